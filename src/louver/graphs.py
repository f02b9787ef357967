"""Halves of a split as ONNX graphs: with noise as an input, without a trace of the machine that they were made on."""

from __future__ import annotations

import copy
import logging
import warnings
from dataclasses import dataclass

import onnx
import torch
from jaxtyping import Float
from torch import Tensor, nn

from louver.bundle import Noise as NoiseInput
from louver.bundle import NoiseKind
from louver.errors import CutError
from louver.stochastic import Noise, RandomMask, Stochastic

__all__ = ["Given", "given_noise", "to_onnx"]

_OPSET = 18
_MOST_BATCH = 2**16


@dataclass
class _Drawn:
    """Where the layers of one edge find the noise of the pass that runs: set at its start."""

    values: tuple[Tensor, ...] = ()
    count: int = 0


class _Placed(nn.Module):
    """A stochastic layer whose draw comes from outside."""

    def __init__(self, layer: Stochastic, drawn: _Drawn) -> None:
        super().__init__()
        self.layer = layer
        self.drawn = drawn
        self.place: int | None = None
        self.shape: tuple[int, ...] = ()

    @property
    def kind(self) -> NoiseKind:
        if isinstance(self.layer, RandomMask):
            return "uniform"
        return "laplace" if isinstance(self.layer, Noise) and self.layer.kind == "laplace" else "normal"

    def forward(self, z: Tensor) -> Tensor:
        if not self.drawn.values:  # the pass that finds order and shapes
            if self.place is not None:
                raise CutError("a layer that draws by chance runs twice in the edge; give each use a layer of its own")
            self.place, self.shape = self.drawn.count, tuple(z.shape[1:])
            self.drawn.count += 1
            return z
        assert self.place is not None
        value = self.drawn.values[self.place]
        if isinstance(self.layer, RandomMask):
            kept: Tensor = z * (value >= self.layer.rate).to(z.dtype) / (1 - self.layer.rate)
            return kept
        assert isinstance(self.layer, Noise)
        noisy: Tensor = z + self.layer.std * value
        return noisy


class Given(nn.Module):
    """An edge that takes its noise as further arguments, one for each of `inputs`, instead of drawing it."""

    def __init__(self, edge: nn.Module, drawn: _Drawn, inputs: tuple[NoiseInput, ...]) -> None:
        super().__init__()
        self.edge = edge
        self.inputs = inputs
        self._drawn = drawn

    def forward(self, image: Tensor, *noise: Tensor) -> Tensor:
        """Features of these images under this noise."""
        self._drawn.values = noise
        try:
            features: Tensor = self.edge(image)
        finally:
            self._drawn.values = ()
        return features


def given_noise(edge: nn.Module, example: Float[Tensor, "n c h w"]) -> Given:
    """A copy of the edge in evaluation mode that takes its noise as input; without noise it takes images alone.

    Raises:
        CutError: a layer that draws by chance in a way that this version cannot export.
    """
    edge = copy.deepcopy(edge).eval()
    drawn = _Drawn()
    if isinstance(edge, Stochastic):
        edge = nn.Sequential(edge)
    by_layer: dict[Stochastic, _Placed] = {}
    for parent in list(edge.modules()):
        # Not named_children: it tells of a layer that has two places only once.
        for name, layer in list(parent._modules.items()):
            if not isinstance(layer, Stochastic):
                continue
            if not isinstance(layer, Noise | RandomMask):
                raise CutError(
                    f"{name}: expected Noise or RandomMask as layers that draw by chance, got {type(layer).__name__}, "
                    "which has no form that a device could draw; build the edge of these two"
                )
            placed = by_layer.setdefault(layer, _Placed(layer, drawn))
            setattr(parent, name, placed)
    with torch.no_grad():
        edge(example)
    used = sorted((one for one in by_layer.values() if one.place is not None), key=lambda one: one.place or 0)
    inputs = tuple(NoiseInput(name=f"noise_{one.place}", shape=one.shape, kind=one.kind) for one in used)
    return Given(edge, drawn, inputs).eval()


def to_onnx(module: nn.Module, inputs: dict[str, Tensor], output: str) -> bytes:
    """`module` as an ONNX graph whose batch is free; `inputs` are examples by name, in order.

    Raises:
        CutError: the module uses an operation that ONNX does not have.
    """
    batch = torch.export.Dim("n", min=1, max=_MOST_BATCH)
    shapes = tuple({0: batch} for _ in inputs)
    # Noise comes as further arguments, which the exporter wants in a tuple of their own.
    dynamic = (shapes[0], shapes[1:]) if len(inputs) > 1 else shapes
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own future
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                dynamo=True,
                dynamic_shapes=dynamic,
                input_names=list(inputs),
                output_names=[output],
                opset_version=_OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise CutError(f"this half cannot be written as ONNX: {reason}; cut elsewhere") from error
    finally:
        quiet.setLevel(level)
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _forget_origin(model)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def _forget_origin(model: onnx.ModelProto) -> None:
    """Takes out notes of the exporter: they hold paths and lines of the machine that it ran on."""
    graphs = [model.graph, *(function for function in model.functions)]
    model.doc_string = ""
    del model.metadata_props[:]
    for graph in graphs:
        graph.doc_string = ""
        del graph.metadata_props[:]
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
        for value in graph.value_info:
            del value.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
