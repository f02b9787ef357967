"""Where a network can be cut, and the cut itself.

`cuts` lists every legal point in network order, `split` cuts at one. A point is legal when exactly one tensor crosses
it, with the batch as its first dimension, and no parameter or buffer is needed on both sides. (Constants that are only
read, such as a table of positions, are copied to both.) Names are module paths, as in torchvision's feature
extraction: the outermost module whose output crosses, else the path of the operation; all others are aliases.

Networks are cut as they are in evaluation mode. A dropout written as `F.dropout(x, training=self.training)` is off in
the halves for good; a `nn.Dropout` module still follows `train()`. What only runs in training (auxiliary heads)
belongs to neither half. The image size is that of the example, the batch size is free.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from louver.cost import Step, profile
from louver.errors import CutError, DataError, nearest
from louver.tracing import Trace, trace
from louver.types import Cost, Cut, HalfCost

__all__ = ["Split", "cuts", "split"]

# What depends on the batch is told from what does not by two runs. One image would not do: a dimension of one hides
# in squeeze() and in broadcasts. Costs of a single image follow, since they grow evenly with the batch.
_BATCHES = (2, 3)


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
        if tuple(feature.shape[1:]) != self.cut.feature_shape:
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
    plan = _Plan.of(model, example)
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
    plan = _Plan.of(model, example)
    for cut, position in plan.cuts:
        if plan.unwrapped(at) in (cut.name, *cut.aliases):
            return Split(_build_half(plan, position, is_edge=True), _build_half(plan, position, is_edge=False), cut)
    raise CutError(plan.refusal(at))


# What crosses where ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weight:
    """A tensor that a step needs besides its inputs. `may_be_copied` holds for constants that are only read."""

    name: str
    tensor: Tensor
    may_be_copied: bool

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for weights tied under two names, as one parameter or as two over the same memory."""
        t = self.tensor
        return (t.device, t.data_ptr(), tuple(t.shape)) if t.data_ptr() else (id(t),)


