"""The short ways of the server, each against the long one: heads that are known, runs on the event loop, one write."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundles import N_SCORES, toy_bundle
from louver.cloud import Batching, Limits, Repository, Settings, create_app, rpc, rpc_messages
from louver.cloud import inference_pb2 as messages
from louver.cloud.batching import Batcher, Workers
from louver.cloud.connections import _Whole
from louver.cloud.heads import Heads
from louver.cloud.models import load_model
from louver.cloud.protocol import RestHeads, read_call
from louver.cloud.refusals import Refusal
from louver.cloud.within import Within
from servers import ask, asking, features, infer_path, message_of, truth

LIMITS = Limits(rows=9)
FEW = features(3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short") / "toy"
    toy_bundle(folder)
    return load_model(folder, threads=1)


@pytest.fixture
def place(tmp_path):
    bundle = toy_bundle(tmp_path / "toy")
    repository = Repository([tmp_path / "toy"], batching=Batching(workers=1, threads=1))
    app = create_app(repository, Settings(limits=LIMITS))
    app.service.lines.write = lambda line: None
    yield bundle, app
    repository.close()
    app.service.close()


# Heads that are known


def outcome(work):
    """What a call is, or why not."""
    try:
        found = work()
    except Refusal as refusal:
        return refusal.status
    return found.id, found.is_binary, found.classes, found.feature.shape, found.feature.tobytes()


def test_a_known_head_has_the_id_and_the_tensor_of_its_own_request(place):
    bundle, app = place

    async def work():
        for i, spaces in enumerate(("", " ", "")):
            feature = features(3, seed=i)
            body, headers = asking(feature, call_id=f"id-{i}")
            head = int(headers["inference-header-content-length"])
            text = json.dumps(json.loads(body[:head]), separators=(",", f":{spaces}")).encode()
            headers["inference-header-content-length"] = str(len(text))
            found = await ask(app, infer_path(bundle), text + body[head:], headers)
            np.testing.assert_allclose(found.scores, truth(bundle, feature), rtol=1e-5, atol=1e-5)
            assert json.loads(found.body.partition(b"]}]}")[0].partition(b',"outputs"')[0] + b"}")["id"] == f"id-{i}"

    asyncio.run(work())
    assert len(app.service.rest_heads) == 2  # with spaces and without


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_body_is_judged_the_same_with_known_heads(model, drawn):
    heads = RestHeads()
    body, headers = asking(FEW, call_id="an-id")
    head = int(headers["inference-header-content-length"])
    read_call(body, head, model, LIMITS, heads)
    assert len(heads) == 1
    changed, at = bytearray(body), drawn.draw(st.integers(0, head + 4))
    match drawn.draw(st.sampled_from(["set", "insert", "delete", "id", "length"])):
        case "set":
            changed[at] = drawn.draw(st.integers(0, 255))
        case "insert":
            changed[at:at] = drawn.draw(st.binary(min_size=1, max_size=3))
        case "delete":
            del changed[at : at + drawn.draw(st.integers(1, 30))]
        case "id":
            text = drawn.draw(st.binary(max_size=70))
            changed[8:13], head = text, head + len(text) - 5
        case "length":
            head = drawn.draw(st.integers(0, len(body) + 2))
    long = outcome(lambda: read_call(bytes(changed), head, model, LIMITS))
    assert outcome(lambda: read_call(bytes(changed), head, model, LIMITS, heads)) == long
    assert outcome(lambda: read_call(bytes(changed), head, model, LIMITS, heads)) == long


def test_a_head_of_one_model_is_not_that_of_another(model, tmp_path):
    toy_bundle(tmp_path / "real", name="real", encoding="float32", seed=1)
    other, heads = load_model(tmp_path / "real", threads=1), RestHeads()
    body, headers = asking(FEW, call_id="an-id")
    head = int(headers["inference-header-content-length"])
    read_call(body, head, model, LIMITS, heads)
    with pytest.raises(Refusal, match="expected datatype FP32"):
        read_call(body, head, other, LIMITS, heads)


def test_clients_cannot_fill_the_memory_with_heads(model):
    heads = RestHeads()
    for i in range(200):
        body, headers = asking(FEW, call_id="an-id")
        head = int(headers["inference-header-content-length"])
        body = body[: head - 1] + b" " * i + body[head - 1 :]
        read_call(body, head + i, model, LIMITS, heads)
        assert len(heads) <= 64
    read_call(body[: head - 1] + b" " * 1000 + body[head + 199 - 1 :], head + 1000, model, LIMITS, fresh := RestHeads())
    assert not len(fresh)


def message(**changes):
    tensor = messages.ModelInferRequest.InferInputTensor(name="feature", datatype="UINT8", shape=FEW.shape)
    found = messages.ModelInferRequest(
        model_name="toy", id="an-id", inputs=[tensor], raw_input_contents=[FEW.tobytes()], **changes
    )
    return found.SerializeToString()


class Context:
    def invocation_metadata(self):
        return ()


def test_a_known_message_is_answered_with_its_own_id_and_scores(place):
    bundle, app = place

    async def work():
        for i in range(3):
            feature = features(3, seed=i)
            asked = messages.ModelInferRequest.FromString(message(model_version=bundle.id))
            asked.id, asked.raw_input_contents[0] = f"id {i}", feature.tobytes()
            found = messages.ModelInferResponse.FromString(
                await rpc._infer(app.service, message_of(asked.SerializeToString()), Context())
            )
            assert (found.id, found.model_name, found.model_version) == (f"id {i}", "toy", bundle.id)
            (output,) = found.outputs
            scores = np.frombuffer(found.raw_output_contents[0], "<f4").reshape(output.shape)
            np.testing.assert_allclose(scores, truth(bundle, feature), rtol=1e-5, atol=1e-5)
        # Without a version it is read each time: which one that is may change.
        await rpc._infer(app.service, message_of(message()), Context())

    asyncio.run(work())
    assert len(app.service.rpc_heads) == 1


def test_messages_that_differ_in_their_classes_are_not_taken_for_one_another(place):
    bundle, app = place

    async def work():
        for count in (2, None, 3, 2, None):
            asked = messages.ModelInferRequest.FromString(message(model_version=bundle.id))
            output = asked.outputs.add(name="scores")
            if count is not None:
                output.parameters["classification"].int64_param = count
            found = messages.ModelInferResponse.FromString(
                await rpc._infer(app.service, message_of(asked.SerializeToString()), Context())
            )
            (output,) = found.outputs
            assert (output.datatype, list(output.shape)) == (
                ("BYTES", [3, count]) if count is not None else ("FP32", [3, N_SCORES])
            )

    asyncio.run(work())
    assert len(app.service.rpc_heads) == 3


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_message_is_judged_the_same_with_known_heads(model, drawn):
    content = message(model_version=model.version)
    head, call_id, tensor = rpc_messages.parts_of(content)
    assert (call_id, bytes(tensor)) == (b"an-id", FEW.tobytes())
    changed, at = bytearray(content), drawn.draw(st.integers(0, len(content) - FEW.nbytes + 3))
    match drawn.draw(st.sampled_from(["set", "insert", "delete", "append"])):
        case "set":
            changed[at] = drawn.draw(st.integers(0, 255))
        case "insert":
            changed[at:at] = drawn.draw(st.binary(min_size=1, max_size=8))
        case "delete":
            del changed[at : at + drawn.draw(st.integers(1, 30))]
        case "append":
            changed += drawn.draw(
                st.sampled_from([b"\x1a\x02hi", b"\x1a\x01\xff", b"\x3a\x00", b"\x08\x01", b"\x3a\xff"])
            )
    parts = rpc_messages.parts_of(bytes(changed))
    if parts is None or parts[0] != head:
        return  # is read as a whole
    asked = messages.ModelInferRequest.FromString(bytes(changed))
    long = outcome(lambda: rpc_messages.read_message(asked, model, LIMITS))
    if len(parts[2]) != FEW.nbytes:
        assert long == 400
    else:
        assert long == (parts[1].decode(), True, 0, FEW.shape, bytes(parts[2]))


def test_heads_start_anew_when_they_are_too_many():
    heads: Heads[int, str] = Heads()
    for i in range(65):
        heads.keep(i, str(i))
    assert len(heads) == 1
    assert (heads.find(64), heads.find(3)) == ("64", None)


# Runs on the event loop


class Network:
    """Says in which threads it ran, and takes as long as it is told."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.here: list[bool] = []

    def __call__(self, feature):
        self.here.append(threading.current_thread() is threading.main_thread())
        if (feature == 13).any():
            raise RuntimeError("13")
        if self.seconds:
            time.sleep(self.seconds)
        return 2 * feature


