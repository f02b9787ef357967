from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from louver.errors import ConfigError, DataError
from louver.measures.difficulty import Factors, inversion_difficulty, measure_factors, order_agreement
from louver.measures.information import (
    distance_correlation,
    effective_dimensions,
    effective_volume,
    feature_entropy,
    intra_class_radius,
    mutual_information,
)
from louver.measures.mutual import _bound, _bound_terms, _student_quantile

N, C, H, W = 7, 3, 8, 10


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Distance correlation


def naive_distance_correlation(x: Tensor, z: Tensor) -> float:
    n = len(x)
    centered = []
    for batch in (x.double(), z.double()):
        d = np.array([[float((a - b).square().sum().sqrt()) for b in batch] for a in batch])
        centered.append(
            np.array([[d[i, j] - d[i].mean() - d[:, j].mean() + d.mean() for j in range(n)] for i in range(n)])
        )
    a, b = centered
    covariance = sum(a[i, j] * b[i, j] for i in range(n) for j in range(n)) / n**2
    return covariance / math.sqrt((a * a).sum() / n**2 * (b * b).sum() / n**2)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_distance_correlation_is_the_definition(offset):
    x = noise(N, C, H, W)
    z = 0.5 * x[:, :2, ::2].flatten(1)[:, :35] + noise(N, 35, seed=1) + offset
    assert float(distance_correlation(x, z)) == pytest.approx(naive_distance_correlation(x, z), abs=2e-5)
    assert naive_distance_correlation(x, z) < 0.98


def test_distance_correlation_has_no_final_root():
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])
    z = (x - 2).square()
    squared = naive_distance_correlation(x, z)
    assert float(distance_correlation(x, z)) == pytest.approx(squared, abs=1e-6)
    assert 0.1 < squared < 0.9


def test_distance_correlation_sees_neither_scale_shift_nor_rotation():
    x, z = noise(N, C, H, W), noise(N, 5, seed=1)
    turn, _ = torch.linalg.qr(noise(5, 5, seed=2))
    plain = float(distance_correlation(x, z))
    assert float(distance_correlation(x, 1e-6 * z @ turn)) == pytest.approx(plain, abs=1e-5)
    assert float(distance_correlation(x, 1e4 * z - 77)) == pytest.approx(plain, abs=1e-5)


def test_distance_correlation_gradient_is_exact():
    x, z = noise(N, 6, dtype=torch.float64), noise(N, 4, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: distance_correlation(x, values), (z,))
    assert torch.autograd.gradcheck(lambda values: distance_correlation(values, z.detach()), (x.requires_grad_(),))


def test_a_step_against_its_gradient_lowers_distance_correlation():
    x = noise(N, C, H, W)
    z = (x.flatten(1)[:, :30] + 0.1 * noise(N, 30, seed=1)).requires_grad_()
    before = distance_correlation(x, z)
    before.backward()
    assert z.grad is not None
    after = distance_correlation(x, z - 0.5 * z.grad / z.grad.norm())
    assert after.item() < before.item() - 1e-4


@pytest.mark.parametrize("level", [0.0, 0.1, 1234.5])
def test_constant_features_give_zero_and_finite_gradients(level):
    x, z = noise(N, C, H, W), torch.full((N, 4, 2, 3), level, requires_grad=True)
    found = distance_correlation(x, z)
    found.backward()
    assert found.item() == 0
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()


def test_rows_that_coincide_have_finite_gradients():
    x, z = noise(N, C, H, W), noise(N, 11, seed=1)
    z[3] = z[1]
    x[5] = x[4]
    expected = naive_distance_correlation(x, z)
    x.requires_grad_()
    z.requires_grad_()
    found = distance_correlation(x, z)
    found.backward()
    assert found.item() == pytest.approx(expected, abs=1e-5)
    assert torch.isfinite(z.grad).all()
    assert torch.isfinite(x.grad).all()
    assert z.grad.abs().sum() > 0


