"""The queue on disk: in order, bounded, encrypted, and whole after a crash at any moment."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from bundles import IMAGE, toy_bundle
from clouds import Cloud, answer, raw, silent, slow, status
from louver.bundle import Bundle
from louver.edge import Delivery, Edge, Settings
from louver.edge.outbox import Outbox
from louver.edge.wire import Request
from louver.errors import (
    AnswerError,
    BusyError,
    CloudRefusedError,
    ConfigError,
    DamagedError,
    MissingExtraError,
    StorageError,
)

QUICK = {"backoff_s": 0.01, "tries": 1, "breaker_failures": 99, "breaker_pause_s": 0.05, "read_timeout_s": 5.0}


def pictures(n: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, *IMAGE), np.float32)


def request(number: int, n_bytes: int = 700) -> Request:
    body = np.random.default_rng(number).bytes(n_bytes)
    return Request(id=f"{number:032x}", n_images=1, header_length=99, compression="zstd", body=body)


def put(outbox: Outbox, one: Request) -> None:
    place = outbox.take_place()
    outbox.put(one, place)
    outbox.leave(place)


def options(folder: Path, **more: object) -> Settings:
    return Settings(**{**QUICK, "queue_folder": folder / "queue", **more})


def held(bundle: Bundle, settings: Settings) -> list[Request]:
    """What waits on disk, read by an outbox that was opened for it."""
    outbox = Outbox(bundle, settings)
    try:
        return [outbox.get(number) for number in outbox.places()]
    finally:
        outbox.close()


# Through the edge


def test_what_could_not_be_sent_is_sent_later_in_order_and_answered_once(tmp_path: Path, cloud: Cloud) -> None:
    late: list[Delivery] = []
    with Edge(cloud.bundle, server=cloud.address, policy="queue", settings=options(tmp_path)) as edge:
        assert edge.infer(pictures(2)).source == "cloud"
        cloud.always = status(503)
        waiting = [edge.infer(pictures(1 + i % 3, seed=i)) for i in range(7)]
        assert all((one.source, one.scores, one.labels, one.tries) == ("queue", None, None, 0) for one in waiting)
        assert not any(one.is_degraded for one in waiting)
        assert edge.n_waiting == 7
        assert edge.flush(late.append).n_delivered == 0
        assert edge.n_waiting == 7
        cloud.always = answer
        cloud.seen.clear()
        done = edge.flush(late.append)
        assert (done.n_delivered, done.n_waiting, done.damaged) == (7, 0, ())
        assert edge.flush(late.append).n_delivered == 0
    assert [one.request_id for one in late] == [one.request_id for one in waiting] == [seen.id for seen in cloud.seen]
    for i, (one, seen) in enumerate(zip(late, cloud.seen, strict=True)):
        assert seen.feature.shape[0] == 1 + i % 3
        np.testing.assert_array_equal(one.scores, cloud.scores(seen.feature))
        assert one.labels == tuple(f"class {k}" for k in one.scores.argmax(1))
    assert sorted(path.name for path in (tmp_path / "queue").iterdir()) == ["lock", "queue.json"]


def test_a_thread_sends_what_waits_once_the_cloud_is_back(tmp_path: Path, cloud: Cloud) -> None:
    late: list[str] = []
    settings = options(tmp_path, breaker_failures=2)
    with Edge(cloud.bundle, server=cloud.address, policy="queue", settings=settings) as edge:
        edge.send_in_background(lambda one: late.append(one.request_id), every_s=0.01)
        with pytest.raises(ConfigError, match="expected one call, got another"):
            edge.send_in_background(print)
        cloud.always = status(503)
        waiting = [edge.infer(pictures(seed=i)).request_id for i in range(5)]
        time.sleep(0.1)
        assert late == []
        cloud.always = answer
        deadline = time.monotonic() + 5
        while edge.n_waiting and time.monotonic() < deadline:
            time.sleep(0.01)
        assert edge.infer(pictures()).source == "cloud"  # the breaker has closed
    assert late == waiting
    # And after `close` nothing is sent any more.
    n_seen = len(cloud.seen)
    time.sleep(0.05)
    assert len(cloud.seen) == n_seen


def test_closed_while_it_sends_the_thread_keeps_the_rest_and_complains_of_nothing(
    tmp_path: Path, cloud: Cloud, caplog: pytest.LogCaptureFixture
) -> None:
    late: list[str] = []
    with Edge(cloud.bundle, server=cloud.address, policy="queue", settings=options(tmp_path)) as edge:
        cloud.always = status(503)
        waiting = [edge.infer(pictures(seed=i)).request_id for i in range(3)]
        cloud.always = lambda handler, seen: edge._closing.wait(5) and answer(handler, seen)
        cloud.seen.clear()
        edge.send_in_background(lambda one: late.append(one.request_id), every_s=0.01)
        while not cloud.seen:
            time.sleep(0.005)
    assert late == waiting[:1]
    assert [one.id for one in held(cloud.bundle, options(tmp_path))] == waiting[1:]
    assert caplog.messages == []


def test_an_entry_stays_until_its_answer_was_taken(tmp_path: Path, cloud: Cloud) -> None:
    taken: list[str] = []

    def full(late: Delivery) -> None:
        if len(taken) == 2:
            raise OSError("the sink is full")
        taken.append(late.request_id)

    with Edge(cloud.bundle, server=cloud.address, policy="queue", settings=options(tmp_path)) as edge:
        cloud.always = status(503)
        waiting = [edge.infer(pictures(seed=i)).request_id for i in range(4)]
        cloud.always = answer
        with pytest.raises(OSError, match="the sink is full"):
            edge.flush(full)
        assert (taken, edge.n_waiting) == (waiting[:2], 2)
        edge.flush(lambda late: taken.append(late.request_id))
    assert taken == waiting


@pytest.mark.parametrize(("code", "is_kept"), [(408, True), (429, True), (503, True), (400, False), (403, False)])
def test_what_waiting_may_mend_is_kept_and_a_spent_budget_is_not(
    tmp_path: Path, cloud: Cloud, code: int, is_kept: bool
) -> None:
    cloud.always = status(code)
    with Edge(cloud.bundle, server=cloud.address, policy="queue", settings=options(tmp_path)) as edge:
        if is_kept:
            assert edge.infer(pictures()).source == "queue"
        else:
            with pytest.raises(CloudRefusedError, match=str(code)):
                edge.infer(pictures())
        assert edge.n_waiting == is_kept


@pytest.mark.parametrize(
    ("trouble", "error"),
    [(status(404, "no such version"), CloudRefusedError), (status(401), CloudRefusedError), (raw(b"?"), AnswerError)],
)
def test_what_the_cloud_refuses_is_kept_until_its_owner_gives_it_up(
    tmp_path: Path, cloud: Cloud, trouble: object, error: type[Exception]
) -> None:
    late: list[str] = []
    with Edge(cloud.bundle, server=cloud.address, policy="queue", settings=options(tmp_path)) as edge:
        cloud.always = status(503)
        waiting = [edge.infer(pictures(seed=i)).request_id for i in range(3)]
        cloud.always = trouble
        with pytest.raises(error, match=f"--discard {waiting[0]}"):
            edge.flush(lambda one: late.append(one.request_id))
        assert edge.n_waiting == 3
        cloud.always = answer
        assert edge.discard(waiting[0])
        assert not edge.discard(waiting[0])
        edge.flush(lambda one: late.append(one.request_id))
    assert late == waiting[1:]


def test_the_queue_outlives_the_process_and_only_one_process_has_it(tmp_path: Path, cloud: Cloud) -> None:
    cloud.always = status(503)
    with Edge(cloud.bundle, server=cloud.address, policy="queue", settings=options(tmp_path)) as edge:
        waiting = [edge.infer(pictures(seed=i)).request_id for i in range(3)]
        with pytest.raises(ConfigError, match="in use by another process"):
            Edge(cloud.bundle, server=cloud.address, policy="queue", settings=options(tmp_path))
    cloud.always = answer
    late: list[str] = []
    with Edge(cloud.bundle, server=cloud.address, policy="queue", settings=options(tmp_path)) as edge:
        edge.flush(lambda one: late.append(one.request_id))
    assert late == waiting


def test_a_full_queue_refuses_and_keeps_what_it_has(tmp_path: Path, cloud: Cloud) -> None:
    cloud.always = status(503)
    for bound, most in (({"queue_most_entries": 2}, 2), ({"queue_most_bytes": 1500}, 2)):
        settings = options(tmp_path / str(bound), **bound)
        with Edge(cloud.bundle, server=cloud.address, policy="queue", settings=settings) as edge:
            kept = [edge.infer(pictures(seed=i)).request_id for i in range(most)]
            with pytest.raises(BusyError, match="the queue is full"):
                edge.infer(pictures(seed=9))
        assert [one.id for one in held(cloud.bundle, settings)] == kept


def test_without_a_folder_or_the_package_it_says_what_is_missing(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="expected queue_folder, got none"):
        Edge(bundle, server="http://127.0.0.1:1", policy="queue")
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'louver\[edge\]'"):
        Edge(bundle, server="http://127.0.0.1:1", policy="queue", settings=options(tmp_path))


# At rest


@pytest.mark.parametrize("folder", ["/", "."])
def test_a_folder_without_a_name_has_no_place_for_its_key(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.chdir("/")
    with pytest.raises(ConfigError, match="queue_folder: expected a folder with a name"):
        Outbox(bundle, Settings(queue_folder=Path(folder)))


def test_what_is_on_disk_is_neither_feature_nor_image_and_for_the_owner_alone(tmp_path: Path, cloud: Cloud) -> None:
    cloud.always = status(503)
    images = pictures(2)
    settings = options(tmp_path, compression="none")
    with Edge(cloud.bundle, server=cloud.address, policy="queue", settings=settings) as edge:
        for _ in range(2):
            edge.infer(images)
    feature = cloud.seen[0].feature.tobytes()
    levels = np.rint(images * 255).astype(np.uint8).tobytes()
    for path in [*(tmp_path / "queue").iterdir(), tmp_path / "queue.key"]:
        content = path.read_bytes()
        for secret in (feature, images.tobytes(), levels, cloud.seen[0].id.encode(), b"feature"):
            assert not any(secret[i : i + 8] in content for i in range(0, len(secret) - 7, 4)), path
        assert path.stat().st_mode & 0o077 == 0, path
    assert (tmp_path / "queue").stat().st_mode & 0o077 == 0
    first, second = sorted((tmp_path / "queue").glob("*.entry"))
    assert first.read_bytes()[:12] != second.read_bytes()[:12]  # no nonce twice
    assert held(cloud.bundle, settings)[0].body == cloud.seen[0].body


def test_another_key_is_refused_and_a_lost_one_is_not_made_anew(tmp_path: Path, bundle: Bundle) -> None:
    settings = options(tmp_path)
    outbox = Outbox(bundle, settings)
    put(outbox, request(1))
    outbox.close()
    key = tmp_path / "queue.key"
    right = key.read_bytes()
    assert len(right) == 32
    for content, words in ((os.urandom(32), "is not the key of"), (right + b"x", "expected 32 random bytes")):
        key.write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            Outbox(bundle, settings)
    key.write_bytes(right)
    key.chmod(0o640)
    with pytest.raises(ConfigError, match="got mode 0640; chmod 600 it"):
        Outbox(bundle, settings)
    key.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="got no such file; restore it"):
        Outbox(bundle, settings)
    assert not key.exists()
    (tmp_path / "moved").chmod(0o600)
    assert held(bundle, options(tmp_path, queue_key=tmp_path / "moved")) == [request(1)]


def test_the_queue_of_another_bundle_is_left_alone(tmp_path: Path, bundle: Bundle) -> None:
    settings = options(tmp_path)
    Outbox(bundle, settings).close()
    other = toy_bundle(tmp_path / "other", seed=5)
    with pytest.raises(ConfigError, match=f"holds features of bundle {bundle.id}, this is {other.id}"):
        Outbox(other, settings)


def test_entries_cannot_be_changed_cut_or_swapped(tmp_path: Path, cloud: Cloud) -> None:
    settings = options(tmp_path)
    outbox = Outbox(cloud.bundle, settings)
    for number in range(6):
        put(outbox, request(number))
    paths = sorted((tmp_path / "queue").glob("*.entry"))
    content = [path.read_bytes() for path in paths]
    paths[0].write_bytes(content[0][:-1])
    paths[1].write_bytes(b"")
    paths[2].write_bytes(content[3])
    paths[3].write_bytes(content[2])
    paths[4].write_bytes(content[4][:50] + bytes([content[4][50] ^ 1]) + content[4][51:])
    for number in range(5):
        with pytest.raises(DamagedError, match="cut short or changed"):
            outbox.get(number)
    assert outbox.get(5) == request(5)
    outbox.close()


def test_a_damaged_entry_is_set_aside_and_the_rest_is_sent(
    tmp_path: Path, cloud: Cloud, caplog: pytest.LogCaptureFixture
) -> None:
    cloud.always = status(503)
    late: list[str] = []
    with Edge(cloud.bundle, server=cloud.address, policy="queue", settings=options(tmp_path)) as edge:
        waiting = [edge.infer(pictures(seed=i)).request_id for i in range(4)]
        path = sorted((tmp_path / "queue").glob("*.entry"))[1]
        path.write_bytes(path.read_bytes()[:100])
        cloud.always = answer
        assert edge.discard(waiting[3])
        done = edge.flush(lambda one: late.append(one.request_id))
        assert (done.n_delivered, done.n_waiting) == (2, 0)
        assert [one.suffix for one in done.damaged] == [".damaged"]
        assert done.damaged[0].stat().st_size == 100
    assert late == [waiting[0], waiting[2]]
    assert "cut short or changed" in caplog.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is damaged"),
        (b"[]", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b'{"format": 2, "bundle": "", "key_check": ""}', "expected format 1, got 2"),
        (b'{"format": 1, "bundle": "%s", "key_check": ""}', "expected 28 bytes, got 0"),
        (b'{"format": 1, "bundle": "%s", "key_check": "AAAA"}', "expected 28 bytes, got 3"),
        (b'{"format": 1, "bundle": "%s", "key_check": null}', "is damaged"),
        (None, r"expected queue\.json beside the entries"),
    ],
)
def test_a_damaged_head_is_refused(tmp_path: Path, bundle: Bundle, content: bytes | None, words: str) -> None:
    outbox = Outbox(bundle, options(tmp_path))
    put(outbox, request(1))
    outbox.close()
    head = tmp_path / "queue" / "queue.json"
    if content is None:
        head.unlink()
    else:
        head.write_bytes(content.replace(b"%s", bundle.id.encode()))
    with pytest.raises(StorageError, match=words):
        Outbox(bundle, options(tmp_path))


def test_a_place_is_never_used_again_so_that_an_old_entry_passes_for_no_other(tmp_path: Path, bundle: Bundle) -> None:
    def entries() -> list[Path]:
        return sorted((tmp_path / "queue").glob("*.entry"))

    outbox = Outbox(bundle, options(tmp_path))
    put(outbox, request(1))
    (old,) = entries()
    content = old.read_bytes()
    outbox.remove(*outbox.places())
    outbox.close()
    outbox = Outbox(bundle, options(tmp_path))
    put(outbox, request(2))
    outbox.close()
    (new,) = entries()
    assert new != old
    new.write_bytes(content)
    outbox = Outbox(bundle, options(tmp_path))
    with pytest.raises(DamagedError, match="cut short or changed"):
        outbox.get(*outbox.places())
    outbox.close()


def test_places_go_on_after_any_number_of_starts_and_blocks(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("louver.edge.outbox._BLOCK", 3)
    used: list[int] = []
    for start, n_entries in enumerate((1, 0, 5, 2)):
        outbox = Outbox(bundle, options(tmp_path))
        outbox.leave(outbox.take_place())  # of a request that was answered: nothing was kept there
        for number in range(n_entries):
            put(outbox, request(10 * start + number))
            (place,) = outbox.places()
            used.append(place)
            outbox.remove(place)
        outbox.close()
    assert used == sorted(set(used))
    assert len(used) == 8


def test_a_queue_of_before_places_were_noted_opens_and_goes_on(tmp_path: Path, bundle: Bundle) -> None:
    outbox = Outbox(bundle, options(tmp_path))
    for number in (1, 2):
        put(outbox, request(number))
    outbox.close()
    head = tmp_path / "queue" / "queue.json"
    content = json.loads(head.read_text())
    head.write_text(json.dumps({key: value for key, value in content.items() if key != "places"}))
    outbox = Outbox(bundle, options(tmp_path))
    put(outbox, request(3))
    outbox.remove(2)
    outbox.close()
    assert json.loads(head.read_text()) == content | {"places": 1002}
    outbox = Outbox(bundle, options(tmp_path))
    put(outbox, request(4))
    outbox.close()
    assert held(bundle, options(tmp_path)) == [request(1), request(2), request(4)]


@pytest.mark.parametrize("places", [-1, "7", 1.5, True, None, 10**12])
def test_places_that_cannot_be_are_damage(tmp_path: Path, bundle: Bundle, places: object) -> None:
    Outbox(bundle, options(tmp_path)).close()
    head = tmp_path / "queue" / "queue.json"
    head.write_text(json.dumps(json.loads(head.read_text()) | {"places": places}))
    with pytest.raises(StorageError, match=r"queue\.json is damaged \(places"):
        Outbox(bundle, options(tmp_path))


def test_what_was_set_aside_is_not_overwritten(tmp_path: Path, bundle: Bundle) -> None:
    folder = tmp_path / "queue"
    outbox = Outbox(bundle, options(tmp_path))
    for name in ("000000000000.damaged", "000000000000.1.damaged"):
        (folder / name).write_text(name)  # of a Louver that used places again
    put(outbox, request(1))
    content = (folder / "000000000000.entry").read_bytes()
    assert outbox.set_aside(0).name == "000000000000.2.damaged"
    outbox.close()
    assert (folder / "000000000000.2.damaged").read_bytes() == content
    for name in ("000000000000.damaged", "000000000000.1.damaged"):
        assert (folder / name).read_text() == name


# A disk that refuses


@pytest.mark.parametrize("call", ["write", "fsync", "open", "replace"])
@pytest.mark.parametrize("how_far", [0, 1, 2])
def test_a_disk_that_refuses_a_new_block_leaves_the_head_and_what_waits(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, call: str, how_far: int
) -> None:
    monkeypatch.setattr("louver.edge.outbox._BLOCK", 1)
    outbox = Outbox(bundle, options(tmp_path))
    put(outbox, request(1))
    real, calls = getattr(os, call), iter(range(10**6))

    def refuse(*arguments: object, **more: object) -> object:
        if next(calls) >= how_far:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **more)

    kept = [request(1)]
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        try:
            put(outbox, request(2))
        except StorageError:
            pass
        else:
            kept.append(request(2))  # it needs fewer of these calls
    put(outbox, request(3))
    outbox.close()
    assert held(bundle, options(tmp_path)) == [*kept, request(3)]


@pytest.mark.parametrize("call", ["write", "fsync", "open", "replace"])
@pytest.mark.parametrize("how_far", [0, 1, 2])
def test_a_disk_that_refuses_loses_nothing_that_was_acknowledged(
    tmp_path: Path, cloud: Cloud, monkeypatch: pytest.MonkeyPatch, call: str, how_far: int
) -> None:
    cloud.always = status(503)
    settings = options(tmp_path)
    with Edge(cloud.bundle, server=cloud.address, policy="queue", settings=settings) as edge:
        kept = [edge.infer(pictures(seed=i)).request_id for i in range(2)]
        real, count = getattr(os, call), iter(range(10**6))

        def refuse(*arguments: object, **more: object) -> object:
            if "queue" in str(arguments[0]) or isinstance(arguments[0], int):
                if next(count) >= how_far:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if call == "write":
                    return real(arguments[0], bytes(arguments[1])[:5])  # a disk takes a part before it is full
            return real(*arguments, **more)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            refusals = []
            for i in range(3):
                try:
                    kept.append(edge.infer(pictures(seed=7 + i)).request_id)
                except StorageError as error:
                    refusals.append(str(error))
        assert refusals
        for words in ("No space left on device", "what the queue had acknowledged is whole"):
            assert all(words in one for one in refusals)
        kept.append(edge.infer(pictures(seed=9)).request_id)  # there is space again
        assert edge.n_waiting == len(kept)
    assert not list((tmp_path / "queue").glob("*.part"))
    assert [one.id for one in held(cloud.bundle, settings)] == kept


def test_a_file_size_limit_is_a_full_disk_too(tmp_path: Path) -> None:
    """The real refusal of a real kernel, in a process of its own."""
    bundle = toy_bundle(tmp_path / "bundle")
    code = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from louver.edge import Edge, Settings\n"
        "from louver.errors import StorageError\n"
        "settings = Settings(queue_folder=Path(sys.argv[2]), tries=1, compression='none', breaker_failures=99)\n"
        "with Edge(sys.argv[1], server='http://127.0.0.1:9', policy='queue', settings=settings) as edge:\n"
        f"    print(edge.infer(np.zeros((1, *{IMAGE}), np.float32)).request_id)\n"
        "    try:\n"
        f"        edge.infer(np.zeros((50, *{IMAGE}), np.float32))\n"
        "    except StorageError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle.folder), str(tmp_path / "queue")],
        capture_output=True, text=True, check=False, timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    identity, said = done.stdout.splitlines()
    assert "File too large" in said
    assert [one.id for one in held(bundle, options(tmp_path))] == [identity]


def test_data_is_on_the_disk_before_its_name_and_its_name_before_it_counts(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = Outbox(bundle, options(tmp_path))
    calls: list[str] = []
    for name in ("write", "fsync", "replace", "unlink"):
        real = getattr(os, name)

        def noted(*arguments: object, name: str = name, real: object = real, **more: object) -> object:
            what = Path(str(arguments[0]))
            if isinstance(arguments[0], int):
                what = Path(f"/proc/self/fd/{arguments[0]}").readlink()
            calls.append(f"{name} {what.name}")
            return real(*arguments, **more)

        monkeypatch.setattr(os, name, noted)
    put(outbox, request(1))
    part, entry = "000000000000.entry.part", "000000000000.entry"
    assert calls == [f"write {part}", f"write {part}", f"fsync {part}", f"replace {part}", "fsync queue"]
    calls.clear()
    outbox.remove(0)
    assert calls == [f"unlink {entry}", "fsync queue"]
    outbox.close()


def test_a_new_folder_is_on_the_disk_before_what_it_holds_counts(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Path]] = []
    mkdir, fsync = os.mkdir, os.fsync

    def noted_mkdir(path: Path, *arguments: object) -> None:
        mkdir(path, *arguments)
        calls.append(("mkdir", Path(path)))

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        calls.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink()))

    monkeypatch.setattr(os, "mkdir", noted_mkdir)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    settings = options(tmp_path / "a" / "b", queue_key=tmp_path / "keys" / "of" / "key")
    Outbox(bundle, settings).close()
    made = [tmp_path / path for path in ("a", "a/b", "a/b/queue", "keys", "keys/of")]
    assert [path for call, path in calls if call == "mkdir"] == made
    for path in made:
        assert calls[calls.index(("mkdir", path)) + 1] == ("fsync", path.parent)
    assert (tmp_path / "a" / "b" / "queue").stat().st_mode & 0o777 == 0o700
    calls.clear()
    Outbox(bundle, settings).close()
    assert calls == []


# Crashes


CRASH = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
from test_outbox import options, put, request
from louver.bundle import read_bundle
from louver.edge import outbox as module
from louver.edge.outbox import Outbox

module._BLOCK = 2  # so that a block ends among them
bundle, here = read_bundle(sys.argv[1]), Path(sys.argv[2])

def crash_at(point):
    count = 0
    for name in ("open", "write", "fsync", "replace", "unlink"):
        def counted(*arguments, real=getattr(os, name), **more):
            nonlocal count
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return real(*arguments, **more)
        setattr(os, name, counted)

point = 0
while True:
    folder = here / str(point)
    folder.mkdir()
    child = os.fork()
    if child == 0:
        told = os.open(folder / "told", os.O_WRONLY | os.O_CREAT)
        tell = os.write
        crash_at(point)
        outbox = Outbox(bundle, options(folder))
        for number in range(3):
            put(outbox, request(number))
            tell(told, b"put %d\\n" % number)
        tell(told, b"removing 0\\n")
        outbox.remove(0)
        tell(told, b"removed 0\\n")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) == 0:
        break
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    point += 1
print(point)
"""


