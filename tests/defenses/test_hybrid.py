from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn

from louver.cut import Split, split
from louver.defenses.base import Batch
from louver.defenses.hybrid import Hybrid, _pairs, contrastive_loss, explained_variance
from louver.errors import ConfigError, DataError
from louver.tasks import ReIdentification
from louver.types import Images


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.Flatten(), nn.Linear(60, 4)
    ).eval()


def images(n: int = 50) -> Images:
    return Images(pixels=np.random.default_rng(1).random((n, 3, 8, 10), dtype=np.float32))


def halves() -> Split:
    return split(network(), "2", torch.rand(2, 3, 8, 10))


def slow_siamese(features: list[list[float]], targets: list[tuple[int, ...]], margin: float) -> float:
    quarter, even = len(features) // 4, 2 * (len(features) // 2)
    n_far = (even - 2 * quarter) // 2
    pairs = [(2 * i, 2 * i + 1) for i in range(quarter)]
    pairs += [(2 * quarter + i, 2 * quarter + n_far + i) for i in range(n_far)]
    total = 0.0
    for i, j in pairs:
        d = math.sqrt(sum((a - b) ** 2 for a, b in zip(features[i], features[j], strict=True)))
        s = 1.0 if targets[i] == targets[j] else 0.0
        total += s * d**2 + (1 - s) * max(0.0, margin - d) ** 2
    return total / (2 * len(pairs))


def batch_of(features: torch.Tensor, targets: torch.Tensor) -> Batch:
    n = len(features)
    return Batch(images=torch.rand(n, 3, 8, 10), features=features, outputs=torch.rand(n, 4), targets=targets)


@pytest.mark.parametrize("n", [2, 7, 12])
@pytest.mark.parametrize("columns", [None, 2])
def test_the_siamese_term_is_that_of_a_slow_loop(n, columns):
    generator = torch.Generator().manual_seed(n)
    features = torch.randn(n, 6, 3, 4, generator=generator)
    targets = torch.randint(0, 2, (n,) if columns is None else (n, columns), generator=generator)
    split_ = halves()
    pressure = Hybrid(siamese_weight=0.3, margin=9.0).pressure(split_, is_mending=False, seed=0)
    got = pressure.terms(split_, batch_of(features, targets))
    rows = [tuple(row) for row in targets.reshape(n, -1).tolist()]
    assert set(got) == {"siamese"}
    assert float(got["siamese"]) == pytest.approx(0.3 * slow_siamese(features.flatten(1).tolist(), rows, 9.0), rel=1e-5)
    assert pressure.task_weight == 2.0  # CE_a + CE_b is twice the mean over both streams
    assert not pressure.freezes_edge


def test_batches_of_a_metric_task_hold_alike_and_different_pairs():
    identities = torch.arange(40).repeat_interleave(8)
    for batch in ReIdentification(per_identity=4).batches(identities, 64, torch.Generator().manual_seed(0)):
        first, second = identities[batch][_pairs(len(batch))].chunk(2)
        assert 0.3 < float((first == second).double().mean()) < 0.7


def test_primary_names_the_column_that_counts():
    features = torch.tensor([[0.0], [1.0], [0.0], [2.0]])
    targets = torch.tensor([[0, 5], [0, 6], [1, 5], [2, 5]])
    split_ = halves()

    def term(primary):
        hybrid = Hybrid(siamese_weight=1.0, margin=10, primary=primary)
        return float(
            hybrid.pressure(split_, is_mending=False, seed=0).terms(split_, batch_of(features, targets))["siamese"]
        )

    assert term(0) == pytest.approx((1 + 64) / 4)
    assert term(1) == pytest.approx((81 + 4) / 4)
    assert term(None) == pytest.approx((81 + 64) / 4)
    with pytest.raises(ConfigError, match="primary below 2"):
        term(2)


def test_a_step_downhill_gathers_the_alike_and_parts_the_others_up_to_the_margin():
    def moved(is_alike: bool, apart: float) -> float:
        z = torch.zeros(2, 3)
        z[1, 0] = apart
        z.requires_grad_(True)
        contrastive_loss(z, torch.tensor([is_alike]), margin=10).backward()
        step = (z - 0.1 * z.grad).detach()
        return float((step[0] - step[1]).norm()) - apart

    assert moved(True, 4.0) < -0.1
    assert moved(False, 4.0) > 0.1
    assert moved(False, 10.5) == 0
    assert math.isfinite(moved(False, 0.0))
    assert math.isfinite(moved(True, 0.0))


def test_a_batch_of_one_is_refused():
    split_ = halves()
    pressure = Hybrid(embedding="siamese").pressure(split_, is_mending=False, seed=0)
    with pytest.raises(DataError, match="2 images or more in a batch, got 1"):
        pressure.terms(split_, batch_of(torch.rand(1, 6, 3, 4), torch.zeros(1, dtype=torch.long)))


@pytest.mark.parametrize("embedding", ["simple", "siamese"])
def test_what_is_not_reduced_keeps_its_form(embedding):
    before, hybrid = halves(), Hybrid(embedding=embedding)
    after = hybrid.finish(before, images(), torch.zeros(50), seed=0)
    x = torch.rand(7, 3, 8, 10)
    assert torch.equal(after(x), before(x))
    assert hybrid.mending == 0
    terms = hybrid.pressure(before, is_mending=False, seed=0).terms(
        before, batch_of(torch.rand(4, 6, 3, 4), torch.tensor([0, 1, 0, 0]))
    )
    assert bool(terms) == (embedding == "siamese")
    with pytest.raises(ConfigError, match="no principal components"):
        explained_variance(after)


