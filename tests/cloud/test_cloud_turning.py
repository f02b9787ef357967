"""The event loop goes on turning while one client's body is unpacked and read, whatever it is."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import time
import weakref
import zlib
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundles import toy_bundle
from louver.cloud import Batching, Limits, Repository, Settings, create_app, json_text, rpc, rpc_messages
from louver.cloud import inference_pb2 as messages
from louver.cloud.aside import Aside
from louver.cloud.refusals import Refusal
from servers import ask, asking, features, head_of, infer_path, message_of, truth

pytestmark = pytest.mark.timeout(120)

MIB = 2**20


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("turning")
    bundle = toy_bundle(folder / "toy")
    repository = Repository([folder / "toy"], batching=Batching(workers=1, threads=1))
    app = create_app(repository, Settings(limits=Limits(rows=2**16)))
    app.service.lines.write = lambda line: None
    yield bundle, app
    repository.close()
    app.service.close()


class Context:
    def invocation_metadata(self):
        return ()


def longest_still(work) -> tuple[float, float, object]:
    """Seconds for which the loop stood still at most while this was done, those that it took, and what it gave."""

    async def main():
        still, ended = 0.0, False

        async def beat() -> None:
            nonlocal still
            while not ended:
                since = time.perf_counter()
                await asyncio.sleep(0)
                still = max(still, time.perf_counter() - since)

        async def some(seconds: float) -> None:
            await asyncio.sleep(seconds)

        beating = asyncio.create_task(beat())
        await some(0.01)
        still = 0.0
        since = time.perf_counter()
        found = await work()
        seconds = time.perf_counter() - since
        await some(0.001)
        ended = True
        await beating
        return still, seconds, found

    return asyncio.run(main())


def as_json(unit: bytes, n_bytes: int = 3 * MIB) -> bytes:
    head = b'{"inputs":[{"name":"feature","shape":[1,4,4,5],"datatype":"UINT8","data":['
    return head + (unit * (n_bytes // len(unit))).rstrip(b",") + b"]}]}"


def typed(rows: int) -> bytes:
    tensor = messages.ModelInferRequest.InferInputTensor(name="feature", datatype="UINT8", shape=[rows, 4, 4, 5])
    tensor.contents.uint_contents.extend(bytes(rows * 80))
    return messages.ModelInferRequest(model_name="toy", inputs=[tensor]).SerializeToString()


NUMBERS = as_json(b"7,")
BODIES = {
    "a bomb": (gzip.compress(bytes(65 * MIB), 9), "gzip", 413, "the body is over"),
    "a deflated bomb": (zlib.compress(bytes(65 * MIB), 9), "deflate", 413, "the body is over"),
    "numbers": (NUMBERS, "", 400, "expected 80 numbers"),
    "gzip of numbers": (gzip.compress(NUMBERS), "gzip", 400, "expected 80 numbers"),
    "floats": (as_json(b"0.5,"), "", 400, "expected 80 numbers"),
    "lists": (as_json(b"[],"), "", 400, "the nesting of data"),
    "strings": (as_json(b'"",'), "", 400, "expected 80 numbers"),
    "rows": (as_json(b"[1,2,3,4,5],"), "", 400, "the nesting of data"),
    "a feature": (
        json.dumps(head_of(np.zeros((12_000, 4, 4, 5), np.uint8), parameters={}, data=[7] * 960_000)).encode(),
        "",
        200,
        "",
    ),
}


def check_that_the_loop_turns(work, check) -> None:
    """While `work()` is done, at least in one of several tries; `check` is given what came of each."""
    shares = []
    for _ in range(8):  # a busy machine stands still by itself
        still, seconds, found = longest_still(work)
        check(found)
        shares.append(still / seconds)
        if shares[-1] < 0.7:
            return
    raise AssertionError(f"the loop stood still for these parts of the time: {shares}")


@pytest.mark.parametrize("name", BODIES)
def test_a_long_body_does_not_stop_the_loop(place, name):
    bundle, app = place
    body, encoding, status, reason = BODIES[name]
    assert len(body) < 4 * MIB
    headers = {"content-encoding": encoding} if encoding else {}

    def check(found) -> None:
        assert found.status == status
        assert status == 200 or found.error.startswith(reason)

    check_that_the_loop_turns(partial(ask, app, infer_path(bundle), body, headers), check)


def test_a_long_message_does_not_stop_the_loop(place):
    _, app = place
    content = typed(50_000)

    def check(found) -> None:
        assert messages.ModelInferResponse.FromString(found).outputs[0].shape[0] == 50_000

    check_that_the_loop_turns(lambda: rpc._infer(app.service, message_of(content), Context()), check)


def test_what_is_read_aside_is_answered_as_it_is_on_the_loop(place):
    bundle, app = place
    feature = features(1000)
    want = truth(bundle, feature)
    head = head_of(feature, parameters={}, data=feature.reshape(1000, -1).reshape(-1).tolist())
    tensor = messages.ModelInferRequest.InferInputTensor(name="feature", datatype="UINT8", shape=feature.shape)
    tensor.contents.uint_contents.extend(feature.reshape(-1).tolist())
    content = messages.ModelInferRequest(model_name="toy", inputs=[tensor]).SerializeToString()
    assert len(content) > 2**16
    body, headers = asking(features(4000))

    async def work():
        found = await ask(app, infer_path(bundle), json.dumps(head).encode())
        np.testing.assert_allclose(found.scores, want, rtol=1e-5, atol=1e-5)
        found = messages.ModelInferResponse.FromString(await rpc._infer(app.service, message_of(content), Context()))
        scores = np.array(found.outputs[0].contents.fp32_contents).reshape(want.shape)
        np.testing.assert_allclose(scores, want, rtol=1e-5, atol=1e-5)
        # More than is unpacked on the loop.
        found = await ask(app, infer_path(bundle), gzip.compress(body), {**headers, "content-encoding": "gzip"})
        assert found.scores.shape[0] == 4000

    asyncio.run(work())


# Long messages


def message(**changes) -> bytes:
    tensor = messages.ModelInferRequest.InferInputTensor(name="feature", datatype="UINT8", shape=[1, 4, 4, 5])
    return messages.ModelInferRequest(model_name="toy", inputs=[tensor], **changes).SerializeToString()


def inner(content: bytes) -> bytes:
    """As an input of a message."""
    return b"\x2a" + size(content) + content


def size(content: bytes) -> bytes:
    left, found = len(content), bytearray()
    while left >= 0x80:
        found.append(left & 0x7F | 0x80)
        left >>= 7
    return bytes([*found, left])


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"\x2a\x00" * 2**16, 400),
        (b"\x1a\x00" * 2**16, 400),
        (inner(b"\x22\x00" * 2**16), 400),
        (inner(inner(b"\x42\x00" * 2**16)), 400),
        (b"\x32" + size(bytes(2**17)) + bytes(2**17), 400),
        (b"\x2a" + size(bytes(2**17)) + bytes(2**16), 400),
        (b"\xff" * 2**17, 400),
        (typed(60_000), 413),
        (typed(50_000), None),
        (message(raw_input_contents=[bytes(5 * MIB)]), None),
        (message(raw_input_contents=[bytes(5 * MIB)], id="é") + b"\x48\x07", None),
    ],
)
def test_a_long_message_is_long_in_its_tensor_only(content, status):
    if status is None:
        rpc_messages.check_long(content, Limits())
        messages.ModelInferRequest.FromString(content)
        return
    with pytest.raises(Refusal) as refused:
        rpc_messages.check_long(content, Limits())
    assert refused.value.status == status


def test_many_ids_are_not_walked_over():
    assert rpc_messages.parts_of(b"\x1a\x00\x3a\x01x")[1] == b""
    assert rpc_messages.parts_of(b"\x1a\x00\x1a\x00\x3a\x01x") is None


# Long JSON


def outcome(decode, text):
    try:
        return repr(decode(text))
    except json.JSONDecodeError as error:
        return error.pos
    except (Refusal, RecursionError) as error:
        return type(error)


numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=5) | st.lists(numbers, max_size=30),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(values, st.sampled_from([(",", ":"), (" ,\n", ": "), (", ", ":")]), st.data())
@settings(max_examples=400, deadline=None)
def test_long_json_is_read_as_short_json_is(value, separators, drawn):
    text = json.dumps(value, separators=separators)
    assert outcome(json_text.decode_long, text) == outcome(json_text.decode_json, text)
    at = drawn.draw(st.integers(0, len(text)))
    odd = drawn.draw(st.sampled_from(["", ",", "]", "[", "1", "-", " ", "e", "NaN", "]]", ",,", '"', "{", "+1", "01"]))
    changed = text[:at] + odd + text[at + drawn.draw(st.integers(0, 2)) :]
    assert outcome(json_text.decode_long, changed) == outcome(json_text.decode_json, changed)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[ ]",
        "[,]",
        "[1,]",
        "[,1]",
        "[1,,2]",
        "[ ,1,2]",
        "[1 2,3]",
        "[1,2",
        "[1,",
        "[[],]",
        "[[1],,[2]]",
        "[[1],[2 3],4]",
        "[ [1] , [2] ]",
        "[",
    ],
)
def test_commas_are_judged_the_same(text):
    assert outcome(json_text.decode_long, text) == outcome(json_text.decode_json, text)


def test_pieces_of_long_lists_are_put_together(monkeypatch):
    found = [*range(-9, 30_000), [0.5, 1e9, -0.25] * 20_000, "1,2,[", *range(7)]
    text = json.dumps(found)
    assert len(text) > 3 * json_text.LONG
    assert json_text.decode_json(text) == found
    with pytest.raises(Refusal, match="at most 4096 objects"):
        json_text.decode_json("[" + "{}," * 30_000 + "{}]")


# Turns


def test_what_waits_aside_keeps_nobody_else_waiting_and_goes_with_its_client():
    aside, gate = Aside(2), threading.Event()
    begun = []

    class Body:
        pass

    def work(body):
        begun.append(0)
        assert gate.wait(20)
        return body

    async def main():
        bodies = [Body() for _ in range(9)]
        alive = [weakref.ref(one) for one in bodies]
        tasks = [asyncio.create_task(aside.do(partial(work, one))) for one in bodies]
        del bodies
        await asyncio.sleep(0.05)
        assert len(begun) == 2
        assert await asyncio.to_thread(lambda: 7) == 7  # where budgets are written
        for one in tasks[:8]:
            one.cancel()
        await asyncio.wait(tasks[:8])
        del tasks[:8], one
        await asyncio.sleep(0.05)
        assert len(begun) == 2  # the turns of those who left are not over before their work is
        assert sum(one() is not None for one in alive) == 3
        gate.set()
        assert await tasks[0] is alive[8]()

    asyncio.run(asyncio.wait_for(main(), 30))
    assert len(begun) == 3
    aside.close()


def test_what_work_raises_reaches_who_asked():
    def work():
        raise Refusal(418, "no")

    async def main():
        aside = Aside(1)
        for _ in range(3):
            with pytest.raises(Refusal, match="no"):
                await aside.do(work)
        aside.close()

    asyncio.run(asyncio.wait_for(main(), 30))
