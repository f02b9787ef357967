"""Which points of a network are legal cuts, and why the others are not.

A plan holds the steps that are computed from the image, in the order in which they run, with what a run on fake images
showed of each. All else (which objects cross a point, which weights are needed on both sides, names, costs, refusals)
follows from these.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any

from torch import Tensor, fx, nn

from louver.cost import Step, profile
from louver.errors import CutError, nearest
from louver.tracing import Trace, trace
from louver.types import Cost, Cut, HalfCost

__all__ = ["BATCHES", "Plan", "half_cost"]

# What depends on the batch is told from what does not by two runs. One image would not do: a dimension of one hides
# in squeeze() and in broadcasts. Costs of a single image follow, since they grow evenly with the batch.
BATCHES = (2, 3)


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
class Plan:
    """The steps that are computed from the image, in order, and what would cross after each."""

    model: nn.Module
    trace: Trace
    steps: tuple[dict[fx.Node, Step], dict[fx.Node, Step]]
    data: list[fx.Node]

    @classmethod
    def of(cls, model: nn.Module, example: Tensor) -> Plan:
        """Follow the network and run it on fake images; see `louver.cut.cuts` for what this raises."""
        found = trace(model, example)
        try:
            few, more = profile(found, example, BATCHES)
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
        """The class of the network, for messages."""
        return type(self.model).__name__

    @cached_property
    def position(self) -> dict[fx.Node, int]:
        """Where each step stands in `data`; steps that are not computed from the image stand nowhere."""
        return {node: i for i, node in enumerate(self.data)}

    @cached_property
    def output(self) -> fx.Node:
        """The step that hands the result out."""
        last: fx.Node = next(iter(reversed(self.trace.graph.nodes)))
        return last

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
        """The steps up to position i whose objects are needed after it; of each object the last step that gives it."""
        latest = {self.object_of[node]: node for node in self.data[: i + 1]}
        return [node for made, node in latest.items() if self.last_use.get(made, -1) > i]

    @cached_property
    def n_crossing(self) -> list[int]:
        """How many objects cross after each position: `crossing`, counted for all positions at once."""
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
        """All names of a step, best first: the outermost module whose output it is, inner ones, then its own."""
        modules = sorted(self.trace.outputs.get(node, []), key=lambda path: path.count("."))
        return [self.unwrapped(name) for name in dict.fromkeys([*modules, self.trace.names[node]]) if name]

    def label(self, node: fx.Node) -> str:
        """The best name of a step, quoted."""
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
            others = [other for other in self.crossing(i) if self.object_of[other] is not mine]
            if not others:
                return "nothing after it uses it"
            shown = ", ".join(self.label(other) for other in others[:3]) + (", …" if len(others) > 3 else "")
            until = self.label(
                self.data[min(max(self.last_use[self.object_of[other]] for other in others), len(self.data) - 1)]
            )
            if any(self.object_of[other] is self.data[0] for other in others):
                return f"the raw image skips past it (used until {until}), so it would be sent as well"
            return f"it is inside a residual block or branch: {shown} also crosses (used until {until})"
        (shape, _), (other, _) = few.tensor, more.tensor
        if (shape[:1], other[:1]) != ((BATCHES[0],), (BATCHES[1],)) or shape[1:] != other[1:]:
            return f"the batch is not its first dimension: {BATCHES[0]} images make a tensor of shape {shape}"
        for first, last, weight in self.weight_span.values():
            if first <= i < last and not weight.may_be_copied:
                users = f"{self.label(self.data[first])} and {self.label(self.data[last])}"
                return f"the weight {weight.name!r} is shared by {users}, which would be on different sides"
        return None

    @cached_property
    def cuts(self) -> list[tuple[Cut, int]]:
        """Legal cuts with their positions. Steps that only pass their input on (Identity) make no second cut."""
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
        cost = self._cost(group[0], prod(shape) * dtype.itemsize)
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
            return f"it is inside {self.unwrapped(path)!r}, which runs as one step{reason}", self.position[whole[0]] - 1
        known = {self.unwrapped(path) for path, _ in self.model.named_modules()}
        return ("that module is not used in evaluation mode" if wanted in known else "unknown name"), None

    # Costs

    def needs_copy(self, i: int, *, is_edge: bool) -> bool:
        """Whether a half of the cut after position i would change its input in place, which is the caller's."""
        storage = self.steps[0][self.data[0 if is_edge else i]].storage
        part = self.data[1 : i + 1] if is_edge else self.data[i + 1 :]
        return any(storage in self.steps[0][node].writes for node in part)

    @cached_property
    def per_image(self) -> tuple[list[int], list[int]]:
        """MACs and live bytes of each step for one image, drawn on from two batch sizes; see `BATCHES`."""
        few, more = self.steps
        macs, live_bytes = [], []
        charged: set[fx.Node] = set()
        for node in self.data:
            # What is not computed from the image (a table of positions) is charged to the step that first needs it.
            needed = [node, *(free for free in self.free_needs(node) if free not in charged)]
            charged.update(needed)
            macs.append(sum(_of_one_image(few[n].macs, more[n].macs) for n in needed))
            live_bytes.append(max(_of_one_image(few[n].live_bytes, more[n].live_bytes) for n in needed))
        return macs, live_bytes

    def _half_cost(self, i: int, feature_bytes: int, *, is_edge: bool) -> HalfCost:
        macs, live_bytes = self.per_image
        part = slice(0, i + 1) if is_edge else slice(i + 1, None)
        entry_bytes = live_bytes[0] if is_edge else feature_bytes
        if self.needs_copy(i, is_edge=is_edge):
            entry_bytes *= 2
        used = [w.tensor for first, last, w in self.weight_span.values() if (first <= i if is_edge else last > i)]
        return HalfCost(
            macs=sum(macs[part]),
            parameters=sum(t.numel() for t in used if isinstance(t, nn.Parameter)),
            weight_bytes=sum(t.numel() * t.element_size() for t in used),
            peak_activation_bytes=max(entry_bytes, *live_bytes[part]),
        )

    def _cost(self, i: int, feature_bytes: int) -> Cost:
        edge = self._half_cost(i, feature_bytes, is_edge=True)
        return Cost(edge=edge, cloud=self._half_cost(i, feature_bytes, is_edge=False), feature_bytes=feature_bytes)


def half_cost(half: nn.Module, example: Tensor) -> HalfCost:
    """What a module costs for one row of `example`, counted as for the halves of a cut.

    Raises:
        CutError: the module cannot be followed.
        DataError: it does not run on the example.
    """
    plan = Plan.of(half, example)
    macs, live_bytes = plan.per_image
    return HalfCost(
        macs=sum(macs),
        parameters=sum(p.numel() for p in half.parameters()),
        weight_bytes=sum(t.numel() * t.element_size() for t in (*half.parameters(), *half.buffers())),
        peak_activation_bytes=max(live_bytes),
    )


def _of_one_image(few: int, more: int) -> int:
    per_image = (more - few) // (BATCHES[1] - BATCHES[0])
    return few - (BATCHES[0] - 1) * per_image
