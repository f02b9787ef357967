"""A feature to a request and an answer to scores: the Open Inference Protocol V2 with binary tensors.

A request carries the feature and nothing else of the picture. Of an answer nothing is believed: each length, type,
shape and number is checked before it is used.
"""

from __future__ import annotations

import json
import math
import uuid
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from louver.bundle import Bundle
from louver.edge.packing import pack
from louver.edge.settings import Compression, Settings
from louver.errors import AnswerError
from louver.triton import triton_name

__all__ = ["HEADER_LENGTH", "MOST_ANSWER_HEADER", "Request", "read_reason", "read_scores", "request_of"]

HEADER_LENGTH = "Inference-Header-Content-Length"
MOST_ANSWER_HEADER = 2**16
_MOST_REASON = 300
_DTYPES = {"UINT8": "u1", "FP32": "<f4"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request, ready to be sent any number of times: its id stays, so that a server can tell.

    `header_length` is that of the JSON before compression. The body is not shown: it is the feature.
    """

    id: str
    n_images: int
    header_length: int
    compression: Compression
    body: bytes = field(repr=False)


def request_of(bundle: Bundle, feature: NDArray[np.generic], settings: Settings) -> Request:
    """The request that asks for the scores of `feature`, [n, *feature_shape] as the wire wants it."""
    serving = bundle.serving
    identity = uuid.uuid4().hex
    raw = np.ascontiguousarray(feature, _DTYPES[serving.wire_dtype])
    header = {
        "id": identity,
        "inputs": [
            {
                "name": "feature",
                "shape": list(raw.shape),
                "datatype": serving.wire_dtype,
                "parameters": {"binary_data_size": raw.nbytes},
            }
        ],
        "outputs": [{"name": "scores", "parameters": {"binary_data": True}}],
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    body = pack(b"".join((text, raw.reshape(-1).view(np.uint8).data)), settings)
    return Request(id=identity, n_images=len(raw), header_length=len(text), compression=settings.compression, body=body)


def read_scores(content: bytes, header_length: str | None, request: Request, bundle: Bundle) -> NDArray[np.float32]:
    """The scores in an answer, [n, *output_shape], all finite.

    Raises:
        AnswerError: it is anything but an answer to this request.
    """
    try:
        length = int(header_length or "")
    except ValueError:
        length = -1
    if not 0 < length <= min(len(content), MOST_ANSWER_HEADER):
        raise _wrong(f"expected {HEADER_LENGTH} within the answer's {len(content)} bytes, got {_shown(header_length)}")
    try:
        header = json.loads(content[:length])
        (output,) = (one for one in header["outputs"] if one["name"] == "scores")
        shape, datatype, size = output["shape"], output["datatype"], output["parameters"]["binary_data_size"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _wrong(f"expected JSON with one output `scores` in binary, got {type(error).__name__}") from error
    if header.get("id", request.id) != request.id:
        raise _wrong("it has the id of another request")
    # Triton's versions are small numbers: there the name says which bundle it is.
    is_named = header.get("model_name") == triton_name(bundle)
    if not is_named and header.get("model_version", bundle.id) != bundle.id:
        raise _wrong(f"expected version {bundle.id}, got {_shown(header['model_version'])}")
    expected = [request.n_images, *bundle.serving.output_shape]
    if shape != expected or datatype != "FP32":
        raise _wrong(f"expected FP32 scores of {expected}, got {_shown(datatype)} of {_shown(shape)}")
    n_bytes = 4 * math.prod(expected)
    if size != n_bytes or len(content) - length != n_bytes:
        raise _wrong(f"expected {n_bytes} bytes of scores, got {len(content) - length} and {_shown(size)} announced")
    scores = np.frombuffer(content, "<f4", offset=length).reshape(expected).astype(np.float32)
    if not np.isfinite(scores).all():
        raise _wrong("it holds scores that are not finite")
    return scores


def read_reason(content: bytes) -> str:
    """What a server says of its refusal, made fit for one line of a message; "no reason given" if it says nothing."""
    try:
        said = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        said = None
    if not isinstance(said, str) or not said.strip():
        return "no reason given"
    return _shown(said)


def _shown(value: Any) -> str:  # noqa: ANN401 - whatever a server sent
    text = "".join(sign if sign.isprintable() else " " for sign in str(value)[: 2 * _MOST_REASON])
    return text if len(text) <= _MOST_REASON else text[:_MOST_REASON] + "…"


def _wrong(what: str) -> AnswerError:
    return AnswerError(f"the cloud's answer cannot be used: {what}; look at the server and what is between")
