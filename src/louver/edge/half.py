"""One half of a bundle in onnxruntime, and the noise that a stochastic edge draws."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from louver.bundle import EDGE, HEAD, Bundle, Noise
from louver.errors import BundleError, DataError
from louver.graph_errors import RUN_ERRORS

__all__ = ["EdgeHalf", "HeadHalf", "checked_images", "draw"]

_FEATURE = {"UINT8": np.dtype(np.uint8), "FP32": np.dtype(np.float32)}


class _Half:
    """A graph that is ready to run, from any thread."""

    def __init__(self, bundle: Bundle, file: str, inputs: Sequence[str], output: str, *, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # The arena stays on: without it resnet18's first half peaked 19 MB higher. Plans of memory took 2 MB, and gave
        # no time.
        options.enable_mem_pattern = False
        # Idle threads that spin take the processor from the camera.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        path, content = bundle.path(file), bundle.content(file)
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except RUN_ERRORS as error:
            raise BundleError(f"{path}: onnxruntime cannot load it ({error}); export the bundle again") from error
        found = {one.name for one in self._session.get_inputs()}, {one.name for one in self._session.get_outputs()}
        if found != (set(inputs), {output}):
            raise BundleError(
                f"{path}: expected inputs {', '.join(sorted(inputs))} and output {output}, got "
                f"{', '.join(sorted(found[0]))} and {', '.join(sorted(found[1]))}; export the bundle again"
            )
        self._path, self._output = path, output

    def run(self, inputs: Mapping[str, NDArray[Any]], expected: tuple[int, ...]) -> NDArray[Any]:
        """What the graph makes of `inputs`.

        Raises:
            BundleError: it breaks, or its output has not the `expected` shape.
        """
        out: NDArray[Any]
        try:
            (out,) = self._session.run([self._output], inputs)
        except RUN_ERRORS as error:
            raise BundleError(f"{self._path}: onnxruntime cannot run it ({error}); export the bundle again") from error
        if out.shape != expected:
            raise BundleError(
                f"{self._path}: expected a {self._output} of {expected}, got {out.shape}; export the bundle again"
            )
        return out


class EdgeHalf:
    """Images to features, with fresh noise for every request."""

    def __init__(self, bundle: Bundle, *, threads: int) -> None:
        self._serving = bundle.serving
        names = ["image", *(one.name for one in bundle.serving.noise)]
        self._half = _Half(bundle, EDGE, names, "feature", threads=threads)
        self._path = bundle.path(EDGE)

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.generic]:
        """The feature of checked images, [n, *feature_shape], as it goes on the wire.

        Raises:
            BundleError: the graph does not make what the manifest says, or not finite numbers.
        """
        serving = self._serving
        inputs = {"image": images, **draw(serving.noise, len(images))}
        feature = self._half.run(inputs, (len(images), *serving.feature_shape))
        if feature.dtype != _FEATURE[serving.wire_dtype]:
            raise BundleError(
                f"{self._path}: expected {serving.wire_dtype} features, got {feature.dtype}; export the bundle again"
            )
        if feature.dtype == np.float32 and not np.isfinite(feature).all():
            raise BundleError(f"{self._path}: it makes features that are not finite; mend the model and export again")
        return feature


class HeadHalf:
    """Features to the scores of the small head."""

    def __init__(self, bundle: Bundle, *, threads: int) -> None:
        self._shape = bundle.serving.output_shape
        self._half = _Half(bundle, HEAD, ["feature"], "scores", threads=threads)

    def __call__(self, feature: NDArray[np.generic]) -> NDArray[np.float32]:
        """Scores [n, *output_shape].

        Raises:
            BundleError: the graph does not make them.
        """
        return self._half.run({"feature": feature}, (len(feature), *self._shape)).astype(np.float32)


def draw(noise: Sequence[Noise], n_images: int) -> dict[str, NDArray[np.float32]]:
    """The noise inputs of one request, from a generator that the operating system's entropy seeds for it alone.

    A seed that could be known, or drawn twice, would let a receiver subtract the noise.
    """
    if not noise:
        return {}
    rng = np.random.default_rng(int.from_bytes(os.urandom(32)))
    out = {}
    for one in noise:
        shape = (n_images, *one.shape)
        if one.kind == "normal":
            out[one.name] = rng.standard_normal(shape, np.float32)
        elif one.kind == "laplace":
            out[one.name] = rng.laplace(scale=2**-0.5, size=shape).astype(np.float32)
        else:
            assert one.kind == "uniform"
            out[one.name] = rng.random(shape, np.float32)
    return out


def checked_images(images: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """`images` in one piece, if they are float32 [n, *shape] in [0,1].

    Raises:
        DataError: they are not.
    """
    if not isinstance(images, np.ndarray):
        raise DataError(f"expected images as a numpy array, got {type(images).__name__}; convert them")
    if images.dtype != np.float32:
        hint = "divide by 255 as float32" if images.dtype == np.uint8 else "convert them with .astype('float32')"
        raise DataError(f"expected float32 images, got {images.dtype}; {hint}")
    if images.ndim != 1 + len(shape) or images.shape[1:] != shape or len(images) == 0:
        wanted = ", ".join(map(str, shape))
        raise DataError(f"expected images of shape [n, {wanted}] with n of 1 or more, got {list(images.shape)}; resize")
    low, high = float(images.min()), float(images.max())  # NaN comes through either
    if not np.isfinite((low, high)).all():
        raise DataError("expected finite images, got NaN or infinity; look at where they come from")
    if low < 0 or high > 1:
        raise DataError(f"expected images in [0,1], got {low:g} to {high:g}; scale them, the model normalizes itself")
    return np.ascontiguousarray(images)