def test_killed_at_any_step_it_keeps_what_it_acknowledged(tmp_path: Path, bundle: Bundle) -> None:
    """Before each call to the operating system, one by one; the killed process is a real one."""
    code = CRASH.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle.folder), str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    n_points = int(done.stdout)
    assert n_points > 30
    for point in range(n_points):
        told = (tmp_path / str(point) / "told").read_text()
        acknowledged = [int(number) for number in re.findall(r"^put (\d)$", told, re.MULTILINE)]
        found = [int(one.id, 16) for one in held(bundle, options(tmp_path / str(point)))]
        if "removed" in told:
            assert found == [1, 2]
        elif "removing" in told:
            assert found in ([0, 1, 2], [1, 2])
        else:
            # One more may have been kept that nobody was told of; none may be missing.
            assert found in (acknowledged, list(range(len(acknowledged) + 1))), point
        assert not list((tmp_path / str(point) / "queue").glob("*.part"))


FILL = """
import sys, numpy as np
from pathlib import Path
from louver.edge import Edge, Settings
settings = Settings(queue_folder=Path(sys.argv[3]), tries=1, breaker_failures=1, breaker_pause_s=999)
with Edge(sys.argv[1], server=sys.argv[2], policy="queue", settings=settings) as edge:
    while True:
        print(edge.infer(np.full((1, 3, 8, 10), 0.5, np.float32)).request_id, flush=True)
"""

