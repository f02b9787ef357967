"""PATROL: a deeper edge pruned to the cost of a shallower one, smooth, and trained against an inverter."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from louver.cut import Split, joined
from louver.cut import split as cut_at
from louver.defenses.adversary import LaterAdversary
from louver.defenses.base import Batch, Defense, Pressure
from louver.defenses.lipschitz import block_ends, graph_of, lipschitz_constants, shapes_of, tapped
from louver.defenses.masks import Block, Group, folded, masked, soft_masks, unmasked
from louver.defenses.pruning import shaped_like, structures, without
from louver.errors import ConfigError
from louver.points import half_cost
from louver.types import Images

__all__ = ["PATROL", "Ledger", "budget_of", "choose", "soft_threshold"]

_FREE_UNTIL, _GONE_BY = 0.25, 0.5
"""Shares of the stage: masks are first free to show what they are worth, then those that must go are brought to zero.

Weights are chosen among the second half of the epochs (`louver.harden`), so whichever are chosen fit the budget.
"""


@dataclass(frozen=True, kw_only=True)
class PATROL(Defense):
    """Task loss + alpha · Σ k_i − beta · the inverter's error, on an edge that masks shrink to a budget of MACs.

    The edge goes down to `target_macs` multiply-accumulates an image (see `budget_of`), or to `target_share` of its
    own where that is None. `sparsity` is the weight of the L1 norm of the masks, which rests while what is not yet zero
    fits the budget. After a quarter of the epochs before the removal, the masks that harm least and save most are
    brought down to zero, which they reach at half, so that the removal takes out what is already silent.
    `least_share` of the channels of every group stays. `noise_std` is that of δ, in pixels of range
    1. The Lipschitz constants are taken over `lipschitz_share` of each batch, the inverter works on `adversary_share`
    of it: the two knobs of how much slower than plain training this is. The inverter's error is its mean squared error
    as a share of the pictures' variance. `mending_share` of the epochs follow the removal.

    Each of the three parts can be switched off; without `is_pruned` the edge keeps its cost and there is no mending.

    A trap: an edge whose Lipschitz constants are small hides nothing by that alone, since an attacker who standardises
    the features undoes any shrinking. Judge it by attacks that do, as those of `louver.attacks`.

    Raises:
        ConfigError: a knob outside its range; (from `operate` and `finish`) an unreachable MAC budget, or an edge
            without a graph.

    Source: PATROL (arXiv 2307.10981): learnable masks on channels and blocks, the Lipschitz regulariser and the
    adversarial reconstruction term are the paper's. We differ or had to choose: the L1 norm with a proximal step, the
    ranking (magnitude for each channel silenced and MAC saved), the falling cap on what it takes (the L1 norm alone
    reaches no budget in a short training), removal by torch-pruning and the share of mending; one
    alpha for all blocks; the supremum over part of a batch, x and x + δ going through the edge as one; the relative
    error; the sum of the terms.
    """

    target_macs: int | None = None
    target_share: float = 0.5
    alpha: float = 0.005
    beta: float = 0.5
    sparsity: float = 3.0
    noise_std: float = 0.05
    least_share: float = 0.125
    lipschitz_share: float = 0.25
    adversary_share: float = 0.5
    adversary_width: int = 32
    mending_share: float = 0.4
    is_pruned: bool = True
    has_lipschitz: bool = True
    has_adversary: bool = True

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "sparsity"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"PATROL: expected {name} of 0 or more, got {getattr(self, name)}")
        for name in ("target_share", "lipschitz_share", "adversary_share", "least_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"PATROL: expected {name} above 0 and at most 1, got {getattr(self, name)}")
        if not 0 <= self.mending_share < 1:
            raise ConfigError(f"PATROL: expected mending_share from 0 to below 1, got {self.mending_share}")
        if not 0 < self.noise_std < math.inf:
            raise ConfigError(f"PATROL: expected a noise_std above 0, got {self.noise_std}")
        if self.target_macs is not None and self.target_macs < 1:
            raise ConfigError(f"PATROL: expected target_macs of 1 or more, got {self.target_macs}; see `budget_of`")

    @property
    def mending(self) -> float:
        """`mending_share`, where there is something to mend."""
        return self.mending_share if self.is_pruned else 0.0

    def operate(self, split: Split, images: Images, targets: Tensor, *, seed: int) -> Split:
        """The split with a mask on each structure that can go."""
        if not self.is_pruned:
            return copy.deepcopy(split)
        device, work, example = _at_hand(split, images)
        groups, blocks = structures(work, example)
        self.budget(Ledger.of(work.edge, groups, blocks, example))
        return masked(work, groups, blocks).to(device)

    def pressure(self, split: Split, *, is_mending: bool, seed: int) -> Pressure:
        """The three parts; after the removal without the masks."""
        return PatrolPressure(self, is_pruned=self.is_pruned and not is_mending, seed=seed)

    def finish(self, split: Split, images: Images, targets: Tensor, *, seed: int) -> Split:
        """The split at or below the budget, masks folded into its weights; a mask left at zero leaves zero weights."""
        if not self.is_pruned:
            return copy.deepcopy(split)
        device, work, example = _at_hand(split, images)
        plain, masks = unmasked(work)
        groups, blocks = structures(plain, example, names=masks)
        ledger = Ledger.of(plain.edge, groups, blocks, example)
        budget = self.budget(ledger)
        channels, lost = choose(ledger, masks, budget, least_share=self.least_share)
        lean = without(folded(plain, groups, blocks, masks), groups, channels, lost, example)
        pruned = joined(lean.edge.eval(), lean.cloud.eval(), example, name=split.cut.name)
        pruned.cut = replace(pruned.cut, aliases=split.cut.aliases)
        assert pruned.cut.cost.edge.macs <= budget, (pruned.cut.cost.edge.macs, budget)
        return pruned.to(device)

    def rebuild(self, split: Split, state: Mapping[str, Tensor]) -> Split:
        """The split in the shapes of `state`."""
        return shaped_like(split, state)

    def budget(self, ledger: Ledger) -> int:
        """MACs that the edge may take.

        Raises:
            ConfigError: it cannot get there.
        """
        budget = int(self.target_share * ledger.total) if self.target_macs is None else self.target_macs
        least = ledger.macs(
            {group.name: _floor(group, self.least_share) for group in ledger.groups},
            {block.name for block in ledger.blocks},
        )
        if least > budget:
            raise ConfigError(
                f"PATROL: an unreachable MAC budget: expected an edge of at most {budget:,} MACs, but this one of "
                f"{ledger.total:,} can be pruned to {least:,} at the least, with {len(ledger.blocks)} blocks and all "
                f"but {self.least_share:.3g} of the channels of {len(ledger.groups)} groups gone; raise target_macs or "
                "target_share, lower least_share, or cut shallower"
            )
        return budget


def budget_of(model: nn.Module, shallower_cut: str, example: Float[Tensor, "n c h w"]) -> int:
    """MACs of the unprotected edge at a shallower cut: what PATROL's deeper edge may take, as its `target_macs`.

    Raises:
        CutError: there is no such cut.
    """
    return cut_at(model, shallower_cut, example).cut.cost.edge.macs


def _at_hand(split: Split, images: Images) -> tuple[torch.device, Split, Tensor]:
    """Where the split is, a copy of it on the processor, and two images."""
    device = next((parameter.device for parameter in split.parameters()), torch.device("cpu"))
    return device, copy.deepcopy(split).cpu(), torch.from_numpy(images.floats(slice(0, 2)))


def _floor(group: Group, least_share: float) -> int:
    return max(1, math.ceil(least_share * group.channels))


# The budget


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What the edge costs with channels and blocks gone: `layers` are (path, MACs, groups it makes or reads).

    `total` MACs hold for the whole edge; what is not in `layers` is counted as it is now.
    """

    total: int
    groups: tuple[Group, ...]
    blocks: tuple[Block, ...]
    layers: Mapping[str, tuple[int, tuple[str, ...]]]

    @classmethod
    def of(cls, edge: nn.Module, groups: Sequence[Group], blocks: Sequence[Block], example: Tensor) -> Ledger:
        """The ledger of an unmasked edge."""
        shapes, graph = shapes_of(edge, example), graph_of(edge)
        layers: dict[str, tuple[int, tuple[str, ...]]] = {}
        for node in graph.graph.nodes:
            layer = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                path = str(node.target)
                macs = math.prod(shapes[node.name][1:]) * layer.weight[0].numel() + layers.get(path, (0, ()))[0]
                # A depthwise convolution is a producer of the group that it reads, once.
                touched = [g.name for g in groups if f"edge.{path}" in (*g.producers, *g.consumers)]
                both = [g.name for g in groups if f"edge.{path}" in g.producers and f"edge.{path}" in g.consumers]
                layers[path] = (macs, (*touched, *both))
        total = half_cost(edge, example).macs
        return cls(total=total, groups=tuple(groups), blocks=tuple(blocks), layers=layers)

    def macs(self, kept: Mapping[str, int], lost: Iterable[str]) -> int:
        """MACs with so many channels kept of each group and these blocks lost."""
        gone = self.gone(lost)
        size = {group.name: group.channels for group in self.groups}
        saved = sum(
            macs - (0 if path in gone else _scaled(macs, touched, kept, size))
            for path, (macs, touched) in self.layers.items()
        )
        return self.total - saved

    def gone(self, lost: Iterable[str]) -> set[str]:
        """The paths of the layers in these blocks."""
        names = set(lost)
        return {path for block in self.blocks if block.name in names for path in block.layers}


