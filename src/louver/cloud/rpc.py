"""The same server over gRPC: `inference.GRPCInferenceService`, registered by path.

Messages are parsed here and not by the library, so that one which does not parse is the client's mistake and not ours.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache
from importlib.metadata import version as version_of
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from louver.cloud import inference_pb2 as messages
from louver.cloud.app import EXTENSIONS
from louver.cloud.certificates import Certificates
from louver.cloud.heads import MOST_HEAD_BYTES
from louver.cloud.models import FEATURE, SCORES, Model
from louver.cloud.protocol import MOST_ID, Call, check_feature, check_rows, model_metadata, tensor_bytes
from louver.cloud.refusals import Refusal, shown
from louver.cloud.service import GONE, Request, Service
from louver.cloud.settings import Limits
from louver.errors import ConfigError

__all__ = ["create_rpc_server"]

_SERVICE = "inference.GRPCInferenceService"
_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
_SPARE_BYTES = 2**16

# The numbers of the fields of ModelInferRequest, shifted by three bits, and 2 for what has a length.
_ID_TAG, _TENSOR_TAG = 0x1A, 0x3A
_HEAD_TAGS = (0x0A, 0x12, 0x22, 0x2A, 0x32)

Context = Any  # grpc.aio.ServicerContext, which has no types
Handler = Callable[[Service, bytes, Context], Awaitable[bytes]]


def create_rpc_server(service: Service, address: str, certificates: Certificates | None) -> tuple[Any, int]:
    """A gRPC server on `address`, not yet started, and its port. It must be made in the event loop of its service.

    Raises:
        ConfigError: the address is taken, or a certificate cannot be used.
    """
    limits = service.settings.limits
    options = [
        # The library checks the size of what it has decompressed as well.
        ("grpc.max_receive_message_length", limits.body_bytes + _SPARE_BYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),  # two servers on one port would share its requests without a word
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
    server = grpc.aio.server(options=options)
    handlers = {name: _unary(service, handler) for name, handler in _HANDLERS.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    try:
        if certificates is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, certificates.credentials())
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {address} for gRPC: the port is taken, or certificate and key do not fit"
        ) from error
    return server, port


def _unary(service: Service, handler: Handler) -> Any:  # noqa: ANN401 - grpc has no types
    async def handle(content: bytes, context: Context) -> bytes:
        try:
            return await handler(service, content, context)
        except Refusal as refusal:
            trailers = []
            if refusal.retry_after_s is not None:
                trailers.append(("grpc-retry-pushback-ms", str(int(1000 * refusal.retry_after_s))))
            status = _STATUS.get(refusal.status, grpc.StatusCode.INTERNAL)
            await context.abort(status, refusal.reason, tuple(trailers))
            raise

    return grpc.unary_unary_rpc_method_handler(handle)


def _parsed(kind: Any, content: bytes) -> Any:  # noqa: ANN401 - generated
    try:
        return kind.FromString(content)
    except DecodeError as error:
        raise Refusal(400, f"the message is no {kind.DESCRIPTOR.name}") from error


def _authorization(context: Context) -> bytes | None:
    return _metadata(context, "authorization")


def _metadata(context: Context, name: str) -> bytes | None:
    for key, value in context.invocation_metadata() or ():
        if key == name:
            return value if isinstance(value, bytes) else value.encode("utf-8", "replace")
    return None


async def _live(service: Service, content: bytes, context: Context) -> bytes:
    return _dump(messages.ServerLiveResponse(live=True))


async def _ready(service: Service, content: bytes, context: Context) -> bytes:
    return _dump(messages.ServerReadyResponse(ready=service.is_ready))


async def _model_ready(service: Service, content: bytes, context: Context) -> bytes:
    asked = _parsed(messages.ModelReadyRequest, content)
    try:
        service.repository.find(asked.name, asked.version)
    except Refusal:
        return _dump(messages.ModelReadyResponse(ready=False))
    return _dump(messages.ModelReadyResponse(ready=service.is_ready))


async def _server(service: Service, content: bytes, context: Context) -> bytes:
    service.identify(_authorization(context))
    found = messages.ServerMetadataResponse(name="louver", version=version_of("louver"), extensions=EXTENSIONS)
    return _dump(found)


async def _model(service: Service, content: bytes, context: Context) -> bytes:
    service.identify(_authorization(context))
    asked = _parsed(messages.ModelMetadataRequest, content)
    served = service.repository.find(asked.name, asked.version)
    versions = [one.model.version for one in service.repository.current if one.model.name == asked.name]
    return _dump(messages.ModelMetadataResponse(**model_metadata(served.model, versions)))


async def _infer(service: Service, content: bytes, context: Context) -> bytes:
    request = service.begun("grpc", n_bytes=len(content))
    if service.traces is not None:
        request.traceparent = _metadata(context, "traceparent")
    try:
        service.hold(request, 2 * len(content))  # the message, and what is parsed of it
        await service.admit(request, _authorization(context))
        parts = _parts(content)
        call = _known_call(service, request, parts) if parts is not None else None
        if call is None:
            asked = _parsed(messages.ModelInferRequest, content)
            request.served = service.repository.find(asked.model_name, asked.model_version)
            call = _read_call(asked, request.served.model, service.settings.limits)
            # Without a version: which one that is may change.
            if call.is_binary and asked.model_version and parts is not None:
                service.rpc_heads.keep(parts[0], (asked.model_name, asked.model_version, len(call.feature)))
        scores = service.checked(await (await service.submit(request, call, content)))
        assert request.served is not None
        return _answer(request.served.model, call, scores)
    except Refusal as refusal:
        request.status = refusal.status
        raise
    except asyncio.CancelledError:
        request.status = GONE
        raise
    finally:
        service.ended(request)


def _known_call(service: Service, request: Request, parts: tuple[bytes, bytes, memoryview]) -> Call | None:
    """The call in a message whose head was read before, its tensor a view of it; None if it must be read as a whole."""
    head, call_id, tensor = parts
    found = service.rpc_heads.find(head)
    if found is None:
        return None
    name, version, rows = found
    request.served = served = service.repository.find(name, version)
    feature = tensor_bytes(tensor, served.model, rows)
    check_feature(feature)
    return Call(id=call_id.decode(), feature=feature, is_binary=True)


def _parts(content: bytes) -> tuple[bytes, bytes, memoryview] | None:
    """Of a ModelInferRequest, all but the next two; the id; the tensor's bytes. None if it is not made like most are.

    The fields of a message follow one another, each with its number and length, and to leave some out leaves the
    others as they are. So the tensor needs no copy, and what stays is the same for all requests of a client.
    """
    view, position, end = memoryview(content), 0, len(content)
    head: list[bytes] = []
    head_bytes = 0
    call_id, tensor = b"", None
    while position < end:
        tag, start, shift, size = content[position], position + 1, 0, 0
        while start < end and shift < 35:
            byte = content[start]
            start += 1
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        else:
            return None
        stop = start + size
        if stop > end:
            return None
        if tag == _TENSOR_TAG:
            if tensor is not None:
                return None
            tensor = view[start:stop]
        elif tag == _ID_TAG:
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
    return (b"".join(head), call_id, tensor) if tensor is not None else None


def _read_call(asked: Any, model: Model, limits: Limits) -> Call:  # noqa: ANN401 - generated
    """The call in a message, judged as `protocol.read_call` judges a body."""
    if len(asked.id) > MOST_ID:
        raise Refusal(400, f"expected id to be a string of at most {MOST_ID} signs")
    if len(asked.inputs) != 1 or asked.inputs[0].name != FEATURE:
        names = shown([one.name for one in asked.inputs[:3]])
        raise Refusal(400, f"expected inputs to hold {FEATURE} and nothing else, got {names}")
    if len(asked.outputs) > 1 or any(one.name != SCORES for one in asked.outputs):
        names = shown([one.name for one in asked.outputs[:3]])
        raise Refusal(400, f"expected outputs to hold {SCORES} and nothing else, got {names}")
    tensor = asked.inputs[0]
    for what, parameters in (
        ("the request", asked.parameters),
        ("the input", tensor.parameters),
        *(("the output", one.parameters) for one in asked.outputs),
    ):
        _check_parameters(what, parameters)
    rows = check_rows(model, tensor.datatype, list(tensor.shape), limits)
    filled = [field.name for field, _ in tensor.contents.ListFields()]
    if asked.raw_input_contents:
        if filled or len(asked.raw_input_contents) != 1:
            raise Refusal(400, "expected one tensor, in raw_input_contents or in the contents of the input")
        feature = tensor_bytes(asked.raw_input_contents[0], model, rows)
    else:
        feature = _typed(tensor.contents, filled, model, rows)
    check_feature(feature)
    return Call(id=asked.id, feature=feature, is_binary=bool(asked.raw_input_contents))


def _check_parameters(what: str, parameters: Mapping[str, Any]) -> None:
    for key in parameters:
        if key not in ("binary_data", "binary_data_output", "priority", "timeout"):
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
    found = np.array(values, np.uint32 if model.datatype == "UINT8" else np.float32)
    if model.datatype == "UINT8" and found.max() > 255:
        raise Refusal(400, "expected uint_contents of UINT8 to be from 0 to 255")
    return found.astype(model.dtype).reshape(shape)


def _answer(model: Model, call: Call, scores: NDArray[np.float32]) -> bytes:
    if call.is_binary:
        content = np.ascontiguousarray(scores, "<f4").tobytes()
        # Messages that follow one another are one: what is the same for all answers is made once.
        return _start(model.name, model.version, scores.shape) + _dump(
            messages.ModelInferResponse(id=call.id, raw_output_contents=(content,))
        )
    output = messages.ModelInferResponse.InferOutputTensor(name=SCORES, datatype="FP32", shape=scores.shape)
    output.contents.fp32_contents.extend(scores.reshape(-1).tolist())
    return _dump(
        messages.ModelInferResponse(model_name=model.name, model_version=model.version, id=call.id, outputs=(output,))
    )


@lru_cache(maxsize=64)
def _start(name: str, version: str, shape: tuple[int, ...]) -> bytes:
    output = messages.ModelInferResponse.InferOutputTensor(name=SCORES, datatype="FP32", shape=shape)
    return _dump(messages.ModelInferResponse(model_name=name, model_version=version, outputs=(output,)))


def _dump(message: Any) -> bytes:  # noqa: ANN401 - generated
    content: bytes = message.SerializeToString()
    return content


_HANDLERS: dict[str, Handler] = {
    "ServerLive": _live,
    "ServerReady": _ready,
    "ModelReady": _model_ready,
    "ServerMetadata": _server,
    "ModelMetadata": _model,
    "ModelInfer": _infer,
}
