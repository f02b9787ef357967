"""The Open Inference Protocol V2 as bytes: a body into a call, scores into a body. No network, no model is run.

The body is JSON, or JSON and then the bytes of the tensor (the binary tensor extension), in which case the header
`Inference-Header-Content-Length` says where the tensor starts. What is not exactly right is refused: a feature that was
cut or shifted would be answered with scores of nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from louver.cloud.heads import MOST_HEAD_BYTES, Heads
from louver.cloud.json_text import decode_json
from louver.cloud.models import FEATURE, SCORES, Model
from louver.cloud.refusals import Refusal, shown
from louver.cloud.settings import Limits

__all__ = [
    "MOST_ID",
    "Asked",
    "Call",
    "RestHeads",
    "answer_bytes",
    "answer_call",
    "answer_form",
    "check_classes",
    "check_feature",
    "check_rows",
    "is_own",
    "model_metadata",
    "read_call",
    "tensor_bytes",
]

MOST_ID = 256
_MOST_CLASSES = 1000
_PIECE = 2**14
_HARMLESS = ("priority", "timeout")
"""Parameters that some clients send with each request; the server has no use for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A checked request: rows of features, and how the scores are wanted: as bytes, as the best `classes`, or plain."""

    id: str
    feature: NDArray[Any]
    is_binary: bool
    classes: int = 0


@dataclass(frozen=True, slots=True)
class Asked:
    """What a head with a binary tensor asks for, beside its id."""

    rows: int
    size: int
    is_binary: bool
    classes: int


RestHeads = Heads[tuple[str, bytes], Asked]
"""By the version of the model, and by the JSON after the id."""

_ID = re.compile(rb'\{ ?"id": ?"([0-9A-Za-z-]{1,64})"')
"""The start of a head as clients write it: an id that stands for itself, without an escape."""


def read_call(
    body: bytes, header_bytes: int | None, model: Model, limits: Limits, heads: RestHeads | None = None
) -> Call:
    """The call in a body, its tensor a view of it. `header_bytes`: length of the JSON; None if that is all.

    heads: those that this model and these limits were found to allow, to which this one is added.

    Raises:
        Refusal: 400, or 413 for too long JSON.
    """
    key = None
    if (
        heads is not None
        and header_bytes is not None
        and header_bytes <= min(len(body), limits.header_bytes, MOST_HEAD_BYTES)
    ):
        start = _ID.match(body, 0, header_bytes)
        if start is not None:
            key = model.version, body[start.end() : header_bytes]
            asked = heads.find(key)
            if asked is not None:
                feature = tensor_bytes(memoryview(body)[header_bytes:], model, asked.rows, told=asked.size)
                check_feature(feature)
                return Call(id=start[1].decode(), feature=feature, is_binary=asked.is_binary, classes=asked.classes)
    content = _json(body, header_bytes, limits)
    _only(content, "the request", {"id", "inputs", "outputs", "parameters"})
    call_id = content.get("id", "")
    if not isinstance(call_id, str) or len(call_id) > MOST_ID:
        raise Refusal(400, f"expected id to be a string of at most {MOST_ID} signs")
    wants = _parameters(content, "the request", {"binary_data_output": bool}, has_own=True)
    tensor = _one(content.get("inputs"), "inputs", FEATURE)
    _only(tensor, "the input", {"name", "shape", "datatype", "parameters", "data"})
    rows = check_rows(model, tensor.get("datatype"), tensor.get("shape"), limits)
    size = _parameters(tensor, "the input", {"binary_data_size": int}).get("binary_data_size")
    if size is None:
        if header_bytes is not None and header_bytes != len(body):
            raise Refusal(400, "bytes follow the JSON, and no input has a binary_data_size")
        feature = _from_json(tensor.get("data"), model, rows)
    else:
        if "data" in tensor:
            raise Refusal(400, "the input has both data and a binary_data_size; send one")
        begin = len(body) if header_bytes is None else header_bytes
        feature = tensor_bytes(memoryview(body)[begin:], model, rows, told=size)
    check_feature(feature)
    is_binary, classes = bool(wants.get("binary_data_output", False)), 0
    if content.get("outputs", []) != []:
        output = _one(content["outputs"], "outputs", SCORES)
        _only(output, "the output", {"name", "parameters"})
        wants = _parameters(output, "the output", {"binary_data": bool, "classification": int})
        is_binary = bool(wants.get("binary_data", is_binary))
        if wants.get("classification", 0) != 0:
            classes = check_classes(model, wants["classification"])
    if heads is not None and key is not None and size is not None:
        heads.keep(key, Asked(rows, size, is_binary, classes))
    return Call(id=call_id, feature=feature, is_binary=is_binary, classes=classes)


def answer_call(model: Model, call: Call, scores: NDArray[np.float32]) -> tuple[int | None, bytes]:
    """The body with these scores, and the length of its JSON if bytes follow it."""
    # Written by hand: an encoder takes longer than all else here. Names and versions of bundles need no escape.
    call_id = f'"id":{json.dumps(call.id)},' if call.id else ""
    datatype, shape = answer_form(call, scores)
    start = (
        f'{{"model_name":"{model.name}","model_version":"{model.version}",{call_id}'
        f'"outputs":[{{"name":"{SCORES}","datatype":"{datatype}","shape":{list(shape)},'
    )
    if not call.is_binary:
        data = _best_classes(model, call, scores) if call.classes else scores.reshape(-1).tolist()
        return None, f'{start}"data":{json.dumps(data, allow_nan=False)}}}]}}'.encode()
    content = answer_bytes(model, call, scores)
    text = f'{start}"parameters":{{"binary_data_size":{len(content)}}}}}]}}'.encode()
    return len(text), text + content


def answer_form(call: Call, scores: NDArray[np.float32]) -> tuple[str, tuple[int, ...]]:
    """Datatype and shape of the answer with these scores."""
    return ("BYTES", (len(scores), call.classes)) if call.classes else ("FP32", scores.shape)


def answer_bytes(model: Model, call: Call, scores: NDArray[np.float32]) -> bytes:
    """The answer with these scores as bytes of a tensor; of classes, each with its length before it."""
    if not call.classes:
        return np.ascontiguousarray(scores, "<f4").tobytes()
    texts = [one.encode() for one in _best_classes(model, call, scores)]
    return b"".join(len(one).to_bytes(4, "little") + one for one in texts)


def model_metadata(model: Model, versions: Sequence[str]) -> dict[str, Any]:
    """What V2 tells of a model: its versions, and its tensors with -1 for the batch."""
    return {
        "name": model.name,
        "versions": list(versions),
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": FEATURE, "datatype": model.datatype, "shape": [-1, *model.feature_shape]}],
        "outputs": [{"name": SCORES, "datatype": "FP32", "shape": [-1, *model.output_shape]}],
    }


def check_rows(model: Model, datatype: object, shape: object, limits: Limits) -> int:
    """How many images a tensor of this type and shape holds.

    Raises:
        Refusal: 400, another type or shape than the model's, or more images than one request may hold.
    """
    if datatype != model.datatype:
        raise Refusal(400, f"expected datatype {model.datatype}, got {shown(datatype)}")
    wanted = list(model.feature_shape)
    if not isinstance(shape, list) or any(type(size) is not int for size in shape) or shape[1:] != wanted:
        told = ", ".join(map(str, ["n", *wanted]))
        raise Refusal(400, f"expected shape [{told}], got {shown(shape)}")
    rows: int = shape[0] if shape else 0
    if not 1 <= rows <= limits.rows:
        raise Refusal(400, f"expected 1 to {limits.rows} images in a request, got {shown(rows)}")
    return rows


def check_classes(model: Model, count: int) -> int:
    """How many classes of an image are told where the best `count` are asked for.

    Raises:
        Refusal: 400, too many or too few, or the scores are no classes.
    """
    if len(model.output_shape) != 1:
        raise Refusal(400, f"expected no classification: the scores of an image have shape {list(model.output_shape)}")
    found = min(count, model.output_shape[0])
    if not 1 <= found <= _MOST_CLASSES:
        raise Refusal(400, f"expected a classification of 1 to {_MOST_CLASSES} classes, got {shown(count)}")
    return found


def tensor_bytes(content: memoryview | bytes, model: Model, rows: int, *, told: int | None = None) -> NDArray[Any]:
    """The tensor whose bytes these are, not one more or less.

    Raises:
        Refusal: 400, another number of bytes.
    """
    wanted = rows * model.feature_bytes
    if told is not None and told != wanted:
        raise Refusal(400, f"expected binary_data_size {wanted} for this shape, got {shown(told)}")
    if len(content) != wanted:
        raise Refusal(400, f"expected {wanted} bytes of tensor for this shape, got {len(content)}")
    feature = np.frombuffer(content, model.dtype).reshape(rows, *model.feature_shape)
    return feature if feature.flags.aligned else feature.copy()


def check_feature(feature: NDArray[Any]) -> None:
    """Refuses NaN and infinity: scores of them mean nothing, and they would spread to what else is in the batch.

    Raises:
        Refusal: 400.
    """
    if feature.dtype.kind == "f" and not np.isfinite(feature).all():
        raise Refusal(400, "the feature holds NaN or infinity")


def _best_classes(model: Model, call: Call, scores: NDArray[np.float32]) -> list[str]:
    """Of each image its best classes, best first, as Triton writes them: `score:index:label`, or without label.

    Not for the event loop: 1,000 classes of 256 images take a third of a second.
    """
    names = [f"{i}:{label}" for i, label in enumerate(model.labels)] or list(map(str, range(scores.shape[1])))
    order = np.argsort(-scores, axis=1, kind="stable")[:, : call.classes]
    best = np.take_along_axis(scores, order, axis=1)
    return [f"{score:f}:{names[i]}" for score, i in zip(best.flat, order.flat, strict=True)]


def _json(body: bytes, header_bytes: int | None, limits: Limits) -> dict[str, Any]:
    if header_bytes is None:
        text, most, what = body, limits.json_bytes, "a tensor as JSON; send it as bytes"
    else:
        if not 0 < header_bytes <= len(body):
            raise Refusal(400, f"Inference-Header-Content-Length is not within the body of {len(body)} bytes")
        text, most, what = body[:header_bytes], limits.header_bytes, "the JSON before a tensor"
    if len(text) > most:
        raise Refusal(413, f"expected at most {most} bytes of JSON, got {len(text)}: the limit for {what}")
    try:
        # Decoded first: json would guess UTF-16 and UTF-32 too. Its own recursion limit bounds the depth.
        found = decode_json(text.decode())
    except UnicodeDecodeError as error:
        raise Refusal(400, "the JSON is not UTF-8") from error
    except RecursionError as error:
        raise Refusal(400, "the JSON is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise Refusal(400, f"the JSON does not parse: {error.msg} at sign {error.pos}") from error
    except ValueError as error:
        raise Refusal(400, "the JSON holds a number that is too long") from error
    if not isinstance(found, dict):
        raise Refusal(400, "expected the JSON to be an object")
    return found


def _only(content: Mapping[str, Any], what: str, known: set[str]) -> None:
    if not content.keys() <= known:
        unknown = min(content.keys() - known)
        raise Refusal(400, f"{what} has an unknown key {shown(unknown)}; known: {', '.join(sorted(known))}")


def _one(tensors: object, what: str, name: str) -> dict[str, Any]:
    """The only tensor of a list, which must have this name."""
    if not isinstance(tensors, list) or not all(isinstance(one, dict) for one in tensors):
        raise Refusal(400, f"expected {what} to be a list of objects")
    if len(tensors) != 1 or tensors[0].get("name") != name:
        names = shown([one.get("name") for one in tensors[:3]])
        raise Refusal(400, f"expected {what} to hold {name} and nothing else, got {names}")
    found: dict[str, Any] = tensors[0]
    return found


def is_own(key: str) -> bool:
    """Whether a parameter of a request is one of its client, or for models with sequences: it changes nothing here."""
    return not key.startswith("triton_")


def _parameters(
    content: Mapping[str, Any], what: str, known: Mapping[str, type], *, has_own: bool = False
) -> dict[str, Any]:
    found = content.get("parameters", {})
    if not isinstance(found, dict):
        raise Refusal(400, f"expected the parameters of {what} to be an object")
    for key, value in found.items():
        if key in _HARMLESS:
            continue
        if key not in known:
            if has_own and is_own(key) and isinstance(value, bool | int | float | str):
                continue
            raise Refusal(400, f"{what} has a parameter {shown(key)} that this server does not support")
        if type(value) is not known[key]:
            raise Refusal(400, f"expected parameter {key} of {what} to be {known[key].__name__}")
    return found


def _from_json(data: object, model: Model, rows: int) -> NDArray[Any]:
    """A tensor written as numbers, flat or nested by its shape."""
    shape = (rows, *model.feature_shape)
    count = int(np.prod(shape, dtype=np.int64))
    for depth in range(1, len(shape)):
        if not isinstance(data, list) or not data or not isinstance(data[0], list):
            break
        is_level = len(data) == int(np.prod(shape[:depth]))
        if not is_level or any(not isinstance(one, list) or len(one) != shape[depth] for one in data):
            raise Refusal(400, f"the nesting of data is not that of its shape {list(shape)}")
        data = [one for piece in _pieces(data) for one in chain.from_iterable(piece)]
    if not isinstance(data, list) or len(data) != count:
        raise Refusal(
            400, f"expected {count} numbers in data, flat or nested by the shape {list(shape)}, or a binary_data_size"
        )
    # A piece at a time: no other thread runs within one of these calls.
    kinds = {kind for piece in _pieces(data) for kind in set(map(type, piece))}
    if model.datatype == "UINT8":
        if kinds != {int} or not all(min(piece) >= 0 and max(piece) <= 255 for piece in _pieces(data)):
            raise Refusal(400, "expected data of UINT8 to be whole numbers from 0 to 255")
        return np.frombuffer(b"".join(map(bytes, _pieces(data))), np.uint8).reshape(shape)
    if not kinds <= {int, float}:
        raise Refusal(400, "expected data of FP32 to be numbers")
    try:
        with np.errstate(over="ignore"):
            pieces = [np.array(piece, np.float64).astype("<f4") for piece in _pieces(data)]
        return np.concatenate(pieces).reshape(shape)
    except OverflowError as error:
        raise Refusal(400, "the feature holds a number past FP32") from error


def _pieces(data: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(data), _PIECE):
        yield data[start : start + _PIECE]
