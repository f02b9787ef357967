"""Small bundles made without torch, for the tests of what serves them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from louver.bundle import CLOUD, EDGE, HEAD, Bundle, Noise, Serving, file_hash, write_manifest

IMAGE, FEATURE, N_SCORES = (3, 8, 10), (4, 4, 5), 7
"""All sizes differ."""


def toy_bundle(
    folder: Path,
    *,
    name: str = "toy",
    seed: int = 0,
    encoding: Literal["uint8", "float32"] = "uint8",
    has_noise: bool = False,
    has_head: bool = False,
) -> Bundle:
    """A bundle of one convolution on the edge and one matrix on the cloud, its weights drawn from `seed`.

    The edge sends relu(conv(image) [+ noise]), as uint8 in steps of 1/64 or as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    c, h, w = FEATURE
    weight = rng.normal(size=(c, IMAGE[0], 3, 3)).astype(np.float32) / 3
    matrix = rng.normal(size=(c * h * w, N_SCORES)).astype(np.float32) / 8
    is_byte = encoding == "uint8"
    wire = TensorProto.UINT8 if is_byte else TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", *IMAGE])]
    nodes = [helper.make_node("Conv", ["image", "weight"], ["conv"], pads=[1, 1, 1, 1], strides=[2, 2])]
    last = "conv"
    if has_noise:
        inputs.append(helper.make_tensor_value_info("noise_0", TensorProto.FLOAT, ["n", *FEATURE]))
        nodes.append(helper.make_node("Add", ["conv", "noise_0"], ["noisy"]))
        last = "noisy"
    nodes.append(helper.make_node("Relu", [last], ["active" if is_byte else "feature"]))
    constants = {"weight": weight, "scale": np.float32(1 / 64), "zero": np.uint8(0), "matrix": matrix}
    if is_byte:
        nodes.append(helper.make_node("QuantizeLinear", ["active", "scale", "zero"], ["feature"]))
    _save(folder / EDGE, nodes, inputs, ("feature", wire, FEATURE), constants)
    nodes = [helper.make_node("DequantizeLinear", ["feature", "scale", "zero"], ["active"])] if is_byte else []
    nodes += [
        helper.make_node("Flatten", ["active" if is_byte else "feature"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], ["scores"]),
    ]
    inputs = [helper.make_tensor_value_info("feature", wire, ["n", *FEATURE])]
    files = [EDGE, CLOUD] + ([HEAD] if has_head else [])
    for file in files[1:]:
        _save(folder / file, nodes, inputs, ("scores", TensorProto.FLOAT, (N_SCORES,)), constants)
    serving = Serving(
        cut="conv",
        image_shape=IMAGE,
        encoding=encoding,
        feature_shape=FEATURE,
        output_shape=(N_SCORES,),
        files={file: file_hash(folder / file) for file in files},
        noise=(Noise(name="noise_0", shape=FEATURE, kind="normal"),) if has_noise else (),
        labels=tuple(f"class {i}" for i in range(N_SCORES)),
    )
    return write_manifest(folder, name, serving, {"findings": []})


def _save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    output: tuple[str, int, tuple[int, ...]],
    constants: dict[str, np.ndarray],
) -> None:
    name, kind, shape = output
    used = {one for node in nodes for one in node.input}
    graph = helper.make_graph(
        nodes,
        path.stem,
        inputs,
        [helper.make_tensor_value_info(name, kind, ["n", *shape])],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items() if key in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