def _scaled(macs: int, touched: Iterable[str], kept: Mapping[str, int], size: Mapping[str, int]) -> int:
    for name in touched:
        macs = macs * kept[name] // size[name]
    return macs


def choose(
    ledger: Ledger, masks: Mapping[str, Tensor], budget: int, *, least_share: float
) -> tuple[dict[str, list[int]], set[str]]:
    """The channels of each group and the blocks to take out, until the edge costs `budget` MACs or less.

    What goes next has the smallest |mask| for each channel that it silences and MAC that it saves: a block silences
    all channels of its branch. Equal masks of a group go from the first.
    """
    order = {g.name: masks[g.name].abs().argsort(stable=True).tolist() for g in ledger.groups}
    size = {group.name: group.channels for group in ledger.groups}
    kept, lost = dict(size), set[str]()
    floors = {group.name: _floor(group, least_share) for group in ledger.groups}
    readers = {name: [layer for layer in ledger.layers.items() if name in layer[1][1]] for name in size}
    while ledger.macs(kept, lost) > budget:
        gone = ledger.gone(lost)
        best: tuple[float, str] | None = None
        for name in size:
            if kept[name] <= floors[name]:
                continue
            fewer = kept | {name: kept[name] - 1}
            saved = sum(
                _scaled(macs, touched, kept, size) - _scaled(macs, touched, fewer, size)
                for path, (macs, touched) in readers[name]
                if path not in gone
            )
            best = _better(best, name, float(masks[name][order[name][size[name] - kept[name]]].abs()), saved)
        for block in ledger.blocks:
            if block.name not in lost:
                saved = sum(_scaled(*ledger.layers[path], kept, size) for path in block.layers if path in ledger.layers)
                best = _better(best, block.name, float(masks[block.name].abs()) * block.channels, saved)
        assert best is not None, "a budget that was found reachable"
        if best[1] in kept:
            kept[best[1]] -= 1
        else:
            lost.add(best[1])
    return {name: order[name][: size[name] - kept[name]] for name in size}, lost


