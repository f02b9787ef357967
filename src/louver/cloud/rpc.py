"""The same server over gRPC: `inference.GRPCInferenceService`, registered by path.

Messages are parsed here and not by the library, so that one which does not parse is the client's mistake and not ours.
They are also read here: to a client, a call that streams one message is the same as one that does not, but its handler
is called before the message is there. So whoever holds no token sends none, and the others must in time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import lru_cache, partial
from importlib.metadata import version as version_of
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from louver.cloud import inference_pb2 as messages
from louver.cloud.app import EXTENSIONS
from louver.cloud.certificates import Certificates
from louver.cloud.clients import ANYONE
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
    model_metadata,
    tensor_bytes,
)
from louver.cloud.refusals import Refusal, shown
from louver.cloud.service import GONE, Request, Service
from louver.cloud.settings import Limits
from louver.cloud.tokens import Client
from louver.cloud.turns import Turns
from louver.cloud.within import Within
from louver.errors import ConfigError

__all__ = ["create_rpc_server"]

_SERVICE = "inference.GRPCInferenceService"
_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
_SPARE_BYTES = 2**16

# The numbers of the fields of ModelInferRequest, shifted by three bits, and 2 for what has a length.
_ID_TAG, _TENSOR_TAG = 0x1A, 0x3A
_HEAD_TAGS = (0x0A, 0x12, 0x22, 0x2A, 0x32)

_LONG_BYTES = 2**16
"""Messages up to this size are read on the event loop; up to the next, if they are little beside raw_input_contents."""

_LONG_RAW_BYTES = 2**22
_MOST_FIELDS = 64
_LONG_FIELDS = (frozenset((0x2A, 0x3A)), frozenset((0x2A,)), frozenset(range(0x0A, 0x43, 8)))
"""What may be long in a message, in its inputs, and in their contents. There it is numbers or bytes, quick to parse."""

_HARMLESS = ("binary_data", "binary_data_output", "priority", "timeout", "triton_enable_empty_final_response")
_STEP = 2**14

_STREAMS = 128
"""Calls at a time on one connection; a client's library lets the next one wait."""

_STRANGERS = 4
"""Messages that are read at a time for those who were not asked for a token."""

_TAKEN_S = 1.0
"""For a client to take the last answer of a stream: once an error ends it, some libraries hand on nothing more."""

Context = Any  # grpc.aio.ServicerContext, which has no types
Read = Callable[[Client], Awaitable[bytes]]
"""The message of a call of this client, once it is there.

Raises:
    Refusal: 408 it took too long, 503 too many others did, 400 there is none.
"""

Handler = Callable[[Service, Read, Context], Awaitable[bytes]]


