from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from louver.errors import ConfigError, DataError
from louver.measures.ranking import log_rank_privacy, rank_privacy


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mean_rank(values: list[float], own: int) -> float:
    """How many are above the own value, equal ones at half."""
    return sum(v > values[own] for v in values) + (sum(v == values[own] for v in values) - 1) / 2


def naive_rank_privacy(clean: Tensor, noisy: Tensor, deviation: np.ndarray) -> tuple[float, float]:
    ranks = []
    for i, seen in enumerate(noisy.double().numpy()):
        likelihood = [
            float(scipy.stats.norm.logpdf(seen, loc=u, scale=deviation).sum()) for u in clean.double().numpy()
        ]
        ranks.append(mean_rank(likelihood, i))
    return float(np.mean(ranks)) / len(clean), float(np.mean([rank == 0 for rank in ranks]))


@pytest.mark.parametrize("std", [0.1, 1.0, 3.0])
def test_rank_privacy_is_the_sort_by_likelihood(std, monkeypatch):
    monkeypatch.setattr("louver.measures.ranking._CHUNK_ELEMENTS", 41 * 6)
    clean = noise(41, 4) + 30
    noisy = clean + std * noise(41, 4, seed=1)
    found = rank_privacy(clean, noisy, std)
    privacy, top1 = naive_rank_privacy(clean, noisy, np.full(4, std))
    assert found.privacy == pytest.approx(privacy, abs=1e-12)
    assert found.top1 == pytest.approx(top1, abs=1e-12)
    assert found.ranks.shape == found.hits.shape == (41,)


def test_rank_privacy_with_a_deviation_per_dimension():
    clean, std = noise(41, 4), torch.tensor([0.1, 1.0, 3.0, 0.5])
    noisy = clean + std * noise(41, 4, seed=1)
    found = rank_privacy(clean, noisy, std)
    assert found.privacy == pytest.approx(naive_rank_privacy(clean, noisy, std.double().numpy())[0], abs=1e-12)
    assert found.privacy < rank_privacy(clean, noisy, 1.0).privacy


def test_rank_privacy_goes_from_identified_to_chance():
    clean = noise(300, 3, 2, 2)
    found = [rank_privacy(clean, clean + std * noise(300, 3, 2, 2, seed=1), std) for std in (0.0, 0.5, 2.0, 1000.0)]
    privacies, hits = [f.privacy for f in found], [f.top1 for f in found]
    assert privacies == sorted(privacies)
    assert hits == sorted(hits, reverse=True)
    assert (privacies[0], hits[0]) == (0, 1)
    assert privacies[-1] == pytest.approx(0.5, abs=0.05)


def test_constant_features_are_at_chance():
    constant = torch.full((41, 5), 0.1)
    found = rank_privacy(constant, constant + noise(41, 5), 1.0)
    assert found.privacy == pytest.approx(found.chance)
    assert found.chance == 40 / 82
    assert found.top1 == pytest.approx(1 / 41)


def naive_log_rank(known, groups, seen, wanted, width):
    n_groups, ranks = int(groups.max()) + 1, []
    for row, own in zip(seen.double().numpy(), wanted.tolist(), strict=True):
        density = []
        for k in range(n_groups):
            points = known[groups == k].double().numpy()
            density.append(np.mean([math.exp(-((row - p) ** 2).sum() / (2 * width**2)) for p in points]))
        ranks.append(1 + mean_rank(density, own))
    return float(np.mean(np.log(ranks))) / math.log(n_groups), float(np.mean([rank == 1 for rank in ranks]))


@pytest.mark.parametrize(("bandwidth", "std"), [(0.5, 0.0), (1.0, 0.7)])
def test_log_rank_privacy_is_the_sort_by_density(bandwidth, std, monkeypatch):
    monkeypatch.setattr("louver.measures.ranking._CHUNK_ELEMENTS", 47 * 5)
    centers = noise(6, 3)
    groups, wanted = torch.arange(47) ** 2 % 6, torch.arange(31) % 3
    groups[:6] = torch.arange(6)  # every identity, and of different numbers
    known, seen = centers[groups] + 0.5 * noise(47, 3, seed=1), centers[wanted] + 0.8 * noise(31, 3, seed=2)
    found = log_rank_privacy(known, 10 * groups, seen, 10 * wanted, bandwidth=bandwidth, noise_std=std)
    privacy, top1 = naive_log_rank(known, groups, seen, wanted, math.hypot(bandwidth, std))
    assert found.privacy == pytest.approx(privacy, abs=1e-9)
    assert found.top1 == pytest.approx(top1)
    assert 0 < privacy < found.chance
    assert found.chance == pytest.approx(np.log(np.arange(1, 7)).mean() / math.log(6))