@dataclass(frozen=True, eq=False)
class _Plan:
    """The steps that are computed from the image, in order, and what would cross after each."""

    model: nn.Module
    trace: Trace
    steps: tuple[dict[fx.Node, Step], dict[fx.Node, Step]]
    data: list[fx.Node]

    @classmethod
    def of(cls, model: nn.Module, example: Tensor) -> _Plan:
        found = trace(model, example)
        try:
            few, more = profile(found, example, _BATCHES)
        except CutError as error:
            raise CutError(f"cannot cut {type(model).__name__}: {error}") from error
        data: dict[fx.Node, None] = {}
        for node in found.graph.nodes:
            # A size is not data: the cloud reads it from the feature, or knows it, since the image size is fixed.
            is_value = node.op != "output" and few[node].constant is None
            if node.op == "placeholder" or (is_value and any(used in data for used in node.all_input_nodes)):
                data[node] = None
        return cls(model, found, (few, more), list(data))

    @property
    def model_name(self) -> str:
        return type(self.model).__name__

    @cached_property
    def position(self) -> dict[fx.Node, int]:
        return {node: i for i, node in enumerate(self.data)}

    @cached_property
    def output(self) -> fx.Node:
        return next(iter(reversed(self.trace.graph.nodes)))

    @cached_property
    def object_of(self) -> dict[fx.Node, fx.Node]:
        """The step that first made the object a step returns: Identity and in-place operations return their input."""
        first: dict[fx.Node, fx.Node] = {}
        for node in self.data:
            same = self.steps[0][node].same_as
            first[node] = first.get(same, node) if same is not None else node
        return first

    @cached_property
    def last_use(self) -> dict[fx.Node, int]:
        """The position of the last step that needs each object; past the end where the network returns it."""
        last: dict[fx.Node, int] = {}
        for node in (*self.data, self.output):
            for used in node.all_input_nodes:
                if used in self.position and (node is self.output or node in self.position):
                    last[self.object_of[used]] = self.position.get(node, len(self.data))
        return last

    def crossing(self, i: int) -> list[fx.Node]:
        """The objects made up to position i and needed after it."""
        return [
            made
            for made in dict.fromkeys(self.object_of[n] for n in self.data[: i + 1])
            if self.last_use.get(made, -1) > i
        ]

    @cached_property
    def n_crossing(self) -> list[int]:
        change = [0] * (len(self.data) + 2)
        for made, last in self.last_use.items():
            change[self.position[made]] += 1
            change[last] -= 1
        return list(accumulate(change))

    @cached_property
    def works(self) -> list[bool]:
        """Whether a step does anything: it makes a new object or changes one in place."""
        step = self.steps[0]
        return [i > 0 and (self.object_of[n] is n or bool(step[n].writes)) for i, n in enumerate(self.data)]

    def free_needs(self, node: fx.Node) -> list[fx.Node]:
        """The steps that a step needs and that are not computed from the image: weights, constants, sizes."""
        needs: dict[fx.Node, None] = {}
        waiting = list(node.all_input_nodes)
        while waiting:
            used = waiting.pop()
            if used not in self.position and used not in needs:
                needs[used] = None
                waiting.extend(used.all_input_nodes)
        return list(needs)

    @cached_property
    def weights(self) -> list[list[_Weight]]:
        """For each position the weights that its step needs."""
        return [
            [weight for user in (node, *self.free_needs(node)) for weight in self._own_weights(user)]
            for node in self.data
        ]

    def _own_weights(self, node: fx.Node) -> list[_Weight]:
        if node.op not in ("call_module", "get_attr"):
            return []
        held, path = self.trace.held(node), self.trace.target(node)
        if isinstance(held, Tensor):
            return [_Weight(path, held, may_be_copied=not isinstance(held, nn.Parameter))]
        named = (*held.named_parameters(), *held.named_buffers())
        return [_Weight(f"{path}.{name}", tensor, may_be_copied=False) for name, tensor in named]

    @cached_property
    def weight_span(self) -> dict[tuple[Any, ...], tuple[int, int, _Weight]]:
        """For each weight the first and the last position that need it."""
        span: dict[tuple[Any, ...], tuple[int, int, _Weight]] = {}
        for i, weights in enumerate(self.weights):
            for weight in weights:
                first, _, known = span.get(weight.key, (i, i, weight))
                span[weight.key] = (first, i, known if not known.may_be_copied else weight)
        return span

    # Names and refusals

    def unwrapped(self, name: str) -> str:
        """The name without the part that only says that the network sits in a wrapper."""
        child = getattr(self.model, "transparent_child", None)
        return name.removeprefix(f"{child}.") if isinstance(child, str) else name

    def names_of(self, node: fx.Node) -> list[str]:
        """All names of a step, the best first: the outermost module whose output it is, then inner ones, then its own."""
        modules = sorted(self.trace.outputs.get(node, []), key=lambda path: path.count("."))
        return [self.unwrapped(name) for name in dict.fromkeys([*modules, self.trace.names[node]]) if name]

    def label(self, node: fx.Node) -> str:
        return repr(self.names_of(node)[0])

    def why_not(self, i: int) -> str | None:
        """Why the network cannot be cut right after position i; None if it can."""
        node = self.data[i]
        few, more = (steps[node] for steps in self.steps)
        if not any(self.works[: i + 1]):
            return "nothing would be left on the device: that is the image itself"
        if not any(self.works[i + 1 :]):
            return "nothing would be left for the cloud: that is the network's output"
        if few.tensor is None or more.tensor is None:
            return f"it is {few.kind}, and exactly one tensor can cross"
        mine = self.object_of[node]
        if self.n_crossing[i] != 1 or self.last_use.get(mine, -1) <= i:
            others = [made for made in self.crossing(i) if made is not mine]
            if not others:
                return "nothing after it uses it"
            shown = ", ".join(self.label(made) for made in others[:3]) + (", …" if len(others) > 3 else "")
            until = self.label(self.data[min(max(self.last_use[made] for made in others), len(self.data) - 1)])
            if self.data[0] in others:
                return f"the raw image skips past it (used until {until}), so it would be sent as well"
            return f"it is inside a residual block or branch: {shown} also crosses (used until {until})"
        (shape, _), (other, _) = few.tensor, more.tensor
        if (shape[:1], other[:1]) != ((_BATCHES[0],), (_BATCHES[1],)) or shape[1:] != other[1:]:
            return f"the batch is not its first dimension: {_BATCHES[0]} images make a tensor of shape {shape}"
        for first, last, weight in self.weight_span.values():
            if first <= i < last and not weight.may_be_copied:
                users = f"{self.label(self.data[first])} and {self.label(self.data[last])}"
                return f"the weight {weight.name!r} is shared by {users}, which would be on different sides"
        return None

    @cached_property
    def cuts(self) -> list[tuple[Cut, int]]:
        """Legal cuts with their positions. Steps that only pass their input on (Identity, dropout) make no second cut."""
        groups: list[list[int]] = []
        for i in range(len(self.data)):
            if self.why_not(i) is None:
                is_passed_on = groups and not any(self.works[groups[-1][0] + 1 : i + 1])
                if is_passed_on:
                    groups[-1].append(i)
                else:
                    groups.append([i])
        return [(self._cut(group), group[0]) for group in groups]

    def _cut(self, group: list[int]) -> Cut:
        names = list(dict.fromkeys(name for i in group for name in self.names_of(self.data[i])))
        names.sort(key=lambda name: name.count("."))
        tensor = self.steps[0][self.data[group[0]]].tensor
        assert tensor is not None
        shape, dtype = tensor[0][1:], tensor[1]
        cost = _cost(self, group[0], prod(shape) * dtype.itemsize)
        return Cut(
            name=names[0],
            feature_shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            cost=cost,
            aliases=tuple(names[1:]),
        )

    def refusal(self, at: str) -> str:
        """Why there is no cut by that name, with the nearest legal ones in network order."""
        wanted = self.unwrapped(at)
        why, position = self._locate(wanted)
        if position is None:
            close = nearest(wanted, [name for cut, _ in self.cuts for name in (cut.name, *cut.aliases)])
            if not close.startswith("nearest"):  # no typo: list places, each by one name
                close = nearest(wanted, [cut.name for cut, _ in self.cuts])
            return f"{self.model_name} has no point {at!r}: {why}; {close}"
        before = [cut.name for cut, i in self.cuts if i <= position][-1:]
        after = [cut.name for cut, i in self.cuts if i > position][:1]
        beside = [f"{name!r} {side}" for names, side in ((before, "before"), (after, "after")) for name in names]
        return f"cannot cut {self.model_name} at {at!r}: {why}; nearest legal: " + (" and ".join(beside) or "none")

    def _locate(self, wanted: str) -> tuple[str, int | None]:
        """Why `wanted` is not legal, and where in the network it is; None if it is nowhere."""
        if wanted == "input":
            return self.why_not(0) or "", 0
        for i, node in enumerate(self.data):
            if wanted in self.names_of(node) or wanted == node.name == self.trace.names[node]:
                return self.why_not(i) or "", i
        order = {node: i for i, node in enumerate(self.trace.graph.nodes)}

        def position_at(node: fx.Node) -> int:
            return max((i for i, data in enumerate(self.data) if order[data] <= order[node]), default=0)

        for node, name in self.trace.names.items():
            if self.unwrapped(name) == wanted:
                return "it is not computed from the image's pixels", position_at(node)
        for path, (what, node) in self.trace.structured.items():
            if self.unwrapped(path) == wanted:
                return f"it returns {what}, and exactly one tensor can cross", position_at(node)
        whole = [n for n in self.data if n.op == "call_module" and wanted.startswith(self.names_of(n)[-1] + ".")]
        if whole:
            path = self.trace.target(whole[0])
            reason = f" ({self.trace.boxes[path]})" if path in self.trace.boxes else ""
            return f"it is inside {self.unwrapped(path)!r}, which runs as one step{reason}", self.position[whole[0]]
        known = {self.unwrapped(path) for path, _ in self.model.named_modules()}
        return ("that module is not used in evaluation mode" if wanted in known else "unknown name"), None


