"""A replica without Ray: what it does when it hears its keeper no more, or cannot do what it hears."""

from __future__ import annotations

import asyncio
import errno
import importlib
import json
import logging
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from bundles import toy_bundle
from louver.bundle import MANIFEST
from louver.cloud import Batching, Limits, Settings
from louver.cloud.keeper import Keeper
from louver.cloud.tokens import add_client, remove_client, rotate_client
from servers import Answer, ask, asking, features, infer_path

pytestmark = pytest.mark.timeout(60)


class Actor:
    """What Ray makes of a keeper: each method has a `remote` that gives its answer, or what goes wrong on the way."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self.wrong: Exception | None = None

    def __getattr__(self, name: str) -> SimpleNamespace:
        async def call(*arguments):
            if self.wrong is not None:
                raise self.wrong
            return await getattr(self._keeper, name)(*arguments)

        return SimpleNamespace(remote=call)


@pytest.fixture
def module(monkeypatch):
    """`louver.cloud.replica` on a Ray that is not there, its times a hundredth."""
    ray, errors = ModuleType("ray"), ModuleType("ray.exceptions")
    errors.RayError = type("RayError", (Exception,), {})
    ray.exceptions, ray.__version__ = errors, "0"
    ray.get = asyncio.run
    ray.get_runtime_context = lambda: SimpleNamespace(get_actor_id=lambda: "a" * 32)
    private = ModuleType("ray.serve._private")
    private.replica = SimpleNamespace(add_port_to_grpc_server=lambda server, address: 0)
    for name, one in {
        "ray": ray,
        "ray.exceptions": errors,
        "ray.serve": ModuleType("ray.serve"),
        "ray.serve._private": private,
    }.items():
        monkeypatch.setitem(sys.modules, name, one)
    before = sys.modules.pop("louver.cloud.replica", None)
    log = logging.getLogger("louver.cloud")
    handlers, level, propagate = log.handlers[:], log.level, log.propagate
    found = importlib.import_module("louver.cloud.replica")
    for name, seconds in (("SYNC_S", 0.02), ("LOST_S", 0.5), ("_READ_AGAIN_S", 0.1)):
        monkeypatch.setattr(found, name, seconds)
    yield found
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)
    del sys.modules["louver.cloud.replica"]
    if before is not None:
        sys.modules["louver.cloud.replica"] = before


class Place:
    """A keeper of one bundle and two clients, and one replica."""

    def __init__(self, module: ModuleType, folder: Path, **batching) -> None:
        self.folder = folder
        self.first = toy_bundle(folder / "b")
        self.file = folder / "tokens.json"
        self.tokens = {name: add_client(self.file, name) for name in ("stays", "gone")}
        self.tokens["paid"] = add_client(self.file, "paid", images_total=9)
        self.keeper = Keeper([folder / "b"], Settings(tokens=self.file), keep_s=60)
        self.actor = Actor(self.keeper)
        self.replica = module.Replica(self.actor, Limits(), Batching(workers=1, threads=1, **batching), 60.0)

    def begin(self) -> None:
        self.app = self.replica.__serve_build_asgi_app__()

    async def ask(
        self, bundle=None, *, client: str = "stays", path: str | None = None, call_id: str | None = None
    ) -> Answer:
        path = path or infer_path(bundle or self.first)
        return await ask(self.app, path, *asking(features(2), call_id=call_id), token=self.tokens[client])

    async def until(self, status: int, *arguments, **options) -> Answer:
        end = time.monotonic() + 10
        while (found := await self.ask(*arguments, **options)).status != status:
            assert time.monotonic() < end, (found.status, found.body)
            await asyncio.sleep(0.02)
        return found

    async def until_said(self, words: str) -> None:
        """Waits for a line of the log with these words, told to the keeper or not yet."""
        end = time.monotonic() + 10
        while not any(words in line for line in (*self.replica._lines, *self.keeper._lines)):
            assert time.monotonic() < end, words
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        for one in (self.replica._following, self.replica._reading):
            if one is not None:
                one.cancel()
        self.replica._repository.close()
        await self.keeper.close()
        self.replica._folder.cleanup()


@pytest.fixture
def place(module, tmp_path):
    return Place(module, tmp_path)


def test_a_replica_that_cannot_write_bundles_goes_on_with_the_old_and_with_new_tokens(place, module, monkeypatch):
    write, fails = module.write_contents, True

    def refused(folder, contents):
        if fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, contents)

    monkeypatch.setattr(module, "write_contents", refused)

    async def work() -> None:
        nonlocal fails
        place.begin()
        second = toy_bundle(place.folder / "b", seed=1)
        assert await place.keeper.reload() == []
        await place.until_said("No space left")
        assert (await place.ask()).status == 200
        remove_client(place.file, "gone")
        place.keeper._clients._looked -= 2
        await place.until(401, client="gone")
        await asyncio.sleep(2 * module.LOST_S)  # it has the keeper, and says so for as long as it wants to
        assert (await place.ask()).status == 200
        fails = False
        await place.until(200, second)
        assert (await place.ask()).status == 200  # as what is about to leave
        await place.close()

    asyncio.run(work())


def test_a_replica_hears_of_a_new_token_and_ends_the_one_before_by_itself(place):
    async def work() -> None:
        place.begin()
        place.tokens["new"] = rotate_client(place.file, "paid", overlap_s=3600)
        assert (await place.ask(client="new")).status == 401
        place.keeper._clients._looked -= 2
        await place.until(200, client="new")
        assert (await place.ask(client="paid")).status == 200
        assert place.keeper._budgets.left(place.keeper._named("paid")) == 5
        place.actor.wrong = OSError("gone")
        place.replica._app.service.clients._wall_clock = lambda: time.time() + 3601
        assert (await place.ask(client="paid")).status == 401
        place.actor.wrong = None
        assert (await place.ask(client="new")).status == 200
        await place.close()

    asyncio.run(work())


def test_the_keeper_hears_which_version_a_request_was_answered_by(place):
    """So that a repetition is free, and the same request to other weights is not."""

    async def work() -> None:
        place.begin()

        async def left() -> int | None:
            answer = await place.ask(client="paid", path="/v2/models/toy/infer", call_id="same")
            assert answer.status == 200
            return place.keeper._budgets.left(place.keeper._named("paid"))

        assert [await left(), await left()] == [7, 7]
        second = toy_bundle(place.folder / "b", seed=1)
        assert await place.keeper.reload() == []
        await place.until(200, second)
        assert [await left(), await left()] == [5, 5]
        await place.close()

    asyncio.run(work())


@pytest.mark.parametrize("wrong", ["ray", OSError("gone"), TimeoutError(), RuntimeError("nobody thought of it")])
def test_a_replica_without_its_keeper_answers_503_whatever_the_cause(place, module, wrong):
    async def work() -> None:
        place.begin()
        await asyncio.sleep(2 * module.LOST_S)
        assert (await place.ask()).status == 200
        place.actor.wrong = module.RayError() if wrong == "ray" else wrong
        assert (await place.ask()).status == 200  # for a moment without it
        told = await place.until(503)
        assert (told.headers["retry-after"], "cannot look up" in told.error) == ("1", True)
        for path in ("/v2", "/v2/models/toy", "/v2/health/ready", "/v2/models/toy/ready"):
            assert (await place.ask(path=path)).status == 503
        assert (await place.ask(path="/v2/health/live")).status == 200
        if isinstance(wrong, RuntimeError):
            await place.until_said("ended by an error")
        else:
            await place.until_said("keeper lost")
            place.actor.wrong = None
            await place.until(200)
            assert (await place.ask(path="/v2/health/ready")).status == 200
        await place.close()

    asyncio.run(work())


def test_a_replica_starts_though_a_model_with_its_own_batch_was_taken_away(module, tmp_path):
    place = Place(module, tmp_path, max_rows_of={"toy": 3, "gone": 5})

    async def work() -> None:
        place.begin()
        told: list[int] = []
        (served,) = place.replica._repository.current
        served.told.append(told.append)
        await asyncio.gather(*(served.batcher.submit(features(1)) for _ in range(7)))
        assert told == [3, 3, 1]
        await place.close()

    asyncio.run(work())


def test_the_line_of_a_request_reaches_the_keeper(place, capfd):
    async def work() -> list[str]:
        place.begin()
        assert (await place.ask()).status == 200
        await place.until_said('"infer"')
        while place.replica._lines:
            await asyncio.sleep(0.02)
        lines = (await place.keeper.look()).lines
        await place.close()
        return [one for one in lines if '"infer"' in one]

    (line,) = asyncio.run(work())
    told = json.loads(line)
    assert (told["replica"], told["client"], told["rows"], told["status"]) == ("a" * 12, "stays", 2, 200)
    assert "infer" not in capfd.readouterr().err  # where nobody would find it


def test_a_bundle_that_was_written_half_is_written_again(place, module, tmp_path):
    _, (one,) = asyncio.run(place.keeper.contents())
    into = tmp_path / "half" / one.version
    into.mkdir(parents=True)
    (into / "cloud.onnx").write_bytes(one.cloud[:100])
    module.write_contents(tmp_path / "half", [one])
    assert (into / "cloud.onnx").read_bytes() == one.cloud
    assert (into / MANIFEST).read_bytes() == one.manifest
    asyncio.run(place.close())
