import pytest
import torch
from torch import nn

from louver.cut import split
from louver.defenses.lipschitz import block_ends, lipschitz_constants, shapes_of, steepness, tapped
from louver.errors import ConfigError
from louver.models import Normalized
from louver.networks import CifarResNet, StreetNet


def slow_steepness(clean, noisy):
    """One image and one block at a time, in double precision."""
    constants = []
    for i in range(1, len(clean)):
        best = 0.0
        for row in range(len(clean[0])):
            came = sum(float(d) ** 2 for d in (noisy[i - 1][row] - clean[i - 1][row]).double().flatten()) ** 0.5
            went = sum(float(d) ** 2 for d in (noisy[i][row] - clean[i][row]).double().flatten()) ** 0.5
            if came > 0:
                best = max(best, went / came)
        constants.append(best)
    return constants


def net(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.Conv2d(5, 4, 3), nn.Tanh()]
        return nn.Sequential(*layers, nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 4 * 6, 6))


def images(n=7, seed=0):
    return torch.rand(n, 3, 8, 10, generator=torch.Generator().manual_seed(seed))


def test_steepness_against_the_slow_loop():
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 8, 10), (5, 4, 6), (11,), (2, 3)]
    clean = [torch.randn(7, *shape, generator=generator) for shape in shapes]
    noisy = [h + torch.randn(h.shape, generator=generator) * (i + 0.3) for i, h in enumerate(clean)]
    noisy[1][2] = clean[1][2]
    got = steepness(clean, noisy)
    assert got.tolist() == pytest.approx(slow_steepness(clean, noisy), rel=1e-5)


def test_rows_that_do_not_change_have_no_ratio_and_no_nan():
    weight = torch.ones(4, requires_grad=True)
    x = torch.rand(3, 4)
    clean, noisy = [x, (x * 0 * weight), x * weight], [x + 1, (x * 0 * weight), (x + 1) * weight]
    constants = steepness(clean, noisy)
    assert constants.tolist() == [0, 0]
    constants.sum().backward()
    assert weight.grad is not None
    assert bool(weight.grad.isfinite().all())


def test_constants_of_an_edge_against_its_blocks_one_by_one():
    halves = split(net(), "4", images(2))
    ends = block_ends(halves.edge, images(2))
    assert len(ends) == 2
    x = images()
    got = lipschitz_constants(tapped(halves.edge, ends), x, noise_std=0.1, generator=torch.Generator().manual_seed(3))
    twin = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    layers = list(net().eval())

    def through(h):
        first = layers[2](layers[1](layers[0](h)))
        return [h, first, layers[4](layers[3](first))]

    with torch.no_grad():
        assert got.tolist() == pytest.approx(slow_steepness(through(x), through(twin)), rel=1e-4)


def test_gradient_lowers_the_constants():
    halves = split(net(), "4", images(2))
    halves.edge.train()
    taps = tapped(halves.edge, block_ends(halves.edge, images(2)))
    optimizer = torch.optim.SGD(halves.edge.parameters(), lr=0.02)

    def constants():
        return lipschitz_constants(taps, images(16), noise_std=0.1, generator=torch.Generator().manual_seed(0)).sum()

    before = constants().item()
    for _ in range(5):
        loss = constants()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert constants().item() < 0.95 * before


@pytest.mark.parametrize("is_training", [True, False])
def test_nothing_but_gradients_is_left_behind(is_training):
    halves = split(net(), "5", images(2)).train(is_training)
    before = {name: tensor.clone() for name, tensor in halves.edge.state_dict().items()}
    taps = tapped(halves.edge, block_ends(halves.edge, images(2)))
    first, second = (
        lipschitz_constants(taps, images(), noise_std=0.1, generator=torch.Generator().manual_seed(0)) for _ in range(2)
    )
    assert torch.equal(first, second), "dropout was on"
    assert all(torch.equal(tensor, before[name]) for name, tensor in halves.edge.state_dict().items())
    assert all(module.training == is_training for module in halves.edge.modules())
    norms = [module for module in halves.edge.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms[0].track_running_stats


def test_blocks_end_where_the_next_weights_begin():
    street = split(StreetNet(5).eval(), "stage3", torch.rand(2, 3, 64, 64))
    ends = block_ends(street.edge, torch.rand(2, 3, 64, 64))
    assert ends == ["stage1_2", "stage1_5", "stage2_2", "stage2_5", "stage3_2", "stage3_5"]
    resnet = split(Normalized(CifarResNet(8).eval(), [0.5] * 3, [0.2] * 3), "layer2", torch.rand(2, 3, 16, 20))
    ends = block_ends(resnet.edge, torch.rand(2, 3, 16, 20))
    assert [end.removeprefix("network_") for end in ends] == ["relu", "layer1_0_relu2", "layer2_0_relu2"]
    for edge, shape in ((street.edge, (2, 3, 64, 64)), (resnet.edge, (2, 3, 16, 20))):
        x = torch.rand(shape)
        assert torch.equal(tapped(edge, block_ends(edge, x))(x)[-1], edge(x))


def test_bad_input():
    with pytest.raises(ConfigError, match=r"louver\.split"):
        shapes_of(nn.Conv2d(3, 4, 3), images())
    halves = split(net(), "4", images(2))
    taps = tapped(halves.edge, block_ends(halves.edge, images(2)))
    with pytest.raises(ConfigError, match="noise_std"):
        lipschitz_constants(taps, images(), noise_std=0.0, generator=torch.Generator())
    bare = split(nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 3)), "1", images(2))
    with pytest.raises(ConfigError, match="weights"):
        block_ends(bare.edge, images(2))