def test_distance_correlation_is_float32_under_autocast():
    x, z = noise(N, C, H, W) + 5, noise(N, 11, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distance_correlation(x, z)
    assert found.dtype == torch.float32
    assert float(found) == float(distance_correlation(x, z))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_batch_of_one_for_a_correlation_loss(n):
    with pytest.raises(DataError, match=rf"batch of 4 or more, got {n}; .*batch size"):
        distance_correlation(noise(n, C, H, W), noise(n, 5))


def test_batches_of_different_length():
    with pytest.raises(DataError, match="got 7 and 6"):
        distance_correlation(noise(N, C, H, W), noise(6, 5))
    with pytest.raises(DataError, match="got 70 and 60"):
        mutual_information(noise(70, 3), noise(60, 5))


# Mutual information


def gaussians(n: int, d: int, rho: float) -> tuple[Tensor, Tensor, float]:
    x = noise(n, d)
    z = rho * x + math.sqrt(1 - rho**2) * noise(n, d, seed=1)
    return x, z, -0.5 * d * math.log(1 - rho**2)


@pytest.mark.parametrize(("d", "rho", "low", "high"), [(1, 0.7, 0.75, 1.25), (5, 0.8, 0.7, 1.1)])
def test_mutual_information_of_correlated_gaussians(d, rho, low, high):
    x, z, truth = gaussians(1000, d, rho)
    found = mutual_information(x, z, steps=60, seeds=2, learning_rate=2e-2)
    assert low * truth < found.value < high * truth
    assert found.low <= found.value <= found.high
    assert not found.is_saturated


def test_mutual_information_of_independent_rows_is_about_0():
    found = mutual_information(noise(400, C, H, W), noise(400, 6, 3, 2, seed=1), steps=30)
    assert abs(found.value) < 0.05


def test_mutual_information_sees_what_is_not_linear_and_no_scale():
    x = noise(800, 1)
    z = (x.abs() + 0.1 * noise(800, 1, seed=1)) * 1e-4 + 7
    assert mutual_information(x, z, steps=100, seeds=2, learning_rate=1e-2).value > 0.8


def test_mutual_information_of_constant_features_is_0():
    found = mutual_information(noise(100, C, H, W), torch.full((100, 4, 2, 3), 0.1), steps=5)
    assert found.per_seed == (0.0, 0.0, 0.0)


def test_mutual_information_of_a_copy_stops_at_its_ceiling():
    x = noise(100, 30)
    found = mutual_information(x, x, steps=40, learning_rate=2e-2, seeds=2)
    assert found.ceiling == pytest.approx(math.log(20 * 19))
    assert max(found.per_seed) <= found.ceiling


def test_mutual_information_is_told_by_its_seed_and_leaves_chance_alone():
    x, z, _ = gaussians(200, 2, 0.8)
    state = torch.random.get_rng_state()
    first = mutual_information(x, z, steps=8)
    assert torch.equal(state, torch.random.get_rng_state())
    assert mutual_information(x, z, steps=8) == first
    assert mutual_information(x, z, steps=8, seed=10).per_seed != first.per_seed
    assert not z.requires_grad


def test_the_bound_is_donsker_varadhans_over_pairs_that_are_not_true():
    scores = noise(N, N).double()
    false = [math.exp(scores[i, j]) for i in range(N) for j in range(N) if i != j]
    joint, log_mean = _bound_terms(scores)
    assert joint.item() == pytest.approx(np.mean([scores[i, i].item() for i in range(N)]))
    assert log_mean.item() == pytest.approx(math.log(np.mean(false)))
    assert _bound(scores, 1.0, scores.max().item()) == pytest.approx(joint.item() - log_mean.item())


def test_no_single_pair_ruins_the_bound():
    scores = torch.full((40, 40), -9.0)
    scores.fill_diagonal_(2.0)
    plain = _bound(scores, 1.0, 2.0)
    for pair in ((3, 5), (3, 3)):
        odd = scores.clone()
        odd[pair] = 1000.0 if pair == (3, 5) else -1000.0
        assert plain - 6 < _bound(odd, 1.0, 2.0) < plain


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 20])
def test_student_quantile(degrees):
    assert _student_quantile(degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), rel=1e-6)


@pytest.mark.parametrize(
    "knob", [{"seeds": 1}, {"steps": 0}, {"components": 0}, {"decay": 1.0}, {"learning_rate": 0.0}]
)
def test_mutual_information_refuses_knobs(knob):
    with pytest.raises(ConfigError, match="mutual information: expected"):
        mutual_information(noise(60, 3), noise(60, 3), **knob)


@pytest.mark.parametrize(
    "measure",
    [
        lambda z: mutual_information(z, z),
        feature_entropy,
        effective_volume,
        effective_dimensions,
        lambda z: intra_class_radius(z, torch.arange(60) % 2),
    ],
)
def test_broken_features_are_refused(measure):
    z = noise(60, 5)
    z[3, 2] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        measure(z)
    with pytest.raises(DataError, match="rows or more"):
        measure(z[:1])