def test_reduced_sends_the_coordinates_of_scikit_learn_and_the_cloud_sees_their_inverse():
    before, data = halves(), images()
    kept = {name: value.clone() for name, value in before.state_dict().items()}
    after = Hybrid(embedding="reduced", components=5).finish(before, data, torch.zeros(50), seed=0)
    features = before.edge(torch.from_numpy(data.pixels)).flatten(1).detach().double().numpy()
    theirs = PCA(5, svd_solver="full").fit(features)
    x = torch.rand(7, 3, 8, 10)
    z = before.edge(x).flatten(1).detach().double().numpy()
    expected = theirs.transform(z)
    sent = after.edge(x)
    assert sent.shape == (7, 5)
    assert after.cut.feature_shape == (5,)
    assert np.allclose(sent.detach().abs().numpy(), np.abs(expected), atol=1e-3)
    seen = torch.from_numpy(theirs.inverse_transform(expected)).float().view(7, 6, 3, 4)
    assert torch.allclose(after(x), before.cloud(seen), atol=1e-3)
    assert np.allclose(explained_variance(after), theirs.explained_variance_ratio_, rtol=1e-3)
    assert after.cut.cost.feature_bytes == 5 * 4
    assert after.cut.cost.edge.macs == before.cut.cost.edge.macs + 5 * 72
    assert all(torch.equal(value, kept[name]) for name, value in before.state_dict().items())


@pytest.mark.parametrize("embedding", ["noisy", "advanced"])
def test_noise_is_fresh_stays_on_and_has_the_asked_deviation(embedding):
    before, data = halves(), images()
    quiet = Hybrid(embedding="reduced", components=4).finish(before, data, torch.zeros(50), seed=0)
    after = (
        Hybrid(embedding=embedding, components=4, noise_std=3.0).finish(before, data, torch.zeros(50), seed=0).eval()
    )
    x = torch.rand(500, 3, 8, 10)
    torch.manual_seed(0)
    first, second = after.edge(x), after.edge(x)
    assert not torch.equal(first, second)
    assert float((first - quiet.edge(x)).detach().std()) == pytest.approx(3.0, rel=0.1)
    relative = Hybrid(embedding=embedding, components=4, noise_std=2.0, noise_scale="relative")
    scaled = relative.finish(before, data, torch.zeros(50), seed=0)
    unit = float(quiet.edge(torch.from_numpy(data.pixels)).detach().var(0).mean().sqrt())
    assert float(scaled.edge.noise.std) == pytest.approx(2.0 * unit, rel=1e-3)


@pytest.mark.parametrize("embedding", ["simple", "reduced", "siamese", "noisy", "advanced"])
def test_rebuilt_from_its_state_it_is_the_same(embedding):
    hybrid, before, data = Hybrid(embedding=embedding, components=3), halves(), images()
    done = hybrid.finish(hybrid.operate(before, data, torch.zeros(50), seed=0), data, torch.zeros(50), seed=0).eval()
    torch.manual_seed(9)
    other = split(nn.Sequential(*network()), "2", torch.rand(2, 3, 8, 10))
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    again = hybrid.rebuild(other, done.state_dict())
    again.load_state_dict(done.state_dict())
    again.eval()
    x = torch.rand(7, 3, 8, 10)
    torch.manual_seed(3)
    expected = done(x)
    torch.manual_seed(3)
    assert torch.equal(again(x), expected)
    assert again.cut.feature_shape == done.cut.feature_shape


def test_mending_holds_the_edge_and_the_edge_has_nothing_to_train():
    hybrid = Hybrid(embedding="advanced", components=3, mending_share=0.3)
    done = hybrid.finish(halves(), images(), torch.zeros(50), seed=0)
    pressure = hybrid.pressure(done, is_mending=True, seed=0)
    assert hybrid.mending == 0.3
    assert pressure.freezes_edge
    assert pressure.task_weight == 1.0
    assert pressure.terms(done, batch_of(torch.rand(4, 3), torch.tensor([0, 1, 0, 0]))) == {}
    assert {name.split(".")[1] for name, _ in done.edge.named_parameters(prefix="edge")} == {"body"}
    assert {name.split(".")[1] for name, _ in done.cloud.named_parameters(prefix="cloud")} == {"body"}


def test_more_components_than_there_are_is_refused_before_training():
    with pytest.raises(ConfigError, match="at most 72 components"):
        Hybrid(components=73).operate(halves(), images(90), torch.zeros(90), seed=0)
    with pytest.raises(ConfigError, match="at most 50 components"):
        Hybrid(components=60).operate(halves(), images(50), torch.zeros(50), seed=0)
    Hybrid(embedding="siamese", components=73).operate(halves(), images(), torch.zeros(50), seed=0)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"embedding": "advance"}, "nearest: advanced"),
        ({"noise_scale": "relativ"}, "nearest: relative"),
        ({"components": 0}, "components 1 or more"),
        ({"siamese_weight": -1.0}, "siamese_weight 0 or more"),
        ({"margin": 0.0}, "margin above 0"),
        ({"primary": -1}, "primary 0 or more"),
        ({"noise_std": float("nan")}, "noise_std 0 or more"),
        ({"mending_share": 1.0}, "mending_share a share"),
    ],
)
def test_knobs_out_of_range_are_refused(knobs, message):
    with pytest.raises(ConfigError, match=message):
        Hybrid(**knobs)
