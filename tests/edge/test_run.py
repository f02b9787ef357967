"""`louver run` as a user meets it, and pictures as the lab sees them."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import louver
from bundles import IMAGE, N_SCORES, toy_bundle
from clouds import Cloud, Handler, Seen, answer, slow, status
from louver import cli
from louver.bundle import Bundle
from louver.edge.sources import SUFFIXES, images_from
from louver.errors import DataError, MissingExtraError

COMMAND = [sys.executable, "-m", "louver", "run"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, name in enumerate(("b.png", "a.PNG", "deep/c.jpg")):
        levels = rng.integers(0, 256, (12 + i, 17, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["louver", "run", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_folder_is_run_and_each_picture_gets_its_line(
    photos: Path, cloud: Cloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, cloud.bundle.folder, "--server", cloud.address, photos, "--json") == 0
    found = lines(capsys)
    assert [Path(one["image"]).name for one in found] == ["a.PNG", "b.png", "c.jpg"]
    by_id = {seen.id: seen for seen in cloud.seen}  # they arrive in any order
    for one in found:
        seen = by_id[one["request"]]
        scores = cloud.scores(seen.feature)[0]
        np.testing.assert_allclose(one["scores"], scores, rtol=1e-6)
        assert one["label"] == f"class {scores.argmax()}"
        assert one["score"] == pytest.approx(scores.max())
        assert (one["source"], one["is_degraded"], one["request"], one["n_images"]) == ("cloud", False, seen.id, 1)
        assert one["sent_bytes"] == len(seen.body)
        assert one["edge_ms"] > 0
        assert one["wire_ms"] > 0
    assert run(monkeypatch, cloud.bundle.folder, "--server", cloud.address, photos / "b.png") == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith(f"{photos / 'b.png'}: class ")
    assert " ms, wire " in said.out
    assert f"{len(cloud.seen[-1].body)} B sent" in said.out


def test_batches_and_arrays(
    tmp_path: Path, cloud: Cloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    levels = np.random.default_rng(1).integers(0, 256, (5, *IMAGE), dtype=np.uint8)
    np.save(tmp_path / "levels.npy", levels)
    np.savez(tmp_path / "named.npz", images=levels.astype(np.float32) / 255, labels=np.arange(5))
    words = (tmp_path / "levels.npy", tmp_path / "named.npz", "--batch", 4, "--json")
    assert run(monkeypatch, cloud.bundle.folder, "--server", cloud.address, *words) == 0
    found = lines(capsys)
    assert [one["n_images"] for one in found] == [4] * 8 + [2] * 2
    assert found[6]["image"] == f"{tmp_path / 'named.npz'}[1]"
    for i in range(5):
        np.testing.assert_allclose(found[i]["scores"], found[5 + i]["scores"], rtol=1e-4, atol=1e-4)
    assert sorted(len(seen.feature) for seen in cloud.seen) == [2, 4, 4]


def test_the_token_comes_from_a_file_or_the_environment(
    tmp_path: Path, photos: Path, cloud: Cloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = (cloud.bundle.folder, "--server", cloud.address, photos / "b.png")
    (tmp_path / "token").write_text("from-file\n")
    assert run(monkeypatch, *base) == 0
    monkeypatch.setenv("LOUVER_TOKEN", "from-environment")
    assert run(monkeypatch, *base) == 0
    assert run(monkeypatch, *base, "--token-file", tmp_path / "token") == 0
    sent = [seen.headers.get("authorization") for seen in cloud.seen]
    assert sent == [None, "Bearer from-environment", "Bearer from-file"]
    assert run(monkeypatch, *base, "--token-file", tmp_path / "nowhere") == 2
    assert "--token-file: cannot read" in capsys.readouterr().err
    assert run(monkeypatch, *base, "--token", "hush") == 2
    assert "No such option" in capsys.readouterr().err


def test_a_token_that_changes_in_its_file_is_read_anew(
    tmp_path: Path, photos: Path, cloud: Cloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text("first")

    def rotated(handler: Handler, seen: Seen) -> None:
        token.write_text("second\n")
        (answer if seen.headers["authorization"] == "Bearer second" else status(401))(handler, seen)

    cloud.always = rotated
    words = (cloud.bundle.folder, "--server", cloud.address, "--token-file", token)
    assert run(monkeypatch, *words, photos / "b.png") == 0
    assert "class " in capsys.readouterr().out
    assert [seen.headers["authorization"] for seen in cloud.seen] == ["Bearer first", "Bearer second"]


def test_what_waited_is_sent_by_the_next_run(
    tmp_path: Path, photos: Path, cloud: Cloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = (
        cloud.bundle.folder,
        "--server",
        cloud.address,
        "--policy",
        "queue",
        "--queue",
        tmp_path / "queue",
        "--json",
    )
    cloud.always = status(429, headers={"Retry-After": "0"})
    assert run(monkeypatch, *base, photos) == 0
    said = capsys.readouterr()
    waiting = [json.loads(line) for line in said.out.splitlines()]
    assert [(one["source"], one["label"], one["scores"]) for one in waiting] == [("queue", None, None)] * 3
    assert "3 requests wait for the cloud; run the same command without pictures" in said.err
    cloud.always = answer
    assert run(monkeypatch, *base) == 0
    late = lines(capsys)
    assert [one["request"] for one in late] == [one["request"] for one in waiting]
    assert all(one["label"].startswith("class ") and len(one["scores"]) == N_SCORES for one in late)
    assert run(monkeypatch, *base) == 0
    assert lines(capsys) == []


def test_the_head_answers_and_says_so(
    photos: Path, cloud: Cloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud.always = status(429, headers={"Retry-After": "0"})
    base = (cloud.bundle.folder, "--server", cloud.address, photos / "b.png")
    assert run(monkeypatch, *base) == 2
    assert "HTTP 429" in capsys.readouterr().err
    assert run(monkeypatch, *base, "--policy", "local") == 0
    assert "(degraded)" in capsys.readouterr().out
    assert run(monkeypatch, *base, "--policy", "local", "--json") == 0
    (found,) = lines(capsys)
    assert (found["source"], found["is_degraded"]) == ("local", True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("PHOTO",), "--server: expected the address of a server, got none"),
        (("--server", "ADDRESS"), "expected pictures to run on, got none"),
        (
            ("--server", "ADDRESS", "PHOTO", "--queue", "q"),
            "--queue, --queue-key and --discard: expected --policy queue with it, got fail",
        ),
        (("--server", "ADDRESS", "PHOTO", "--policy", "hope"), "policy: got 'hope'"),
        (("--server", "ADDRESS", "PHOTO", "--policy", "queue"), "expected queue_folder, got none"),
        (("--server", "ADDRESS", "PHOTO", "--timeout", "0"), "read_timeout_s: expected seconds above 0"),
        (("--server", "http://cloud.example", "PHOTO"), "allow it by name"),
        (("--server", "ADDRESS", "nowhere.png"), "expected a picture, a folder, .npy, .npz or camera[:N]"),
        (("--server", "ADDRESS", "camera:x"), "expected camera or camera:N"),
    ],
)
def test_what_is_wrong_is_said_with_exit_code_2(
    photos: Path, cloud: Cloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words, said
) -> None:
    known = {"ADDRESS": cloud.address, "PHOTO": str(photos / "b.png")}
    assert run(monkeypatch, cloud.bundle.folder, *(known.get(word, word) for word in words)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert cloud.seen == []
    assert run(monkeypatch, photos, "--server", cloud.address, photos / "b.png") == 2
    assert "got no manifest.json" in capsys.readouterr().err


def test_answers_before_a_bad_picture_are_printed(
    photos: Path, cloud: Cloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "aa.png").write_bytes(b"no picture")
    cloud.always = slow(0.1)
    assert run(monkeypatch, cloud.bundle.folder, "--server", cloud.address, photos, "--json") == 2
    said = capsys.readouterr()
    assert [Path(json.loads(line)["image"]).name for line in said.out.splitlines()] == ["a.PNG"]
    assert "cannot be decoded" in said.err


def test_a_name_that_is_no_utf_8_is_printed_with_escapes(photos: Path, cloud: Cloud) -> None:
    (photos / "b.png").rename(photos / os.fsdecode(b"b\xff.png"))
    words = [*COMMAND, str(cloud.bundle.folder), "--server", cloud.address, str(photos)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    escaped = str(photos / r"b\udcff.png")
    for as_json in (False, True):
        done = subprocess.run(
            [*words, *["--json"] * as_json],
            capture_output=True,
            encoding="utf-8",
            check=False,
            timeout=60,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        found = done.stdout.splitlines()
        names = [json.loads(line)["image"] if as_json else line.partition(": ")[0] for line in found]
        assert names == [str(photos / "a.PNG"), escaped, str(photos / "deep" / "c.jpg")]


def test_a_queue_that_a_refused_request_bars_is_freed_by_giving_it_up(
    tmp_path: Path,
    photos: Path,
    cloud: Cloud,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = (cloud.bundle.folder, "--server", cloud.address, "--policy", "queue", "--queue", tmp_path / "q", "--json")
    cloud.always = status(429, headers={"Retry-After": "0"})
    assert run(monkeypatch, *words, photos / "b.png", photos / "a.PNG") == 0
    first, second = (one["request"] for one in lines(capsys))
    cloud.always = status(413)
    assert run(monkeypatch, *words) == 2
    assert f"give the request up by --discard {first}" in capsys.readouterr().err.replace("\n", " ")
    cloud.always = answer
    other = "0" * 32
    assert run(monkeypatch, *words, "--discard", first, "--discard", other, photos / "deep") == 0
    said = capsys.readouterr()
    assert f"gave up request {first}" in said.err
    assert f"no request {other} waits" in said.err
    late, new = map(json.loads, said.out.splitlines())
    assert late["request"] == second
    assert new["image"].endswith("c.jpg")
    assert run(monkeypatch, *words[:3], photos / "b.png", "--discard", first) == 2
    assert "--discard: expected --policy queue" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["fail", "queue"])
def test_interrupted_it_leaves_a_whole_queue(tmp_path: Path, cloud: Cloud, policy: str) -> None:
    np.save(tmp_path / "many.npy", np.zeros((20_000, *IMAGE), np.uint8))
    cloud.always = status(429, headers={"Retry-After": "0"}) if policy == "queue" else slow(0.01)
    queue = ("--policy", "queue", "--queue", str(tmp_path / "queue")) if policy == "queue" else ()
    words = [str(cloud.bundle.folder), "--server", cloud.address, *queue, str(tmp_path / "many.npy"), "--json"]
    process = subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # What runs in the background of a shell is born deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    printed = [process.stdout.readline() for _ in range(3)]
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()  # `communicate` would leave out what was read ahead with the first lines
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "--resume" not in error
    assert "Traceback" not in error
    printed += rest.splitlines()
    if policy == "fail":
        assert error.strip() == "interrupted"
        return
    waiting = [json.loads(line)["request"] for line in printed]
    cloud.always = answer
    done = subprocess.run([*COMMAND, *words[:-2], "--json"], capture_output=True, text=True, check=True, timeout=60)
    late = [json.loads(line)["request"] for line in done.stdout.splitlines()]
    assert f"interrupted; {len(late)} requests wait in" in error
    assert [one for one in late if one in waiting] == waiting
    assert len(late) <= len(waiting) + 5  # those under way when it was interrupted


CAMERA = """
import sys, time, types
import numpy as np

