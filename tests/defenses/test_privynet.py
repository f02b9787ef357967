from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from louver.cut import Split, split
from louver.defenses.channels import ChannelScore, characterize
from louver.defenses.privynet import PrivyNet, choose_channels
from louver.errors import ConfigError, CutError
from louver.types import Images


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 5, 3), nn.Flatten(), nn.Linear(120, 4)
    ).eval()


class Summed(nn.Module):
    """Features that are a sum: its channels can only be selected."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 12, 3), nn.Conv2d(3, 12, 3), nn.Linear(576, 4)

    def forward(self, x):
        return self.head((self.a(x) + self.b(x)).flatten(1))


EXAMPLE = torch.rand(2, 3, 8, 10, generator=torch.Generator().manual_seed(0))


def halves(cut: str = "2", seed: int = 0) -> Split:
    return split(network(seed), cut, EXAMPLE)


def world(n: int = 90) -> tuple[Images, torch.Tensor]:
    rng = np.random.default_rng(2)
    kind = rng.integers(0, 4, n)
    pixels = 0.7 * rng.random((n, 3, 8, 10)) + 0.1 * (kind % 3 == np.arange(3)[:, None]).T[:, :, None, None]
    return Images(pixels=pixels.astype(np.float32)), torch.from_numpy(kind)


def scores(fisher: list[float], leak: list[float]) -> list[ChannelScore]:
    return [ChannelScore(fisher=f, psnr=p) for f, p in zip(fisher, leak, strict=True)]


# The choice

FISHER = [9.0, 1.0, 8.0, 0.1, 7.0, 6.0, 0.2, 5.0]
LEAK = [40.0, 10.0, 11.0, 30.0, 12.0, 13.0, 9.0, 14.0]


def test_the_leaky_go_first_however_discriminative_then_the_least_discriminative():
    draw = random.Random(0)
    assert choose_channels(scores(FISHER, LEAK), 3, drop_leaky=0.25, spare=0, draw=draw).tolist() == [2, 4, 5]
    assert choose_channels(scores(FISHER, LEAK), 3, drop_leaky=0, spare=0, draw=draw).tolist() == [0, 2, 4]
    assert 3 not in choose_channels(scores(FISHER, LEAK), 6, drop_leaky=0.25, spare=0, draw=draw).tolist()


def test_the_remainder_is_drawn_from_the_best_and_no_others():
    seen = {
        tuple(choose_channels(scores(FISHER, LEAK), 2, drop_leaky=0.25, spare=1.0, draw=random.Random(i)).tolist())
        for i in range(300)
    }
    pool = [2, 4, 5, 7]
    assert seen == {(a, b) for i, a in enumerate(pool) for b in pool[i + 1 :]}
    anything = {
        i
        for seed in range(100)
        for i in choose_channels(
            scores(FISHER, LEAK), 2, drop_leaky=0.0, spare=math.inf, draw=random.Random(seed)
        ).tolist()
    }
    assert anything == set(range(8))


def test_too_few_channels_and_missing_leakage_are_refused():
    with pytest.raises(ConfigError, match=r"at most 6, what drop_leaky = 0\.25 leaves of 8"):
        choose_channels(scores(FISHER, LEAK), 7, drop_leaky=0.25, spare=0, draw=random.Random(0))
    unknown = [ChannelScore(fisher=1.0, psnr=None)] * 4
    with pytest.raises(ConfigError, match="needs the PSNR"):
        choose_channels(unknown, 2, drop_leaky=0.25, spare=0, draw=random.Random(0))


# Surgery


def test_planted_channels_are_released_and_kept_back():
    net = network()
    with torch.no_grad():
        net[0].weight[3] = torch.tensor([3.0, -3.0, 0.0])[:, None, None] / 9  # tells the class
        net[0].weight[7] = 0
        net[0].weight[7, :, 1, 1] = 1 / 3  # the gray image itself
        net[0].bias[7] = 0
        net[0].bias[3] = 1.0
        net[0].weight[9] = 0  # dead
        net[0].bias[9] = -1
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 2, 200)
    pixels = np.repeat(rng.uniform(0.2, 0.8, (200, 1, 8, 10)), 3, axis=1)
    pixels[:, 0] += 0.1 * (2 * kind[:, None, None] - 1)
    images = Images(pixels=pixels.astype(np.float32))
    defense = PrivyNet(n_channels=2, drop_leaky=0.05, spare=0)
    chosen = defense.operate(split(net, "2", EXAMPLE), images, torch.from_numpy(kind), seed=0).edge.index.tolist()
    assert 3 in chosen
    assert 7 not in chosen
    assert 9 not in chosen


@pytest.mark.parametrize(("model", "cut"), [(network, "2"), (Summed, "add")])
@pytest.mark.parametrize("choice", ["fisher", "random"])
def test_only_chosen_channels_are_sent_and_the_rest_is_as_before(model, cut, choice):
    torch.manual_seed(0)
    before = split(model(), cut, EXAMPLE)
    kept = {name: value.clone() for name, value in before.state_dict().items()}
    images, targets = world()
    after = PrivyNet(n_channels=4, choice=choice, secret_seed=3).operate(before, images, targets, seed=0)
    x = torch.rand(7, 3, 8, 10)
    sent = after.edge(x)
    assert sent.shape == (7, 4, 6, 8)
    assert after.cut.feature_shape == (4, 6, 8)
    assert torch.allclose(sent, before.edge(x)[:, after.edge.index], atol=1e-5)
    assert after(x).shape == (7, 4)
    assert after.cut.cost.feature_bytes == 4 * 48 * 4
    assert (after.cut.cost.edge.macs < before.cut.cost.edge.macs) == (model is network)
    assert all(torch.equal(value, kept[name]) for name, value in before.state_dict().items())


def test_the_cloud_starts_from_the_least_squares_guess_of_all_channels():
    before, (images, targets) = halves(), world()
    after = PrivyNet(n_channels=4, secret_seed=1).operate(before, images, targets, seed=0)
    index = after.edge.index
    pixels = torch.from_numpy(images.pixels)
    with torch.no_grad():
        z = before.edge(pixels)
        guess = after.cloud.widen(after.edge(pixels))
    rows = z.permute(0, 2, 3, 1).flatten(0, 2).double().numpy()
    design = np.concatenate([rows[:, index.numpy()], np.ones((len(rows), 1))], 1)
    solution = np.linalg.lstsq(design, rows, rcond=None)[0]
    expected = torch.from_numpy(design @ solution).float().view(90, 6, 8, 12).permute(0, 3, 1, 2)
    assert torch.allclose(guess, expected, atol=1e-3)
    assert torch.allclose(guess[:, index], z[:, index], atol=1e-3)


def test_all_channels_leave_the_split_as_it_is():
    before, (images, targets) = halves(), world()
    defense = PrivyNet(choice="all")
    after = defense.operate(before, images, targets, seed=0)
    x = torch.rand(7, 3, 8, 10)
    assert torch.equal(after(x), before(x))
    assert defense.rebuild(before, after.state_dict()).cut == before.cut


def test_the_edge_is_frozen_throughout():
    before, (images, targets) = halves(), world()
    defense = PrivyNet(n_channels=4)
    pressure = defense.pressure(defense.operate(before, images, targets, seed=0), is_mending=False, seed=0)
    assert pressure.freezes_edge
    assert defense.mending == 0


# The secret


def test_the_secret_is_drawn_anew_unless_a_seed_is_given_and_is_not_shown():
    before, (images, targets) = halves(), world(40)

    def chosen(secret_seed):
        defense = PrivyNet(n_channels=4, choice="random", drop_leaky=0, secret_seed=secret_seed)
        torch.manual_seed(0)
        random.seed(0)
        return tuple(defense.operate(before, images, targets, seed=0).edge.index.tolist())

    assert len({chosen(None) for _ in range(8)}) > 4
    assert chosen(5) == chosen(5)
    assert "12345" not in repr(PrivyNet(n_channels=4, secret_seed=12345))


# Characterization


def test_a_characterization_decides_in_place_of_the_training_images(tmp_path):
    images, targets = world()
    found = characterize(network(), EXAMPLE, images, targets, cuts=["2"], widths=[4])
    path = found.save(tmp_path / "found.json")
    turned = dataclasses.replace(found, channels={"2": found.channels["2"][::-1]}).save(tmp_path / "turned.json")
    private = Images(pixels=1 - images.pixels)

    def chosen(at):
        defense = PrivyNet(n_channels=4, spare=0, characterization=at)
        return defense.operate(halves(), private, targets, seed=0).edge.index.tolist()

    assert chosen(turned) == sorted(11 - i for i in chosen(path))
    assert chosen(turned) != chosen(path)
    with pytest.raises(ConfigError, match="other weights"):
        PrivyNet(n_channels=4, characterization=path).operate(halves(seed=1), private, targets, seed=0)


# Rebuilding


@pytest.mark.parametrize(("model", "cut"), [(network, "2"), (Summed, "add")])
def test_rebuilt_from_its_state_it_is_the_same(model, cut):
    torch.manual_seed(0)
    images, targets = world()
    defense = PrivyNet(n_channels=4)
    done = defense.finish(
        defense.operate(split(model(), cut, EXAMPLE), images, targets, seed=0), images, targets, seed=0
    ).eval()
    torch.manual_seed(8)
    again = defense.rebuild(split(model(), cut, EXAMPLE), done.state_dict())
    again.load_state_dict(done.state_dict())
    x = torch.rand(7, 3, 8, 10)
    assert torch.equal(again.eval()(x), done(x))
    assert again.cut.feature_shape == done.cut.feature_shape


# Bad input


def test_features_without_channels_and_too_many_channels_are_refused():
    images, targets = world(20)
    with pytest.raises(CutError, match="expected features of shape"):
        PrivyNet(n_channels=4).operate(halves("4"), images, targets, seed=0)
    with pytest.raises(ConfigError, match="at most 9"):
        PrivyNet(n_channels=10).operate(halves(), images, targets, seed=0)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"n_channels": 4, "choice": "fischer"}, "nearest: fisher"),
        ({"choice": "fisher"}, "expected n_channels with choice"),
        ({"n_channels": 4, "choice": "all"}, "none with"),
        ({"n_channels": 0}, "n_channels 1 or more"),
        ({"n_channels": 4, "drop_leaky": 1.0}, "drop_leaky a share"),
        ({"n_channels": 4, "spare": -0.5}, "spare 0 or more"),
    ],
)
def test_knobs_out_of_range_are_refused(knobs, message):
    with pytest.raises(ConfigError, match=message):
        PrivyNet(**knobs)
