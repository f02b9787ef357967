from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from louver.errors import AttackError, ConfigError, DataError
from louver.probes import LinearProbe, NeighborProbe, Probe, TailProbe, completion, learned_metric, probe, reidentify
from louver.probes.base import standardized
from louver.probes.completion import _drawn, _half_width
from louver.probes.identity import _searched
from louver.probes.linear import logistic
from louver.probes.neighbor import votes
from louver.probes.tail import scores_of, tail_of

completion_module = importlib.import_module("louver.probes.completion")
tail_module = importlib.import_module("louver.probes.tail")

SIZES = {"train": 240, "validation": 90, "test": 110}
PROBES: dict[str, Probe] = {
    "linear": LinearProbe(),
    "neighbor": NeighborProbe(),
    "tail": TailProbe(epochs=6, learning_rate=3e-3),
}


def world(*, keeps_private: bool, seed: int = 0, n_classes: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Features (n, 3, 8, 10) made of noise and, in one channel, a pattern of the private label that can be left out."""
    rng = torch.Generator().manual_seed(seed)
    patterns = torch.randn(n_classes, 8, 10, generator=rng)
    features, labels = {}, {}
    for role, n in SIZES.items():
        y = torch.randint(n_classes, (n,), generator=rng)
        x = 0.3 * torch.randn(n, 3, 8, 10, generator=rng)
        if keeps_private:
            x[:, 1] += patterns[y]
        features[role], labels[role] = x, y
    return features, labels


def accuracy_of(one: Probe, x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> float:
    return probe([one], x, y)[0].accuracy


class Cloud(nn.Module):
    """A cloud half with batch normalization, whose modules are not declared in the order they are called in."""

    def __init__(self, n_classes: int = 5) -> None:
        super().__init__()
        self.head = nn.Linear(7, n_classes)
        self.inner = nn.Linear(6, 7)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().amax((2, 3))
        return self.head(self.inner(x).relu())


class Squeezed(nn.Module):
    """A cloud half whose only Linear sits in an attention gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(3, 3)
        self.out = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x * self.gate(x.mean((2, 3)))[:, :, None, None]).mean((2, 3))


# Whether a label is there


@pytest.mark.parametrize("name", PROBES)
def test_present_label_is_found(name: str) -> None:
    found = probe([PROBES[name]], *world(keeps_private=True))[0]
    assert found.probe == name
    assert found.accuracy > 0.95
    assert found.beats_chance
    assert found.low <= found.accuracy <= found.high
    assert (found.n, found.n_classes, found.uniform_chance) == (110, 3, pytest.approx(1 / 3))
    assert found.correct.shape == (110,)
    assert found.correct.mean() == pytest.approx(found.accuracy)
    assert found.seconds > 0


def test_pictures_may_be_learned_from_in_bfloat16() -> None:
    """One level of 255 more in one color, below noise of four, is about the least that a picture can show."""
    rng = np.random.default_rng(4)
    pixels, label = rng.integers(200, 205, (400, 3, 12, 16)), rng.integers(0, 3, 400)
    pixels[np.arange(400), label] += 1
    pictures = torch.from_numpy((pixels / 255).astype(np.float32))
    parts = {"train": slice(0, 260), "validation": slice(260, 300), "test": slice(300, 400)}
    shown = {role: pictures[rows] for role, rows in parts.items()}
    found = probe([TailProbe(is_half=True)], shown, {role: label[rows] for role, rows in parts.items()})[0]
    assert found.accuracy > 0.9


@pytest.mark.parametrize("name", PROBES)
def test_removed_label_falls_to_chance(name: str) -> None:
    found = probe([PROBES[name]], *world(keeps_private=False))[0]
    assert not found.beats_chance
    assert found.low <= found.uniform_chance <= found.high


def test_results_are_the_same_again() -> None:
    x, y = world(keeps_private=False)
    wide = LinearProbe(ridges=(1e-2,), width=50)
    probes = [wide, NeighborProbe(), TailProbe(epochs=2)]
    first, again = (probe(probes, x, y, seed=3) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.correct, b.correct)


def test_tail_of_the_cloud_finds_what_is_there() -> None:
    torch.manual_seed(0)
    x, y = world(keeps_private=True)
    assert accuracy_of(TailProbe(cloud=Cloud(), epochs=12, learning_rate=1e-2), x, y) > 0.9


