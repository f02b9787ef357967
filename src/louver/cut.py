"""Where a network can be cut, and the cut itself.

`cuts` lists every legal point in network order, `split` cuts at one. A point is legal when exactly one tensor crosses
it, with the batch as its first dimension, and no parameter or buffer is needed on both sides. (Constants that are only
read, such as a table of positions, are copied to both.) Names are module paths, as in torchvision's feature
extraction: the outermost module whose output crosses, else the path of the operation; all others are aliases.

Networks are cut as they are in evaluation mode. A dropout written as `F.dropout(x, training=self.training)` is off in
the halves for good; a `nn.Dropout` module still follows `train()`. What only runs in training (auxiliary heads)
belongs to neither half. The image size is that of the example, the batch size is free.
"""

# ruff: noqa: ANN401 - a network may return anything, and values on their way through a graph are of any type

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from louver.errors import CutError, DataError
from louver.points import BATCHES, Plan, half_cost
from louver.types import Cost, Cut

__all__ = ["Split", "cuts", "joined", "split"]


class Split(nn.Module):
    """A network in two halves: `split(x)` is `cloud(edge(x))`, bit for bit the network at the moment of cutting.

    The halves are in evaluation mode and own their weights; `cut` says where they part and what each costs.

    Raises:
        DataError: the features have another shape than at the moment of cutting, as with images of another size.
    """

    def __init__(self, edge: nn.Module, cloud: nn.Module, cut: Cut) -> None:
        super().__init__()
        self.edge = edge
        self.cloud = cloud
        self.cut = cut

    def forward(self, x: Float[Tensor, "n c h w"]) -> Any:
        """What the network gives for these images."""
        feature = self.edge(x)
        # What follows a split to cut it again sends stand-ins, which have no shape to check.
        if isinstance(feature, Tensor) and tuple(feature.shape[1:]) != self.cut.feature_shape:
            raise DataError(
                f"cut {self.cut.name!r}: expected features of shape {self.cut.feature_shape}, got "
                f"{tuple(feature.shape[1:])}; use images of the size that the network was cut with"
            )
        return self.cloud(feature)


def cuts(model: nn.Module, example: Float[Tensor, "n c h w"]) -> list[Cut]:
    """Every legal cut in network order, with the cost of both halves for one image. The network is left untouched.

    Raises:
        CutError: the network cannot be followed, or has no legal cut; the message says why.
        DataError: the network does not run on the example.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 5))
    >>> [(cut.name, cut.feature_shape) for cut in cuts(net, torch.rand(2, 3, 8, 10))]
    [('0', (4, 6, 8)), ('1', (4, 6, 8)), ('2', (192,))]
    """
    _check_images(example)
    plan = Plan.of(model, example)
    if not plan.cuts:
        reasons = dict.fromkeys(plan.why_not(i) or "" for i in range(1, len(plan.data)))
        raise CutError(f"{plan.model_name} has no legal cut: " + "; ".join(list(reasons)[:3]))
    return [cut for cut, _ in plan.cuts]


def split(model: nn.Module, at: str, example: Float[Tensor, "n c h w"]) -> Split:
    """The network in two halves, cut at a name or alias of `cuts`. The halves are copies; the network is untouched.

    Raises:
        CutError: no legal cut goes by that name; the message says why and lists the nearest that do.
        DataError: the network does not run on the example.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 5)).eval()
    >>> halves = split(net, "1", torch.rand(2, 3, 8, 10))
    >>> x = torch.rand(7, 3, 8, 10)
    >>> halves.edge(x).shape, torch.equal(halves(x), net(x))
    (torch.Size([7, 4, 6, 8]), True)
    """
    _check_images(example)
    plan = Plan.of(model, example)
    for cut, position in plan.cuts:
        if plan.unwrapped(at) in (cut.name, *cut.aliases):
            return split_at(plan, cut, position)
    raise CutError(plan.refusal(at))


def split_at(plan: Plan, cut: Cut, position: int) -> Split:
    """The halves of one of `plan.cuts`; for many cuts of one network, which is followed only once."""
    return Split(_build_half(plan, position, is_edge=True), _build_half(plan, position, is_edge=False), cut)


def _check_images(example: Tensor) -> None:
    if example.ndim != 4 or example.shape[0] < 1:
        raise DataError(f"expected an example of shape (n, c, h, w) with n of 1 or more, got {tuple(example.shape)}")


# The halves