# Entropy, volume, dimensions, radius


def test_entropy_is_that_of_each_elements_histogram(monkeypatch):
    z = noise(61, C, 4, 5) * torch.linspace(0.01, 50, 5)
    bits = []
    for column in z.flatten(1).T.numpy():
        counts, _ = np.histogram(column, bins=16, range=(column.min(), column.max()))
        bits.append(scipy.stats.entropy(counts, base=2))
    monkeypatch.setattr("louver.measures.information._CHUNK_ELEMENTS", 61 * 7)
    found = feature_entropy(z, bins=16)
    assert found.total_bits == pytest.approx(sum(bits), rel=2e-3)
    assert found.bits_per_element == pytest.approx(found.total_bits / 60)


def test_a_contraction_hides_no_entropy_and_rounding_is_none():
    z = noise(61, 9)
    assert feature_entropy(1e-5 * z).total_bits == pytest.approx(feature_entropy(z).total_bits, rel=1e-3)
    constant = torch.full((61, 9), 1000.0) + 1e-4 * (noise(61, 9) > 0)
    assert feature_entropy(constant).total_bits == 0
    assert feature_entropy((noise(61, 9) > 0).float(), bins=8).bits_per_element == pytest.approx(1, abs=0.1)


def test_effective_volume_counts_what_is_not_zero():
    z = torch.zeros(N, C, H, W)
    z[0, :, 0, 0] = -0.2
    z[1, 0, :, 0] = 5.0
    assert effective_volume(z) == (C + H) / N
    assert effective_volume(z, threshold=1.0) == H / N
    with pytest.raises(ConfigError, match="threshold"):
        effective_volume(z, threshold=-1.0)


@pytest.mark.parametrize("shape", [(50, 6), (6, 50)])
def test_effective_dimensions_is_the_participation_ratio(shape):
    z = noise(*shape) * torch.linspace(1, 5, shape[1])
    eigenvalues = np.linalg.eigvalsh(np.cov(z.double().numpy().T))
    expected = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    assert effective_dimensions(1e-9 * z) == pytest.approx(expected, rel=1e-4)


def test_effective_dimensions_of_lines_and_points():
    line = torch.arange(7.0).unsqueeze(1) * noise(1, 11) + 3
    assert effective_dimensions(line) == pytest.approx(1, abs=1e-4)
    assert effective_dimensions(torch.full((7, 11), 0.1)) == 0


def test_intra_class_radius_is_within_over_total():
    labels = torch.arange(61) % 4 + 10
    z = noise(61, 3, 4) + 2 * noise(20, 3, 4, seed=1)[labels]
    rows = z.double().flatten(1)
    within = sum(
        float((rows[labels == k] - rows[labels == k].mean(0)).square().sum()) for k in labels.unique().tolist()
    )
    total = float((rows - rows.mean(0)).square().sum())
    expected = (within / (61 - 4)) / (total / 60)
    assert intra_class_radius(z, labels) == pytest.approx(expected, rel=1e-4)
    assert intra_class_radius(1e-3 * z + 5, labels) == pytest.approx(expected, rel=1e-3)


def test_intra_class_radius_of_random_classes_is_about_1_and_of_points_0():
    labels = torch.arange(60) // 2
    assert intra_class_radius(noise(60, 200), labels) == pytest.approx(1, abs=0.05)
    assert intra_class_radius(noise(30, 5)[labels], labels) == 0
    assert intra_class_radius(torch.ones(60, 5), labels) == 0


def test_classes_of_one_tell_nothing():
    z, labels = noise(30, 5), torch.arange(30) % 3
    more = torch.cat((z, 100 + noise(2, 5, seed=1)))
    assert intra_class_radius(more, torch.cat((labels, torch.tensor([7, 8])))) == intra_class_radius(z, labels)
    with pytest.raises(DataError, match="every class has one image"):
        intra_class_radius(z, torch.arange(30))
    with pytest.raises(DataError, match="expected 30 labels"):
        intra_class_radius(z, labels[:7])


# The criterion

PLAIN = Factors(mutual_information=4.0, entropy=900.0, volume=300.0)


def test_the_reference_is_not_protected():
    found = inversion_difficulty(PLAIN, PLAIN)
    assert found.protects_by == ()
    assert found.score == 0