def hidden(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=rng, dtype=torch.float64)).Q
    x, y = {}, {}
    for role, n in SIZES.items():
        label = torch.randint(2, (n,), generator=rng)
        rows = torch.randn(n, 24, generator=rng, dtype=torch.float64)
        rows[:, 5] = 1e-4 * ((2 * label - 1) + 0.2 * torch.randn(n, generator=rng, dtype=torch.float64))
        if kind == "rotated":
            rows = rows @ rotation
        if kind == "wide":
            rows = torch.cat([rows, torch.randn(n, 1400, generator=rng, dtype=torch.float64)], 1)
        x[role], y[role] = rows.float(), label
    return x, y


@pytest.mark.parametrize("kind", ["column", "rotated", "wide"])
def test_linear_probe_finds_a_label_hidden_at_a_ten_thousandth(kind: str) -> None:
    assert accuracy_of(LinearProbe(), *hidden(kind)) > 0.95


def test_wide_features_keep_a_direction_of_all_columns() -> None:
    # The label is on no single column, but on a direction of all of them.
    rng = torch.Generator().manual_seed(2)
    direction = torch.randn(1500, generator=rng).sign() / 1500**0.5
    x, y = {}, {}
    for role, n in SIZES.items():
        y[role] = torch.randint(2, (n,), generator=rng)
        x[role] = 0.3 * torch.randn(n, 1500, generator=rng) + 2.5 * (2 * y[role] - 1)[:, None] * direction
    assert accuracy_of(LinearProbe(width=40), x, y) > 0.95


def test_linear_probe_reads_channel_means_from_few_rows() -> None:
    rng = torch.Generator().manual_seed(3)
    x, y = {}, {}
    for role, n in SIZES.items():
        y[role] = torch.randint(2, (n,), generator=rng)
        x[role] = torch.randn(n, 7, 8, 10, generator=rng)
        x[role][:, 2] += 0.2 * (2 * y[role] - 1)[:, None, None]
    flat = {role: rows.flatten(1) for role, rows in x.items()}
    assert accuracy_of(LinearProbe(), x, y) > max(0.92, accuracy_of(LinearProbe(), flat, y) + 0.05)


# Against oracles


@pytest.mark.parametrize("ridge", [1e-3, 0.2])
@pytest.mark.parametrize("n_classes", [2, 4])
def test_logistic_is_scikit_learns(ridge: float, n_classes: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(97, 11)) @ rng.normal(size=(11, 11))
    y = (x @ rng.normal(size=(11, n_classes)) + 3 * rng.normal(size=(97, n_classes))).argmax(1)
    weight, bias = logistic(torch.from_numpy(x), torch.from_numpy(y), ridge=ridge, n_classes=n_classes, iterations=300)
    # With two classes scikit-learn has one weight, the difference of two opposite ones: twice the ridge for it.
    strength = 1 / (97 * ridge) * (2 if n_classes == 2 else 1)
    oracle = LogisticRegression(C=strength, tol=1e-10, max_iter=5000).fit(x, y)
    np.testing.assert_allclose(
        torch.softmax(torch.from_numpy(x) @ weight + bias, 1).numpy(), oracle.predict_proba(x), atol=1e-4
    )
    if n_classes > 2:
        np.testing.assert_allclose(weight.T.numpy(), oracle.coef_, atol=1e-3)


@pytest.mark.parametrize("count", [1, 5, 9])
def test_neighbors_are_scikit_learns(count: int) -> None:
    rng = torch.Generator().manual_seed(count)
    x = {role: torch.randn(n, 13, generator=rng) * torch.logspace(-3, 3, 13) + 5 for role, n in SIZES.items()}
    y = {
        role: (rows[:, 0] * 1e3 + rows[:, 4] + torch.randn(len(rows), generator=rng) > 0).long()
        for role, rows in x.items()
    }
    mean, deviation = x["train"].mean(0), x["train"].std(0, correction=0)
    scaled = {role: ((rows - mean) / deviation).numpy() for role, rows in x.items()}
    fits = [
        KNeighborsClassifier(count, metric=metric, algorithm="brute").fit(scaled["train"], y["train"])
        for metric in ("cosine", "euclidean")
    ]
    best = max(fits, key=lambda fit: fit.score(scaled["validation"], y["validation"]))
    given = (x["train"], y["train"], x["validation"], y["validation"], x["test"])
    found = NeighborProbe(counts=(count,)).fit_predict(*given, n_classes=2, seed=0, device="cpu")
    np.testing.assert_array_equal(found.numpy(), best.predict(scaled["test"]))