def alone(network: Network, count: int, *, rows: int = 1, **options) -> list[bool]:
    """Where the runs of `count` lone requests were, one after another."""
    batching = Batching(**{"workers": 1, "threads": 1, **options})

    async def main():
        with closing(Workers(1)) as workers:
            batcher = Batcher(network, workers, batching)
            for i in range(count):
                feature = np.full((rows, 1), i % 7, np.float32)
                assert (await batcher.submit(feature, is_alone=True) == 2 * feature).all()
            return network.here

    return asyncio.run(asyncio.wait_for(main(), 30))


def test_a_quick_network_runs_on_the_loop_once_it_is_known_to_be_quick():
    here = alone(Network(), 2000)
    assert not any(here[:20])
    assert sum(here[-1000:]) > 200  # however busy the machine is


@pytest.mark.parametrize(
    ("network", "options"),
    [
        (Network(0.002), {}),
        (Network(), {"rows": 2}),
        (Network(), {"max_delay_s": 0.001}),
    ],
)
def test_others_run_in_threads(network, options):
    assert not any(alone(network, 100, **options))


def test_who_is_not_alone_goes_to_a_thread():
    network = Network()

    async def main():
        with closing(Workers(1)) as workers:
            batcher = Batcher(network, workers, Batching(workers=1, threads=1))
            for i in range(300):
                await batcher.submit(np.full((1, 1), i, np.float32) * 0, is_alone=False)
            # Known to be quick by now; but one waits already.
            await asyncio.gather(*(batcher.submit(np.zeros((1, 1), np.float32), is_alone=i == 4) for i in range(5)))

    asyncio.run(asyncio.wait_for(main(), 30))
    assert not any(network.here)


