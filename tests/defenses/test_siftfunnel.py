"""SiftFunnel: penalties against slow oracles, attention that acts, a start that keeps the network working."""

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from louver.cut import split as cut_at
from louver.defenses.attention import (
    Cbam,
    SqueezeExcitation,
    TripletAttention,
    _PlaneExtremes,
    _ScaledExtremes,
    axis_extremes,
)
from louver.defenses.base import Batch
from louver.defenses.funnel import Funnel, Widening, principal_axes, start_at_best
from louver.defenses.penalties import channel_correlation, image_correlation, mean_magnitude
from louver.defenses.siftfunnel import SiftFunnel, sift_cnn, sift_resnet18, sift_vgg16
from louver.errors import ConfigError, DataError
from louver.measures.information import distance_correlation
from louver.measures.rows import gram
from toys import pictures

SHAPE = (3, 16, 20)


def victim(*, is_signed: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers: list[nn.Module] = [nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)]
        if is_signed:
            layers.append(nn.Conv2d(12, 12, 1))
        layers += [nn.Conv2d(12, 9, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 3)]
        return nn.Sequential(*layers).eval()


def images_of(n: int = 60):
    return pictures(n, seed=1, shape=SHAPE)


def tensor_of(n: int = 60) -> torch.Tensor:
    return torch.from_numpy(images_of(n).floats())


def cut_victim(at: str = "3", *, is_signed: bool = False):
    return cut_at(victim(is_signed=is_signed), at, torch.rand(2, *SHAPE))


def hardened(knobs: SiftFunnel, *, is_signed: bool = False):
    halves = cut_victim("4" if is_signed else "3", is_signed=is_signed)
    return knobs.operate(halves, images_of(), torch.zeros(60), seed=0)


# Penalties


def slow_channel_correlation(z: np.ndarray) -> float:
    found = []
    for sample in z:
        rows = sample.reshape(len(sample), -1)
        squares = []
        for i, j in itertools.product(range(len(rows)), repeat=2):
            if i != j:
                a, b = rows[i] - rows[i].mean(), rows[j] - rows[j].mean()
                squares.append(0.0 if not a.any() or not b.any() else (a @ b) ** 2 / ((a @ a) * (b @ b)))
        found.append(np.mean(squares))
    return float(np.mean(found))


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_channel_correlation_is_that_of_the_slow_loops(scale) -> None:
    z = torch.rand(7, 3, 8, 10, generator=torch.Generator().manual_seed(1))
    z[:, 1] += z[:, 0]
    z[2, 1] = 0.5
    value = channel_correlation(scale * z)
    assert float(value) == pytest.approx(slow_channel_correlation(z.double().numpy()), abs=1e-5)
    assert 0 < float(value) < 1
    assert float(channel_correlation(z[:, :1])) == 0


def test_magnitude_is_the_mean_of_absolute_values() -> None:
    z = torch.randn(7, 3, 8, 10)
    assert float(mean_magnitude(z)) == pytest.approx(sum(abs(v) for v in z.flatten().tolist()) / z.numel(), abs=1e-6)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_correlation_with_images_does_not_depend_on_how_they_lie_in_memory(memory) -> None:
    images, z = torch.rand(7, 3, 8, 10), torch.rand(7, 5, 4, 6)
    found = image_correlation(images.contiguous(memory_format=memory), z)
    assert float(found) == pytest.approx(float(distance_correlation(images, z)), abs=1e-6)


@pytest.mark.parametrize("penalty", [channel_correlation, mean_magnitude])
def test_a_step_against_the_gradient_lowers_a_penalty_and_a_step_along_raises_it(penalty) -> None:
    z = torch.rand(7, 3, 8, 10, generator=torch.Generator().manual_seed(2))
    z[:, 2] = z[:, 0] + 0.3 * z[:, 1]
    z[3] = 0.25
    z.requires_grad_()
    value = penalty(z)
    (gradient,) = torch.autograd.grad(value, z)
    assert bool(gradient.isfinite().all())
    with torch.no_grad():
        step = 0.5 * gradient / gradient.norm()
        assert penalty(z - step) < value.detach() < penalty(z + step)