class Capture:
    def __init__(self, number):
        self.n = 0

    def read(self):
        self.n += 1
        while self.n > {n_frames}:
            time.sleep(1)
        time.sleep({every_s})
        return True, np.zeros((8, 10, 3), np.uint8)

    def release(self):
        pass

sys.modules["cv2"] = types.SimpleNamespace(VideoCapture=Capture)
from louver import cli
sys.argv = ["louver", "run", *sys.argv[1:]]
cli.main()
"""
"""`louver run` with a camera that gives some pictures, and then lets wait for ever."""


@contextmanager
def camera(*words: object, n_frames: int, every_s: float = 0.0, before: str = "") -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", before + CAMERA.format(n_frames=n_frames, every_s=every_s), *map(str, words), "camera"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    limit = threading.Timer(60, process.kill)
    limit.start()
    with process:
        try:
            yield process
        finally:
            process.kill()
            limit.cancel()


def test_a_camera_that_waits_for_its_trigger_withholds_no_answer(cloud: Cloud) -> None:
    with camera(cloud.bundle.folder, "--server", cloud.address, "--json", n_frames=3) as process:
        names = [json.loads(process.stdout.readline())["image"] for _ in range(3)]
        assert names == ["camera[0]", "camera[1]", "camera[2]"]
        process.send_signal(signal.SIGINT)
        rest, error = process.communicate(timeout=30)
    assert (process.returncode, rest, error.strip()) == (130, "", "interrupted")


QUICK_BREAKER = """
import functools, louver.edge
louver.edge.Settings = functools.partial(louver.edge.Settings, backoff_s=0.01, breaker_pause_s=0.1)
"""


def test_what_waits_is_sent_while_the_camera_goes_on(tmp_path: Path, bundle: Bundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    words = (bundle.folder, "--server", f"http://127.0.0.1:{port}", "--policy", "queue", "--queue", tmp_path / "q")
    found: list[dict] = []

    def ids(source: str, *, has_image: bool) -> list[str]:
        return [one["request"] for one in found if one["source"] == source and ("image" in one) == has_image]

    with camera(*words, "--json", n_frames=10**9, every_s=0.02, before=QUICK_BREAKER) as process:

        def read_until(is_enough: Callable[[], bool]) -> None:
            while not is_enough():
                found.append(json.loads(process.stdout.readline()))

        read_until(lambda: len(ids("queue", has_image=True)) == 5)
        with Cloud(bundle, port=port) as cloud:
            read_until(lambda: len(ids("cloud", has_image=False)) == len(ids("queue", has_image=True)))
            read_until(lambda: found[-1]["source"] == "cloud" and "image" in found[-1])
            cloud.always = status(503)
            n_queued = len(ids("queue", has_image=True))
            read_until(lambda: len(ids("queue", has_image=True)) > n_queued + 2)
            process.send_signal(signal.SIGINT)
            rest = process.stdout.read()
            _, error = process.communicate(timeout=30)
            found += map(json.loads, rest.splitlines())
            assert process.returncode == 130
            assert "Traceback" not in error
            cloud.always = answer
            done = subprocess.run(
                [*COMMAND, *map(str, words), "--json"], capture_output=True, text=True, check=True, timeout=60
            )
            last = [json.loads(line) for line in done.stdout.splitlines()]
            assert error.splitlines()[-1] == f"interrupted; {len(last)} requests wait in {tmp_path / 'q'}"
            found += last
    queued, late = ids("queue", has_image=True), ids("cloud", has_image=False)
    assert [one for one in late if one in queued] == queued
    assert len(set(late)) == len(late) <= len(queued) + 5  # those under way when it was interrupted
    assert not set(late) & set(ids("cloud", has_image=True))
    answered = [int(one["image"].removeprefix("camera[")[:-1]) for one in found if "image" in one]
    assert answered == list(range(len(answered)))


def test_lines_of_two_threads_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from louver.cli_edge import _print

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            time.sleep(0.002)
            return super().write(text)

    out = Slow()
    monkeypatch.setattr(sys, "stdout", out)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(_print, ["line"] * 40))
    assert out.getvalue() == "line\n" * 40


def test_the_command_is_light(tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path / "bundle")
    np.save(tmp_path / "one.npy", np.zeros((1, *IMAGE), np.uint8))
    code = (
        "import sys\nfrom louver import cli\nsys.argv = ['louver', 'run', *sys.argv[1:]]\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print(sorted({'torch', 'PIL', 'cv2', 'cryptography', 'onnx', 'jaxtyping'} & set(sys.modules)))"
    )
    with Cloud(bundle) as cloud:
        command = [sys.executable, "-c", code, str(bundle.folder), "--server", cloud.address, str(tmp_path / "one.npy")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


# Sources


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK"])
@pytest.mark.parametrize("shape", [(3, 8, 10), (1, 11, 5), (3, 40, 30)])
@pytest.mark.parametrize("size", [(23, 14), (9, 31), (430, 270)])
def test_a_picture_is_brought_to_shape_as_the_lab_does_it(
    tmp_path: Path, mode: str, shape: tuple[int, int, int], size: tuple[int, int]
) -> None:
    levels = np.random.default_rng(3).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    for suffix in (".png", ".jpg") if mode in ("RGB", "L", "CMYK") else (".png",):
        if mode == "CMYK" and suffix == ".png":
            continue
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        Image.fromarray(levels).convert(mode).save(folder / f"one{suffix}")
        ((name, found),) = images_from([str(folder)], shape)
        expected = louver.load_images(str(folder), size=shape[1:], channels=shape[0]).floats()[0]
        assert name == str(folder / f"one{suffix}")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


def test_the_lab_reads_the_same_kinds_of_files() -> None:
    from louver.data.pictures import SUFFIXES as THEIRS

    assert SUFFIXES == THEIRS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.npy", np.zeros((2, 3, 10, 8), np.uint8), r"expected uint8 or float32 of shape \[n, 3, 8, 10\]"),
        ("x.npy", np.zeros((2, *IMAGE)), "got float64"),
        ("x.npy", b"\x93NUMPY", "cannot be read"),
        ("x.npz", b"PK", "cannot be read"),
        ("x.npz", {"a": np.zeros(1), "b": np.zeros(1)}, "one called images, got a, b"),
        ("x.png", b"\x89PNG\r\n\x1a\n", "cannot be decoded"),
        ("x.png", Image.new("I;16", (9, 9)), "expected 8 bits a channel"),
        ("x", None, "expected pictures .*, got none"),
    ],
)
def test_a_source_that_does_not_fit_is_refused_by_name(tmp_path: Path, name: str, content: object, words: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    elif content is None:
        path.mkdir()
    else:
        content.save(path)
    with pytest.raises(DataError, match=words) as caught:
        list(images_from([str(path)], IMAGE))
    assert str(path) in str(caught.value)


def test_an_array_that_runs_code_when_read_is_refused(tmp_path: Path) -> None:
    objects = np.array([print], dtype=object)
    np.save(tmp_path / "x.npy", objects, allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        list(images_from([str(tmp_path / "x.npy")], IMAGE))


class FakeCapture:
    """OpenCV's camera, as far as it is used: blue first, a frame a call, then none."""

    opened: list[FakeCapture] = []  # noqa: RUF012

    def __init__(self, number: int) -> None:
        self.number, self.left, self.is_released = number, 3 if number < 5 else 0, False
        self.opened.append(self)

    def read(self) -> tuple[bool, np.ndarray | None]:
        self.left -= 1
        if self.left < 0:
            return False, None
        frame = np.zeros((8, 10, 3), np.uint8)
        frame[:, :, 0] = 255  # blue
        return True, frame

    def release(self) -> None:
        self.is_released = True