def _build_half(plan: Plan, i: int, *, is_edge: bool) -> fx.GraphModule:
    """The steps up to position i, or after it, as a module with its own copy of what they use."""
    source, part = (plan.data[0], plan.data[1 : i + 1]) if is_edge else (plan.data[i], plan.data[i + 1 :])
    graph = fx.Graph()
    entry = graph.placeholder("image" if is_edge else "feature")
    if plan.needs_copy(i, is_edge=is_edge):
        entry = graph.call_method("clone", (entry,))
    steps = _Steps(plan, graph, entry, plan.object_of[source])
    for node in part:
        steps.known[node] = steps.copied(node)
    if is_edge:
        graph.output(steps.value(plan.data[i]))
    else:
        graph.output(fx.node.map_arg(plan.output.args[0], steps.value))
    held = {target: plan.trace.held(node) for target, node in steps.held.items()}
    half = fx.GraphModule(copy.deepcopy(held), graph, class_name="Edge" if is_edge else "Cloud")
    return half.eval()


class _Steps:
    """Copies steps into the graph of a half; what they need besides data is copied along when first needed."""

    def __init__(self, plan: Plan, graph: fx.Graph, entry: fx.Node, source: fx.Node) -> None:
        self.plan = plan
        self.graph = graph
        self.entry = entry
        self.source = source
        self.known: dict[fx.Node, Any] = {}
        self.held: dict[str, fx.Node] = {}
        self.batch: fx.Node | None = None

    def value(self, node: fx.Node) -> Any:
        if node not in self.known:
            if node in self.plan.position:
                assert self.plan.object_of[node] is self.source, f"{node} crosses beside {self.source}"
                return self.entry
            self.known[node] = self.sized(node) if self.plan.steps[0][node].constant else self.copied(node)
        return self.known[node]

    def copied(self, node: fx.Node) -> fx.Node:
        target = node.target
        if node.op in ("call_module", "get_attr"):
            target = self.plan.trace.target(node)
            self.held[target] = node
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value)
        return self.graph.create_node(node.op, target, args, kwargs)

    def sized(self, node: fx.Node) -> Any:
        """A value without tensors. Sizes are numbers, but for the batch, which is read from the input of the half."""
        few, more = (steps[node].constant for steps in self.plan.steps)
        assert few is not None
        assert more is not None
        if any(used in self.plan.position for used in node.all_input_nodes):
            return self._read(few[0], more[0])
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value)
        if not any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves((args, kwargs))):
            return few[0]
        if node.target is operator.getitem and isinstance(args[0], tuple) and isinstance(args[1], int):
            return args[0][args[1]]
        return self.graph.create_node(node.op, node.target, args, kwargs)

    def _read(self, few: Any, more: Any) -> Any:
        if isinstance(few, (tuple, list)):
            return tuple(self._read(a, b) for a, b in zip(few, more, strict=True))
        if isinstance(few, torch.device):
            return self.graph.call_function(getattr, (self.entry, "device"))
        if few == more:
            return few
        assert isinstance(few, int), f"{few!r} depends on the batch and is no size"
        if self.batch is None:
            self.batch = self.graph.call_method("size", (self.entry, 0))
        per_image = more - few
        rest = few - BATCHES[0] * per_image
        scaled = self._with(operator.mul, self.batch, per_image, neutral=1)
        return self._with(operator.add, scaled, rest, neutral=0)

    def _with(self, operation: Callable[..., Any], node: fx.Node, number: int, *, neutral: int) -> fx.Node:
        return node if number == neutral else self.graph.call_function(operation, (node, number))


def joined(edge: nn.Module, cloud: nn.Module, example: Float[Tensor, "n c h w"], *, name: str) -> Split:
    """Two halves as a split named `name`, with feature shape and cost measured; the halves are taken as they are.

    Raises:
        CutError: a half cannot be followed, or the edge gives something other than one tensor per batch.
        DataError: the halves do not run on the example, or do not fit each other.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        modes = {module: module.training for half in (edge, cloud) for module in half.modules()}
        edge.eval()
        cloud.eval()
        feature = edge(example)
        if not isinstance(feature, Tensor) or feature.ndim < 2 or len(feature) != len(example):
            raise CutError(f"cut {name!r}: expected one tensor of features per batch, got {type(feature).__name__}")
        cost = Cost(
            edge=half_cost(edge, example),
            cloud=half_cost(cloud, feature),
            feature_bytes=feature[0].numel() * feature.element_size(),
        )
        for module, was_training in modes.items():
            module.training = was_training
    shape, dtype = tuple(feature.shape[1:]), str(feature.dtype).removeprefix("torch.")
    return Split(edge, cloud, Cut(name=name, feature_shape=shape, dtype=dtype, cost=cost))
