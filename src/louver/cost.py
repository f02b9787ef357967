"""What each half costs: multiply-accumulates, parameters, memory, bytes on the wire, time.

Everything but time is counted without computing: the graph is run once on fake tensors, which have shapes and
storage but no values. What counts:

- MACs: convolutions, matrix products, attention. Element-wise work, normalization and pooling are left out.
- Activation bytes: the most that tensors computed from the image hold at any moment, input and feature included,
  weights not. Views and in-place results share storage; a tensor is gone after its last use. Temporaries between the
  operators of a module count, the scratch space inside one operator does not.
- Weight bytes: parameters and buffers.
"""

# ruff: noqa: ANN401 - values on their way through a graph are of any type

from __future__ import annotations

import copy
import itertools
import math
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from louver.errors import CutError
from louver.tracing import Trace, quiet
from louver.types import Cut, Latency

__all__ = ["Halves", "Step", "measure_latency", "profile", "with_latency"]


@runtime_checkable
class Halves(Protocol):
    """Anything with two halves: `louver.cut.Split`, or what a defense makes of one."""

    edge: nn.Module
    cloud: nn.Module


@dataclass(frozen=True)
class Step:
    """What one step of the graph did with a batch of fake images.

    `tensor` is (shape, dtype) if its value is one tensor; `constant` holds a value without any tensor inside (sizes,
    devices), boxed in a tuple. `same_as` is the earlier step whose very object came out again; `storage` names the
    memory of the value, `writes` the memory that the step changed in place.
    """

    tensor: tuple[tuple[int, ...], torch.dtype] | None
    constant: tuple[Any] | None
    kind: str
    same_as: fx.Node | None
    storage: int | None
    writes: frozenset[int]
    macs: int
    live_bytes: int


def profile(trace: Trace, example: Float[Tensor, "n c h w"], batches: tuple[int, ...]) -> list[dict[fx.Node, Step]]:
    """What every step does, for each batch size, in one pass each over the graph, without computing anything.

    Raises:
        CutError: the network takes no other batch than the example's, or its shapes depend on the values of pixels.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    held = {node: trace.held(node) for node in trace.graph.nodes if node.op in ("call_module", "get_attr")}
    with quiet(), torch.no_grad(), _plain_attention():
        fakes: dict[int, Any] = {}
        for tensor in _tensors_of(held.values()):
            if id(tensor) not in fakes:
                fakes[id(tensor)] = mode.from_tensor(tensor, static_shapes=True)
        weights = list(fakes.values())
        faked = copy.deepcopy(held, {id(node): node for node in held} | fakes)
        steps: list[dict[fx.Node, Step]] = []
        try:
            for batch in batches:
                with mode:
                    images = torch.empty((batch, *example.shape[1:]), dtype=example.dtype, device=example.device)
                    inputs = [images]
                    del images
                    steps.append(_run(trace.graph, faked, inputs, weights))
        except Exception as error:  # the user's modules run on fake tensors and may raise anything
            text = str(error).strip().splitlines()
            depends = "DataDependent" in type(error).__name__ or "DynamicOutput" in type(error).__name__
            why = (
                "shapes or control flow depend on the data" if depends else (text[0] if text else type(error).__name__)
            )
            raise CutError(f"the network cannot be followed with a batch of {batches[len(steps)]}: {why}") from error
    return steps


def _tensors_of(held: Iterable[Any]) -> Iterator[Tensor]:
    for thing in held:
        if isinstance(thing, nn.Module):
            yield from thing.parameters()
            yield from thing.buffers()
        elif isinstance(thing, Tensor):
            yield thing


@contextmanager
def _plain_attention() -> Iterator[None]:
    """nn.MultiheadAttention step by step: its fused kernel is one operator that would hide its products."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _run(graph: fx.Graph, held: dict[fx.Node, Any], images: list[Tensor], weights: list[Tensor]) -> dict[fx.Node, Step]:
    """Run the graph, dropping each value after its last use. `images` is emptied, so that the input is dropped too."""
    last_uses: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                last_uses.setdefault(node, []).append(used)
    values: dict[fx.Node, Any] = {}
    steps: dict[fx.Node, Step] = {}
    meter = _Meter(weights)
    meter.hold(images[0])  # held before the first step starts, and so part of what is live in it
    for node in graph.nodes:
        meter.start()
        if node.op == "placeholder":
            value: Any = images.pop()
        elif node.op == "get_attr":
            value = held[node]
        elif node.op != "output":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            with meter:
                value = _call(node, held, args, kwargs)
            del args, kwargs
        else:
            value = None
        values[node] = value
        steps[node] = _step(node, value, values, meter)
        for used in last_uses.get(node, []):
            del values[used]
        if not node.users:
            del values[node]
        del value
    return steps


def _call(node: fx.Node, held: dict[fx.Node, Any], args: Any, kwargs: Any) -> Any:
    if node.op == "call_module":
        return held[node](*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _step(node: fx.Node, value: Any, values: dict[fx.Node, Any], meter: _Meter) -> Step:
    is_tensor = isinstance(value, Tensor)
    has_tensor = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
    same = [used for used in node.all_input_nodes if is_tensor and values[used] is value]
    return Step(
        tensor=(tuple(value.shape), value.dtype) if is_tensor else None,
        constant=None if has_tensor else (value,),
        kind=_kind(value),
        same_as=same[0] if same else None,
        storage=meter.storage_of(value) if is_tensor else None,
        writes=frozenset(meter.written),
        macs=meter.macs,
        live_bytes=meter.peak_bytes,
    )


def _kind(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)} values"
    return "a tensor" if isinstance(value, Tensor) else f"a value of type {type(value).__name__}"


