"""Slow and obviously right versions of what cutting computes fast."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from louver.cut import Split, split_at
from louver.points import Plan


def all_splits(model: nn.Module, example: Tensor) -> Iterator[Split]:
    """The network split at every legal cut, followed only once."""
    plan = Plan.of(model, example)
    for cut, position in plan.cuts:
        yield split_at(plan, cut, position)


def separating_steps(model: nn.Module, example: Tensor) -> list[str]:
    """Steps that every path from the image to the result goes through: without it, nothing arrives.

    For networks whose steps are all tensors. Steps that hand on their input (dropout, Identity) do not count.
    """
    traced = fx.symbolic_trace(model)
    values = _values(traced, example)
    (image,) = (node for node in traced.graph.nodes if node.op == "placeholder")
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    found = []
    for gone in traced.graph.nodes:
        if gone in (image, output) or not isinstance(values.get(gone), Tensor):
            continue
        reached, waiting = {image}, [image]
        while waiting:
            for user in waiting.pop().users:
                if user is not gone and user not in reached:
                    reached.add(user)
                    waiting.append(user)
        is_handed_on = any(torch.equal(values[gone], values[used]) for used in gone.all_input_nodes)
        if output not in reached and gone is not output.args[0] and not is_handed_on:
            found.append(str(gone.target) if gone.op == "call_module" else gone.name)
    return found


def _values(traced: fx.GraphModule, example: Tensor) -> dict[fx.Node, object]:
    class Keeper(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            kept[n] = result = super().run_node(n)
            kept[n] = result.clone() if isinstance(result, Tensor) else result
            return result

    kept: dict[fx.Node, object] = {}
    with torch.no_grad():
        Keeper(traced).run(example.clone())
    return kept


def counted_macs(half: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates that torch's own counter sees while the half really runs."""
    # The counter does not know the fused attention operators of CPUs, so attention is run as plain products.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            half(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() // 2


def peak_bytes(half: fx.GraphModule, shape: tuple[int, ...]) -> int:
    """The most that tensors hold after any step, by asking the garbage collector for every living tensor.

    For halves whose modules make no tensors besides their result.
    """
    peak = 0

    class Scales(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            nonlocal peak
            result = super().run_node(n)
            if n.op != "output":
                living = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
                peak = max(
                    peak, sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in living}.values())
                )
            return result

        def placeholder(self, target: object, args: object, kwargs: object) -> object:
            return torch.rand(shape)  # made here, so that nobody else holds on to it

    gc.collect()
    gc.freeze()  # what lives by now, weights above all, is not looked at
    try:
        with torch.no_grad():
            Scales(half).run(None)
    finally:
        gc.unfreeze()
    return peak
