"""The baselines: what each adds, that it is measured, that it comes back from a file, that its gradient protects."""

import copy

import numpy as np
import pytest
import torch
from test_siftfunnel import cut_victim, images_of, tensor_of, victim
from torch import nn

from louver.cut import split as cut_at
from louver.defenses.base import Batch
from louver.defenses.baselines import (
    AddedNoise,
    AdversarialTraining,
    Bottleneck,
    FeatureDropout,
    NoDefense,
    NoPeek,
)
from louver.errors import ConfigError, DataError
from louver.stochastic import silenced

ALL = [
    NoDefense(),
    AddedNoise(std=0.3),
    AddedNoise(std=0.3, kind="laplace"),
    FeatureDropout(rate=0.4),
    NoPeek(weight=1.5),
    AdversarialTraining(width=8),
    Bottleneck(channels=5),
]
NAMES = [repr(defense) for defense in ALL]


def batch_of(found, n: int = 24) -> Batch:
    x = tensor_of(n)
    features = found.edge(x)
    return Batch(images=x, features=features, outputs=found.cloud(features), targets=torch.arange(n) % 3)


@pytest.mark.parametrize("at", ["3", "7"])
@pytest.mark.parametrize("defense", ALL, ids=NAMES)
def test_a_baseline_leaves_the_split_alone_and_comes_back_from_its_state(defense, at) -> None:
    base = cut_victim(at)
    before = copy.deepcopy(base.state_dict())
    found = defense.operate(base, images_of(), torch.zeros(60), seed=0)
    found = defense.finish(found, images_of(), torch.zeros(60), seed=0)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    again = defense.rebuild(base, found.state_dict())
    again.load_state_dict(found.state_dict())
    assert again.cut.feature_shape == found.cut.feature_shape
    x = tensor_of(7)
    answers = []
    for each in (found, again):
        torch.manual_seed(3)
        answers.append(each(x))
    assert torch.equal(*answers)
    assert not any(module.training for half in (found.edge, found.cloud) for module in half.modules())


@pytest.mark.parametrize("defense", [NoDefense(), NoPeek(), AdversarialTraining(), Bottleneck(channels=12)])
def test_a_baseline_that_takes_nothing_away_keeps_computing(defense) -> None:
    base = cut_victim()
    found = defense.operate(base, images_of(), torch.zeros(60), seed=0)
    assert torch.allclose(found(tensor_of(7)), victim()(tensor_of(7)), atol=1e-4)


def test_a_bottleneck_starts_at_the_best_linear_one() -> None:
    base, images = cut_victim(), images_of()
    features = base.edge(tensor_of()).detach()
    rows = features.transpose(0, 1).flatten(1).T
    centered = (rows - rows.mean(0)).double()
    lost = torch.linalg.svdvals(centered)[4:].square().sum() / centered.numel()
    found = Bottleneck(channels=4).operate(base, images, torch.zeros(60), seed=0)
    assert found.cut.feature_shape == (4, 8, 10)
    back = found.cloud[0](found.edge(tensor_of())).detach()
    assert float((back - features).square().mean()) == pytest.approx(float(lost), rel=1e-3)


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_noise_has_the_share_it_says_and_stays_on_in_use(kind) -> None:
    base = cut_victim()
    found = AddedNoise(std=0.5, kind=kind).operate(base, images_of(), torch.zeros(60), seed=0)
    x = tensor_of()
    clean = base.edge(x).detach()
    drawn = found.edge(x).detach() - clean
    assert float(drawn.std() / clean.std()) == pytest.approx(0.5, rel=0.03)
    assert not torch.equal(found.edge(x), found.edge(x))
    assert torch.equal(silenced(found.edge)(x), clean)
    kurtosis = float((drawn / drawn.std()).pow(4).mean())
    assert kurtosis == pytest.approx(3.0 if kind == "gaussian" else 6.0, rel=0.15)


def test_noise_follows_an_edge_that_sends_larger_numbers() -> None:
    defense = AddedNoise(std=0.5)
    found = defense.operate(cut_victim(), images_of(), torch.zeros(60), seed=0)
    start = float(found.edge[-1].std)
    with torch.no_grad():
        found.edge[0].get_submodule("1").weight.mul_(10)
        found.edge[0].get_submodule("1").bias.mul_(10)
    pressure = defense.pressure(found, is_mending=False, seed=0)
    for _ in range(60):
        pressure.before(found, batch_of(found))
    assert float(found.edge[-1].std) == pytest.approx(10 * start, rel=0.1)
    before = float(found.edge[-1].std)
    finished = defense.finish(found, images_of(), torch.zeros(60), seed=0)
    assert float(finished.edge[-1].std) == pytest.approx(10 * start, rel=1e-3)
    assert float(found.edge[-1].std) == before