SEND = """
import os, sys
from pathlib import Path
from louver.edge import Edge, Settings
settings = Settings(queue_folder=Path(sys.argv[3]))
def sink(late):
    print(late.request_id, flush=True)
    if os.environ.get("DIE_AT") == late.request_id:
        os.kill(os.getpid(), 9)
with Edge(sys.argv[1], server=sys.argv[2], policy="queue", settings=settings) as edge:
    edge.flush(sink)
"""


def start(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})


def killed(process: subprocess.Popen[str], *, after_lines: int, wait_s: float = 0.0) -> list[str]:
    """All whole lines that a process printed until it was killed."""
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(after_lines)]
    time.sleep(wait_s)
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read()  # `communicate` would leave out what was read ahead with the first lines
    process.communicate(timeout=30)
    return [line.strip() for line in [*lines, *rest.splitlines(keepends=True)] if line.endswith("\n")]


def test_killed_while_queueing_and_while_sending_nothing_is_lost(tmp_path: Path, cloud: Cloud) -> None:
    queue, acknowledged = tmp_path / "queue", []
    nowhere = "http://127.0.0.1:9"
    for after, wait in ((3, 0.0), (5, 0.003), (4, 0.011)):
        process = start(FILL, cloud.bundle.folder, nowhere, queue)
        acknowledged += killed(process, after_lines=after, wait_s=wait)
    on_disk = [one.id for one in held(cloud.bundle, options(tmp_path))]
    assert [one for one in on_disk if one in acknowledged] == acknowledged
    assert len(on_disk) <= len(acknowledged) + 3  # a kill may fall between keeping and telling

    # Killed in the middle of a request, then between the answer's delivery and the entry's deletion.
    cloud.always = slow(0.05)
    delivered = killed(start(SEND, cloud.bundle.folder, cloud.address, queue), after_lines=2, wait_s=0.02)
    cloud.always = answer
    left = [one.id for one in held(cloud.bundle, options(tmp_path))]
    process = start(SEND, cloud.bundle.folder, cloud.address, queue, DIE_AT=left[2])
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    delivered += printed.split()
    assert delivered[-1] == left[2]
    process = start(SEND, cloud.bundle.folder, cloud.address, queue)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    again = printed.split()
    assert again[0] == left[2]  # what was delivered twice bears the same id, and comes first
    delivered += again
    assert list(dict.fromkeys(delivered)) == on_disk
    assert len(delivered) <= len(on_disk) + 2
    assert held(cloud.bundle, options(tmp_path)) == []


