"""Soft masks on the channels and blocks of an edge: one trainable factor for each, all 1 at first.

A mask sits where its channels are *read*, so a channel whose mask is zero reaches nobody, whatever bias or activation
made it; the mask of a block sits on its branch, before the addition.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from louver.cut import Split
from louver.defenses.lipschitz import graph_of

__all__ = [
    "Block",
    "Group",
    "SoftMask",
    "all_of",
    "folded",
    "is_tail",
    "masked",
    "soft_masks",
    "step_of",
    "unmasked",
]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Channels that exist or go together. Paths are those of the split (`edge.…`, `cloud.…`).

    `producers` lose outputs when a channel goes, the first is where torch-pruning starts; `consumers` lose inputs, so
    many a channel (more than one behind a flatten).
    """

    name: str
    channels: int
    producers: tuple[str, ...]
    consumers: Mapping[str, int]

    @property
    def is_sent(self) -> bool:
        """Whether the cloud reads these channels: they are features."""
        return any(path.startswith("cloud.") for path in self.consumers)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A residual branch that can go, leaving its skip. `name` is the step that adds, `tail` the last layer inside."""

    name: str
    channels: int
    tail: str
    layers: tuple[str, ...]


class SoftMask(nn.Module):
    """One trainable factor for each channel of its input (or for so many in a row, or one for all); all start at 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Float[Tensor, "n c *rest"]) -> Float[Tensor, "n c *rest"]:
        """The input, scaled."""
        scale = self.scale.to(x.dtype).repeat_interleave(x.shape[1] // len(self.scale))
        return x * scale.view(-1, *[1] * (x.ndim - 2))


def masked(split: Split, groups: Sequence[Group], blocks: Sequence[Block]) -> Split:
    """A copy with a `SoftMask` of ones for each structure, wherever a group is read and on each block's branch."""
    split = copy.deepcopy(split)
    edge = graph_of(split.edge)
    masks = nn.ModuleDict()
    edge.add_module("masks", masks)
    last = next(iter(reversed(edge.graph.nodes)))
    for structure in all_of(groups, blocks):
        key = structure.name.replace(".", "/")
        if isinstance(structure, Group):
            masks[key] = SoftMask(structure.channels)
            readers = [
                node
                for node in edge.graph.nodes
                if node.op == "call_module" and f"edge.{node.target}" in structure.consumers
            ]
            if structure.is_sent:
                readers.append(last)
            sites = [(node, node.args[0]) for node in readers]
        else:
            masks[key] = SoftMask(1)
            node = step_of(edge, structure.name)
            sites = [(node, branch) for branch in node.args if is_tail(branch, structure.tail)]
        _insert(edge, f"masks.{key}", sites)
    edge.recompile()
    device = next((parameter.device for parameter in edge.parameters()), torch.device("cpu"))
    masks.to(device)
    return split


def is_tail(branch: object, tail: str) -> bool:
    """Whether a step is the call of this layer."""
    return isinstance(branch, fx.Node) and branch.op == "call_module" and branch.target == tail


def _insert(edge: fx.GraphModule, target: str, sites: Sequence[tuple[fx.Node, Any]]) -> None:
    done: dict[fx.Node, fx.Node] = {}
    for reader, value in sites:
        if value not in done:
            with edge.graph.inserting_after(value):
                done[value] = edge.graph.call_module(target, (value,))
        reader.replace_input_with(value, done[value])


def soft_masks(edge: nn.Module) -> dict[str, SoftMask]:
    """The masks of an edge by the name of their structure; none where there are none."""
    holder = getattr(edge, "masks", None)
    if not isinstance(holder, nn.ModuleDict):
        return {}
    return {key.replace("/", "."): mask for key, mask in holder.items() if isinstance(mask, SoftMask)}


def unmasked(split: Split) -> tuple[Split, dict[str, Tensor]]:
    """A copy as it was before `masked`, and the masks by the name of their structure, for `folded` to take up."""
    split = copy.deepcopy(split)
    edge = graph_of(split.edge)
    masks = {name: mask.scale.detach().clone() for name, mask in soft_masks(edge).items()}
    for node in list(edge.graph.nodes):
        if node.op == "call_module" and str(node.target).startswith("masks."):
            node.replace_all_uses_with(node.args[0])
            edge.graph.erase_node(node)
    if masks:
        del edge.masks
    edge.recompile()
    return split, masks


def folded(split: Split, groups: Sequence[Group], blocks: Sequence[Block], masks: Mapping[str, Tensor]) -> Split:
    """A copy of an unmasked split whose weights hold the masks, so that it computes what the masked one did."""
    split = copy.deepcopy(split)
    with torch.no_grad():
        for group in groups:
            for path, repeat in group.consumers.items():
                weight = _tensor(split, f"{path}.weight")
                scale = masks[group.name].to(weight).repeat_interleave(repeat)
                weight.mul_(scale.view(1, -1, *[1] * (weight.ndim - 2)))
        for block in blocks:
            for parameter in split.edge.get_submodule(block.tail).parameters(recurse=False):
                parameter.mul_(masks[block.name].to(parameter))
    return split


def _tensor(module: nn.Module, path: str) -> Tensor:
    parent, _, name = path.rpartition(".")
    found = getattr(module.get_submodule(parent), name)
    assert isinstance(found, Tensor), path
    return found


def all_of(groups: Sequence[Group], blocks: Sequence[Block]) -> list[Group | Block]:
    """Both kinds in one list."""
    return [*groups, *blocks]


def step_of(edge: nn.Module, name: str) -> fx.Node:
    """The step of that name."""
    found: fx.Node = next(node for node in graph_of(edge).graph.nodes if node.name == name)
    return found