def _better(best: tuple[float, str] | None, name: str, harm: float, saved: int) -> tuple[float, str] | None:
    if saved <= 0 or (best is not None and best[0] <= harm / saved):
        return best
    return harm / saved, name


# Training


def soft_threshold(values: Float[Tensor, "*n"], threshold: float) -> Float[Tensor, "*n"]:
    """sign(v) · max(|v| − threshold, 0): the point that least costs threshold · |u| + (u − v)² / 2."""
    return values.sign() * (values.abs() - threshold).clamp(min=0)


class PatrolPressure(Pressure):
    """The terms of PATROL, its inverter's steps and the proximal step on the masks."""

    def __init__(self, knobs: PATROL, *, is_pruned: bool, seed: int) -> None:
        super().__init__()
        self.knobs = knobs
        self.is_pruned = is_pruned
        self.seed = seed
        self.adversary = LaterAdversary(width=knobs.adversary_width, measure="relative", seed=seed)
        # In a list, since it is not for `state_dict`: the taps share the edge's weights.
        self._taps: list[nn.Module] = []
        self._example: Tensor | None = None
        self._done = 0.0
        self._ledger: tuple[Ledger, int] | None = None

    @cached_property
    def generator(self) -> torch.Generator:
        """Draws the noise. Made when it is first used: one that exists does not cross to another process unharmed."""
        return torch.Generator().manual_seed(self.seed)

    def before(self, split: Split, batch: Batch) -> None:
        """One step of the inverter."""
        self._example, self._done = batch.images[:2].detach(), batch.done
        if self.knobs.has_adversary:
            images, features = self._seen(batch)
            self.adversary.on(images, features).step(images, features.detach(), batch.autocast)

    def terms(self, split: Split, batch: Batch) -> dict[str, Tensor]:
        """`lipschitz` and `adversary`, weighted."""
        terms: dict[str, Tensor] = {}
        if self.knobs.has_lipschitz:
            n = math.ceil(self.knobs.lipschitz_share * len(batch.images))
            constants = lipschitz_constants(
                self._tapped(split, batch),
                batch.images[:n],
                noise_std=self.knobs.noise_std,
                generator=self.generator,
                autocast=batch.autocast,
            )
            terms["lipschitz"] = self.knobs.alpha * constants.sum()
        if self.knobs.has_adversary:
            images, features = self._seen(batch)
            error = self.adversary.on(images, features).error(images, features, batch.autocast)
            terms["adversary"] = -self.knobs.beta * error
        return terms

    def after(self, split: Split, *, learning_rate: float) -> None:
        """What must go is brought down; the L1 norm's step follows, unless what is not zero already fits the budget."""
        masks = soft_masks(split.edge) if self.is_pruned else {}
        if not masks or self._example is None:
            return
        if self._ledger is None:
            plain, _ = unmasked(split)
            ledger = Ledger.of(plain.edge, *structures(plain, self._example, names=masks), self._example)
            self._ledger = ledger, self.knobs.budget(ledger)
        ledger, budget = self._ledger
        most = max(0.0, (_GONE_BY - self._done) / (_GONE_BY - _FREE_UNTIL))
        if most < 1:
            values = {name: mask.scale.detach().cpu() for name, mask in masks.items()}
            channels, lost = choose(ledger, values, budget, least_share=self.knobs.least_share)
            with torch.no_grad():
                for name, which in (channels | {name: [0] for name in lost}).items():
                    masks[name].scale[which] = masks[name].scale[which].clamp(-most, most)
        alive = torch.stack([mask.scale.detach().count_nonzero() for mask in masks.values()]).tolist()
        kept = dict(zip(masks, alive, strict=True))
        if ledger.macs(kept, {block.name for block in ledger.blocks if not kept[block.name]}) > budget:
            with torch.no_grad():
                for mask in masks.values():
                    mask.scale.copy_(soft_threshold(mask.scale, learning_rate * self.knobs.sparsity))

    def held(self) -> dict[str, Tensor]:
        """The state of the noise, the inverter and its optimizer."""
        return {"noise": self.generator.get_state()} | self.adversary.held()

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `held` gave."""
        self.generator.set_state(tensors["noise"].cpu())
        self.adversary.hold(tensors)

    def _seen(self, batch: Batch) -> tuple[Tensor, Tensor]:
        n = min(len(batch.images), max(2, math.ceil(self.knobs.adversary_share * len(batch.images))))
        return batch.images[:n], batch.features[:n]

    def _tapped(self, split: Split, batch: Batch) -> nn.Module:
        if not self._taps:
            self._taps.append(tapped(split.edge, block_ends(split.edge, batch.images[:2])))
        return self._taps[0]