def test_a_network_that_turns_slow_goes_back_to_threads_for_long():
    network = Network()

    async def main():
        with closing(Workers(1)) as workers:
            batcher = Batcher(network, workers, Batching(workers=1, threads=1))

            async def ask_once() -> bool:
                await batcher.submit(np.zeros((1, 1), np.float32), is_alone=True)
                return network.here[-1]

            while not await ask_once():
                pass
            network.seconds = 0.03
            while await ask_once():
                pass
            network.seconds = 0.0
            # Each quick run makes up for a tenth of a millisecond at most.
            for _ in range(250):
                assert not await ask_once()
            while not await ask_once():
                pass

    asyncio.run(asyncio.wait_for(main(), 30))


def test_an_error_on_the_loop_reaches_only_its_own_request():
    network = Network()

    async def main():
        with closing(Workers(1)) as workers:
            batcher = Batcher(network, workers, Batching(workers=1, threads=1))
            found = 0
            while not found:
                await batcher.submit(np.zeros((1, 1), np.float32), is_alone=True)
                with pytest.raises(Refusal) as refused:
                    await batcher.submit(np.full((1, 1), 13, np.float32), is_alone=True)
                assert (refused.value.status, refused.value.reason) == (500, "the network failed on this request")
                found = network.here[-1]
            assert (await batcher.submit(np.ones((1, 1), np.float32), is_alone=True))[0, 0] == 2

    asyncio.run(asyncio.wait_for(main(), 30))


def test_the_service_knows_who_is_alone(place):
    bundle, app = place
    batcher = app.service.repository.find("toy", None).batcher
    submit, told = batcher.submit, []

    def watched(feature, *, is_alone, **options):
        told.append(is_alone)
        return submit(feature, is_alone=is_alone, **options)

    batcher.submit = watched
    body, headers = asking(features(1))

    async def work():
        assert (await ask(app, infer_path(bundle), body, headers)).status == 200
        assert (await ask(app, infer_path(bundle), body[:-1], headers)).status == 400
        assert (await ask(app, infer_path(bundle), body, headers)).status == 200
        sent = asyncio.Event()

        async def slow(scope, receive, send):
            async def later():
                await sent.wait()
                return await receive()

            await app(scope, later, send)

        uploads = asyncio.gather(ask(slow, infer_path(bundle), body, headers))
        await asyncio.sleep(0)
        assert (await ask(app, infer_path(bundle), body, headers)).status == 200
        sent.set()
        assert [one.status for one in await uploads] == [200]
        assert (await ask(app, infer_path(bundle), body, headers)).status == 200

    asyncio.run(work())
    assert told == [True, True, False, True, True]


# One write, and times


class Transport:
    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def close(self) -> None:
        self.written.append(b"closed")


HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"


def test_a_head_leaves_with_its_body():
    transport = Transport()
    whole = _Whole(transport)
    whole.write(HEAD)
    assert transport.written == []
    whole.write(b"hello")
    whole.write(b"more")
    whole.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    whole.write(HEAD)
    whole.flush()
    whole.flush()
    whole.write(HEAD)
    whole.close()
    want = [HEAD + b"hello", b"more", b"HTTP/1.1 100 Continue\r\n\r\n", HEAD, HEAD, b"closed"]
    assert transport.written == want


@pytest.mark.parametrize("by", ["time", "another", "both", "nobody"])
def test_a_time_ends_what_is_within_it(by):
    async def work():
        task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        if by in ("another", "both"):
            loop.call_later(0.01, task.cancel)
        with Within(0.01 if by == "both" else 0.02 if by == "time" else 5):
            await asyncio.sleep(0 if by == "nobody" else 3)
        await asyncio.sleep(0.03)
        return "done"

    if by == "nobody":
        assert asyncio.run(work()) == "done"
    else:
        with pytest.raises(TimeoutError if by == "time" else asyncio.CancelledError):
            asyncio.run(work())