def test_a_camera_gives_red_first_and_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", types.SimpleNamespace(VideoCapture=FakeCapture))
    found = list(images_from(["camera:2"], IMAGE))
    assert [name for name, _ in found] == ["camera:2[0]", "camera:2[1]", "camera:2[2]"]
    assert FakeCapture.opened[-1].number == 2
    for _, image in found:
        assert image.shape == IMAGE
        assert [plane.mean() for plane in image] == [0, 0, 1]
    assert FakeCapture.opened[-1].is_released
    with pytest.raises(DataError, match="expected a camera that gives pictures"):
        list(images_from(["camera:7"], IMAGE))
    assert FakeCapture.opened[-1].is_released
    frames = images_from(["camera"], IMAGE)
    next(frames)
    frames.close()
    assert FakeCapture.opened[-1].is_released
    assert FakeCapture.opened[-1].number == 0


def test_what_is_not_installed_is_named_with_its_command(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingExtraError, match=r"camera needs OpenCV: pip install 'louver\[camera\]'"):
        list(images_from(["camera"], IMAGE))
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingExtraError, match=r"needs Pillow: pip install 'louver\[edge\]'"):
        list(images_from([str(photos)], IMAGE))


def test_a_bundle_for_other_than_pictures_takes_arrays_alone(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(DataError, match=r"expected a bundle that takes pictures of 1 or 3 channels"):
        list(images_from([str(photos)], (4, 8, 10)))
    np.save(tmp_path / "x.npy", np.zeros((2, 4, 8, 10), np.float32))
    assert len(list(images_from([str(tmp_path / "x.npy")], (4, 8, 10)))) == 2
