import copy

import pytest
import torch
import torchvision
from torch import nn

from louver.cut import joined, split
from louver.defenses.masks import folded, masked, soft_masks, unmasked
from louver.defenses.pruning import residual_blocks, shaped_like, structures, without
from louver.errors import ConfigError, CutError
from louver.networks import CifarResNet, StreetNet


class ShuffledNet(nn.Module):
    """Two groups of channels, mixed as a ShuffleNet does: no channel can go without its partner."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.third = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x):
        x = torch.sigmoid(self.first(x))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.third(torch.sigmoid(self.second(x)))


class FlatNet(nn.Module):
    """An activation that is not 0 at 0, and a flatten between the cut and its reader."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 7, 3)
        self.second = nn.Conv2d(7, 5, 3)
        self.act = nn.Sigmoid()
        self.relu = nn.ReLU()
        self.flatten = nn.Flatten()
        self.head = nn.Linear(5 * 4 * 6, 6)

    def forward(self, x):
        return self.head(self.flatten(self.relu(self.second(self.act(self.first(x))))))


def inverted(c, d, e):
    """Wide inside, each channel by itself, and narrow again, as in a MobileNet."""
    wide = (nn.Conv2d(c, e, 1), nn.BatchNorm2d(e), nn.ReLU6(inplace=True))
    apart = (nn.Conv2d(e, e, 3, padding=1, groups=e), nn.BatchNorm2d(e), nn.Hardswish())
    return nn.Sequential(*wide, *apart, nn.Conv2d(e, d, 1), nn.BatchNorm2d(d))


class Inverted(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = inverted(3, 6, 9)
        self.second = inverted(6, 6, 14)
        self.third = inverted(6, 5, 8)

    def forward(self, x):
        x = self.first(x)
        x = x + self.second(x)
        return self.third(x).mean((2, 3))


NETWORKS = {
    "street": (lambda: StreetNet(5), "stage3", (3, 32, 48)),
    "resnet20": (lambda: CifarResNet(20), "layer2", (3, 16, 20)),
    "resnet8 whole": (lambda: CifarResNet(8), "layer3", (3, 16, 20)),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=6), "layer2", (3, 32, 48)),
    "inverted": (Inverted, "add", (3, 8, 10)),
    "flat": (FlatNet, "relu", (3, 8, 10)),
}


def cut_network(name, seed=0):
    """A cut network whose normalisations have seen something, so that biases and means are not zero."""
    make, at, shape = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
                module.momentum = None
        x = torch.rand(7, *shape)
        with torch.no_grad():
            network.train()(x)
    return split(network.eval(), at, x[:2]), x


def close(a, b):
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