def test_dropout_drops_its_share_in_use_and_keeps_the_mean() -> None:
    base = cut_victim()
    found = FeatureDropout(rate=0.3).operate(base, images_of(), torch.zeros(60), seed=0)
    clean, sent = base.edge(tensor_of()).detach(), found.edge(tensor_of()).detach()
    is_alive = clean > 0
    assert float((sent[is_alive] == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(sent.mean() / clean.mean()) == pytest.approx(1.0, abs=0.02)


def slow_distance_correlation(x: np.ndarray, z: np.ndarray) -> float:
    def centered(rows: np.ndarray) -> np.ndarray:
        distances = np.array([[np.linalg.norm(a - b) for b in rows] for a in rows])
        return distances - distances.mean(0) - distances.mean(1)[:, None] + distances.mean()

    a, b = centered(x.reshape(len(x), -1)), centered(z.reshape(len(z), -1))
    return (a * b).mean() / np.sqrt((a * a).mean() * (b * b).mean())


def test_nopeek_is_the_weighted_distance_correlation_and_its_step_lowers_it() -> None:
    found = NoPeek(weight=1.5).operate(cut_victim(), images_of(), torch.zeros(60), seed=0)
    pressure = NoPeek(weight=1.5).pressure(found, is_mending=False, seed=0)
    batch = batch_of(found)
    (term,) = pressure.terms(found, batch).values()
    slow = slow_distance_correlation(batch.images.double().numpy(), batch.features.detach().double().numpy())
    assert float(term.detach()) == pytest.approx(1.5 * slow, abs=1e-4)
    weights = list(found.edge.parameters())
    gradients = torch.autograd.grad(term, weights)
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight -= 0.05 * gradient
    (less,) = pressure.terms(found, batch_of(found)).values()
    assert less < term
    assert NoPeek(weight=0).pressure(found, is_mending=False, seed=0).terms(found, batch) == {}


@pytest.mark.parametrize("measure", ["ssim", "relative"])
def test_an_edge_that_follows_the_adversary_becomes_harder_to_invert(measure) -> None:
    knobs = AdversarialTraining(weight=1.0, hinge=None, width=8, measure=measure)
    found = cut_at(nn.Sequential(nn.Conv2d(3, 12, 2, stride=2), nn.Flatten(), nn.Linear(960, 3)), "0", tensor_of(2))
    pressure = knobs.pressure(found, is_mending=False, seed=0)
    for _ in range(40):
        pressure.before(found, batch_of(found))
    batch = batch_of(found)
    (term,) = pressure.terms(found, batch).values()
    weights = list(found.edge.parameters())
    for weight, gradient in zip(weights, torch.autograd.grad(term, weights), strict=True):
        weight.data -= 0.02 * gradient / gradient.norm()
    (less,) = pressure.terms(found, batch_of(found)).values()
    assert less < term
    assert "adversary" not in " ".join(pressure.state_dict())


def test_success_below_the_hinge_costs_nothing() -> None:
    found = cut_victim()
    batch = batch_of(found)
    terms = {}
    for hinge in (None, 0.99, 0.0):
        pressure = AdversarialTraining(weight=2.0, hinge=hinge, width=8).pressure(found, is_mending=False, seed=0)
        pressure.before(found, batch)
        terms[hinge] = float(pressure.terms(found, batch)["adversary"].detach())
    assert terms[0.99] == 0
    assert terms[None] == pytest.approx(terms[0.0])
    assert terms[0.0] > 0


def test_a_stopped_adversarial_training_goes_on_bit_for_bit() -> None:
    found = cut_victim()
    batch = batch_of(found)
    knobs = AdversarialTraining(width=8)
    whole = knobs.pressure(found, is_mending=False, seed=0)
    assert whole.held() == {}
    whole.before(found, batch)
    held = {name: value.clone().contiguous() for name, value in whole.held().items()}
    resumed = knobs.pressure(found, is_mending=False, seed=1)
    resumed.load_state_dict(whole.state_dict())
    resumed.hold(held)
    assert set(resumed.held()) == set(held)
    for pressure in (whole, resumed):
        pressure.before(found, batch)
        pressure.before(found, batch)
    assert set(whole.held()) == set(resumed.held())
    assert all(torch.equal(value, resumed.held()[name]) for name, value in whole.held().items())
    assert whole.terms(found, batch)["adversary"].equal(resumed.terms(found, batch)["adversary"])


def test_refusals() -> None:
    base = cut_victim()
    with pytest.raises(ConfigError, match="at most 12"):
        Bottleneck(channels=13).operate(base, images_of(), torch.zeros(60), seed=0)
    for make in (
        lambda: AddedNoise(std=-1),
        lambda: AddedNoise(kind="uniform"),
        lambda: FeatureDropout(rate=1.0),
        lambda: NoPeek(weight=-1),
        lambda: AdversarialTraining(weight=-1),
        lambda: AdversarialTraining(hinge=1.0),
        lambda: AdversarialTraining(width=4),
        lambda: AdversarialTraining(measure="mse"),
        lambda: Bottleneck(channels=0),
    ):
        with pytest.raises(ConfigError):
            make()
    one = batch_of(base, 1)
    with pytest.raises(DataError, match="batch"):
        NoPeek().pressure(base, is_mending=False, seed=0).terms(base, one)
    with pytest.raises(DataError, match="batch"):
        AdversarialTraining().pressure(base, is_mending=False, seed=0).before(base, one)