def create_rpc_server(
    service: Service,
    address: str,
    certificates: Certificates | None,
    *,
    connections: int = 1024,
    head_s: float = 10.0,
    idle_s: float = 75.0,
) -> tuple[Any, int]:
    """A gRPC server on `address`, not yet started, and its port. It must be made in the event loop of its service.

    connections: as many, and as many calls over all of them. head_s: for a handshake. idle_s: without a call.

    Raises:
        ConfigError: the address is taken, or a certificate cannot be used.
    """
    limits = service.settings.limits
    # Of a client that takes no answers the library knows nothing: it ends with its connection, which has its time.
    silent_s = limits.body_s + limits.answer_s
    most_bytes = limits.body_bytes + _SPARE_BYTES
    options = [
        # The library checks the size of what it has decompressed as well.
        ("grpc.max_receive_message_length", most_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),  # two servers on one port would share its requests without a word
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.max_concurrent_streams", _STREAMS),
        ("grpc.server_handshake_timeout_ms", _ms(head_s)),
        ("grpc.max_connection_idle_ms", _ms(idle_s)),
        ("grpc.max_connection_age_ms", _ms(10 * silent_s)),
        ("grpc.max_connection_age_grace_ms", _ms(2 * silent_s)),
        ("grpc.keepalive_time_ms", _ms(limits.answer_s)),
        ("grpc.keepalive_timeout_ms", _ms(limits.answer_s)),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=connections)
    # The library gathers a message whole before anybody may look at it, and takes twice its size for that.
    count = max(1, limits.held_bytes // (2 * most_bytes))
    share = max(1, count // 4) if service.clients is not None else count
    known, strangers = Turns(count, share), Turns(_STRANGERS, _STRANGERS)
    handlers = {
        name: _unary(service, handler, known if handler in _FOR_TOKENS else strangers)
        for name, handler in _HANDLERS.items()
    }
    # A stream may be silent for long, so its messages take no turns from others.
    handlers["ModelStreamInfer"] = _streaming(service, Turns(count, share))
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


def _ms(seconds: float) -> int:
    return min(2**31 - 1, max(1, int(1000 * seconds)))


def _unary(service: Service, handler: Handler, turns: Turns) -> Any:  # noqa: ANN401 - grpc has no types
    async def handle(_: object, context: Context) -> bytes:
        async def read(client: Client) -> bytes:
            return await _message(context, turns, client, service.settings.limits.body_s)

        try:
            return await handler(service, read, context)
        except Refusal as refusal:
            await _refuse(context, refusal)
            raise

    return grpc.stream_unary_rpc_method_handler(handle)


def _streaming(service: Service, places: Turns) -> Any:  # noqa: ANN401 - grpc has no types
    async def handle(_: object, context: Context) -> None:
        try:
            await _stream(service, places, context)
        except Refusal as refusal:
            await _refuse(context, refusal)

    return grpc.stream_stream_rpc_method_handler(handle)


async def _refuse(context: Context, refusal: Refusal) -> None:
    trailers = []
    if refusal.retry_after_s is not None:
        trailers.append(("grpc-retry-pushback-ms", str(int(1000 * refusal.retry_after_s))))
    status = _STATUS.get(refusal.status, grpc.StatusCode.INTERNAL)
    await context.abort(status, refusal.reason, tuple(trailers))


async def _message(context: Context, turns: Turns, client: Client, within_s: float) -> bytes:
    """The message of a call, read when it is its turn."""
    is_its_turn = False
    try:
        with Within(within_s):
            async with turns.share_of(client), turns.all:
                is_its_turn = True
                content = await context.read()
    except TimeoutError as error:
        if not is_its_turn:
            raise Refusal(503, "too many messages at once", retry_after_s=1.0) from error
        raise Refusal(408, f"the message took more than {within_s:g} s") from error
    if content is grpc.aio.EOF:
        raise Refusal(400, "expected a message, got none")
    found: bytes = content
    return found


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


async def _live(service: Service, read: Read, context: Context) -> bytes:
    return _dump(messages.ServerLiveResponse(live=True))


async def _ready(service: Service, read: Read, context: Context) -> bytes:
    return _dump(messages.ServerReadyResponse(ready=service.is_ready))


async def _model_ready(service: Service, read: Read, context: Context) -> bytes:
    asked = _parsed(messages.ModelReadyRequest, await read(ANYONE))
    try:
        service.repository.find(asked.name, asked.version)
    except Refusal:
        return _dump(messages.ModelReadyResponse(ready=False))
    return _dump(messages.ModelReadyResponse(ready=service.is_ready))


async def _server(service: Service, read: Read, context: Context) -> bytes:
    service.identify(_authorization(context))
    found = messages.ServerMetadataResponse(name="louver", version=version_of("louver"), extensions=EXTENSIONS)
    return _dump(found)


async def _model(service: Service, read: Read, context: Context) -> bytes:
    client = service.identify(_authorization(context))
    asked = _parsed(messages.ModelMetadataRequest, await read(client))
    served = service.repository.find(asked.name, asked.version)
    versions = [one.model.version for one in service.repository.current if one.model.name == asked.name]
    return _dump(messages.ModelMetadataResponse(**model_metadata(served.model, versions)))


async def _infer(service: Service, read: Read, context: Context) -> bytes:
    request = service.begun("grpc")
    if service.traces is not None:
        request.traceparent = _metadata(context, "traceparent")
    try:
        content = await read(await service.admit(request, _authorization(context)))
        request.n_bytes = len(content)
        service.hold(request, 2 * len(content))  # the message, and what is parsed of it
        parts = _parts(content)
        call = _known_call(service, request, parts) if parts is not None else None
        if call is None:
            limits = service.settings.limits
            is_long = len(content) > (_LONG_BYTES if parts is None else _LONG_RAW_BYTES)
            if is_long and parts is None:
                _check_long(content, limits)
            parse = partial(_parsed, messages.ModelInferRequest, content)
            asked = await service.aside.do(parse) if is_long else parse()
            request.served = service.repository.find(asked.model_name, asked.model_version)
            judge = partial(_read_call, asked, request.served.model, limits)
            call = await service.aside.do(judge) if is_long else judge()
            # Without a version: which one that is may change.
            if call.is_binary and asked.model_version and parts is not None:
                known = (asked.model_name, asked.model_version, len(call.feature), call.classes)
                service.rpc_heads.keep(parts[0], known)
        scores = service.checked(await (await service.submit(request, call, content)))
        assert request.served is not None
        work = partial(_answer, request.served.model, call, scores)
        return await service.aside.do(work) if call.classes else work()
    except Refusal as refusal:
        request.status = refusal.status
        raise
    except asyncio.CancelledError:
        request.status = GONE
        raise
    finally:
        service.ended(request)


async def _stream(service: Service, places: Turns, context: Context) -> None:
    """Answers the messages of a stream, one after another, as if each had come alone.

    Raises:
        Refusal: it ends: 401, 408 the next message or the taking of an answer took too long, 503 too many streams, or
            the server is about to end.
    """
    limits = service.settings.limits
    client = service.identify(_authorization(context))
    share = places.share_of(client)
    if share.locked() or places.all.locked():
        raise Refusal(503, "too many streams at once", retry_after_s=1.0)
    async with share, places.all:
        # Not with the first answer: where that is not taken, the end of the stream could not be sent either.
        await context.send_initial_metadata(())
        while not service.is_draining:
            try:
                with Within(limits.body_s):
                    content = await context.read()
                if content is grpc.aio.EOF:
                    return
                answer = await _answer_in_stream(service, content, context)
                with Within(limits.answer_s):
                    await context.write(answer)
            except TimeoutError as error:
                raise Refusal(408, "the next message, or the taking of an answer, took too long") from error
    await asyncio.sleep(_TAKEN_S)
    raise Refusal(503, "the server is about to end", retry_after_s=1.0)


async def _answer_in_stream(service: Service, content: bytes, context: Context) -> bytes:
    """The answer to one message of a stream, or why there is none.

    Raises:
        Refusal: 401, from whom no further message is read.
    """

    async def read(client: Client) -> bytes:
        return content

    found = messages.ModelStreamInferResponse()
    answer = found.infer_response
    try:
        answer.ParseFromString(await _infer(service, read, context))
        answer.parameters["triton_final_response"].bool_param = True
    except Refusal as refusal:
        if refusal.status == 401:
            raise
        found.error_message, answer.id = refusal.reason, _id_of(content)
    return _dump(found)


def _id_of(content: bytes) -> str:
    """The id in a message that was refused; none if it cannot be told."""
    try:
        fields = dict(_long_fields(memoryview(content), _LONG_FIELDS[-1]))
        return bytes(fields.get(_ID_TAG, b""))[:MOST_ID].decode()
    except (Refusal, UnicodeDecodeError):
        return ""


def _known_call(service: Service, request: Request, parts: tuple[bytes, bytes, memoryview]) -> Call | None:
    """The call in a message whose head was read before, its tensor a view of it; None if it must be read as a whole."""
    head, call_id, tensor = parts
    found = service.rpc_heads.find(head)
    if found is None:
        return None
    name, version, rows, classes = found
    request.served = served = service.repository.find(name, version)
    feature = tensor_bytes(tensor, served.model, rows)
    check_feature(feature)
    return Call(id=call_id.decode(), feature=feature, is_binary=True, classes=classes)


def _parts(content: bytes) -> tuple[bytes, bytes, memoryview] | None:
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


def _check_long(content: bytes, limits: Limits) -> None:
    """Refuses a message that would be long to parse: many fields, where one tensor is asked for, or too many numbers.

    The library lets no other thread run while it parses. Of numbers and bytes it parses a MiB in some milliseconds;
    of the smallest fields, in a hundred.
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
        if others > _LONG_BYTES:
            break
    if position == len(view) and others <= _LONG_BYTES:
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


def _no_request() -> Refusal:
    return Refusal(400, "the message is no ModelInferRequest")


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


def _answer(model: Model, call: Call, scores: NDArray[np.float32]) -> bytes:
    datatype, shape = answer_form(call, scores)
    if call.is_binary:
        content = answer_bytes(model, call, scores)
        # Messages that follow one another are one: what is the same for all answers is made once.
        return _start(model.name, model.version, datatype, shape) + _dump(
            messages.ModelInferResponse(id=call.id, raw_output_contents=(content,))
        )
    output = messages.ModelInferResponse.InferOutputTensor(name=SCORES, datatype=datatype, shape=shape)
    output.contents.fp32_contents.extend(scores.reshape(-1).tolist())
    return _dump(
        messages.ModelInferResponse(model_name=model.name, model_version=model.version, id=call.id, outputs=(output,))
    )


@lru_cache(maxsize=64)
def _start(name: str, version: str, datatype: str, shape: tuple[int, ...]) -> bytes:
    output = messages.ModelInferResponse.InferOutputTensor(name=SCORES, datatype=datatype, shape=shape)
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
_FOR_TOKENS = (_server, _model, _infer)
