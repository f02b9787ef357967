"""The way to the cloud when it goes wrong: what is sent again, what is not, and that no answer is believed unseen."""

from __future__ import annotations

import logging
import socket
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bundles import IMAGE, N_SCORES, toy_bundle
from clouds import (
    LENGTH,
    Behavior,
    Cloud,
    Handler,
    Seen,
    answer,
    answer_of,
    changed,
    raw,
    reset_after,
    silent,
    slow,
    status,
)
from louver.bundle import Bundle
from louver.edge import Edge, Settings
from louver.edge.breaker import Breaker
from louver.edge.transport import _retry_after
from louver.errors import AnswerError, CloudAwayError, CloudError, CloudRefusedError, ConfigError

QUICK = {"backoff_s": 0.01, "most_backoff_s": 0.02, "connect_timeout_s": 2.0, "read_timeout_s": 2.0, "deadline_s": 5.0}
TOKEN = "hush-2f6e9c"


def pictures(n: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, *IMAGE), np.float32)


def edge_to(cloud: Cloud, **options: object) -> Edge:
    return Edge(cloud.bundle, server=cloud.address, token=TOKEN, settings=Settings(**{**QUICK, **options}))


# Sent again


@pytest.mark.parametrize(
    "trouble",
    [
        *(pytest.param(status(code), id=str(code)) for code in (408, 429, 502, 503, 504)),
        pytest.param(silent(0.01), id="hangs up"),
        *(pytest.param(reset_after(n), id=f"reset after {n}") for n in (0, 9, 40, 10**6)),
    ],
)
def test_what_may_end_otherwise_is_sent_again_with_the_same_id(cloud: Cloud, trouble: object) -> None:
    cloud.script.extend([trouble, trouble])
    with edge_to(cloud) as edge:
        found = edge.infer(pictures(2))
    assert found.tries == len(cloud.seen) == 3
    assert {seen.id for seen in cloud.seen} == {found.request_id}
    assert len({seen.body for seen in cloud.seen}) == 1
    np.testing.assert_array_equal(found.scores, cloud.scores(cloud.seen[0].feature))


def test_a_slow_server_is_given_up_in_time(cloud: Cloud) -> None:
    cloud.script.extend([slow(1.0), answer])
    with edge_to(cloud, read_timeout_s=0.2) as edge:
        started = time.monotonic()
        found = edge.infer(pictures())
        assert found.tries == 2
        assert time.monotonic() - started < 0.9
        # The late answer to the first try must never be taken for one to the next request.
        other = edge.infer(pictures(seed=1))
        time.sleep(0.8)
        np.testing.assert_array_equal(other.scores, cloud.scores(cloud.seen[-1].feature))


def test_tries_and_deadline_are_bounds(cloud: Cloud) -> None:
    cloud.always = status(503)
    with edge_to(cloud, tries=3) as edge:
        with pytest.raises(CloudAwayError, match=r"HTTP 503: told to.*\(3 of 3 tries\)"):
            edge.infer(pictures())
        assert len(cloud.seen) == 3
    cloud.always = silent(0.3)
    with edge_to(cloud, tries=50, deadline_s=0.4, read_timeout_s=0.1, breaker_failures=99) as edge:
        started = time.monotonic()
        with pytest.raises(CloudAwayError, match="of 50 tries"):
            edge.infer(pictures())
        assert 0.2 < time.monotonic() - started < 2


