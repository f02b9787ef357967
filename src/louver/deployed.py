"""The exported edge as an audit sees it: what is measured is what the device will send."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from louver.bundle import EDGE, Bundle, Serving
from louver.bundle import Noise as NoiseInput
from louver.cut import Split
from louver.devices import n_cores
from louver.quantizing import Dequantize, Quantize, rounded
from louver.stochastic import laplace_like, stochastic_layers

__all__ = ["DeployedEdge", "Session", "deployed", "drawn"]


class Session:
    """An ONNX graph that runs; copies of what holds it share it."""

    def __init__(self, graph: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = n_cores()
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.digest = hashlib.sha256(graph).digest()

    def __deepcopy__(self, memo: object) -> Session:
        return self

    def run(self, inputs: dict[str, NDArray[Any]]) -> NDArray[Any]:
        """Its one output."""
        found: NDArray[Any] = self._session.run(None, inputs)[0]
        return found


class DeployedEdge(nn.Module):
    """Images to features as the cloud reads them, computed by the exported graph, noise and rounding included.

    Where a gradient is asked for, or chance is switched off, the same layers in torch stand in, rounded as the graph
    rounds, and gradients pass the rounding as if it were not there.
    """

    digest: Tensor

    def __init__(
        self,
        session: Session,
        serving: Serving,
        edge: nn.Module,
        quantize: Quantize | None,
        dequantize: Dequantize | None,
    ) -> None:
        super().__init__()
        self._session = session
        self._noise = serving.noise
        self.register_buffer("digest", torch.frombuffer(bytearray(session.digest), dtype=torch.uint8).clone())
        self.quantize = quantize
        self.dequantize = dequantize
        self.edge = edge  # last, so that a mask at its end is the last module here too

    def forward(self, x: Float[Tensor, "n c h w"]) -> Tensor:
        """Float32 features on the device of the images."""
        is_silent = any(layer.is_silent for layer in stochastic_layers(self.edge))
        if is_silent or (torch.is_grad_enabled() and x.requires_grad):
            features: Tensor = self.edge(x)
            if self.quantize is None or self.dequantize is None:
                return features
            return rounded(features.float(), self.quantize, self.dequantize)
        inputs = {"image": x.detach().float().cpu().contiguous().numpy()} | drawn(self._noise, len(x))
        sent = torch.from_numpy(self._session.run(inputs)).to(x.device)
        arrived: Tensor = sent if self.dequantize is None else self.dequantize(sent)
        return arrived


def drawn(noise: tuple[NoiseInput, ...], n: int) -> dict[str, NDArray[np.float32]]:
    """Noise for n images by torch's global generator, so that an audit can be repeated; a device draws its own."""
    found = {}
    for one in noise:
        shape = (n, *one.shape)
        if one.kind == "normal":
            value = torch.randn(shape)
        elif one.kind == "uniform":
            value = torch.rand(shape)
        else:
            value = laplace_like(torch.empty(shape))
        found[one.name] = value.numpy()
    return found


def deployed(halves: Split, bundle: Bundle, quantize: Quantize | None, dequantize: Dequantize | None) -> Split:
    """`halves` with the bundle's edge in the place of their own: the same cut, at the size of what is sent.

    Raises:
        BundleError: the bundle's edge is missing or changed.
    """
    edge = DeployedEdge(Session(bundle.content(EDGE)), bundle.serving, halves.edge, quantize, dequantize)
    cost = replace(halves.cut.cost, feature_bytes=bundle.serving.feature_bytes)
    return Split(edge.eval(), halves.cloud, replace(halves.cut, cost=cost))
