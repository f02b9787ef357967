"""The cloud half of a bundle, loaded from the bytes that were verified, and checked against its manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from louver.bundle import CLOUD, Bundle
from louver.errors import BundleError
from louver.graph_errors import RUN_ERRORS
from louver.signing import Maker, trusted_bundle

__all__ = ["FEATURE", "SCORES", "Model", "load_model", "model_of"]

FEATURE, SCORES = "feature", "scores"
"""The one input and the one output, in the graph and on the wire."""

_TYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "UINT8": ("tensor(uint8)", np.dtype(np.uint8)),
    "FP32": ("tensor(float)", np.dtype("<f4")),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """One cloud half, ready to run. Shapes are of one image; `run` takes and gives rows."""

    name: str
    version: str
    datatype: Literal["UINT8", "FP32"]
    feature_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    labels: tuple[str, ...]
    run: Callable[[NDArray[Any]], NDArray[np.float32]]
    dtype: np.dtype[Any]
    """Of the feature, as numpy names it; little-endian, as on the wire."""
    feature_bytes: int
    """Bytes of one image's feature."""


def load_model(folder: Path, *, threads: int, maker: Maker | None = None) -> Model:
    """The cloud half of the bundle in `folder`, run once; with a `maker` the bundle must be signed by it.

    Raises:
        BundleError: no bundle, a changed byte, a graph that onnxruntime refuses, or another than the manifest says.
        ConfigError: the maker's key cannot be read.
    """
    return model_of(trusted_bundle(folder, maker), threads=threads)


def model_of(bundle: Bundle, *, threads: int) -> Model:
    """The cloud half of a bundle that is open, run once.

    Raises:
        BundleError: a changed byte, a graph that onnxruntime refuses, or another than the manifest says.
    """
    content = bundle.content(CLOUD)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # What it logs of a failed run may hold values; what it says of a graph is in the exception.
    options.log_severity_level = 4
    # A thread that spins for its next run takes the core from another worker, and from the loop that feeds it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        _check(bundle, session)
    except RUN_ERRORS as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(
            f"{bundle.folder / CLOUD}: onnxruntime cannot run it ({_first_line(error)}); export the bundle again, or "
            "install a newer onnxruntime"
        ) from error
    serving = bundle.serving

    def run(feature: NDArray[Any]) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = session.run([SCORES], {FEATURE: feature})[0]
        return scores

    return Model(
        name=bundle.name,
        version=bundle.id,
        datatype=serving.wire_dtype,
        feature_shape=serving.feature_shape,
        output_shape=serving.output_shape,
        labels=serving.labels,
        run=run,
        dtype=_TYPES[serving.wire_dtype][1],
        feature_bytes=serving.feature_bytes,
    )


def _check(bundle: Bundle, session: Any) -> None:  # noqa: ANN401 - onnxruntime has no types
    """The graph takes and gives what the manifest says, and does so in a run of two images."""
    serving, path = bundle.serving, bundle.folder / CLOUD
    kind, dtype = _TYPES[serving.wire_dtype]
    for what, found, name, wanted, shape in (
        ("input", session.get_inputs(), FEATURE, kind, serving.feature_shape),
        ("output", session.get_outputs(), SCORES, "tensor(float)", serving.output_shape),
    ):
        told = ", ".join(f"{one.name} {one.type} {one.shape}" for one in found)
        fits = [(one.name, one.type) for one in found] == [(name, wanted)]
        if not fits or not _fits(found[0].shape, shape):
            raise BundleError(
                f"{path}: expected one {what} {name} {wanted} of {['n', *shape]} as its manifest says, got {told}; "
                "export the bundle again"
            )
    scores = session.run([SCORES], {FEATURE: np.zeros((2, *serving.feature_shape), dtype)})[0]
    if scores.shape != (2, *serving.output_shape):
        raise BundleError(
            f"{path}: expected scores of {(2, *serving.output_shape)} for two images as its manifest says, got "
            f"{scores.shape}; export the bundle again"
        )


def _fits(found: list[int | str | None], shape: tuple[int, ...]) -> bool:
    """Whether the batch is free, and every size that the graph fixes is the manifest's."""
    if len(found) != 1 + len(shape) or isinstance(found[0], int):
        return False
    return all(not isinstance(size, int) or size == wanted for size, wanted in zip(found[1:], shape, strict=True))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
