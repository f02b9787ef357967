from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from numpy.linalg import pinv
from torch import nn
from torch.nn import functional as F

from louver.cut import split
from louver.defenses.channels import (
    Characterization,
    Choice,
    channel_scores,
    characterize,
    fisher_scores,
    linear_psnr,
    released,
    select,
)
from louver.errors import ConfigError, CutError, DataError, StorageError
from louver.points import half_cost
from louver.types import Images


class Planted(nn.Module):
    """Channel 0 tells the class and little else, channel 1 is the gray image, channels 2 and 3 tell nothing of use."""

    def forward(self, x):
        tint = x[:, :1].mean((2, 3), keepdim=True) - x[:, 1:2].mean((2, 3), keepdim=True)
        flat = tint.expand(-1, -1, 8, 10) * 3
        return torch.cat([flat, x.mean(1, keepdim=True), torch.sin(300 * x[:, :1]), torch.sin(300 * x[:, 1:2])], 1)


def world(n: int = 200) -> tuple[Images, torch.Tensor]:
    """Gray noise, tinted by the class."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 2, n)
    pixels = np.repeat(rng.uniform(0.2, 0.8, (n, 1, 8, 10)), 3, axis=1)
    pixels[:, 0] += 0.04 * (2 * kind[:, None, None] - 1) + rng.normal(0, 0.01, (n, 1, 1))
    return Images(pixels=pixels.astype(np.float32)), torch.from_numpy(kind)


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 12, 3, stride=2, padding=1), nn.ReLU()
    )
    return nn.Sequential(*net, nn.Flatten(), nn.Linear(240, 2)).eval()


def slow_fisher(responses: np.ndarray, targets: np.ndarray) -> list[float]:
    scores = []
    for j in range(responses.shape[1]):
        x = responses[:, j].astype(np.float64)
        within, between = np.zeros((x.shape[1],) * 2), np.zeros((x.shape[1],) * 2)
        for k in set(targets.tolist()):
            mine = x[targets == k]
            for row in mine:
                within += np.outer(row - mine.mean(0), row - mine.mean(0))
            between += len(mine) * np.outer(mine.mean(0) - x.mean(0), mine.mean(0) - x.mean(0))
        scores.append(float(np.trace(pinv(within, rcond=1e-10, hermitian=True) @ between)))
    return scores


# Scores


def test_fisher_scores_are_those_of_a_slow_loop():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 4, 61)
    x = rng.normal(size=(61, 5, 6)).astype(np.float32) + 10
    x[:, 2] += 0.5 * targets[:, None] * np.arange(6)
    got = fisher_scores(torch.from_numpy(x), torch.from_numpy(targets))
    assert np.allclose(got.numpy(), slow_fisher(x, targets), rtol=1e-6)
    assert int(got.argmax()) == 2
    two = torch.from_numpy(np.stack([targets, targets % 2], 1))
    assert np.allclose(
        fisher_scores(torch.from_numpy(x), two).numpy(),
        np.add(slow_fisher(x, targets), slow_fisher(x, targets % 2)),
        rtol=1e-6,
    )


def test_degenerate_scatter_is_no_infinity_and_repeats_count_once():
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 3, 40)
    x = np.zeros((40, 3, 4), np.float32)  # channel 0 is dead
    x[:, 1] = rng.normal(size=(40, 1)) + targets[:, None]  # the same response in every cell
    x[:, 2, :2] = rng.normal(size=(40, 2)) + targets[:, None]
    got = fisher_scores(torch.from_numpy(x), torch.from_numpy(targets))
    single = fisher_scores(torch.from_numpy(x[:, 1:2, :1]), torch.from_numpy(targets))
    assert got[0] == 0
    assert float(got[1]) == pytest.approx(float(single), rel=1e-9)
    assert np.allclose(got.numpy(), slow_fisher(x, targets), rtol=1e-6)


def test_one_class_is_refused():
    with pytest.raises(DataError, match="2 classes or more"):
        fisher_scores(torch.rand(20, 3, 4), torch.zeros(20, dtype=torch.long))


def test_the_planted_channels_are_found():
    images, targets = world()
    scores = channel_scores(Planted(), images, targets, has_psnr=True)
    fisher, leak = [score.fisher for score in scores], [score.psnr for score in scores]
    assert np.argmax(fisher) == 0
    assert fisher[0] > 10 * max(fisher[1:])
    assert np.argmax(leak) == 1
    assert leak[1] > 20 + max(leak[0], *leak[2:])
    assert all(s.psnr is None for s in channel_scores(Planted(), images, targets, has_psnr=False))


def test_a_constant_leaks_what_the_mean_image_does():
    pixels = torch.from_numpy(world()[0].pixels)
    mean = pixels[:120].mean(0)
    floor = float((-10 * torch.log10((pixels[160:] - mean).square().flatten(1).mean(1))).mean())
    assert linear_psnr(torch.full((200, 2, 4, 5), 0.3), pixels) == pytest.approx(floor, abs=0.05)
    assert linear_psnr(pixels, pixels) > 50


def test_channels_need_enough_images_with_targets():
    images, targets = world(9)
    with pytest.raises(DataError, match="10 images or more"):
        channel_scores(Planted(), images, targets, has_psnr=False)
    images, targets = world(30)
    with pytest.raises(DataError, match="29 targets"):
        channel_scores(Planted(), images, targets[:29], has_psnr=False)


# Surgery


class Tied(nn.Module):
    """The last convolution runs twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(240, 2)

    def forward(self, x):
        return self.head(self.conv(self.conv(x)).relu().flatten(1))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.bn, self.act, self.head = nn.BatchNorm2d(6), nn.ReLU(), nn.Linear(480, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.act(self.bn(self.conv(x)) + x).flatten(1))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Linear(72, 2)

    def forward(self, x):
        return self.head(F.max_pool2d(F.relu(self.bn(self.conv(x))), 2).flatten(1))