@pytest.mark.parametrize("name", ["mutual_information", "entropy", "volume"])
def test_the_factor_that_falls_protects(name):
    values = {"mutual_information": 4.1, "entropy": 880.0, "volume": 300.0}
    values[name] = getattr(PLAIN, name) / 4
    found = inversion_difficulty(Factors(**values), PLAIN)
    assert found.protects_by == (name,)
    assert getattr(found, name) == 0.25
    assert found.score > 0.4


def test_the_strongest_protection_comes_first_and_none_is_infinite():
    found = inversion_difficulty(Factors(mutual_information=-0.1, entropy=90.0, volume=150.0), PLAIN)
    assert found.protects_by == ("mutual_information", "entropy", "volume")
    turned = inversion_difficulty(Factors(mutual_information=3.0, entropy=300.0, volume=20.0), PLAIN)
    assert turned.protects_by == ("volume", "entropy", "mutual_information")
    assert found.mutual_information == 0
    assert found.score == pytest.approx(-(math.log(1e-3) + math.log(0.1) + math.log(0.5)) / 3)


def test_factors_are_measured_and_a_bottleneck_protects():
    x = torch.rand((120, C, H, W), generator=torch.Generator().manual_seed(0))
    wide, narrow = x[:, :, ::2, ::2] - 0.5, torch.relu(x.mean(dim=(2, 3), keepdim=True) - 0.5)
    knobs = {"seeds": 2, "steps": 10}
    plain, funnel = measure_factors(x, wide, **knobs), measure_factors(x, narrow, **knobs)
    found = inversion_difficulty(funnel, plain)
    assert {"entropy", "volume"} <= set(found.protects_by)
    assert measure_factors(x, wide, volume_by="dimensions", **knobs).volume == effective_dimensions(wide)


def test_factors_that_cannot_be_compared():
    other = Factors(mutual_information=4.0, entropy=900.0, volume=30.0, volume_by="dimensions")
    with pytest.raises(ConfigError, match="count both the same way"):
        inversion_difficulty(other, PLAIN)
    with pytest.raises(DataError, match="mutual information is above 0"):
        inversion_difficulty(PLAIN, Factors(mutual_information=0.0, entropy=900.0, volume=300.0))
    with pytest.raises(ConfigError, match="finite"):
        Factors(mutual_information=math.nan, entropy=1.0, volume=1.0)
    with pytest.raises(ConfigError, match="margin"):
        inversion_difficulty(PLAIN, PLAIN, margin=1.0)


def test_order_agreement_is_spearmans_with_less_leakage():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 8, 23).astype(float)
    leakage = -scores + rng.normal(0, 2, 23).round()
    found = order_agreement(scores, leakage)
    assert found.correlation == pytest.approx(scipy.stats.spearmanr(scores, -leakage).statistic)
    assert -1 < found.low < found.correlation < found.high < 1
    exact = scipy.stats.spearmanr(scores, -leakage, alternative="greater").pvalue
    assert found.p_value == pytest.approx(exact, abs=0.01)
    assert found.orders == (found.low > 0)


def test_the_chance_of_few_orders_is_exact():
    scores, leakage = [0.0, 1.0, 2.0, 3.0, 4.0], [9.0, 8.0, 5.0, 6.0, 1.0]
    found = order_agreement(scores, leakage)
    as_good = [
        scipy.stats.spearmanr(scores, order).statistic >= found.correlation - 1e-9
        for order in itertools.permutations(range(5))
    ]
    assert found.correlation == pytest.approx(0.9)
    assert found.p_value == pytest.approx(np.mean(as_good))


def test_order_agreement_says_no():
    assert not order_agreement([0.0, 1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0, 5.0]).orders
    assert order_agreement([0.0, 1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0, 5.0]).correlation == pytest.approx(-1)
    rng = np.random.default_rng(3)
    assert abs(order_agreement(rng.random(40), rng.random(40)).correlation) < 0.4
    # Four splits in perfect order: one of 24, which chance gives often enough; three are refused.
    assert order_agreement([0.0, 1.0, 2.0, 3.0], [4.0, 3.0, 2.0, 1.0]).p_value == pytest.approx(1 / 24)
    with pytest.raises(DataError, match="4 splits or more"):
        order_agreement([0.0, 1.0, 2.0], [2.0, 1.0, 0.0])
    with pytest.raises(DataError, match="equal"):
        order_agreement([1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0])
    with pytest.raises(DataError, match="NaN"):
        order_agreement([1.0, math.nan, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0])