def test_the_order_is_that_of_the_pictures_whichever_try_ends_first(tmp_path: Path, cloud: Cloud) -> None:
    waits = iter([0.3, 0.0, 0.15, 0.0, 0.0, 0.0])

    def uneven(handler, seen) -> None:
        time.sleep(next(waits))
        status(503)(handler, seen)

    cloud.always = uneven
    sent_early: list[str] = []
    with Edge(cloud.bundle, server=cloud.address, policy="queue", settings=options(tmp_path)) as edge:
        found = edge.infer_many(pictures(seed=i) for i in range(6))
        first = next(found)
        waiting = [first, *found]
        # One that comes later and is under way holds nothing back.
        waits = iter([0.4])
        cloud.always = uneven
        thread = threading.Thread(target=lambda: waiting.append(edge.infer(pictures(seed=6))))
        n_before = len(cloud.seen)
        thread.start()
        while len(cloud.seen) == n_before:
            time.sleep(0.005)
        cloud.always = answer
        edge.flush(lambda late: sent_early.append(late.request_id))
        assert sent_early == [one.request_id for one in waiting[:6]]
        thread.join()
    assert [one.id for one in held(cloud.bundle, options(tmp_path))] == [waiting[6].request_id]


def test_what_is_under_way_holds_back_what_came_after_it(tmp_path: Path, bundle: Bundle) -> None:
    outbox = Outbox(bundle, options(tmp_path))
    first, second = outbox.take_place(), outbox.take_place()
    outbox.put(request(2), second)
    outbox.leave(second)
    assert outbox.places() == []
    assert len(outbox) == 1
    outbox.put(request(1), first)
    outbox.leave(first)
    assert [outbox.get(place).id for place in outbox.places()] == [request(1).id, request(2).id]
    outbox.close()