@pytest.mark.parametrize("kind", ["angle", "length"])
def test_distance_that_fits_is_chosen(kind: str) -> None:
    rng = torch.Generator().manual_seed(4)
    x, y = {}, {}
    for role, n in SIZES.items():
        y[role] = torch.randint(2, (n,), generator=rng)
        direction = torch.nn.functional.normalize(torch.randn(n, 3, generator=rng))
        length = torch.exp(1.5 * torch.randn(n, 1, generator=rng))
        if kind == "length":
            length = 1.0 + 2 * y[role][:, None]
        else:
            y[role] = (direction[:, 0] * direction[:, 1] > 0).long()
        x[role] = direction * length
    metric = {"angle": "cosine", "length": "euclidean"}[kind]
    mean, deviation = x["train"].mean(0), x["train"].std(0, correction=0)
    fit = KNeighborsClassifier(5, metric=metric, algorithm="brute").fit((x["train"] - mean) / deviation, y["train"])
    expected = fit.score((x["test"] - mean) / deviation, y["test"])
    assert accuracy_of(NeighborProbe(counts=(5,)), x, y) == pytest.approx(expected)


def test_votes_go_to_most_then_to_nearer() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, size=(200, 6))
    expected = []
    for row in labels.tolist():
        order = sorted(range(4), key=lambda c: (-row.count(c), sum(i for i, v in enumerate(row) if v == c), c))
        expected.append(order[0])
    assert votes(torch.from_numpy(labels), 4).tolist() == expected


def test_more_neighbors_than_rows_are_all_of_them() -> None:
    x, y = world(keeps_private=True)
    x["train"], y["train"] = x["train"][:12], y["train"][:12]
    assert accuracy_of(NeighborProbe(counts=(50,)), x, y) < 0.7
    assert accuracy_of(NeighborProbe(counts=(1, 50)), x, y) > 0.95


def test_standardized_columns() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(31, 2, 3, generator=rng)
    x[:, 0, 0] = 0.1
    x[:, 1, 2] = 1000 + 1e-2 * x[:, 1, 2]
    rows, other = standardized(x, x[:7] + 1)
    assert rows.mean(0).abs().max() < 1e-6
    np.testing.assert_allclose(rows.std(0, correction=0).numpy(), [0, 1, 1, 1, 1, 1], atol=1e-6)
    assert other[:, 0].abs().max() == 0
    assert other.shape == (7, 6)


# Judging


@dataclass(frozen=True)
class Fixed:
    """Answers what it was given, whatever it sees."""

    answer: object
    name: str = "fixed"

    def fit_predict(self, *_: Tensor, n_classes: int, seed: int, device: torch.device | str) -> Tensor:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[return-value]


def small(labels: list[int] | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    y = torch.tensor(labels or [40, 7, 7, -3, 7, 40, -3, 7])
    return {role: torch.randn(len(y), 4) for role in SIZES}, dict.fromkeys(SIZES, y)


def test_figures_are_counted_as_by_hand() -> None:
    x, y = small()
    # In order the classes are -3, 7, 40; the rows are 40 7 7 -3 7 40 -3 7.
    found = probe([Fixed(torch.tensor([2, 1, 0, 0, 1, 1, 0, 2]))], x, y)[0]
    assert found.correct.tolist() == [1, 1, 0, 1, 1, 0, 1, 0]
    assert (found.accuracy, found.chance, found.n_classes) == (5 / 8, 4 / 8, 3)


def test_chance_is_the_class_commonest_in_training() -> None:
    x, y = small([0, 0, 0, 1, 1, 0, 0, 1])
    y["test"] = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0])
    found = probe([Fixed(torch.ones(8, dtype=torch.long))], x, y)[0]
    assert (found.accuracy, found.chance, found.uniform_chance) == (6 / 8, 2 / 8, 1 / 2)


def test_same_answer_to_all_is_luck_however_the_classes_shift() -> None:
    x, y = small([0] * 30 + [1] * 10)
    y["test"] = 1 - y["test"]
    found = probe([Fixed(torch.ones(40, dtype=torch.long))], x, y)[0]
    assert (found.accuracy, found.chance, found.luck) == (30 / 40, 10 / 40, 30 / 40)
    assert not found.beats_chance
    assert not found.is_informative


