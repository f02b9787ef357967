"""Messages of gRPC as bytes: a request into a call, scores into an answer. No network, no model is run.

What `protocol.py` is for REST. A message is walked over before it is parsed: the library copies a tensor, lets no other
thread run while it parses, and takes any number of fields.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from louver.cloud import inference_pb2 as messages
from louver.cloud.heads import MOST_HEAD_BYTES
from louver.cloud.models import FEATURE, SCORES, Model
from louver.cloud.protocol import (
    MOST_ID,
    Call,
    answer_bytes,
    answer_form,
    check_classes,
    check_feature,
    check_rows,
    is_own,
    tensor_bytes,
)
from louver.cloud.refusals import Refusal, shown
from louver.cloud.settings import Limits

__all__ = ["LONG_BYTES", "answer_message", "check_long", "dump", "id_of", "parsed", "parts_of", "read_message"]

LONG_BYTES = 2**16
"""Messages up to this size are read on the event loop."""

# The numbers of the fields of ModelInferRequest, shifted by three bits, and 2 for what has a length.
_ID_TAG, _TENSOR_TAG = 0x1A, 0x3A
_HEAD_TAGS = (0x0A, 0x12, 0x22, 0x2A, 0x32)

_MOST_FIELDS = 64
_LONG_FIELDS = (frozenset((0x2A, 0x3A)), frozenset((0x2A,)), frozenset(range(0x0A, 0x43, 8)))
"""What may be long in a message, in its inputs, and in their contents. There it is numbers or bytes, quick to parse."""

_HARMLESS = ("binary_data", "binary_data_output", "priority", "timeout", "triton_enable_empty_final_response")
_STEP = 2**14


def parsed(kind: Any, content: bytes) -> Any:  # noqa: ANN401 - generated
    """The message of this kind in these bytes.

    Raises:
        Refusal: 400, there is none.
    """
    try:
        return kind.FromString(content)
    except DecodeError as error:
        raise Refusal(400, f"the message is no {kind.DESCRIPTOR.name}") from error


def parts_of(content: bytes) -> tuple[bytes, bytes, memoryview] | None:
    """Of a ModelInferRequest, all but the next two; the id; the tensor's bytes. None if it is not made like most are.

    The fields of a message follow one another, each with its number and length, and to leave some out leaves the
    others as they are. So the tensor needs no copy, and what stays is the same for all requests of a client.
    """
    view, position, end = memoryview(content), 0, len(content)
    head: list[bytes] = []
    head_bytes = 0
    call_id: bytes | None = None
    tensor = None
    while position < end:
        tag = content[position]
        try:
            size, start = _varint(view, position + 1)
        except Refusal:  # it is said where the message is read as a whole
            return None
        stop = start + size
        if stop > end:
            return None
        if tag == _TENSOR_TAG:
            if tensor is not None:
                return None
            tensor = view[start:stop]
        elif tag == _ID_TAG:
            if call_id is not None:  # any number of them would be walked over
                return None
            call_id = content[start:stop]
            if size > MOST_ID or not call_id.isascii():
                return None
        elif tag in _HEAD_TAGS:
            head_bytes += stop - position
            if head_bytes > MOST_HEAD_BYTES:
                return None
            head.append(content[position:stop])
        else:
            return None
        position = stop
    return (b"".join(head), call_id or b"", tensor) if tensor is not None else None


def check_long(content: bytes, limits: Limits) -> None:
    """Refuses a message that would be long to parse: many fields, where one tensor is asked for, or too many numbers.

    The library lets no other thread run while it parses. Of numbers and bytes it parses a MiB in some milliseconds;
    of the smallest fields, in a hundred.

    Raises:
        Refusal: 400, and 413 for too many numbers.
    """
    in_message, in_input, in_contents = _LONG_FIELDS
    inputs = [view for tag, view in _long_fields(memoryview(content), in_message) if tag != _TENSOR_TAG]
    contents = [view for one in inputs for _, view in _long_fields(one, in_input)]
    n_bytes = sum(len(view) for one in contents for _, view in _long_fields(one, in_contents))
    if n_bytes > limits.json_bytes:
        raise Refusal(
            413, f"expected at most {limits.json_bytes} bytes in the contents of an input; send raw_input_contents"
        )


def _long_fields(view: memoryview, tags: frozenset[int]) -> list[tuple[int, memoryview]]:
    """The fields with these tags; all others together are short.

    Raises:
        Refusal: 400.
    """
    found: list[tuple[int, memoryview]] = []
    position = others = 0
    for _ in range(_MOST_FIELDS):
        if position == len(view):
            return found
        start = position
        tag, position = _varint(view, position)
        if tag & 7 == 0:
            position = _varint(view, position)[1]
        elif tag & 7 == 2:
            size, position = _varint(view, position)
            position += size
            if tag in tags:
                found.append((tag, view[position - size : position]))
        else:
            position += {1: 8, 5: 4}.get(tag & 7, len(view))
        others += 0 if tag in tags else position - start
        if position > len(view):
            raise _no_request()
        if others > LONG_BYTES:
            break
    if position == len(view) and others <= LONG_BYTES:
        return found
    raise Refusal(400, "expected a message of this size to be one tensor, its numbers packed, and little else")


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    found = 0
    for shift in range(0, 70, 7):
        if position >= len(view):
            break
        byte = view[position]
        position += 1
        found |= (byte & 0x7F) << shift
        if byte < 0x80:
            return found, position
    raise _no_request()


def id_of(content: bytes) -> str:
    """The id in a message that was refused; none if it cannot be told."""
    try:
        fields = dict(_long_fields(memoryview(content), _LONG_FIELDS[-1]))
        return bytes(fields.get(_ID_TAG, b""))[:MOST_ID].decode()
    except (Refusal, UnicodeDecodeError):
        return ""


def _no_request() -> Refusal:
    return Refusal(400, "the message is no ModelInferRequest")


def read_message(asked: Any, model: Model, limits: Limits) -> Call:  # noqa: ANN401 - generated
    """The call in a message, judged as `protocol.read_call` judges a body.

    Raises:
        Refusal: 400.
    """
    if len(asked.id) > MOST_ID:
        raise Refusal(400, f"expected id to be a string of at most {MOST_ID} signs")
    if len(asked.inputs) != 1 or asked.inputs[0].name != FEATURE:
        names = shown([one.name for one in asked.inputs[:3]])
        raise Refusal(400, f"expected inputs to hold {FEATURE} and nothing else, got {names}")
    if len(asked.outputs) > 1 or any(one.name != SCORES for one in asked.outputs):
        names = shown([one.name for one in asked.outputs[:3]])
        raise Refusal(400, f"expected outputs to hold {SCORES} and nothing else, got {names}")
    tensor = asked.inputs[0]
    _check_parameters("the request", (key for key in asked.parameters if not is_own(key)))
    _check_parameters("the input", tensor.parameters)
    classes = 0
    for output in asked.outputs:
        _check_parameters("the output", (key for key in output.parameters if key != "classification"))
        if "classification" in output.parameters:
            classes = check_classes(model, output.parameters["classification"].int64_param)
    rows = check_rows(model, tensor.datatype, list(tensor.shape), limits)
    filled = [field.name for field, _ in tensor.contents.ListFields()]
    if asked.raw_input_contents:
        if filled or len(asked.raw_input_contents) != 1:
            raise Refusal(400, "expected one tensor, in raw_input_contents or in the contents of the input")
        feature = tensor_bytes(asked.raw_input_contents[0], model, rows)
    else:
        feature = _typed(tensor.contents, filled, model, rows)
    check_feature(feature)
    # Triton has classes in raw_output_contents whatever was sent.
    is_binary = bool(asked.raw_input_contents) or classes > 0
    return Call(id=asked.id, feature=feature, is_binary=is_binary, classes=classes)


def _check_parameters(what: str, keys: Iterable[str]) -> None:
    for key in keys:
        if key not in _HARMLESS:
            raise Refusal(400, f"{what} has a parameter {shown(key)} that this server does not support")


def _typed(contents: Any, filled: list[str], model: Model, rows: int) -> NDArray[Any]:  # noqa: ANN401 - generated
    """A tensor whose numbers are fields of the message."""
    field = "uint_contents" if model.datatype == "UINT8" else "fp32_contents"
    if filled != [field]:
        raise Refusal(400, f"expected {model.datatype} in raw_input_contents or {field}, got {shown(filled)}")
    values = getattr(contents, field)
    shape = (rows, *model.feature_shape)
    if len(values) != int(np.prod(shape, dtype=np.int64)):
        raise Refusal(400, f"expected as many numbers as the shape {list(shape)} holds, got {len(values)}")
    found = np.empty(len(values), np.uint32 if model.datatype == "UINT8" else np.float32)
    for start in range(0, len(values), _STEP):  # no other thread runs while one step is copied
        found[start : start + _STEP] = values[start : start + _STEP]
    if model.datatype == "UINT8" and found.max() > 255:
        raise Refusal(400, "expected uint_contents of UINT8 to be from 0 to 255")
    return found.astype(model.dtype).reshape(shape)


def answer_message(model: Model, call: Call, scores: NDArray[np.float32]) -> bytes:
    """The ModelInferResponse with these scores."""
    datatype, shape = answer_form(call, scores)
    if call.is_binary:
        content = answer_bytes(model, call, scores)
        # Messages that follow one another are one: what is the same for all answers is made once.
        return _start(model.name, model.version, datatype, shape) + dump(
            messages.ModelInferResponse(id=call.id, raw_output_contents=(content,))
        )
    output = messages.ModelInferResponse.InferOutputTensor(name=SCORES, datatype=datatype, shape=shape)
    output.contents.fp32_contents.extend(scores.reshape(-1).tolist())
    return dump(
        messages.ModelInferResponse(model_name=model.name, model_version=model.version, id=call.id, outputs=(output,))
    )


@lru_cache(maxsize=64)
def _start(name: str, version: str, datatype: str, shape: tuple[int, ...]) -> bytes:
    output = messages.ModelInferResponse.InferOutputTensor(name=SCORES, datatype=datatype, shape=shape)
    return dump(messages.ModelInferResponse(model_name=name, model_version=version, outputs=(output,)))


def dump(message: Any) -> bytes:  # noqa: ANN401 - generated
    """A message as bytes."""
    content: bytes = message.SerializeToString()
    return content