class InPlace(nn.Module):
    """A skip that is added in place leaves the convolution at the end of the chain, with another user beside."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.act = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.ReLU()
        self.head = nn.Linear(480, 2)

    def forward(self, x):
        x = self.stem(x)
        z = self.conv(x)
        z.add_(x)
        return self.head(self.act(z).flatten(1))


def depthwise() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(), nn.Linear(288, 2))


@pytest.mark.parametrize(
    ("build", "cut", "is_removed"),
    [
        (network, "0", True),
        (network, "1", True),
        (network, "2", True),
        (network, "4", True),
        (Functional, "relu", True),
        (Functional, "max_pool2d", False),
        (Residual, "act", False),
        (InPlace, "act", False),
        (depthwise, "1", False),
        (depthwise, "0", True),
        (Tied, "conv_1", False),
    ],
)
def test_released_channels_are_those_of_the_whole_edge(build, cut, is_removed):
    torch.manual_seed(1)
    net = build().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    example = torch.rand(2, 3, 8, 10)
    halves = split(net, cut, example)
    before = {name: value.clone() for name, value in halves.state_dict().items()}
    index = torch.tensor([0, 2])
    edge = released(halves.edge, index)
    x = torch.rand(7, 3, 8, 10)
    assert edge.is_removed == is_removed
    assert torch.allclose(edge(x), halves.edge(x)[:, index], atol=1e-6)
    cost = half_cost(edge, example)
    assert (cost.macs < halves.cut.cost.edge.macs) == is_removed
    assert torch.equal(edge.index, index)
    assert all(torch.equal(value, before[name]) for name, value in halves.state_dict().items())


# Characterization


@pytest.fixture(scope="module")
def found() -> Characterization:
    images, targets = world(120)
    return characterize(network(), torch.rand(2, 3, 8, 10), images, targets, cuts=["2", "4"], widths=[3, 8], seed=5)


def test_every_affordable_choice_is_there_with_its_cost(found):
    assert [(c.cut, c.n_channels) for c in found.choices] == [("2", 3), ("4", 3), ("4", 8)]
    assert {cut: len(scores) for cut, scores in found.channels.items()} == {"2": 6, "4": 12}
    first, second, third = found.choices
    assert first.macs == 8 * 10 * 3 * 27  # three filters of 3x3x3 at each of 80 places
    assert third.macs - second.macs == 4 * 5 * 5 * 54
    assert third.weight_bytes - second.weight_bytes == 5 * (54 + 1) * 4 + 5 * 8
    assert (first.feature_bytes, third.feature_bytes) == (3 * 80 * 4, 8 * 20 * 4)
    assert all(0 <= c.accuracy <= 1 and 0 < c.psnr < 100 for c in found.choices)
    assert third.psnr > second.psnr


def test_accuracy_of_the_head_is_that_of_the_classes():
    images, targets = world()
    net = nn.Sequential(Planted(), nn.Flatten(), nn.Linear(320, 2))
    (easy,) = characterize(net, torch.rand(2, 3, 8, 10), images, targets, cuts=["0"], widths=[4]).choices
    shuffled = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))]
    (chance,) = characterize(net, torch.rand(2, 3, 8, 10), images, shuffled, cuts=["0"], widths=[4]).choices
    assert easy.accuracy > 0.95
    assert chance.accuracy < 0.7


def test_the_leakage_of_a_choice_is_that_of_its_worst_draw():
    images, targets = world(100)
    net = nn.Sequential(Planted(), nn.Flatten(), nn.Linear(320, 2))
    many = characterize(net, torch.rand(2, 3, 8, 10), images, targets, cuts=["0"], widths=[1], n_draws=8)
    worst, *rest = sorted((score.psnr for score in many.channels["0"]), reverse=True)
    assert many.choices[0].psnr == pytest.approx(worst)
    assert worst > 20 + rest[0]


def test_it_is_the_same_twice_and_leaves_torch_and_the_network_alone(found):
    images, targets = world(120)
    net = network().train()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    again = characterize(net, torch.zeros(2, 3, 8, 10), images, targets, cuts=["2", "4"], widths=[3, 8], seed=5)
    assert torch.equal(torch.rand(3), expected)
    assert net.training
    assert again.edges == found.edges
    assert again.choices == found.choices


def test_the_file_gives_back_what_was_saved(found, tmp_path):
    path = found.save(tmp_path / "deep" / "characterization.json")
    assert Characterization.load(path) == found


@pytest.mark.parametrize("damage", ["{}", "no json", "[1, 2]"])
def test_another_file_is_refused(damage, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(damage)
    with pytest.raises(DataError, match="not a characterization"):
        Characterization.load(path)


def test_another_format_a_wrong_type_and_no_file_are_refused(found, tmp_path):
    content = json.loads(found.save(tmp_path / "a.json").read_text())
    (tmp_path / "b.json").write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(DataError, match="format 1, got 2"):
        Characterization.load(tmp_path / "b.json")
    (tmp_path / "c.json").write_text(json.dumps(content | {"n_images": "120"}))
    with pytest.raises(DataError, match="n_images"):
        Characterization.load(tmp_path / "c.json")
    with pytest.raises(StorageError, match="cannot read"):
        Characterization.load(tmp_path / "none.json")


def test_scores_are_given_for_the_same_weights_only(found):
    halves = split(network(), "4", torch.rand(2, 3, 8, 10))
    assert found.scores("4", halves.edge) == found.channels["4"]
    with pytest.raises(ConfigError, match="no cut '3'"):
        found.scores("3", halves.edge)
    with torch.no_grad():
        next(halves.edge.parameters()).add_(0.01)
    with pytest.raises(ConfigError, match="other weights"):
        found.scores("4", halves.edge)


def test_a_cut_without_channels_and_a_width_that_fits_nowhere_are_refused():
    images, targets = world(30)
    common = (network(), torch.rand(2, 3, 8, 10), images, targets)
    with pytest.raises(CutError, match="features of shape"):
        characterize(*common, cuts=["5"], widths=[3])
    with pytest.raises(ConfigError, match="width of at most 12"):
        characterize(*common, cuts=["4"], widths=[13])
    with pytest.raises(ConfigError, match="widths of 1 or more"):
        characterize(*common, cuts=["4"], widths=[0])


# Selection


def choice(cut, n_channels, accuracy, psnr, macs, weight_bytes) -> Choice:
    return Choice(
        cut=cut,
        n_channels=n_channels,
        accuracy=accuracy,
        psnr=psnr,
        macs=macs,
        weight_bytes=weight_bytes,
        feature_bytes=1,
    )


def grid() -> Characterization:
    choices = (
        choice("a", 8, 0.9, 25.0, 100, 10),
        choice("b", 8, 0.8, 18.0, 200, 20),
        choice("b", 4, 0.7, 14.0, 150, 15),
        choice("c", 8, 0.8, 16.0, 400, 40),
    )
    return Characterization(network="Net", images="i", n_images=9, seed=0, choices=choices, channels={}, edges={})


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, ("a", 8)),
        ({"max_psnr": 18.0}, ("c", 8)),
        ({"max_psnr": 18.0, "max_macs": 200}, ("b", 8)),
        ({"max_psnr": 18.0, "max_bytes": 15}, ("b", 4)),
        ({"max_macs": 100}, ("a", 8)),
    ],
)
def test_the_most_accurate_within_limits_is_selected(limits, expected):
    got = select(grid(), **limits)
    assert (got.cut, got.n_channels) == expected


def test_limits_that_nothing_meets_list_the_nearest():
    with pytest.raises(ConfigError, match=r"psnr up to 13.*nearest: 'b' with 4 channels \(14\.0 dB"):
        select(grid(), max_psnr=13.0)
    with pytest.raises(ConfigError, match="limits above 0"):
        select(grid(), max_macs=0)


def test_a_characterization_cannot_be_changed(found):
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.seed = 1