@pytest.mark.parametrize("where", ["head", "body"])
def test_an_answer_that_drips_meets_the_deadline(cloud: Cloud, where: str) -> None:
    def drip(handler, seen) -> None:
        content, headers = answer_of(cloud, seen)
        lines = [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join(["HTTP/1.1 200 -", *lines, f"Content-Length: {len(content)}"]).encode() + b"\r\n\r\n"
        for byte in head if where == "head" else [head, *content]:
            handler.wfile.write(byte if isinstance(byte, bytes) else bytes([byte]))
            time.sleep(0.02)

    cloud.always = drip
    with edge_to(cloud, deadline_s=0.3, tries=1) as edge:
        started = time.monotonic()
        with pytest.raises(CloudAwayError, match="deadline passed while reading"):
            edge.infer(pictures())
        assert time.monotonic() - started < 1.5


def test_a_server_that_does_not_read_meets_the_deadline(tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path, encoding="float32")
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        settings = Settings(**{**QUICK, "deadline_s": 0.4, "connect_timeout_s": 0.2}, tries=1, compression="none")
        with Edge(bundle, server=address, settings=settings) as edge:
            started = time.monotonic()
            with pytest.raises(CloudAwayError, match="no answer from"):
                edge.infer(pictures(20_000))  # past what a kernel buffers
            assert time.monotonic() - started < 3


def test_where_nobody_listens_the_cloud_is_away(bundle: Bundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with (
        Edge(bundle, server=f"http://127.0.0.1:{port}", settings=Settings(**QUICK, tries=2)) as edge,
        pytest.raises(CloudAwayError, match=r"Connection refused.*\(2 of 2 tries\)"),
    ):
        edge.infer(pictures())


@pytest.mark.parametrize(("header", "least"), [("1", 0.3), (None, 0.0), ("soon", 0.0)])
def test_the_server_says_how_long_to_wait_up_to_a_bound(cloud: Cloud, header: str | None, least: float) -> None:
    cloud.script.append(status(429, headers=None if header is None else {"Retry-After": header}))
    with edge_to(cloud, most_retry_after_s=0.3) as edge:
        started = time.monotonic()
        assert edge.infer(pictures()).tries == 2
        assert least <= time.monotonic() - started < least + 0.6


def test_a_wait_past_the_deadline_is_not_waited_for(cloud: Cloud) -> None:
    cloud.always = status(503, headers={"Retry-After": "60"})
    with edge_to(cloud, most_retry_after_s=60, deadline_s=1) as edge:
        started = time.monotonic()
        with pytest.raises(CloudAwayError):
            edge.infer(pictures())
        assert time.monotonic() - started < 0.5
        assert len(cloud.seen) == 1


def test_both_forms_of_retry_after_are_read() -> None:
    from email.utils import formatdate

    assert _retry_after("7") == 7
    assert _retry_after(formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)
    assert _retry_after(formatdate(time.time() - 30, usegmt=True)) == 0
    assert [_retry_after(value) for value in (None, "", "-3", "never", "1e9", "9" * 30 + "x")] == [None] * 6


# Not sent again


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (400, "the bundles may differ"),
        (401, "give the token that the server knows"),
        (403, "query budget"),
        (404, "serve this bundle there, or give the device the bundle that is served"),
        (413, "send fewer images"),
        (415, "choose another compression"),
        (418, "look at the server"),
    ],
)
def test_a_refusal_is_an_error_at_once_with_the_reason(cloud: Cloud, code: int, words: str) -> None:
    cloud.always = status(code, "toy has versions aaaa, bbbb")
    with edge_to(cloud) as edge, pytest.raises(CloudRefusedError) as caught:
        edge.infer(pictures())
    for part in (words, f"HTTP {code}: toy has versions aaaa, bbbb", f"toy version {cloud.bundle.id}"):
        assert part in str(caught.value)
    assert len(cloud.seen) == 1


def test_a_redirection_is_not_followed(cloud: Cloud) -> None:
    with Cloud(cloud.bundle) as other:
        cloud.always = status(307, headers={"Location": other.address + cloud.bundle.id})
        with edge_to(cloud) as edge, pytest.raises(AnswerError, match="got HTTP 307"):
            edge.infer(pictures())
        assert other.seen == []


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b'{"error": 3}', b'{"error": " "}', b"\xff" * 99])
def test_a_refusal_without_a_reason_is_told_as_such(cloud: Cloud, content: bytes) -> None:
    cloud.always = lambda handler, seen: handler.reply(400, content)
    with edge_to(cloud) as edge, pytest.raises(CloudRefusedError, match="HTTP 400: no reason given"):
        edge.infer(pictures())


def test_a_reason_is_made_fit_for_one_line(cloud: Cloud) -> None:
    cloud.always = status(400, "a\nb\x1b[31m" + "c" * 10_000 + TOKEN)
    with edge_to(cloud) as edge, pytest.raises(CloudRefusedError) as caught:
        edge.infer(pictures())
    assert len(str(caught.value)) < 700
    assert all(sign.isprintable() for sign in str(caught.value))


# Answers that are none


def marked_as_compressed(handler, seen) -> None:
    content, headers = answer_of(handler.server.cloud, seen)
    handler.reply(200, content, {**headers, "Content-Encoding": "zstd"})