def draw_masks(groups, blocks, seed=1):
    """Random masks; about a third of each group and every other block at zero."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for group in groups:
        mask = 0.5 + torch.rand(group.channels, generator=generator)
        masks[group.name] = mask * (torch.rand(group.channels, generator=generator) > 0.35)
        masks[group.name][0] = 0.7
    for i, block in enumerate(blocks):
        masks[block.name] = torch.tensor([0.0 if i % 2 == 0 else 1.3])
    return masks


def gone(groups, blocks, masks):
    channels = {group.name: (masks[group.name] == 0).nonzero().flatten().tolist() for group in groups}
    return channels, {block.name for block in blocks if masks[block.name] == 0}


@pytest.mark.parametrize("name", NETWORKS)
def test_pruned_is_masked_is_rebuilt(name):
    halves, x = cut_network(name)
    original = copy.deepcopy(halves.state_dict())
    groups, blocks = structures(halves, x[:2])
    assert groups
    soft = masked(halves, groups, blocks)
    with torch.no_grad():
        assert close(soft(x), halves(x)), "masks of ones change nothing"
        masks = draw_masks(groups, blocks)
        for key, mask in soft_masks(soft.edge).items():
            mask.scale.copy_(masks[key])
        expected = soft(x)
        assert not close(expected, halves(x))
        plain, read = unmasked(soft)
        assert sorted(read) == sorted(masks)
        whole = folded(plain, groups, blocks, read)
        assert close(whole(x), expected), "folded"
        lean = without(whole, groups, *gone(groups, blocks, masks), x[:2])
        pruned = joined(lean.edge, lean.cloud, x[:2], name=halves.cut.name)
        assert close(pruned(x), expected), "pruned"
    assert pruned.cut.cost.edge.macs < 0.8 * halves.cut.cost.edge.macs
    assert pruned.cut.cost.edge.parameters < halves.cut.cost.edge.parameters
    state = pruned.state_dict()
    rebuilt = shaped_like(halves, state)
    rebuilt.load_state_dict(state)
    assert rebuilt.cut.feature_shape == pruned.cut.feature_shape
    with torch.no_grad():
        assert torch.equal(rebuilt(x), pruned(x))
    assert joined(rebuilt.edge, rebuilt.cloud, x[:2], name="again").cut.cost == pruned.cut.cost
    assert all(torch.equal(tensor, original[key]) for key, tensor in halves.state_dict().items()), "the split changed"
    assert all(parameter.requires_grad for parameter in pruned.parameters())


def test_what_is_found():
    halves, x = cut_network("street")
    groups, blocks = structures(halves, x[:2])
    assert {group.name for group in groups} == {f"stage{i}.{j}" for i in (1, 2, 3) for j in (0, 3)}
    assert [group.name for group in groups if group.is_sent] == ["stage3.3"]
    assert blocks == []
    halves, x = cut_network("resnet20")
    groups, blocks = structures(halves, x[:2])
    # Padded shortcuts tie channels in ways that only the insides of blocks escape.
    assert {group.name for group in groups} == {f"layer{i}.{j}.conv1" for i in (1, 2) for j in (0, 1, 2)}
    assert [block.channels for block in blocks] == [16, 16, 16, 32, 32]
    halves, x = cut_network("resnet18")
    groups, blocks = structures(halves, x[:2])
    assert {group.name for group in groups if len(group.producers) > 2} == {"conv1", "layer2.0.downsample.0"}
    assert [block.tail for block in blocks] == ["layer1.0.bn2", "layer1.1.bn2", "layer2.1.bn2"]


def test_shuffled_channels_are_left_alone():
    x = torch.rand(7, 3, 8, 10)
    halves = split(ShuffledNet().eval(), "second", x[:2])
    groups, _ = structures(halves, x[:2])
    assert "first" not in {group.name for group in groups}


def test_channels_normalised_together_are_left_alone():
    """torch-pruning offers them; only the trial shows that the others change when one goes."""
    layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)]
    x = torch.rand(7, 3, 8, 10)
    halves = split(nn.Sequential(*layers).eval(), "4", x[:2])
    groups, _ = structures(halves, x[:2])
    assert [group.name for group in groups] == ["3"]


def test_a_mask_has_gradients_and_its_own_channel():
    halves, x = cut_network("flat")
    groups, blocks = structures(halves, x[:2])
    soft = masked(halves, groups, blocks)
    soft(x).square().sum().backward()
    scales = {name: mask.scale for name, mask in soft_masks(soft.edge).items()}
    assert sorted(scales) == ["first", "second"]
    assert all(bool((scale.grad != 0).any()) for scale in scales.values())
    with torch.no_grad():
        scales["second"][3] = 0
        features = soft.edge(x)
    assert bool((features[:, 3] == 0).all())
    assert not bool((features[:, :3] == 0).all())


def test_the_state_must_belong_to_the_split():
    halves, _ = cut_network("resnet20")
    state = dict(halves.state_dict())
    del state["edge.layer1.0.conv1.weight"]
    with pytest.raises(CutError, match=r"layer1\.0\.conv1\.weight"):
        shaped_like(halves, state)


def test_an_edge_without_a_graph_is_refused():
    halves, x = cut_network("flat")
    halves.edge = nn.Conv2d(3, 5, 5)
    with pytest.raises(ConfigError, match=r"louver\.split"):
        structures(halves, x)
    with pytest.raises(ConfigError, match="graph"):
        residual_blocks(halves.edge)