def _cost(plan: _Plan, i: int, feature_bytes: int) -> Cost:
    def weighed(is_edge: bool) -> tuple[int, int]:
        spans = plan.weight_span.values()
        used = [weight.tensor for first, last, weight in spans if (first <= i if is_edge else last > i)]
        parameters = sum(t.numel() for t in used if isinstance(t, nn.Parameter))
        return parameters, sum(t.numel() * t.element_size() for t in used)

    halves = []
    for is_edge, part in ((True, slice(0, i + 1)), (False, slice(i + 1, None))):
        macs, live_bytes = _single_image(plan)
        parameters, weight_bytes = weighed(is_edge)
        # A half that would change its input in place works on a copy.
        entry = 2 * (live_bytes[0] if is_edge else feature_bytes) if _needs_copy(plan, i, is_edge) else 0
        peak = max(entry, *live_bytes[part])
        halves.append(
            HalfCost(macs=sum(macs[part]), parameters=parameters, weight_bytes=weight_bytes, peak_activation_bytes=peak)
        )
    return Cost(edge=halves[0], cloud=halves[1], feature_bytes=feature_bytes)


def _single_image(plan: _Plan) -> tuple[list[int], list[int]]:
    """MACs and live bytes of each step for one image, drawn on from two batch sizes; see `_BATCHES`."""
    few, more = plan.steps
    macs, live_bytes = [], []
    charged: set[fx.Node] = set()
    for node in plan.data:
        free = [n for n in plan.free_needs(node) if n not in charged]
        charged.update(free)
        macs.append(sum(2 * few[n].macs - more[n].macs for n in (node, *free)))
        live_bytes.append(max(2 * few[n].live_bytes - more[n].live_bytes for n in (node, *free)))
    return macs, live_bytes


