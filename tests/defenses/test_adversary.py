"""The proxy attacker learns, teaches the edge and not itself, and goes on bit for bit."""

import copy

import pytest
import torch
from torch import nn

from louver.defenses.adversary import Adversary, Inverter
from louver.errors import ConfigError, DataError
from louver.measures.image import ssim
from toys import pictures

SHAPES = [(5, 8, 10), (4, 3, 2), (6, 32, 40), (2, 1, 1), (9,), (3, 11, 7), (5, 6)]


def images_of(n: int, size: tuple[int, int] = (16, 20)) -> torch.Tensor:
    return torch.from_numpy(pictures(n, seed=1, shape=(3, *size)).floats())


@pytest.mark.parametrize("feature_shape", SHAPES)
@pytest.mark.parametrize("image_shape", [(3, 16, 20), (1, 33, 45)])
def test_an_inverter_paints_pictures_of_the_right_size(feature_shape, image_shape) -> None:
    inverter = Inverter(feature_shape, image_shape, width=8)
    out = inverter(torch.randn(7, *feature_shape))
    assert out.shape == (7, *image_shape)
    assert out.min() > 0
    assert out.max() < 1
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in inverter.parameters())


def test_an_inverter_is_not_fooled_by_scale_or_shift() -> None:
    inverter = Inverter((5, 8, 10), (3, 16, 20), width=8)
    z = torch.randn(7, 5, 8, 10)
    assert torch.allclose(inverter(z), inverter(0.1 * z + 3), atol=1e-3)


@pytest.mark.parametrize("measure", ["mse", "ssim", "relative"])
def test_an_adversary_learns_to_invert_an_open_edge_and_not_a_closed_one(measure) -> None:
    images = images_of(64)
    edge = nn.Conv2d(3, 12, 2, stride=2)
    features = edge(images).detach()
    noise = torch.randn_like(features)
    errors = {}
    for name, z in {"open": features, "closed": noise}.items():
        adversary = Adversary((12, 8, 10), (3, 16, 20), width=16, measure=measure)
        for _ in range(80):
            last = adversary.step(images, z if name == "open" else torch.randn_like(noise))
        assert not last.requires_grad
        errors[name] = float(last)
    assert errors["open"] < 0.35 * errors["closed"]
    if measure == "relative":
        assert 0.7 < errors["closed"] < 2


def test_the_error_teaches_the_edge_and_never_the_inverter() -> None:
    images = images_of(7)
    adversary = Adversary((5, 8, 10), (3, 16, 20), width=8)
    for _ in range(30):
        adversary.step(images, nn.functional.avg_pool2d(images, 2).repeat(1, 2, 1, 1)[:, :5])
    z = nn.functional.avg_pool2d(images, 2).repeat(1, 2, 1, 1)[:, :5].clone().requires_grad_()
    before = copy.deepcopy(adversary.inverter.state_dict())
    error = adversary.error(images, z)
    error.backward()
    assert z.grad is not None
    gradient, z.grad = z.grad, None
    assert all(parameter.grad is None for parameter in adversary.inverter.parameters())
    assert all(torch.equal(before[name], value) for name, value in adversary.inverter.state_dict().items())
    with torch.no_grad():
        less, more = (float(adversary.error(images, z + step * gradient)) for step in (-20, 20))
    assert less < float(error.detach()) < more
    adversary.step(images, z)
    assert any(not torch.equal(before[name], value) for name, value in adversary.inverter.state_dict().items())
    assert z.grad is None


def test_a_stopped_adversary_goes_on_bit_for_bit() -> None:
    images, z = images_of(7), torch.randn(7, 5, 8, 10)
    whole = Adversary((5, 8, 10), (3, 16, 20), width=8, seed=3)
    for _ in range(3):
        whole.step(images, z)
    resumed = Adversary((5, 8, 10), (3, 16, 20), width=8, seed=4)
    resumed.load_state_dict({name: value.contiguous() for name, value in whole.state_dict().items()})
    resumed.hold({name: value.clone().contiguous() for name, value in whole.held().items()})
    for adversary in (whole, resumed):
        for _ in range(3):
            adversary.step(images, z)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    fresh = Adversary((5, 8, 10), (3, 16, 20), width=8)
    assert fresh.held() == {}
    fresh.hold({})
    fresh.step(images, z)


def test_the_same_seed_gives_the_same_inverter_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one, two, other = (Adversary((9,), (3, 16, 20), width=8, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.rand(3), expected)
    first, same, different = (a.inverter.leave.weight for a in (one, two, other))
    assert torch.equal(first, same)
    assert not torch.equal(first, different)


def test_refusals() -> None:
    with pytest.raises(DataError, match="batch of 2"):
        Adversary((9,), (3, 16, 20)).error(torch.rand(1, 3, 16, 20), torch.rand(1, 9))
    with pytest.raises(ConfigError, match="width of 8"):
        Inverter((9,), (3, 16, 20), width=4)
    with pytest.raises(ConfigError, match="no measure"):
        Adversary((9,), (3, 16, 20), measure="l1")
    with pytest.raises(ConfigError, match="SSIM needs"):
        Adversary((9,), (3, 8, 10), measure="ssim")
    with pytest.raises(ConfigError, match="learning_rate"):
        Adversary((9,), (3, 16, 20), learning_rate=0.0)


@pytest.mark.parametrize("size", [(16, 20), (15, 21), (48, 50)])
@pytest.mark.parametrize("measure", ["mse", "ssim", "relative"])
def test_the_error_is_that_of_the_pictures_painted(measure, size) -> None:
    images = images_of(7, size)
    z = torch.randn(7, 5, 8, 10)
    adversary = Adversary((5, 8, 10), (3, *size), width=8, measure=measure)
    with torch.no_grad():
        guess, error = adversary.inverter(z), adversary.error(images, z)
        truth = nn.functional.avg_pool2d(images, 2) if measure == "ssim" and size[0] == 48 else images
        squares = [((a - b) ** 2).mean() for a, b in zip(truth, guess, strict=True)]
        if measure == "ssim":
            squares = [1 - ssim(a[None], b[None])[0] for a, b in zip(truth, guess, strict=True)]
        expected = torch.stack(squares).mean()
        if measure == "relative":
            expected = expected / ((truth - truth.mean(0)) ** 2).mean()
        assert float(error) == pytest.approx(float(expected), rel=1e-4)
        other = 1 - images
        assert float(adversary.error(other, z)) != pytest.approx(float(error), rel=1e-3)
