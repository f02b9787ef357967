"""Streams of gRPC: each message is answered, counted and limited as if it had come alone."""

from __future__ import annotations

import signal
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import grpc
import numpy as np
import pytest

from bundles import toy_bundle
from frames import DATA, HEADERS, connected, frame, head
from louver.cloud import inference_pb2 as messages
from louver.cloud.tokens import add_client, remove_client
from servers import PATIENCE_S, Running, features, running, truth

pytestmark = pytest.mark.timeout(120)

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"


def asked(rows: int, call_id: str = "", *, model: str = "toy", seed: int = 0) -> messages.ModelInferRequest:
    feature = features(rows, seed=seed)
    tensor = messages.ModelInferRequest.InferInputTensor(name="feature", datatype="UINT8", shape=feature.shape)
    return messages.ModelInferRequest(
        model_name=model, id=call_id, inputs=[tensor], raw_input_contents=[feature.tobytes()]
    )


def wrong(call_id: str) -> messages.ModelInferRequest:
    found = asked(2, call_id)
    found.inputs[0].shape[1] = 9
    return found


@contextmanager
def streaming(server: Running, token: str | None = None) -> Iterator[Callable]:
    """A way to open streams: what is sent in, what is answered out."""
    with grpc.insecure_channel(server.told["grpc"]) as channel:
        method = channel.stream_stream(STREAM, response_deserializer=messages.ModelStreamInferResponse.FromString)

        def opened(sent: Iterable[bytes | messages.ModelInferRequest]) -> grpc.Call:
            metadata = (("authorization", f"Bearer {token}"),) if token else ()
            parts = (one if isinstance(one, bytes) else one.SerializeToString() for one in sent)
            return method(parts, metadata=metadata, timeout=PATIENCE_S)

        yield opened


class Sent:
    """Messages that are sent when the test says so."""

    def __init__(self, *sent: messages.ModelInferRequest) -> None:
        self._waiting: SimpleQueue[messages.ModelInferRequest | None] = SimpleQueue()
        for one in sent:
            self.send(one)

    def __iter__(self) -> Iterator[messages.ModelInferRequest]:
        return iter(self._waiting.get, None)

    def send(self, one: messages.ModelInferRequest | None) -> None:
        self._waiting.put(one)


def code_of(call: grpc.Call) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as error:
        list(call)
    return error.value.code()


