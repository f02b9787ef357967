import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from louver import training
from louver.cut import split
from louver.defenses.base import Batch
from louver.defenses.masks import soft_masks
from louver.defenses.patrol import PATROL, Ledger, budget_of, choose, soft_threshold
from louver.defenses.pruning import structures
from louver.errors import ConfigError, CutError
from louver.networks import CifarResNet
from louver.tasks import Classification
from toys import pictures

SHAPE = (3, 16, 20)
IMAGES = pictures(48, seed=1, shape=SHAPE)
TARGETS = torch.from_numpy(IMAGES.labels["kind"])


def plain_net(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stages = [
            (nn.Conv2d(c, d, 3, padding=1, stride=stride), nn.BatchNorm2d(d), nn.ReLU())
            for c, d, stride in ((3, 6, 1), (6, 10, 2), (10, 12, 1))
        ]
        layers = [*itertools.chain(*stages), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3)]
        return nn.Sequential(*layers).eval()


def plain_split(at="8"):
    return split(plain_net(), at, torch.rand(2, *SHAPE))


def resnet_split():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return split(CifarResNet(14, n_classes=3).eval(), "layer2", torch.rand(2, *SHAPE))


def train(halves, pressure, *, steps, learning_rate=0.02, seed=0, batch_size=16):
    """The plain loop that hardening runs, small."""
    halves.train()
    parameters = [parameter for parameter in halves.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9)
    shuffle = np.random.default_rng(seed)
    history = []
    for _ in range(steps):
        index = shuffle.permutation(len(IMAGES))[:batch_size]
        images = torch.from_numpy(IMAGES.floats(index))
        features = halves.edge(images)
        outputs = halves.cloud(features)
        batch = Batch(images=images, features=features, outputs=outputs, targets=TARGETS[torch.from_numpy(index)])
        pressure.before(halves, batch)
        terms = {"task": F.cross_entropy(outputs, batch.targets), **pressure.terms(halves, batch)}
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        pressure.after(halves, learning_rate=learning_rate)
        history.append({name: value.item() for name, value in terms.items()})
    halves.eval()
    return history


def harden(defense, halves, *, steps=3):
    soft = defense.operate(halves, IMAGES, TARGETS, seed=0)
    train(soft, defense.pressure(soft, is_mending=False, seed=0), steps=steps)
    hard = defense.finish(soft, IMAGES, TARGETS, seed=0)
    train(hard, defense.pressure(hard, is_mending=True, seed=0), steps=steps)
    return hard


# The proximal step


def test_soft_threshold_against_the_closed_form_and_a_search():
    values = torch.tensor([-2.0, -0.3, 0.0, 0.1, 0.5, 1.7])
    got = soft_threshold(values, 0.4)
    assert got.tolist() == pytest.approx([-1.6, 0, 0, 0, 0.1, 1.3])
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    for value, point in zip(values, got, strict=True):
        cost = 0.4 * grid.abs() + (grid - value).square() / 2
        assert grid[cost.argmin()].item() == pytest.approx(point.item(), abs=2e-4)


