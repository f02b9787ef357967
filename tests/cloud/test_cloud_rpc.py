"""gRPC and clients that misbehave: too slow to send, to take an answer, to begin; too many; without a token."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Iterator
from itertools import count

import grpc
import pytest

from bundles import toy_bundle
from frames import DATA, HEADERS, PING, connected, frame, head
from louver.cloud import inference_pb2 as messages
from louver.cloud.tokens import Client, add_client
from louver.cloud.turns import Turns
from servers import Running, features, running

pytestmark = pytest.mark.timeout(120)

INFER = "/inference.GRPCInferenceService/ModelInfer"
LIVE = "/inference.GRPCInferenceService/ServerLive"


def message(rows: int) -> bytes:
    feature = features(rows)
    tensor = messages.ModelInferRequest.InferInputTensor(name="feature", datatype="UINT8", shape=feature.shape)
    asked = messages.ModelInferRequest(model_name="toy", inputs=[tensor], raw_input_contents=[feature.tobytes()])
    return asked.SerializeToString()


def is_answered(server: Running, *, token: str | None = None, rows: int = 3, timeout_s: float = 20) -> bool:
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(server.told["grpc"]) as channel:
        content = channel.unary_unary(INFER)(message(rows), metadata=metadata, timeout=timeout_s)
    return messages.ModelInferResponse.FromString(content).outputs[0].shape[0] == rows


def refused(server: Running, method: str, *, token: str | None = None) -> tuple[grpc.RpcError, float]:
    """What a client is told that never sends its message, and after how many seconds."""
    never = threading.Event()

    def sends() -> Iterator[bytes]:
        never.wait(30)
        yield b""

    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    started = time.monotonic()
    with grpc.insecure_channel(server.told["grpc"]) as channel:
        with pytest.raises(grpc.RpcError) as error:
            channel.stream_unary(method)(sends(), metadata=metadata, timeout=20)
        never.set()
    return error.value, time.monotonic() - started


def seconds_until_closed(one: socket.socket) -> float:
    """How long the server lets a connection live whose client is there, answers pings, and does nothing else."""
    started = time.monotonic()
    kept = b""
    try:
        while part := one.recv(2**16):
            kept += part
            while len(kept) >= 9 and len(kept) >= 9 + int.from_bytes(kept[:3], "big"):
                size = int.from_bytes(kept[:3], "big")
                if kept[3] == PING and not kept[4]:
                    one.sendall(frame(PING, 1, 0, kept[9 : 9 + size]))
                kept = kept[9 + size :]
    except (BrokenPipeError, ConnectionResetError):
        pass
    return time.monotonic() - started


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rpc")
    toy_bundle(folder / "toy")
    token = add_client(folder / "tokens.json", "a")
    # Two messages may be read at a time, one of each client: 0.5 MiB are held, and one counts for twice its 0.05 MiB.
    options = ("--max-body-mb", "0.05", "--max-held-mb", "0.5", "--body-s", "0.2", "--answer-s", "0.2", "--head-s", "1")
    options += ("--tokens", str(folder / "tokens.json"), "--max-connections", "7", "--drain-s", "0")
    with running(folder / "log", folder / "toy", options=options) as server:
        yield server, token
        assert "Traceback" not in (folder / "log").read_text()


def test_without_a_token_no_message_is_read(place):
    server, token = place
    for method in ("ModelInfer", "ServerMetadata", "ModelMetadata"):
        error, seconds = refused(server, INFER.replace("ModelInfer", method))
        assert error.code() == grpc.StatusCode.UNAUTHENTICATED
        assert seconds < 10
    assert is_answered(server, token=token)


def test_a_message_that_does_not_come_is_not_waited_for(place):
    server, token = place
    for method, its in ((INFER, token), (INFER.replace("ModelInfer", "ModelReady"), None)):
        error, seconds = refused(server, method, token=its)
        assert (error.code(), error.details()) == (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "the message took more than 0.2 s",
        )
        assert seconds < 10
    assert is_answered(server, token=token)


def test_slow_writers_keep_others_waiting_for_their_time_only(place):
    server, token = place
    codes = []
    threads = [
        threading.Thread(target=lambda: codes.append(refused(server, INFER, token=token)[0].code())) for _ in range(5)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join(30)
    assert set(codes) <= {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE}
    assert codes.count(grpc.StatusCode.DEADLINE_EXCEEDED) >= 1
    assert is_answered(server, token=token)


def test_one_client_s_silent_calls_leave_others_their_turns(tmp_path):
    """Of fifteen turns each client has three, for thirty seconds if it likes."""
    toy_bundle(tmp_path / "toy")
    silent, other = (add_client(tmp_path / "tokens.json", name) for name in ("silent", "other"))
    never = threading.Event()

    def sends() -> Iterator[bytes]:
        never.wait(60)
        yield b""

    options = ("--tokens", str(tmp_path / "tokens.json"), "--drain-s", "0")
    with running(tmp_path / "log", tmp_path / "toy", options=options) as server:
        with grpc.insecure_channel(server.told["grpc"]) as channel:
            ask = channel.stream_unary(INFER)
            calls = [ask.future(sends(), metadata=(("authorization", f"Bearer {silent}"),)) for _ in range(40)]
            with pytest.raises(grpc.RpcError) as error:
                # Until the calls have reached the server.
                all(is_answered(server, token=silent, timeout_s=1) for _ in count())
            assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            assert is_answered(server, token=other, timeout_s=5)
            assert not any(one.done() for one in calls)
            for one in calls:
                one.cancel()
            never.set()
        assert is_answered(server, token=silent)


def test_nothing_is_kept_of_clients_without_a_call():
    turns = Turns(5, 2)

    async def work() -> None:
        for i in range(100):
            async with turns.share_of(Client(name=f"client-{i}", sha256="0" * 64)), turns.all:
                assert len(turns._shares) == 1

    asyncio.run(work())
    assert not turns._shares


def test_health_needs_no_message(place):
    """So that strangers who send none cannot keep a balancer from its answer."""
    server, _ = place
    with connected(server) as one:
        one.sendall(frame(HEADERS, 4, 1, head(LIVE)))
        one.settimeout(10)
        found = b""
        while b"grpc-status" not in found:
            found += one.recv(2**16)
    assert b"\x08\x01" in found


def test_a_connection_that_says_nothing_is_ended(place):
    server, _ = place
    host, _, port = server.told["grpc"].rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as one:
        assert seconds_until_closed(one) < 10


def test_whoever_takes_no_answer_is_ended(tmp_path):
    """An answer is asked for, no window is given for it, and everything else is as it should be."""
    toy_bundle(tmp_path / "toy")
    options = ("--body-s", "0.1", "--answer-s", "0.1", "--drain-s", "0", "--max-connections", "1")
    with running(tmp_path / "log", tmp_path / "toy", options=options) as server:
        content = message(100)
        with connected(server, window=0) as one:
            one.sendall(frame(HEADERS, 4, 1, head(INFER)))
            one.sendall(frame(DATA, 1, 1, b"\0" + struct.pack(">I", len(content)) + content))
            # Its call is the only one that there may be, and so is its connection.
            with pytest.raises(grpc.RpcError) as error:
                is_answered(server)
            assert error.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
            assert seconds_until_closed(one) < 15
        (line,) = server.lines("infer")
        assert (line["status"], line["rows"]) == (200, 100)
        assert is_answered(server)


def test_more_connections_than_there_may_be_are_refused(place):
    server, token = place
    host, _, port = server.told["grpc"].rpartition(":")
    held = [socket.create_connection((host, int(port)), timeout=20) for _ in range(7)]
    with pytest.raises(grpc.RpcError) as error:
        is_answered(server, token=token)
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    for one in held:
        one.close()
    end = time.monotonic() + 20
    while True:
        try:
            assert is_answered(server, token=token)
            break
        except grpc.RpcError:
            assert time.monotonic() < end
            time.sleep(0.05)