# The halves -----------------------------------------------------------------------------------------------------------


def _needs_copy(plan: _Plan, i: int, is_edge: bool) -> bool:
    """Whether a half would change its input in place, which is the caller's."""
    step = plan.steps[0]
    source, part = (plan.data[0], plan.data[1 : i + 1]) if is_edge else (plan.data[i], plan.data[i + 1 :])
    return any(step[source].storage in step[node].writes for node in part)


def _build_half(plan: _Plan, i: int, *, is_edge: bool) -> fx.GraphModule:
    """The steps up to position i, or after it, as a module with its own copy of what they use."""
    source, part = (plan.data[0], plan.data[1 : i + 1]) if is_edge else (plan.data[i], plan.data[i + 1 :])
    graph = fx.Graph()
    entry = graph.placeholder("image" if is_edge else "feature")
    if _needs_copy(plan, i, is_edge):
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

    def __init__(self, plan: _Plan, graph: fx.Graph, entry: fx.Node, source: fx.Node) -> None:
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
        assert few is not None and more is not None
        if any(used in self.plan.position for used in node.all_input_nodes):
            return self._read(few[0], more[0])
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value)
        if not any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves((args, kwargs))):
            return few[0]
        if node.target is operator.getitem and isinstance(args[0], tuple):
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
        rest = few - _BATCHES[0] * per_image
        scaled = self._with(operator.mul, self.batch, per_image, neutral=1)
        return self._with(operator.add, scaled, rest, neutral=0)

    def _with(self, operation: Callable[..., Any], node: fx.Node, number: int, *, neutral: int) -> fx.Node:
        return node if number == neutral else self.graph.call_function(operation, (node, number))