WRONG = {
    "garbage": raw(b"garbage", {LENGTH: "7"}),
    "nothing": raw(b""),
    "no length of the header": raw(b"{}"),
    "a negative length": raw(b"{}", {LENGTH: "-2"}),
    "a length that is no number": raw(b"{}", {LENGTH: "two"}),
    "a length past the end": raw(b"{}", {LENGTH: "3"}),
    "no object": raw(b"[]", {LENGTH: "2"}),
    "deep nesting": raw(b"[" * 60_000, {LENGTH: "60000"}),
    "no outputs": changed(outputs=[]),
    "two outputs": changed(outputs=[{"name": "scores"}, {"name": "scores"}]),
    "outputs that are no list": changed(outputs=7),
    "another name": changed(name="logits"),
    "another datatype": changed(datatype="FP64"),
    "fewer images": changed(shape=[1, N_SCORES]),
    "a shape that is no list": changed(shape="2,7"),
    "transposed": changed(shape=[N_SCORES, 2]),
    "a size that lies upward": changed(size=10**15),
    "a size that lies downward": changed(size=4),
    "a size that is no number": changed(size="56"),
    "too few bytes": changed(scores=np.zeros((2, N_SCORES - 1)), shape=[2, N_SCORES], size=2 * 4 * N_SCORES),
    "too many bytes": changed(scores=np.zeros((2, N_SCORES + 1)), shape=[2, N_SCORES], size=2 * 4 * N_SCORES),
    "NaN": changed(scores=np.full((2, N_SCORES), np.nan)),
    "infinity": changed(scores=np.full((2, N_SCORES), np.inf)),
    "the id of another": changed(id="0" * 32),
    "another version": changed(version="0" * 32),
    "a compressed answer": marked_as_compressed,
    "an error of the server": status(500, "CUDA out of luck"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_answer_is_refused_and_not_asked_for_again(cloud: Cloud, case: str) -> None:
    cloud.script.append(WRONG[case])
    with edge_to(cloud) as edge:
        with pytest.raises(AnswerError, match="look at the server"):
            edge.infer(pictures(2))
        assert len(cloud.seen) == 1
        # And what was left of it on the wire does not reach the next.
        found = edge.infer(pictures(2, seed=1))
        np.testing.assert_array_equal(found.scores, cloud.scores(cloud.seen[-1].feature))


@pytest.mark.parametrize("has_length", [True, False])
def test_an_endless_answer_is_not_held(cloud: Cloud, has_length: bool) -> None:
    sent = 0

    def flood(handler, seen) -> None:
        nonlocal sent
        head = f"HTTP/1.1 200 -\r\n{LENGTH}: 9\r\n" + (f"Content-Length: {10**12}\r\n" if has_length else "")
        handler.close_connection = True
        handler.wfile.write(head.encode() + b"\r\n")
        while True:
            handler.wfile.write(bytes(2**16))
            sent += 2**16

    cloud.always = flood
    with edge_to(cloud) as edge, pytest.raises(AnswerError, match="expected at most 65564 bytes, got more"):
        edge.infer(pictures())
    assert sent < 2**25  # what the kernel buffers, and no gigabytes


# The breaker


def test_the_breaker_opens_lets_one_probe_through_and_closes(cloud: Cloud, caplog: pytest.LogCaptureFixture) -> None:
    cloud.always = status(503)
    with edge_to(cloud, tries=1, breaker_failures=3, breaker_pause_s=0.3) as edge:
        for _ in range(3):
            with pytest.raises(CloudAwayError, match="HTTP 503"):
                edge.infer(pictures())
        with pytest.raises(CloudAwayError, match="since 3 tries in a row failed"):
            edge.infer(pictures())
        assert len(cloud.seen) == 3
        time.sleep(0.32)
        with pytest.raises(CloudAwayError, match="HTTP 503"):  # the probe
            edge.infer(pictures())
        with pytest.raises(CloudAwayError, match="nothing is sent"):
            edge.infer(pictures())
        assert len(cloud.seen) == 4
        cloud.always = answer
        time.sleep(0.32)
        for _ in range(3):
            assert edge.infer(pictures()).tries == 1
    assert [record.message for record in caplog.records if record.name == "louver.edge"] == [
        "the cloud is away: 3 tries in a row failed",
        "the cloud answers again",
    ]


def test_only_one_of_many_threads_probes(cloud: Cloud) -> None:
    with edge_to(cloud, tries=1, breaker_failures=1, breaker_pause_s=0.05, most_in_flight=8) as edge:
        cloud.always = status(503)
        with pytest.raises(CloudAwayError):
            edge.infer(pictures())
        time.sleep(0.06)
        cloud.always = slow(0.2)
        outcomes: list[str] = []

        def ask() -> None:
            try:
                outcomes.append(edge.infer(pictures()).source)
            except CloudAwayError:
                outcomes.append("away")

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(outcomes) == ["away"] * 5 + ["cloud"]
    assert len(cloud.seen) == 2


def test_who_refuses_or_is_busy_is_alive(cloud: Cloud) -> None:
    cloud.always = status(400)
    with edge_to(cloud, tries=1, breaker_failures=2) as edge:
        for trouble in (status(400), status(408), status(429), status(503, headers={"Retry-After": "0"}), status(401)):
            cloud.always = trouble
            for _ in range(3):
                with pytest.raises(CloudError, match="HTTP"):
                    edge.infer(pictures())
        assert len(cloud.seen) == 15


def test_a_probe_that_was_interrupted_bars_nobody() -> None:
    breaker = Breaker(1, 0.01)
    with breaker.attempt() as attempt:
        attempt.failed()
    time.sleep(0.02)
    with pytest.raises(KeyboardInterrupt), breaker.attempt():
        raise KeyboardInterrupt
    assert breaker.is_open
    with breaker.attempt() as attempt:
        attempt.worked()
    assert not breaker.is_open


def test_failures_must_be_in_a_row(cloud: Cloud) -> None:
    with edge_to(cloud, tries=1, breaker_failures=2) as edge:
        for _ in range(3):
            cloud.script.append(status(503))
            with pytest.raises(CloudAwayError, match="HTTP 503"):
                edge.infer(pictures())
            assert edge.infer(pictures()).source == "cloud"


# The token


def test_the_token_is_sent_and_never_shown(cloud: Cloud, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with edge_to(cloud, tries=2, breaker_failures=99) as edge:
        edge.infer(pictures())
        assert cloud.seen[0].headers["authorization"] == f"Bearer {TOKEN}"
        shown = [repr(edge), str(edge), repr(vars(edge)), repr(vars(edge._transport)), repr(edge.settings)]
        for trouble in (
            status(401, f"no such token: {TOKEN}"),
            status(503, f"Bearer {TOKEN}"),
            reset_after(0),
            status(500, TOKEN),
            raw(TOKEN.encode(), {LENGTH: TOKEN}),
            changed(version="x" + TOKEN, shape=[2, 2]),
        ):
            cloud.always = trouble
            with pytest.raises(CloudError) as caught:
                edge.infer(pictures())
            assert "nothing is sent" not in str(caught.value)
            shown += ["".join(traceback.format_exception(caught.value)), repr(caught.value)]
    shown += [record.getMessage() for record in caplog.records]
    assert any("POST" in one for one in shown)  # the log was listened to
    assert [one for one in shown if TOKEN in one or "2f6e9c" in one] == []


def known(token: str) -> Behavior:
    """A server that knows one token, and says back what it was given."""

    def judge(handler: Handler, seen: Seen) -> None:
        given = seen.headers["authorization"]
        (answer if given == f"Bearer {token}" else status(401, f"unknown: {given}"))(handler, seen)

    return judge


def test_a_token_that_the_server_no_longer_knows_is_read_anew(cloud: Cloud, caplog: pytest.LogCaptureFixture) -> None:
    there = ["hush-first"]
    n_read: list[None] = []

    def read() -> str:
        n_read.append(None)
        return there[-1]

    cloud.always = known("hush-first")
    with Edge(cloud.bundle, server=cloud.address, token=read, settings=Settings(**QUICK, tries=1)) as edge:
        edge.infer(pictures())
        cloud.always = known("hush-second")
        with pytest.raises(CloudRefusedError, match="give the token that the server knows") as caught:
            edge.infer(pictures())  # it is still the first that is there
        assert (len(cloud.seen), len(n_read)) == (2, 2)
        there.append("hush-second")
        with ThreadPoolExecutor(6) as pool:
            assert all(one.source == "cloud" for one in pool.map(edge.infer, [pictures()] * 6))
        assert len(n_read) == 3
        shown = [repr(vars(edge._transport)), repr(vars(edge._transport._credential)), str(caught.value)]
        there.append("two words")
        cloud.always = known("hush-third")
        with pytest.raises(CloudRefusedError, match="HTTP 401") as caught:
            edge.infer(pictures())
        assert "no other can be read" in caplog.text
        shown += [caplog.text, "".join(traceback.format_exception(caught.value))]
        assert not any("hush" in text or "two words" in text for text in shown)


@pytest.mark.parametrize("token", ["", "two words", "line\nend", "ключ", "a" * 5000, "a=b"])
def test_a_token_that_cannot_be_is_refused_unseen(bundle: Bundle, token: str) -> None:
    with pytest.raises(ConfigError, match="token: expected letters, digits") as caught:
        Edge(bundle, server="http://127.0.0.1:1", token=token)
    assert not token or token not in str(caught.value)
