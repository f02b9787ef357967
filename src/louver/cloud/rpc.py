"""The same server over gRPC: `inference.GRPCInferenceService`, registered by path.

Messages are parsed in `rpc_messages.py`, not by the library, so that one which does not parse is the client's mistake
and not ours. They are also read here: to a client, a call that streams one message is the same as one that does not,
but its handler is called before the message is there. So whoever holds no token sends none, and the others must in
time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.metadata import version as version_of
from typing import Any

import grpc

from louver.cloud import inference_pb2 as messages
from louver.cloud.app import EXTENSIONS
from louver.cloud.certificates import Certificates
from louver.cloud.clients import ANYONE
from louver.cloud.protocol import Call, check_feature, model_metadata, tensor_bytes
from louver.cloud.refusals import Refusal
from louver.cloud.rpc_messages import (
    LONG_BYTES,
    answer_message,
    check_long,
    dump,
    id_of,
    parsed,
    parts_of,
    read_message,
)
from louver.cloud.service import GONE, Request, Service
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

_LONG_RAW_BYTES = 2**22
"""Messages up to this size are read on the event loop, too, if they are little beside raw_input_contents."""

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


def _authorization(context: Context) -> bytes | None:
    return _metadata(context, "authorization")


def _metadata(context: Context, name: str) -> bytes | None:
    for key, value in context.invocation_metadata() or ():
        if key == name:
            return value if isinstance(value, bytes) else value.encode("utf-8", "replace")
    return None


async def _live(service: Service, read: Read, context: Context) -> bytes:
    return dump(messages.ServerLiveResponse(live=True))


async def _ready(service: Service, read: Read, context: Context) -> bytes:
    return dump(messages.ServerReadyResponse(ready=service.is_ready))


async def _model_ready(service: Service, read: Read, context: Context) -> bytes:
    asked = parsed(messages.ModelReadyRequest, await read(ANYONE))
    try:
        service.repository.find(asked.name, asked.version)
    except Refusal:
        return dump(messages.ModelReadyResponse(ready=False))
    return dump(messages.ModelReadyResponse(ready=service.is_ready))


async def _server(service: Service, read: Read, context: Context) -> bytes:
    service.identify(_authorization(context))
    found = messages.ServerMetadataResponse(name="louver", version=version_of("louver"), extensions=EXTENSIONS)
    return dump(found)


async def _model(service: Service, read: Read, context: Context) -> bytes:
    client = service.identify(_authorization(context))
    asked = parsed(messages.ModelMetadataRequest, await read(client))
    served = service.repository.find(asked.name, asked.version)
    versions = [one.model.version for one in service.repository.current if one.model.name == asked.name]
    return dump(messages.ModelMetadataResponse(**model_metadata(served.model, versions)))


async def _infer(service: Service, read: Read, context: Context) -> bytes:
    request = service.begun("grpc")
    if service.traces is not None:
        request.traceparent = _metadata(context, "traceparent")
    try:
        content = await read(await service.admit(request, _authorization(context)))
        request.n_bytes = len(content)
        service.hold(request, 2 * len(content))  # the message, and what is parsed of it
        parts = parts_of(content)
        call = _known_call(service, request, parts) if parts is not None else None
        if call is None:
            limits = service.settings.limits
            is_long = len(content) > (LONG_BYTES if parts is None else _LONG_RAW_BYTES)
            if is_long and parts is None:
                check_long(content, limits)
            parse = partial(parsed, messages.ModelInferRequest, content)
            asked = await service.aside.do(parse) if is_long else parse()
            request.served = service.repository.find(asked.model_name, asked.model_version)
            judge = partial(read_message, asked, request.served.model, limits)
            call = await service.aside.do(judge) if is_long else judge()
            # Without a version: which one that is may change.
            if call.is_binary and asked.model_version and parts is not None:
                known = (asked.model_name, asked.model_version, len(call.feature), call.classes)
                service.rpc_heads.keep(parts[0], known)
        scores = service.checked(await (await service.submit(request, call, content)))
        assert request.served is not None
        work = partial(answer_message, request.served.model, call, scores)
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
        found.error_message, answer.id = refusal.reason, id_of(content)
    return dump(found)


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


_HANDLERS: dict[str, Handler] = {
    "ServerLive": _live,
    "ServerReady": _ready,
    "ModelReady": _model_ready,
    "ServerMetadata": _server,
    "ModelMetadata": _model,
    "ModelInfer": _infer,
}
_FOR_TOKENS = (_server, _model, _infer)