class _Meter(TorchDispatchMode):
    """Watches operators go by: products, writes in place, and bytes held by live tensors."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self.numbers = itertools.count()
        self.storages: dict[int, tuple[int, int, set[int]]] = {}  # address -> (number, bytes, tensors on it)
        self.watches: dict[int, weakref.ref[Tensor]] = {}
        self.live_bytes = 0
        self.start()

    def start(self) -> None:
        self.macs = 0
        self.written: set[int] = set()
        self.settled_bytes = self.moment_bytes = self.live_bytes
        self.newest: set[int] = set()

    @property
    def peak_bytes(self) -> int:
        return max(self.settled_bytes, self.moment_bytes)

    def hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, key = storage._cdata, id(tensor)
        if address in self.weights or key in self.watches:
            return
        if address not in self.storages:
            self.storages[address] = (next(self.numbers), storage.nbytes(), set())
            self.live_bytes += storage.nbytes()
            self.newest.add(address)
        self.storages[address][2].add(key)
        self.watches[key] = weakref.ref(tensor, lambda _: self._release(key, address))

    def _release(self, key: int, address: int) -> None:
        del self.watches[key]
        _, size, tensors = self.storages[address]
        tensors.discard(key)
        if not tensors:
            del self.storages[address]
            self.live_bytes -= size
            # What goes before anyone could use it (the indices of a pooling) is scratch of the operator that made it.
            if address in self.newest:
                self.newest.discard(address)
                self.moment_bytes -= size

    def storage_of(self, tensor: Tensor) -> int | None:
        """The number of the memory behind a tensor, None for weights."""
        known = self.storages.get(tensor.untyped_storage()._cdata)
        return known[0] if known else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.settled_bytes, self.newest = self.peak_bytes, set()
        for leaf in pytree.tree_leaves(_written_arguments(func, args, kwargs)):
            if isinstance(leaf, Tensor) and (number := self.storage_of(leaf)) is not None:
                self.written.add(number)
        result = func(*args, **kwargs)
        self.macs += _macs(func, args, result)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.hold(leaf)
        self.moment_bytes = self.live_bytes
        return result


@cache
def _written_names(func: Any) -> tuple[tuple[int, str], ...]:
    arguments = enumerate(func._schema.arguments)
    return tuple((k, a.name) for k, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _written_arguments(func: Any, args: Any, kwargs: Any) -> list[Any]:
    return [args[k] if k < len(args) else kwargs.get(name) for k, name in _written_names(func)]


def _macs(func: Any, args: Any, result: Any) -> int:
    """Multiply-accumulates of one operator: the shape of the result times the length of each sum."""
    name = func.overloadpacket.__name__
    if name in ("mm", "bmm", "mv", "dot"):
        return int(result.numel()) * int(args[0].shape[-1])
    if name in ("addmm", "baddbmm", "addbmm", "addmv"):
        sums = args[1].shape[0] if name == "addbmm" else 1
        return int(result.numel()) * int(args[1].shape[-1]) * int(sums)
    if name in ("convolution", "_convolution", "convolution_overrideable"):
        is_transposed = args[6]
        return int((args[0] if is_transposed else result).numel()) * int(math.prod(args[1].shape[1:]))
    if name.startswith("_scaled_dot_product_"):
        query, key, value = args[:3]
        pairs = math.prod(query.shape[:-1]) * key.shape[-2]
        return int(pairs * (query.shape[-1] + value.shape[-1]))
    return 0


def measure_latency(
    split: Halves, example: Float[Tensor, "n c h w"], *, runs: int = 30, warmup: int = 5, threads: int | None = None
) -> tuple[Latency, Latency]:
    """Time of the edge half and of the cloud half on the example as it is, in milliseconds, on this machine.

    `threads` is for the time of the measurement only; None leaves torch's own number.

    Raises:
        ValueError: `runs` or `threads` below one, or `warmup` below zero.
    """
    if runs < 1 or warmup < 0 or (threads is not None and threads < 1):
        raise ValueError(f"expected runs >= 1, warmup >= 0 and threads >= 1, got {runs}, {warmup} and {threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with torch.no_grad():
            feature = split.edge(example)
            return _time(split.edge, example, runs, warmup), _time(split.cloud, feature, runs, warmup)
    finally:
        torch.set_num_threads(before)


def _time(half: nn.Module, x: Tensor, runs: int, warmup: int) -> Latency:
    times_ms = []
    for _ in range(warmup + runs):
        _wait(x)
        start = time.perf_counter()
        half(x)
        _wait(x)
        times_ms.append((time.perf_counter() - start) * 1e3)
    p10, median, p90 = (float(q) for q in np.percentile(times_ms[warmup:], (10, 50, 90)))
    return Latency(median_ms=median, p10_ms=p10, p90_ms=p90, runs=runs)


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def with_latency(cut: Cut, edge: Latency | None, cloud: Latency | None) -> Cut:
    """The same cut with measured times in its cost; None takes them out.

    >>> edge, cloud = measure_latency(halves, images)  # doctest: +SKIP
    >>> with_latency(halves.cut, edge, cloud).cost.edge.latency.runs  # doctest: +SKIP
    30
    """
    cost = replace(cut.cost, edge=replace(cut.cost.edge, latency=edge), cloud=replace(cut.cost.cloud, latency=cloud))
    return replace(cut, cost=cost)