def becomes_free(opened: Callable) -> bool:
    """Whether a place for a stream is left before long."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        try:
            return not next(opened([asked(2)])).error_message
        except grpc.RpcError:
            time.sleep(0.05)
    return False


def infer(server: Running, token: str) -> None:
    with grpc.insecure_channel(server.told["grpc"]) as channel:
        metadata = (("authorization", f"Bearer {token}"),)
        channel.unary_unary(INFER)(asked(2).SerializeToString(), metadata=metadata, timeout=5)


def test_each_message_is_answered_in_order_and_counted(tmp_path):
    bundle = toy_bundle(tmp_path / "toy")
    token = add_client(tmp_path / "tokens.json", "few", images_total=12)
    options = ("--tokens", str(tmp_path / "tokens.json"), "--drain-s", "0")
    sent = [asked(3, "a"), wrong("b"), asked(1, "c", model="tox"), asked(4, "d", seed=1), asked(3, "a")]
    sent += [b"\xff\xff", asked(6, "f"), asked(5, "g")]
    with running(tmp_path / "log", tmp_path / "toy", options=options) as server, streaming(server, token) as opened:
        found = list(opened(sent))
    assert [one.infer_response.id for one in found] == ["a", "b", "c", "d", "a", "", "f", "g"]
    words = ["", "expected shape", "", "", "", "the message is no", "budget", ""]
    for one, part in zip(found, words, strict=True):
        assert part in one.error_message
    for i, (rows, seed) in {0: (3, 0), 3: (4, 1), 4: (3, 0), 7: (5, 0)}.items():
        answer = found[i].infer_response
        assert found[i].error_message == ""
        assert answer.parameters["triton_final_response"].bool_param
        scores = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(answer.outputs[0].shape)
        np.testing.assert_allclose(scores, truth(bundle, features(rows, seed=seed)), rtol=1e-5, atol=1e-5)
    lines = server.lines("infer")
    assert [(one["status"], one["rows"]) for one in lines] == [
        (200, 3),
        (400, 0),
        (404, 0),
        (200, 4),
        (200, 3),  # a repetition: not paid for again
        (400, 0),
        (403, 6),
        (200, 5),
    ]
    assert {(one["protocol"], one["client"]) for one in lines} == {("grpc", "few")}
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_stream_needs_a_token_as_long_as_it_lasts(tmp_path):
    toy_bundle(tmp_path / "toy")
    tokens = tmp_path / "tokens.json"
    token = add_client(tokens, "a")
    with running(tmp_path / "log", tmp_path / "toy", options=("--tokens", str(tokens), "--drain-s", "0")) as server:
        with streaming(server) as opened:
            assert code_of(opened([asked(2)])) == grpc.StatusCode.UNAUTHENTICATED
        with streaming(server, token) as opened:
            sent = Sent(asked(2))
            call = opened(sent)
            assert not next(call).error_message
            remove_client(tokens, "a")
            time.sleep(1.1)  # the file is looked at again
            sent.send(asked(2))
            assert code_of(call) == grpc.StatusCode.UNAUTHENTICATED
            sent.send(None)


def test_silent_streams_keep_nobody_waiting(tmp_path):
    """Of fifteen places for streams each client has three. Turns of other calls they take none."""
    toy_bundle(tmp_path / "toy")
    silent, other = (add_client(tmp_path / "tokens.json", name) for name in ("silent", "other"))
    options = ("--tokens", str(tmp_path / "tokens.json"), "--drain-s", "0")
    with (
        running(tmp_path / "log", tmp_path / "toy", options=options) as server,
        streaming(server, silent) as opened,
        streaming(server, other) as opened_by_other,
    ):
        sents = [Sent(asked(1)) for _ in range(3)]
        calls = [opened(one) for one in sents]
        for call in calls:
            assert not next(call).error_message
        assert code_of(opened([asked(2)])) == grpc.StatusCode.UNAVAILABLE
        infer(server, silent)
        assert not next(opened_by_other([asked(2)])).error_message
        assert not any(call.done() for call in calls)
        for sent in sents:
            sent.send(None)
        assert [list(call) for call in calls] == [[], [], []]
        assert not next(opened([asked(2)])).error_message


def test_a_silent_stream_ends(tmp_path):
    toy_bundle(tmp_path / "toy")
    options = ("--body-s", "0.3", "--drain-s", "0")
    with running(tmp_path / "log", tmp_path / "toy", options=options) as server, streaming(server) as opened:
        sent = Sent(asked(2))
        call = opened(sent)
        assert not next(call).error_message
        assert code_of(call) == grpc.StatusCode.DEADLINE_EXCEEDED
        sent.send(None)


@pytest.mark.parametrize("ends", ["cancelled", "too long"])
def test_a_stream_that_breaks_off_leaves_its_place(tmp_path, ends):
    """There is one place: 0.2 MiB are held, and a message counts for twice its 0.05 MiB and a little."""
    toy_bundle(tmp_path / "toy")
    options = ("--max-body-mb", "0.05", "--max-held-mb", "0.2", "--drain-s", "0")
    with running(tmp_path / "log", tmp_path / "toy", options=options) as server, streaming(server) as opened:
        sent = Sent(asked(2))
        call = opened(sent)
        assert not next(call).error_message
        assert code_of(opened([asked(2)])) == grpc.StatusCode.UNAVAILABLE
        if ends == "cancelled":
            call.cancel()
        else:
            sent.send(asked(2000))
            assert code_of(call) == grpc.StatusCode.RESOURCE_EXHAUSTED
        sent.send(None)
        assert becomes_free(opened)
        assert "Traceback" not in (tmp_path / "log").read_text()


def test_whoever_takes_no_answers_leaves_the_place_to_others(tmp_path):
    toy_bundle(tmp_path / "toy")
    options = ("--max-body-mb", "0.05", "--max-held-mb", "0.2", "--answer-s", "2", "--drain-s", "0")
    with running(tmp_path / "log", tmp_path / "toy", options=options) as server:
        content = asked(100).SerializeToString()
        with connected(server, window=0) as one, streaming(server) as opened:
            one.sendall(frame(HEADERS, 4, 1, head(STREAM)))
            one.sendall(frame(DATA, 0, 1, b"\0" + struct.pack(">I", len(content)) + content))
            while not server.lines("infer"):
                time.sleep(0.01)
            assert code_of(opened([asked(2)])) == grpc.StatusCode.UNAVAILABLE
            assert becomes_free(opened)
        assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_server_that_ends_answers_what_was_sent(tmp_path):
    toy_bundle(tmp_path / "toy")
    with running(tmp_path / "log", tmp_path / "toy") as server, streaming(server) as opened:
        sent = Sent(asked(2))
        call = opened(sent)
        assert not next(call).error_message
        time.sleep(0.5)  # the server waits for the next message
        server.process.send_signal(signal.SIGTERM)
        while not server.lines("draining"):
            time.sleep(0.01)
        sent.send(asked(3))
        assert next(call).infer_response.outputs[0].shape[0] == 3
        assert code_of(call) == grpc.StatusCode.UNAVAILABLE
        sent.send(None)
        assert server.process.wait(PATIENCE_S) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()