def test_a_closed_queue_keeps_nothing_for_another_process_may_have_it(tmp_path: Path, bundle: Bundle) -> None:
    outbox = Outbox(bundle, options(tmp_path))
    put(outbox, request(1))
    outbox.close()
    outbox.close()
    with pytest.raises(StorageError, match="was closed; nothing was kept"):
        put(outbox, request(2))
    assert held(bundle, options(tmp_path)) == [request(1)]


def test_closing_waits_for_what_another_thread_has_to_keep(tmp_path: Path, cloud: Cloud) -> None:
    cloud.always = silent(0.3)
    settings = options(tmp_path, tries=3)
    edge = Edge(cloud.bundle, server=cloud.address, policy="queue", settings=settings)
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(edge.infer(pictures()).request_id))
    thread.start()
    while not cloud.seen:
        time.sleep(0.005)
    edge.close()
    thread.join()
    assert [one.id for one in held(cloud.bundle, settings)] == found
    # A slot that was lost with an interrupted thread does not hold closing up for long.
    edge = Edge(cloud.bundle, server=cloud.address, policy="queue", settings=options(tmp_path, read_timeout_s=0.2))
    edge._take_slot()
    started = time.monotonic()
    edge.close()
    assert time.monotonic() - started < 2


def test_many_threads_may_queue_at_once(tmp_path: Path, cloud: Cloud) -> None:
    cloud.always = status(503)
    settings = options(tmp_path, most_in_flight=8)
    found: list[str] = []
    with Edge(cloud.bundle, server=cloud.address, policy="queue", settings=settings) as edge:

        def work(seed: int) -> None:
            found.extend(edge.infer(pictures(seed=seed + i)).request_id for i in range(5))

        threads = [threading.Thread(target=work, args=(10 * k,)) for k in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(one.id for one in held(cloud.bundle, settings)) == sorted(found)
    assert len(found) == 30
    assert json.loads((tmp_path / "queue" / "queue.json").read_text())["bundle"] == cloud.bundle.id