@pytest.mark.parametrize("shape", [(7, 30), (7, 5, 24)])
def test_the_gradient_of_a_gram_matrix_is_that_of_the_product_as_is_its_own(shape) -> None:
    rows = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(*shape[:-1], shape[-2], dtype=torch.float64)
    (fast,) = torch.autograd.grad((gram(rows).square() * weight).sum(), rows)
    (plain,) = torch.autograd.grad(((rows @ rows.mT).square() * weight).sum(), rows)
    assert torch.allclose(fast, plain)
    assert torch.autograd.gradgradcheck(gram, (rows[..., :2].detach().requires_grad_(),))


# Layers


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_attention_in_training_is_that_in_use_with_its_gradients(memory) -> None:
    x = torch.randn(7, 3, 8, 10).to(memory_format=memory).requires_grad_()
    for layer in (SqueezeExcitation(3), TripletAttention(), Cbam(3)):
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        found = []
        for is_training in (True, False):
            y = layer.train(is_training)(x)
            weight = torch.linspace(-1, 1, y.numel()).view_as(y)
            found.append((y.detach(), *torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()])))
        for fast, plain in zip(*found, strict=True):
            assert torch.allclose(fast, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_funnel_and_widening_learn_in_half_precision_as_in_full(dtype) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        layers = nn.Sequential(Funnel(12, 4), Widening(4, 12, (8, 10))).train()
        x = torch.randn(7, 12, 8, 10).to(memory_format=torch.channels_last)
    found = []
    for is_half in (False, True):
        entry = x.to(dtype if is_half else torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            y = layers(entry)
        weight = torch.linspace(-1, 1, y.numel()).view_as(y)
        gradients = torch.autograd.grad((y.float() * weight).sum(), [entry, layers[0].reduce.weight])
        found.append([gradient.float().flatten() for gradient in gradients])
    for full, half in zip(*found, strict=True):
        assert F.cosine_similarity(full, half, dim=0) > 0.98


def test_triplet_attention_is_that_of_the_paper_with_rotations() -> None:
    layer = TripletAttention()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(7, 3, 8, 10)

    def gated(y: torch.Tensor, plane: nn.Module) -> torch.Tensor:
        seen = torch.cat([y.max(1, keepdim=True).values, y.mean(1, keepdim=True)], 1)
        return y * torch.sigmoid(plane(seen))

    layer.eval()
    by_hw, by_ch, by_cw = layer.planes
    expected = gated(x, by_hw)
    expected = expected + gated(x.permute(0, 3, 1, 2), by_ch).permute(0, 2, 3, 1)
    expected = expected + gated(x.permute(0, 2, 1, 3), by_cw).permute(0, 2, 1, 3)
    assert torch.allclose(layer(x), 2 / 3 * expected, atol=1e-5)


def test_extremes_of_equal_values_give_the_gradient_once() -> None:
    x = torch.ones(2, 3, 4, 5, requires_grad=True)
    found = axis_extremes(x, is_training=True)
    (gradient,) = torch.autograd.grad(sum(part[:, 0].sum() for part in found), x)
    assert float(gradient.sum()) == sum(part[:, 0].numel() for part in found)


def test_where_all_is_equal_one_place_takes_the_gradient_of_the_maximum() -> None:
    for value in (0.0, 1.0):
        x = torch.full((2, 3, 4, 5), value, requires_grad=True)
        _, largest, _ = _PlaneExtremes.apply(x)
        (of_planes,) = torch.autograd.grad(largest.sum(), x)
        assert of_planes.flatten(2).sort().values[..., -1].eq(1).all()
        assert of_planes.sum() == largest.numel()
        _, extremes = _ScaledExtremes.apply(x, torch.ones(2, 3))
        (of_channels,) = torch.autograd.grad(extremes[:, 0].sum(), x)
        assert of_channels.amax(1).eq(1).all()
        assert of_channels.sum() == extremes[:, 0].numel()


def test_every_attention_block_acts_and_learns() -> None:
    x = torch.randn(7, 12, 8, 10).relu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        funnel, widening = Funnel(12, 4), Widening(4, 12, (8, 10))
        whole = nn.Sequential(funnel, widening)
        blocks = [m for m in whole.modules() if isinstance(m, SqueezeExcitation | TripletAttention | Cbam)]
        assert len(blocks) == 5
        whole.train()(x).square().mean().backward()
        for block in blocks:
            for name, parameter in block.named_parameters():
                assert parameter.grad is not None, f"{type(block).__name__}.{name}"
                assert float(parameter.grad.abs().max()) > 0, f"{type(block).__name__}.{name}"
        before = whole.eval()(x).detach()
        for block in blocks:
            changed = copy.deepcopy(whole)
            twin = changed.get_submodule(next(name for name, m in whole.named_modules() if m is block))
            for parameter in twin.parameters():
                nn.init.zeros_(parameter)
            assert not torch.equal(changed(x), before), type(block).__name__


def test_principal_axes_are_those_of_scikit_learn() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    rows = np.random.default_rng(1).normal(size=(200, 6)) @ np.random.default_rng(2).normal(size=(6, 6))
    mean, axes = principal_axes(torch.from_numpy(rows), 3)
    reference = decomposition.PCA(3).fit(rows)
    assert np.allclose(mean.numpy(), reference.mean_, atol=1e-5)
    assert np.allclose(np.abs(axes.numpy().T @ reference.components_.T), np.eye(3), atol=1e-4)


def test_the_start_comes_close_to_the_best_linear_way_through_so_few_channels() -> None:
    features = cut_victim().edge(tensor_of()).detach()
    rows = features.transpose(0, 1).flatten(1).T
    mean, axes = principal_axes(rows, 4)
    best = ((rows - mean) @ axes @ axes.T + mean - rows).square().mean()
    funnel, widening = Funnel(12, 4), Widening(4, 12, (8, 10))
    unset = nn.Sequential(copy.deepcopy(funnel), copy.deepcopy(widening)).eval()(features)
    start_at_best(funnel, widening, features)
    back = nn.Sequential(funnel, widening).eval()(features)
    error = (back - features).square().mean()
    assert error < 2 * best
    assert error < 0.1 * (unset - features).square().mean()
    assert error < 0.2 * features.var()


# The defense


@pytest.mark.parametrize("knobs", [SiftFunnel(channels=4), SiftFunnel(channels=5, pool=3)])
@pytest.mark.parametrize("is_signed", [False, True])
def test_operate_gives_an_ordinary_split_that_rebuild_can_make_again(knobs, is_signed) -> None:
    base = cut_victim("4" if is_signed else "3", is_signed=is_signed)
    before = copy.deepcopy(base.state_dict())
    modes = [module.training for module in base.modules()]
    torch.manual_seed(0)
    expected_draw = torch.rand(1)
    torch.manual_seed(0)
    found = knobs.operate(base, images_of(), torch.zeros(60), seed=0)
    assert torch.equal(torch.rand(1), expected_draw)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert [module.training for module in base.modules()] == modes
    height, width = (8, 10) if knobs.pool == 1 else (3, 4)
    assert found.cut.feature_shape == (knobs.channels, height, width)
    assert found.cut.cost.feature_bytes == 4 * knobs.channels * height * width
    assert found.cut.name == base.cut.name
    x = tensor_of(7)
    assert float(found.edge(x).detach().min()) >= 0
    again = knobs.rebuild(base, found.state_dict())
    again.load_state_dict(found.state_dict())
    assert again.cut.feature_shape == found.cut.feature_shape
    assert torch.equal(again(x), found(x))
    same = knobs.operate(base, images_of(), torch.zeros(60), seed=0)
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in found.state_dict().items())
    assert knobs.finish(found, images_of(), torch.zeros(60), seed=0)(x).equal(found(x))


@pytest.mark.parametrize("is_signed", [False, True])
def test_a_network_goes_on_from_near_where_it_was(is_signed) -> None:
    found = hardened(SiftFunnel(channels=5), is_signed=is_signed)
    x = tensor_of()
    base = victim(is_signed=is_signed)(x)
    assert (found(x) - base).square().mean() < 0.15 * base.var(0).mean()


def batch_of(found, n: int = 7) -> Batch:
    x = tensor_of(n)
    features = found.edge(x)
    targets = torch.arange(n) % 3
    return Batch(images=x, features=features, outputs=found.cloud(features), targets=targets)


def test_the_loss_is_that_of_the_paper_but_for_a_constant() -> None:
    knobs = SiftFunnel(channels=4, alpha=4.0, beta=1.5, gamma=0.7, smoothing=0.3, sparsity=0.05)
    found = hardened(knobs)
    batch = batch_of(found)
    pressure = knobs.pressure(found, is_mending=False, seed=0)
    task = F.cross_entropy(batch.outputs, batch.targets, label_smoothing=pressure.label_smoothing)
    loss = pressure.task_weight * task + sum(pressure.terms(found, batch).values())

    q = torch.full((7, 3), 0.3 / 2)
    q[torch.arange(7), batch.targets] = 0.7
    divergence = (q * (q.log() - batch.outputs.log_softmax(1))).sum(1).mean()
    expected = 4 * divergence + 1.5 * distance_correlation(batch.images, batch.features)
    expected = (
        expected
        + 0.05 * batch.features.abs().mean()
        + 0.7 * slow_channel_correlation(batch.features.detach().double().numpy())
    )
    entropy = -(0.7 * math.log(0.7) + 0.3 * math.log(0.15))
    assert float(loss.detach() - 4 * entropy) == pytest.approx(float(expected.detach()), abs=1e-4)


def test_terms_of_no_weight_are_left_out_and_the_others_reach_the_edge() -> None:
    found = hardened(SiftFunnel(channels=4))
    batch = batch_of(found)
    only = SiftFunnel(channels=4, beta=0, sparsity=0).pressure(found, is_mending=False, seed=0).terms(found, batch)
    assert list(only) == ["channel correlation"]
    for term in SiftFunnel(channels=4).pressure(found, is_mending=False, seed=0).terms(found, batch).values():
        (gradient,) = torch.autograd.grad(term, found.edge[1].reduce.weight, retain_graph=True)
        assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize(
    ("build", "sent"), [(sift_cnn, (12, 16, 16)), (sift_resnet18, (6, 32, 32)), (sift_vgg16, (4, 16, 16))]
)
def test_the_three_networks_send_what_the_paper_says(build, sent) -> None:
    shape = build(5)
    assert shape.sent == sent
    images = pictures(4, seed=1, shape=(3, 64, 64))
    base = cut_at(shape.model, shape.cut, torch.from_numpy(images.floats(slice(0, 2))))
    knobs = SiftFunnel(channels=shape.channels, pool=shape.pool)
    rebuilt = knobs.rebuild(base, {})
    assert rebuilt.cut.feature_shape == sent
    assert rebuilt(torch.from_numpy(images.floats())).shape == (4, 5)


def test_refusals() -> None:
    flat = cut_victim("7")
    with pytest.raises(ConfigError, match="no channel dimension for a funnel"):
        SiftFunnel(channels=4).operate(flat, images_of(), torch.zeros(60), seed=0)
    with pytest.raises(ConfigError, match="at most 12"):
        hardened(SiftFunnel(channels=13))
    with pytest.raises(ConfigError, match="pool of at most 8"):
        hardened(SiftFunnel(channels=4, pool=9))
    for wrong in ({"channels": 0}, {"alpha": 0}, {"beta": -1}, {"gamma": math.inf}, {"smoothing": 0.5}, {"pool": 0}):
        with pytest.raises(ConfigError, match="expected " + next(iter(wrong))):
            replace(SiftFunnel(), **wrong)
    found = hardened(SiftFunnel(channels=4))
    with pytest.raises(DataError, match="batch"):
        SiftFunnel(channels=4).pressure(found, is_mending=False, seed=0).terms(found, batch_of(found, 1))
