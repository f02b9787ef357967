"""A network as a graph of steps with module-path names: torch.fx where it can, torch.export where it must.

torch.fx comes first since its graphs run the user's own modules, whole, so nothing about them can change. A module
whose own forward cannot be followed is kept as one indivisible step. torch.export lowers modules to operators, with
image sizes fixed; it follows what decides by size. Either graph is run once against the network: one bit off, refused.
"""

# ruff: noqa: ANN401 - values on their way through a graph are of any type

from __future__ import annotations

import copy
import io
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jaxtyping
import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.node import Argument
from torch.utils import _pytree as pytree

from louver.errors import CutError, DataError
from louver.stochastic import Stochastic

__all__ = ["Trace", "quiet", "trace"]

_ROOT = "net"  # the tracer follows a holder whose only child is the network, so that the root is called, hooks and all
_NO_BRANCHING = "symbolically traced variables cannot be used as inputs to control flow"


@dataclass(frozen=True)
class Trace:
    """The steps of a network in evaluation mode, in the order in which they run.

    `root` is a copy that shares the user's parameters and nothing else. `names` gives each step a path a person can
    type, `outputs` the modules whose output a step is (inner to outer), `structured` the modules that return something
    other than one value (with the last step inside), `boxes` the modules kept whole, with the reason.
    """

    root: nn.Module
    graph: fx.Graph
    names: dict[fx.Node, str]
    outputs: dict[fx.Node, list[str]]
    structured: dict[str, tuple[str, fx.Node]]
    boxes: dict[str, str]
    engine: str

    def target(self, node: fx.Node) -> str:
        """Where the module or tensor of a `call_module` or `get_attr` step lives in the user's network."""
        return str(node.target).removeprefix(f"{_ROOT}.") if self.engine == "torch.fx" else str(node.target)

    def held(self, node: fx.Node) -> Any:
        """The module or tensor that a `call_module` or `get_attr` step uses."""
        found: Any = self.root
        for part in str(node.target).split("."):
            found = getattr(found, part)
        return found


@contextmanager
def quiet() -> Iterator[None]:
    """Tracing makes torch warn, log and print about its own insides; the user can do nothing about it and sees none.

    A network that draws random numbers draws them here too: the user's generators are put back.
    """
    logger = logging.getLogger("torch")
    told = io.StringIO()
    children = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith("torch.")]
    speaking = [child for child in (logger, *children) if not child.disabled]
    for child in speaking:
        child.disabled = True
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(), redirect_stderr(told), redirect_stdout(told):
            warnings.simplefilter("ignore")
            yield
    finally:
        for child in speaking:
            child.disabled = False