def test_log_rank_privacy_far_away_does_not_underflow():
    groups = torch.arange(40) % 4
    known = 1e3 * groups.unsqueeze(1) + noise(40, 2)
    found = log_rank_privacy(known, groups, known + 1, groups, bandwidth=0.01)
    assert (found.privacy, found.top1) == (0, 1)
    wrong = log_rank_privacy(known, groups, known + 1, 3 - groups, bandwidth=0.01)
    nearest = [[float((known[groups == k] - row - 1).norm(dim=1).min()) for k in range(4)] for row in known]
    ranks = [1 + sum(d < row[3 - g] for d in row) for row, g in zip(nearest, groups.tolist(), strict=True)]
    assert wrong.privacy == pytest.approx(np.log(ranks).mean() / math.log(4))


def test_the_bandwidth_is_that_of_the_best_leave_one_out():
    groups = torch.arange(44) % 7
    known = noise(7, 2)[groups] + 0.6 * noise(44, 2, seed=1)
    nearest = [min(float((a - b).norm()) for j, b in enumerate(known) if j != i) for i, a in enumerate(known)]
    found = {}
    for factor in (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0):
        width = factor * sorted(nearest)[21]
        logs = []
        for i in range(44):
            rest = torch.arange(44) != i
            privacy, _ = naive_log_rank(known[rest], groups[rest], known[i : i + 1], groups[i : i + 1], width)
            logs.append(privacy)
        found[width] = np.mean(logs)
    chosen = log_rank_privacy(known, groups, known, groups).bandwidth
    assert max(found.values()) > min(found.values()) + 0.02
    assert chosen == pytest.approx(min(found, key=found.__getitem__), rel=1e-5)


def test_the_bandwidth_is_chosen_for_the_attacker():
    centers = noise(8, 5)
    groups, wanted = torch.arange(80) % 8, torch.arange(64) % 8
    known, seen = centers[groups] + 0.4 * noise(80, 5, seed=1), centers[wanted] + 0.4 * noise(64, 5, seed=2)
    chosen = log_rank_privacy(known, groups, seen, wanted)
    assert chosen.privacy <= log_rank_privacy(known, groups, seen, wanted, bandwidth=50.0).privacy + 0.01
    assert chosen.privacy < 0.5 * chosen.chance
    assert 0.05 < chosen.bandwidth < 10


def test_identities_of_one_known_feature_count_when_they_are_seen():
    known, groups = torch.tensor([[0.0], [0.1], [5.0]]), torch.tensor([0, 0, 1])
    found = log_rank_privacy(known, groups, torch.tensor([[4.9]]), torch.tensor([1]))
    assert found.privacy == 0


def test_features_that_say_nothing_are_at_chance():
    groups = torch.arange(200) % 10
    told = log_rank_privacy(noise(200, 3), groups, noise(200, 3, seed=1), groups)
    assert told.privacy == pytest.approx(told.chance, abs=0.08)
    assert told.chance == pytest.approx(0.656, abs=1e-3)
    constant = torch.full((200, 3), 0.1)
    tied = log_rank_privacy(constant, groups, constant, groups)
    assert tied.privacy == pytest.approx(math.log(5.5) / math.log(10))
    assert tied.top1 == pytest.approx(0.1)


def test_bad_input():
    z, groups = noise(8, 3), torch.arange(8) % 2
    with pytest.raises(DataError, match="noisy point for each"):
        rank_privacy(z, z[:5], 1.0)
    with pytest.raises(DataError, match="2 rows or more"):
        rank_privacy(z[:1], z[:1], 1.0)
    with pytest.raises(DataError, match="NaN"):
        rank_privacy(z, z / 0, 1.0)
    with pytest.raises(ConfigError, match="0 or more"):
        rank_privacy(z, z, -1.0)
    with pytest.raises(ConfigError, match="one positive deviation"):
        rank_privacy(z, z, torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(DataError, match="unknown ones"):
        log_rank_privacy(z, groups, z, groups + 1)
    with pytest.raises(DataError, match="2 identities"):
        log_rank_privacy(z, groups * 0, z, groups * 0)
    with pytest.raises(DataError, match="no identity has two"):
        log_rank_privacy(z, torch.arange(8), z, torch.arange(8))
    with pytest.raises(DataError, match="width 3 are known, 2"):
        log_rank_privacy(z, groups, z[:, :2], groups)
    with pytest.raises(DataError, match="expected an identity"):
        log_rank_privacy(z, groups[:5], z, groups)
    with pytest.raises(ConfigError, match="bandwidth"):
        log_rank_privacy(z, groups, z, groups, bandwidth=0.0)