def test_masks_shrink_by_rate_times_sparsity_until_the_rest_fits():
    defense = PATROL(sparsity=0.5, has_lipschitz=False, has_adversary=False, target_share=0.5)
    soft = defense.operate(plain_split(), IMAGES, TARGETS, seed=0)
    pressure = defense.pressure(soft, is_mending=False, seed=0)
    x = torch.from_numpy(IMAGES.floats(slice(0, 4)))
    features = soft.edge(x)
    pressure.before(soft, Batch(images=x, features=features, outputs=features, targets=TARGETS[:4]))
    pressure.after(soft, learning_rate=0.1)
    masks = soft_masks(soft.edge)
    assert masks
    assert all(mask.scale.tolist() == pytest.approx([0.95] * len(mask.scale)) for mask in masks.values())
    with torch.no_grad():
        for mask in masks.values():
            mask.scale[: len(mask.scale) // 2] = 0
    pressure.after(soft, learning_rate=0.1)
    assert all(mask.scale[-1].item() == pytest.approx(0.95) for mask in masks.values()), "the rest fits the budget"


@pytest.mark.parametrize("make", [plain_split, resnet_split])
@pytest.mark.parametrize("epochs", [1, 4])
def test_training_itself_silences_all_that_the_removal_takes_out(make, epochs):
    defense = PATROL(target_share=0.5, has_lipschitz=False, has_adversary=False)
    halves = make()
    soft = training.train(
        defense.operate(halves, IMAGES, TARGETS, seed=0),
        Classification("kind", 3),
        IMAGES,
        IMAGES,
        defense.pressure(halves, is_mending=False, seed=0),
        config=training.Training(batch_size=6, lr=1e-3),
        epochs=epochs,
        seed=0,
        choose_after=0.5,
    )
    values = torch.cat([mask.scale for mask in soft_masks(soft.edge).values()])
    silent = (values == 0).float().mean()
    assert 0.1 < silent < 0.9, "some go and some stay"
    assert values.abs().max() > 0.8, "what stays is not shrunk with them"
    hard = defense.finish(soft, IMAGES, TARGETS, seed=0)
    assert hard.cut.cost.edge.macs <= 0.5 * halves.cut.cost.edge.macs
    x = torch.from_numpy(IMAGES.floats(slice(0, 8)))
    assert torch.allclose(hard(x), soft(x), atol=1e-4), "the removal changes nothing that is computed"


# The budget


@pytest.mark.parametrize("make", [plain_split, resnet_split])
@pytest.mark.parametrize("share", [0.8, 0.3])
def test_the_budget_is_kept_and_hardly_undercut(make, share):
    halves = make()
    before = copy.deepcopy(halves.state_dict())
    defense = PATROL(target_share=share, has_lipschitz=False, has_adversary=False)
    hard = defense.finish(defense.operate(halves, IMAGES, TARGETS, seed=0), IMAGES, TARGETS, seed=0)
    edge = halves.cut.cost.edge.macs
    assert 0.75 * share * edge < hard.cut.cost.edge.macs <= share * edge
    assert hard.cut.name == halves.cut.name
    assert all(torch.equal(tensor, before[name]) for name, tensor in halves.state_dict().items())


def test_the_budget_of_a_shallower_cut():
    example = torch.rand(2, *SHAPE)
    assert budget_of(plain_net(), "5", example) == plain_split("5").cut.cost.edge.macs
    with pytest.raises(CutError, match="55"):
        budget_of(plain_net(), "55", example)
    hard = harden(PATROL(target_macs=budget_of(plain_net(), "5", example)), plain_split())
    assert hard.cut.cost.edge.macs <= plain_split("5").cut.cost.edge.macs
    assert hard.cut.name == "8"


def test_an_unreachable_budget_says_what_can_be_reached():
    halves, example = plain_split(), torch.rand(2, *SHAPE)
    groups, blocks = structures(halves, example)
    least = Ledger.of(halves.edge, groups, blocks, example).macs({group.name: 1 for group in groups}, ())
    defense = PATROL(target_macs=least - 1, least_share=0.01)
    with pytest.raises(ConfigError, match=rf"unreachable MAC budget.*{least:,}.*raise target_macs"):
        defense.operate(halves, IMAGES, TARGETS, seed=0)
    reached = PATROL(target_macs=least, least_share=0.01, has_lipschitz=False, has_adversary=False)
    hard = reached.finish(reached.operate(halves, IMAGES, TARGETS, seed=0), IMAGES, TARGETS, seed=0)
    assert hard.cut.cost.edge.macs == least


@pytest.mark.parametrize("make", [plain_split, resnet_split])
def test_the_ledger_counts_as_the_cost_does(make):
    halves, example = make(), torch.rand(2, *SHAPE)
    defense = PATROL(target_share=0.4, has_lipschitz=False, has_adversary=False)
    groups, blocks = structures(halves, example)
    ledger = Ledger.of(halves.edge, groups, blocks, example)
    assert ledger.total == halves.cut.cost.edge.macs
    masks = {structure.name: torch.rand(structure.channels) for structure in groups}
    masks |= {block.name: torch.rand(1) for block in blocks}
    channels, lost = choose(ledger, masks, defense.budget(ledger), least_share=0.1)
    kept = {group.name: group.channels - len(channels[group.name]) for group in groups}
    soft = defense.operate(halves, IMAGES, TARGETS, seed=0)
    with torch.no_grad():
        for name, mask in soft_masks(soft.edge).items():
            mask.scale.copy_(masks[name])
    hard = PATROL(target_share=0.4, least_share=0.1).finish(soft, IMAGES, TARGETS, seed=0)
    assert hard.cut.cost.edge.macs == ledger.macs(kept, lost)


def test_the_smallest_masks_go_first():
    halves, example = plain_split(), torch.rand(2, *SHAPE)
    groups, blocks = structures(halves, example)
    ledger = Ledger.of(halves.edge, groups, blocks, example)
    masks = {group.name: torch.linspace(0.2, 1, group.channels).flip(0) for group in groups}
    channels, _ = choose(ledger, masks, ledger.total // 2, least_share=0.125)
    for group in groups:
        n = len(channels[group.name])
        assert channels[group.name] == list(range(group.channels))[::-1][:n]
    masks["0"] = torch.full((6,), 100.0)
    spared, _ = choose(ledger, masks, ledger.total // 2, least_share=0.125)
    assert spared["0"] == []
    assert channels["0"] != []


# Whole


def test_finish_keeps_what_zero_masks_compute():
    halves = resnet_split()
    defense = PATROL(target_share=0.6, has_lipschitz=False, has_adversary=False)
    soft = defense.operate(halves, IMAGES, TARGETS, seed=0)
    plain, example = resnet_split(), torch.rand(2, *SHAPE)
    groups, blocks = structures(plain, example)
    generator = torch.Generator().manual_seed(2)
    masks = {name: torch.rand(len(mask.scale), generator=generator) for name, mask in soft_masks(soft.edge).items()}
    ledger = Ledger.of(plain.edge, groups, blocks, example)
    channels, lost = choose(ledger, masks, defense.budget(ledger), least_share=defense.least_share)
    assert lost
    assert any(channels.values())
    with torch.no_grad():
        for name, mask in soft_masks(soft.edge).items():
            mask.scale.copy_(masks[name])
    hard = defense.finish(soft, IMAGES, TARGETS, seed=0)
    with torch.no_grad():
        for name, mask in soft_masks(soft.edge).items():
            mask.scale[channels.get(name, [0] if name in lost else [])] = 0
        x = torch.rand(7, *SHAPE)
        assert torch.allclose(hard(x), soft(x), atol=1e-5)


@pytest.mark.parametrize("make", [plain_split, resnet_split])
def test_a_hardened_split_is_rebuilt_from_its_state(make):
    defense = PATROL(target_share=0.4)
    hard = harden(defense, make())
    assert not soft_masks(hard.edge)
    state = {name: tensor.clone() for name, tensor in hard.state_dict().items()}
    rebuilt = defense.rebuild(make(), state)
    rebuilt.load_state_dict(state)
    x = torch.rand(7, *SHAPE)
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(x), hard(x))
    assert rebuilt.cut.feature_shape == hard.cut.feature_shape


def test_each_part_can_be_switched_off():
    def names(**knobs):
        defense = PATROL(**knobs)
        soft = defense.operate(plain_split(), IMAGES, TARGETS, seed=0)
        history = train(soft, defense.pressure(soft, is_mending=False, seed=0), steps=1)
        return set(history[0]), bool(soft_masks(soft.edge)), defense.mending

    assert names() == ({"task", "lipschitz", "adversary"}, True, 0.4)
    assert names(is_pruned=False) == ({"task", "lipschitz", "adversary"}, False, 0.0)
    assert names(has_lipschitz=False) == ({"task", "adversary"}, True, 0.4)
    assert names(has_adversary=False) == ({"task", "lipschitz"}, True, 0.4)
    defense = PATROL(is_pruned=False)
    halves = plain_split()
    same = defense.finish(defense.operate(halves, IMAGES, TARGETS, seed=0), IMAGES, TARGETS, seed=0)
    assert same.cut == halves.cut


def test_training_lowers_the_lipschitz_term_and_raises_the_error():
    def last(**knobs):
        defense = PATROL(is_pruned=False, **knobs)
        soft = defense.operate(plain_split(), IMAGES, TARGETS, seed=0)
        history = train(soft, defense.pressure(soft, is_mending=False, seed=0), steps=40)
        return {name: np.mean([terms[name] for terms in history[-8:]]) for name in history[0]}

    weak, strong = last(alpha=1e-6, has_adversary=False), last(alpha=0.1, has_adversary=False)
    assert strong["lipschitz"] / 0.1 < 0.9 * weak["lipschitz"] / 1e-6
    weak, strong = last(beta=1e-6, has_lipschitz=False), last(beta=3.0, has_lipschitz=False)
    assert strong["adversary"] < 0, "the edge is paid for the inverter's error"
    assert -strong["adversary"] / 3 > 1.1 * -weak["adversary"] / 1e-6


def test_a_step_down_the_adversary_term_raises_the_error():
    defense = PATROL(is_pruned=False, has_lipschitz=False, beta=2.0, adversary_share=0.4)
    halves = plain_split()
    pressure = defense.pressure(halves, is_mending=False, seed=0)
    x = torch.from_numpy(IMAGES.floats(slice(0, 20)))
    features = halves.edge(x).detach().requires_grad_()
    batch = Batch(images=x, features=features, outputs=features, targets=TARGETS[:20])
    for _ in range(20):
        pressure.before(halves, batch)
    term = pressure.terms(halves, batch)["adversary"]
    (slope,) = torch.autograd.grad(term, features)
    assert bool((slope[:8] != 0).any())
    assert not bool(slope[8:].any()), "the inverter sees its share of the batch"
    adversary = pressure.adversary.on(batch.images, batch.features)
    moved = features.detach() - 1.0 * slope / slope.norm()
    before, after = (adversary.error(x[:8], z[:8]).item() for z in (features.detach(), moved))
    assert term.item() == pytest.approx(-2.0 * before, rel=1e-5)
    assert after > before


@pytest.mark.parametrize("is_mending", [False, True])
def test_a_stopped_run_goes_on_bit_for_bit(is_mending):
    defense = PATROL(target_share=0.5, sparsity=1.0)

    def start():
        halves = plain_split() if is_mending else defense.operate(plain_split(), IMAGES, TARGETS, seed=0)
        return halves, defense.pressure(halves, is_mending=is_mending, seed=5)

    whole, pressure = start()
    train(whole, pressure, steps=3, seed=1)
    kept = copy.deepcopy((whole.state_dict(), pressure.state_dict(), pressure.held()))
    train(whole, pressure, steps=3, seed=2)

    again, second = start()
    again.load_state_dict(kept[0])
    second.load_state_dict(kept[1])
    second.hold(kept[2])
    assert sorted(second.held()) == sorted(kept[2])
    train(again, second, steps=3, seed=2)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in whole.state_dict().items())
    assert all(torch.equal(tensor, second.held()[name]) for name, tensor in pressure.held().items())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", -1.0),
        ("beta", float("inf")),
        ("sparsity", float("nan")),
        ("target_share", 0.0),
        ("lipschitz_share", 1.5),
        ("adversary_share", 0.0),
        ("least_share", 0.0),
        ("noise_std", 0.0),
        ("mending_share", 1.0),
        ("target_macs", 0),
    ],
)
def test_knobs_outside_their_range(name, value):
    with pytest.raises(ConfigError, match=name):
        PATROL(**{name: value})