def test_answers_below_the_majority_can_still_tell() -> None:
    x, y = small([0] * 80 + [1] * 20)
    answers = torch.tensor([0] * 55 + [1] * 25 + [1] * 19 + [0])
    found = probe([Fixed(answers)], x, y)[0]
    assert found.accuracy < found.chance
    assert found.is_informative
    assert not found.beats_chance


def test_luck_is_the_mean_over_shuffled_answers() -> None:
    rng = np.random.default_rng(0)
    x, y = small(rng.choice(3, size=60, p=[0.6, 0.3, 0.1]).tolist())
    answers = rng.choice(3, size=60, p=[0.3, 0.5, 0.2])
    found = probe([Fixed(torch.from_numpy(answers))], x, y)[0]
    shuffled = [(rng.permutation(answers) == y["test"].numpy()).mean() for _ in range(4000)]
    assert found.luck == pytest.approx(np.mean(shuffled), abs=4 * np.std(shuffled) / 4000**0.5)


def test_noise_seldom_beats_chance() -> None:
    n_beaten = 0
    for seed in range(40):
        rng = torch.Generator().manual_seed(seed)
        x = {role: torch.randn(n, 5, generator=rng) for role, n in SIZES.items()}
        y = {role: torch.randint(3, (n,), generator=rng) for role, n in SIZES.items()}
        found = probe([NeighborProbe()], x, y, resamples=400)[0]
        n_beaten += found.is_informative + found.beats_chance
    assert n_beaten <= 4


@pytest.mark.parametrize(
    "answer",
    [
        torch.full((8,), torch.nan),
        torch.zeros(7, dtype=torch.long),
        torch.full((8,), 3),
        torch.full((8,), -1),
        [0] * 8,
        RuntimeError("out of order"),
        KeyError("gone"),
    ],
)
def test_broken_probe_is_an_error(answer: object) -> None:
    x, y = small()
    with pytest.raises(AttackError, match="fixed"):
        probe([LinearProbe(), Fixed(answer)], x, y)


def test_diverging_tail_is_an_error() -> None:
    x, y = world(keeps_private=True)
    broken = Cloud()
    with torch.no_grad():
        broken.conv.weight.fill_(torch.nan)
    with pytest.raises(AttackError, match="loss became nan"):
        probe([TailProbe(cloud=broken, epochs=1)], x, y)


def test_unknown_classes_are_named() -> None:
    x, y = small()
    y["test"] = torch.tensor([40, 7, 7, -3, 7, 41, 2, 7])
    with pytest.raises(DataError, match=r"test: classes that train does not know: c, 41;.*reidentify"):
        probe([Fixed(torch.zeros(8, dtype=torch.long))], x, y, classes=["a", "b", "c"])


def test_bad_input_is_refused() -> None:
    x, y = small()
    zero = [Fixed(torch.zeros(8, dtype=torch.long))]
    with pytest.raises(DataError, match="validation missing"):
        probe(zero, {role: x[role] for role in ("train", "test")}, y)
    with pytest.raises(DataError, match="test: expected finite"):
        probe(zero, x | {"test": x["test"] / 0}, y)
    with pytest.raises(DataError, match="train: expected 8 integer labels"):
        probe(zero, x, y | {"train": y["train"][:5]})
    with pytest.raises(DataError, match="integer labels"):
        probe(zero, x, y | {"train": y["train"].float()})
    with pytest.raises(DataError, match=r"test: expected features of shape \(4,\)"):
        probe(zero, x | {"test": torch.zeros(8, 5)}, y)
    with pytest.raises(DataError, match="2 classes or more"):
        probe(zero, x, dict.fromkeys(SIZES, torch.full((8,), 4)))
    with pytest.raises(DataError, match="n of 1 or more"):
        probe(zero, x | {"test": torch.zeros(0, 4)}, y)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LinearProbe(ridges=()),
        lambda: LinearProbe(ridges=(0.0,)),
        lambda: LinearProbe(width=1),
        lambda: NeighborProbe(counts=(0, 3)),
        lambda: TailProbe(epochs=0),
        lambda: TailProbe(learning_rate=0.0),
        lambda: completion(None, {}, {}, repeats=1),
        lambda: completion(None, {}, {}, counts=()),
        lambda: completion(None, {}, {}, steps=0),
        lambda: reidentify(torch.zeros(4, 2), torch.arange(4), resamples=5),
    ],
)
def test_bad_knobs_are_refused(make) -> None:
    with pytest.raises(ConfigError, match="expected"):
        make()