@contextmanager
def _unchecked() -> Iterator[None]:
    """Shape checkers off: they would refuse the stand-ins that a tracer sends through the user's annotated forwards."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def trace(model: nn.Module, example: Tensor) -> Trace:
    """The network as a graph that computes, bit for bit, what the network computes in evaluation mode.

    Raises:
        CutError: neither torch.fx nor torch.export can follow the network; the message holds both reasons.
        DataError: the network does not run on the example.
    """
    if example.ndim < 2 or example.shape[0] < 1:
        raise DataError(f"expected an example of shape (n, ...) with n of 1 or more, got {tuple(example.shape)}")
    net = _private_copy(model)
    with quiet(), torch.no_grad():
        try:
            expected = _answer(net, example)
        except Exception as error:  # the user's forward may raise anything; all of it means the same
            shape = tuple(example.shape)
            raise DataError(
                f"{type(model).__name__} does not run on an example of shape {shape}: {_first_line(error)}"
            ) from error
        reasons = []
        for engine in (_trace_fx, _trace_export):
            try:
                found = engine(net, example)
            except _UntraceableError as error:
                reasons.append(str(error))
                continue
            got = _answer(fx.GraphModule(found.root, found.graph), example)
            if _same(got, expected):
                return found
            if not _same(_answer(net, example), expected):
                reasons = ["two passes over the same image differ, so the halves could not be compared with it"]
                break
            reasons.append(f"{found.engine} follows it, but to another result (it may ask what kind of value it gets)")
    raise CutError(f"cannot cut {type(model).__name__}: " + "; ".join(reasons))


def _answer(net: nn.Module, example: Tensor) -> Any:
    """What the network makes of the example, with the same draws each time where it draws by chance."""
    if any(isinstance(module, Stochastic) for module in net.modules()):
        torch.manual_seed(0)
    return net(example.clone())


class _UntraceableError(Exception):
    """One engine gives up; the message is the reason."""


def _private_copy(model: nn.Module) -> nn.Module:
    """The network in evaluation mode with the user's own parameters, everything else copied.

    Parameters are shared to save memory: neither engine computes on them. Buffers, modes and hooks are copied since
    a forward may change them.
    """
    parameters = list(model.parameters())
    if any(nn.parameter.is_lazy(p) for p in parameters):
        raise CutError(
            f"cannot cut {type(model).__name__}: it has lazy parameters; run it once first, to give them shapes"
        )
    try:
        return copy.deepcopy(model, {id(p): p for p in parameters}).eval()
    except Exception as error:  # a user's __deepcopy__ may raise anything
        raise CutError(f"cannot cut {type(model).__name__}: it cannot be copied ({_first_line(error)})") from error


def _same(left: Any, right: Any) -> bool:
    lefts, left_spec = pytree.tree_flatten(left)
    rights, right_spec = pytree.tree_flatten(right)
    return left_spec == right_spec and all(_same_leaf(a, b) for a, b in zip(lefts, rights, strict=True))


def _same_leaf(left: Any, right: Any) -> bool:
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return type(left) is type(right) and bool(left == right)
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return bool(((left == right) | ((left != left) & (right != right))).all())


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _reason(error: BaseException) -> str:
    """Why an engine gave up, in the words of the user's own code: the line that stopped it."""
    text = str(error)
    is_data_dependent = "data-dependent" in text.lower() or "DataDependent" in type(error).__name__
    why = "control flow depends on the data" if is_data_dependent else _first_line(error)
    if _NO_BRANCHING in text:
        why = "control flow depends on the input"
    inside_torch = str(Path(torch.__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((inside_torch, __file__)) and frame.line:
            return f"{why} (`{frame.line.strip()}`, line {frame.lineno} of {Path(frame.filename).name})"
    return why


# torch.fx ------------------------------------------------------------------------------------------------------------


class _Holder(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Any:
        return self.net(image)


@dataclass
class _Paths:
    """Names as given out: a second call of the same place gets `_1`, as in torchvision's feature extraction."""

    taken: set[str] = field(default_factory=set)

    def fresh(self, wanted: str) -> str:
        name, k = wanted, 0
        while name in self.taken:
            k += 1
            name = f"{wanted}_{k}"
        self.taken.add(name)
        return name


class _Tracer(fx.Tracer):
    def __init__(self, boxes: dict[str, str]) -> None:
        super().__init__()
        self.boxes = boxes
        self.stack: list[str] = []
        self.failed: tuple[str, BaseException] | None = None
        self.paths = _Paths()
        self.names: dict[fx.Node, str] = {}
        self.outputs: dict[fx.Node, list[str]] = {}
        self.structured: dict[str, tuple[str, fx.Node]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # A hook must see tensors, never the tracer's stand-ins, so a module with hooks runs whole.
        has_hooks = bool(m._forward_hooks or m._forward_pre_hooks)
        is_kept = has_hooks or isinstance(m, Stochastic)
        return module_qualified_name in self.boxes or is_kept or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        self.stack.append(path)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception as error:
            if self.failed is None:
                self.failed = (path, error)
            raise
        finally:
            self.stack.pop()
        short = path.removeprefix(_ROOT).removeprefix(".")
        if isinstance(result, fx.Proxy):
            # A module that ran as one step is its step; only one that was looked into needs a name of its own.
            is_step = result.node.op == "call_module" and result.node.target == path
            if short:
                self.outputs.setdefault(result.node, []).append(
                    self.names[result.node] if is_step else self.paths.fresh(short)
                )
        elif short:
            self.structured[short] = (f"a {type(result).__name__}", next(iter(reversed(self.graph.nodes))))
        return result

    def create_node(
        self,
        kind: str,
        target: fx.node.Target,
        args: tuple[Argument, ...],
        kwargs: dict[str, Argument],
        name: str | None = None,
        type_expr: Any | None = None,
    ) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        here = self.stack[-1].removeprefix(_ROOT).removeprefix(".") if self.stack else ""
        if kind in ("call_module", "get_attr"):
            wanted = str(target).removeprefix(f"{_ROOT}.")
        elif kind == "placeholder":
            wanted = "input"
        else:
            wanted = ".".join(part for part in (here, _operation_name(target)) if part)
        self.names[node] = self.paths.fresh(wanted)
        return node


def _operation_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = str(target.overloadpacket.__name__)
    else:
        name = target if isinstance(target, str) else str(getattr(target, "__name__", type(target).__name__))
    return name.strip("_") or name


def _trace_fx(net: nn.Module, example: Tensor) -> Trace:
    """Follow the network; where a module's own forward cannot be followed, keep its class whole and retry."""
    holder = _Holder(net)
    boxes: dict[str, str] = {}
    while True:
        tracer = _Tracer(boxes)
        try:
            with _unchecked():
                graph = tracer.trace(holder)
        except Exception as error:  # the user's forward runs on stand-ins and may raise anything
            path, cause = tracer.failed or (_ROOT, error)
            if path == _ROOT:
                raise _UntraceableError(f"torch.fx: {_reason(cause)}") from error
            stuck = type(holder.get_submodule(path))
            for other, module in holder.named_modules():
                if type(module) is stuck and other != _ROOT:
                    boxes[other] = _reason(cause)
            continue
        short = {path.removeprefix(f"{_ROOT}."): reason for path, reason in boxes.items()}
        return Trace(holder, graph, tracer.names, tracer.outputs, tracer.structured, short, "torch.fx")


# torch.export --------------------------------------------------------------------------------------------------------


def _trace_export(net: nn.Module, example: Tensor) -> Trace:
    # A batch of one would be taken for a constant, so the example is doubled where it holds a single image.
    images = example.expand(2, *example.shape[1:]).clone() if example.shape[0] == 1 else example
    batch = {0: torch.export.Dim("batch")}
    try:
        exported = torch.export.export(_Holder(net), (images,), dynamic_shapes=(batch,), strict=False)
        module = exported.module(check_guards=False)
    except Exception as error:  # the user's forward runs on stand-ins and may raise anything
        raise _UntraceableError(f"torch.export: {_reason(error)}") from error
    # The exported tensors are looked up in the network itself: same names, same ties, same parameters.
    graph = fx.Graph()
    seen: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            codegen = module.graph._codegen
            assert isinstance(codegen, _PyTreeCodeGen)
            out_spec = codegen.pytree_info.out_spec
            assert out_spec is not None
            graph.output(pytree.tree_unflatten([seen.get(n, n) for n in node.args[0]], out_spec))
        else:
            seen[node] = graph.node_copy(node, lambda n: seen[n])
            seen[node].meta["modules"] = _call_stack(node)
    names, outputs, structured = _exported_names(graph)
    return Trace(module, graph, names, outputs, structured, {}, "torch.export")


def _call_stack(node: fx.Node) -> list[tuple[str, str]]:
    """(call, path) of the modules around an exported step, outer to inner; a second call has its own first part."""
    stack = node.meta.get("nn_module_stack") or {}
    pairs = [(str(call), str(path)) for call, (path, _) in stack.items()]
    return [(call, path.removeprefix(f"{_ROOT}.")) for call, path in pairs if path.startswith(f"{_ROOT}.")]


def _exported_names(
    graph: fx.Graph,
) -> tuple[dict[fx.Node, str], dict[fx.Node, list[str]], dict[str, tuple[str, fx.Node]]]:
    paths = _Paths()
    names: dict[fx.Node, str] = {}
    leaving: dict[tuple[str, str], list[fx.Node]] = {}
    for node in graph.nodes:
        stack = node.meta.get("modules", [])
        if node.op == "placeholder":
            wanted = "input"
        elif node.op == "get_attr":
            wanted = str(node.target).removeprefix(f"{_ROOT}.")
        else:
            wanted = ".".join([path for _, path in stack[-1:]] + [_operation_name(node.target)])
        names[node] = paths.fresh(wanted)
        for call in stack:
            if any(call not in user.meta.get("modules", []) for user in node.users):
                leaving.setdefault(call, []).append(node)
    outputs: dict[fx.Node, list[str]] = {}
    structured: dict[str, tuple[str, fx.Node]] = {}
    for (_, path), nodes in leaving.items():
        if len(nodes) == 1:
            outputs.setdefault(nodes[0], []).append(paths.fresh(path))
        else:
            structured[path] = (f"{len(nodes)} values", nodes[-1])
    for known in outputs.values():
        known.sort(key=lambda path: -path.count("."))
    return names, outputs, structured