# The tail


def test_tail_is_a_copy_with_another_last_layer() -> None:
    cloud = Cloud().train()
    cloud.requires_grad_(False)
    before = copy.deepcopy(cloud.state_dict())
    x = torch.randn(5, 3, 8, 10)
    tail = tail_of(cloud, x, n_classes=4, seed=0)
    assert tail is not None
    assert tail.head.weight.shape == (4, 7)
    assert torch.equal(tail.inner.weight, cloud.inner.weight)
    assert all(parameter.requires_grad for parameter in tail.parameters())
    assert tail(x).shape == (5, 4)
    roles = {"train": x, "validation": x, "test": x}
    probe([TailProbe(cloud=cloud, epochs=2)], roles, dict.fromkeys(roles, torch.tensor([0, 1, 1, 0, 2])))
    assert cloud.training
    assert not any(parameter.requires_grad for parameter in cloud.parameters())
    assert all(torch.equal(before[name], value) for name, value in cloud.state_dict().items())


def test_fresh_tail_forgets_everything_and_scales_its_input() -> None:
    cloud, x = Cloud(), 1e-4 * torch.randn(9, 3, 8, 10) + 3
    tail = tail_of(cloud, x, n_classes=4, seed=0, is_fresh=True)
    assert tail is not None
    assert not torch.equal(tail[1].inner.weight, cloud.inner.weight)
    assert not torch.equal(tail[1].conv.weight, cloud.conv.weight)
    seen = tail[0](x)
    np.testing.assert_allclose(seen.std((0, 2, 3), correction=0).detach().numpy(), 1, atol=1e-3)


@pytest.mark.parametrize(
    "cloud", [Squeezed(), nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())]
)
def test_cloud_without_a_last_linear_leaves_it_to_the_small_network(cloud: nn.Module) -> None:
    x, y = world(keeps_private=True)
    assert tail_of(cloud, x["train"], n_classes=6, seed=0) is None
    assert accuracy_of(TailProbe(cloud=cloud, epochs=6, learning_rate=3e-3), x, y) > 0.95


def test_flat_features_have_a_small_network_too() -> None:
    x, y = world(keeps_private=True)
    assert accuracy_of(TailProbe(epochs=6), {role: rows.flatten(1) for role, rows in x.items()}, y) > 0.95


def test_features_of_another_cut_are_refused() -> None:
    x, y = world(keeps_private=True)
    with pytest.raises(DataError, match=r"does not take features of shape \(2, 8, 10\)"):
        probe([TailProbe(cloud=Cloud())], {role: rows[:, :2] for role, rows in x.items()}, y)


def test_a_score_does_not_depend_on_its_neighbors_in_the_batch() -> None:
    x = torch.randn(9, 3, 8, 10)
    tail = tail_of(Cloud(), x, n_classes=4, seed=0)
    assert tail is not None
    y = torch.arange(9) % 4
    tail_module.train_tail(
        tail, x, y, epochs=2, batch_size=4, learning_rate=1e-3, seed=0, device="cpu", learns_statistics=True
    )
    np.testing.assert_allclose(scores_of(tail, x, "cpu")[:2], scores_of(tail, x[:2], "cpu"), atol=1e-5)


def test_epoch_is_chosen_on_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    x = {role: torch.eye(3).repeat(n // 3, 1) for role, n in SIZES.items()}
    y = {role: rows.argmax(1) for role, rows in x.items()}

    def planted(tail: nn.Module, *_: Tensor, after_epoch, **__: object) -> None:
        for weight in (torch.zeros(3, 3), torch.eye(3), -torch.eye(3)):
            with torch.no_grad():
                tail.weight.copy_(weight)
                tail.bias.zero_()
            after_epoch()

    monkeypatch.setattr(tail_module, "train_tail", planted)
    assert accuracy_of(TailProbe(cloud=nn.Linear(3, 3)), x, y) == 1.0


# Identities


def naive(x: np.ndarray, identity: list[int], camera: list[int] | None) -> tuple[list[float], list[float]]:
    x = (x - x.mean(0)) / x.std(0)
    hits, chances = [], []
    for i in range(len(x)):
        best, right, candidates, matches = -2.0, False, 0, 0
        for j in range(len(x)):
            if j == i or (camera is not None and camera[i] == camera[j] and identity[i] == identity[j]):
                continue
            candidates += 1
            matches += identity[i] == identity[j]
            cosine = x[i] @ x[j] / math.sqrt((x[i] @ x[i]) * (x[j] @ x[j]))
            if cosine > best:
                best, right = cosine, identity[i] == identity[j]
        hits.append(float(right) if matches else math.nan)
        chances.append(matches / candidates if matches else math.nan)
    return hits, chances


@pytest.mark.parametrize("has_cameras", [False, True])
def test_reidentification_is_the_naive_one(has_cameras: bool) -> None:
    rng = np.random.default_rng(5)
    identity = rng.integers(0, 9, size=60)
    identity[0] = 99
    camera = rng.integers(0, 2, size=60) if has_cameras else None
    x = rng.normal(size=(100, 6))[identity] + 0.7 * rng.normal(size=(60, 6))
    found = reidentify(torch.from_numpy(x).float(), identity, camera)
    hits, chances = naive(x, identity.tolist(), None if camera is None else camera.tolist())
    np.testing.assert_array_equal(found.correct, hits)
    np.testing.assert_allclose(found.chances, chances)
    assert found.accuracy == pytest.approx(np.nanmean(hits))
    assert found.chance == pytest.approx(np.nanmean(chances))
    assert found.n_skipped == np.isnan(hits).sum() >= 1
    assert found.n_queries + found.n_skipped == 60
    assert found.low <= found.accuracy <= found.high
    assert found.beats_chance


def identified(n_identities: int, *, seed: int, width: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Six pictures of each identity: four columns tell it, the others vary far more and say nothing of it."""
    generator = torch.Generator().manual_seed(seed)
    identity = torch.arange(n_identities).repeat_interleave(6)
    x = torch.randn(len(identity), width, generator=generator)
    x[:, :4] = torch.randn(n_identities, 4, generator=generator)[identity] + 0.2 * x[:, :4]
    mix = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(1)))[0]
    scale = torch.ones(width)
    scale[4:] = 4.0
    return (x * scale) @ mix, identity


def test_a_learned_metric_knows_identities_that_it_has_never_seen() -> None:
    known, known_of = identified(40, seed=1)
    new, new_of = identified(12, seed=2)
    (seen,) = learned_metric(known, known_of, new)
    plain, learned = reidentify(new, new_of), reidentify(seen, new_of, is_scaled=True)
    assert plain.accuracy < 0.4
    assert learned.accuracy > 0.8
    (again,) = learned_metric(1e-4 * known + 7, known_of, 1e-4 * new + 7)
    assert reidentify(again, new_of, is_scaled=True).accuracy == pytest.approx(learned.accuracy, abs=0.05)


def test_a_learned_metric_finds_nothing_in_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    known, new = (torch.randn(n, 3, 4, 5, generator=generator) for n in (120, 72))
    (seen,) = learned_metric(known, torch.arange(20).repeat_interleave(6), new)
    assert not reidentify(seen, torch.arange(12).repeat_interleave(6), is_scaled=True).beats_chance
    (still,) = learned_metric(0 * known, torch.arange(20).repeat_interleave(6), new)
    assert bool(still.isfinite().all())
    with pytest.raises(DataError, match="10 identities or more"):
        learned_metric(known, torch.arange(120), new)


def test_features_that_say_nothing_get_chance() -> None:
    identity = torch.arange(12).repeat_interleave(4)
    constant = reidentify(torch.ones(48, 3, 2, 2), identity)
    assert constant.accuracy == pytest.approx(constant.chance) == pytest.approx(3 / 47)
    noise = reidentify(torch.randn(48, 9, generator=torch.Generator().manual_seed(0)), identity)
    assert not constant.beats_chance
    assert not noise.beats_chance
    assert noise.low <= noise.chance <= noise.high


def test_a_tie_up_to_rounding_is_shared() -> None:
    angles = torch.tensor([0.0, 0.0, 6e-4, 1.0])
    rows = torch.stack([angles.cos(), angles.sin()], 1)
    hit, chance = _searched(rows, torch.arange(4), torch.tensor([0, 0, 1, 1]), None)
    np.testing.assert_allclose(hit, [1 / 2, 1 / 2, 0, 1])
    np.testing.assert_allclose(chance, 1 / 3)


def test_interval_is_over_identities() -> None:
    # Half the identities are found always, half never: the rows of one tell the same, so 6 are no 60.
    identity = torch.arange(6).repeat_interleave(10)
    x = torch.randn(60, 64, generator=torch.Generator().manual_seed(0))
    x[:30] += 4 * torch.randn(6, 64, generator=torch.Generator().manual_seed(1))[identity[:30]]
    found = reidentify(x, identity)
    share = found.accuracy
    assert 0.4 < share < 0.75
    assert found.high - found.low > 2 * 2 * 1.96 * math.sqrt(share * (1 - share) / 60) / 1.5


def test_reidentification_refuses_what_it_cannot_judge() -> None:
    with pytest.raises(DataError, match="2 identities or more"):
        reidentify(torch.randn(5, 3), torch.arange(5))
    with pytest.raises(DataError, match="different cameras"):
        reidentify(torch.randn(6, 3), torch.arange(6) // 2, torch.zeros(6, dtype=torch.long))
    with pytest.raises(DataError, match="6 integer identities"):
        reidentify(torch.randn(6, 3), torch.arange(5))
    with pytest.raises(DataError, match="finite"):
        reidentify(torch.full((6, 3), torch.nan), torch.arange(6) // 2)


# Completion


def test_completion_rises_with_examples_and_falls_to_chance_without_information() -> None:
    x, y = world(keeps_private=True)
    x = {role: rows + torch.randn(rows.shape, generator=torch.Generator().manual_seed(9)) for role, rows in x.items()}
    few, many = completion(Cloud(), x, y, counts=(2, 60), repeats=2, steps=40, learning_rate=1e-2)
    assert (few.count, few.n_labels, many.n_labels, many.n) == (2, 6, 180, 110)
    assert many.accuracy > few.accuracy + 0.1
    assert len(many.repeats) == 2
    assert many.low <= many.accuracy <= many.high
    assert many.accuracy == pytest.approx(np.mean(many.repeats))
    (nothing,) = completion(None, *world(keeps_private=False), counts=(20,), repeats=3, steps=20)
    assert abs(nothing.accuracy - 1 / 3) < 0.12


@pytest.mark.parametrize("keeps_weights", [False, True])
def test_completion_starts_from_nothing_unless_told(keeps_weights: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = world(keeps_private=True)
    cloud, starts = Cloud(), []

    def spied(tail: nn.Module, rows: Tensor, labels: Tensor, *, learns_statistics: bool, **_: object) -> None:
        starts.append((tail.state_dict(), rows, labels, learns_statistics))

    monkeypatch.setattr(completion_module, "train_tail", spied)
    completion(cloud, x, y, counts=(4,), repeats=2, keeps_weights=keeps_weights)
    (first, rows, labels, learns_statistics), (second, other_rows, _, _) = starts
    knows = [torch.equal(value, cloud.conv.weight) for name, value in first.items() if name.endswith("conv.weight")]
    assert knows == [keeps_weights]
    assert learns_statistics is not keeps_weights
    assert torch.bincount(labels).tolist() == [4, 4, 4]
    assert not torch.equal(rows, other_rows)
    head = next(name for name in first if name.endswith("head.weight"))
    assert not torch.equal(first[head], second[head])


def test_drawn_examples_are_of_each_class_and_differ_by_seed() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 2, 2, 1])
    rows = _drawn(labels, 3, 2, 0)
    assert torch.bincount(labels[rows]).tolist() == [2, 2, 2]
    assert len(set(rows.tolist())) == 6
    assert any(_drawn(labels, 3, 2, seed).tolist() != rows.tolist() for seed in range(1, 5))


@pytest.mark.parametrize("n", [2, 3, 11, 12, 40])
def test_interval_over_repeats_is_students(n: int) -> None:
    shares = np.random.default_rng(n).random(n)
    expected = student.ppf(0.975, n - 1) * shares.std(ddof=1) / math.sqrt(n)
    assert _half_width(shares.tolist()) == pytest.approx(expected, rel=1e-3)


def test_completion_refuses_a_class_with_too_few_examples() -> None:
    x, y = world(keeps_private=True)
    y["train"][y["train"] == 2] = 1
    y["train"][:4] = 2
    with pytest.raises(DataError, match="expected 5 examples of each class, got 4 of truck"):
        completion(None, x, y, counts=(2, 5), classes=["car", "bus", "truck"])
    with pytest.raises(DataError, match="test missing"):
        completion(None, {"train": x["train"]}, y)
