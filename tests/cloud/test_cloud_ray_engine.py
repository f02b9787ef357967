"""What serves on Ray, without Ray: which of its errors end the service, and which are told and outlived."""

from __future__ import annotations

import asyncio
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest

from bundles import toy_bundle
from louver.cloud import Batching, Listening, Settings, ray_engine
from louver.cloud.keeper import Content, Seen
from louver.errors import ConfigError

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def errors(monkeypatch):
    """`ray.exceptions` as far as it is asked for; the tree is Ray's."""
    ray, errors = ModuleType("ray"), ModuleType("ray.exceptions")
    errors.RayError = type("RayError", (Exception,), {})
    errors.RayTaskError = type("RayTaskError", (errors.RayError,), {})
    errors.RayActorError = type("RayActorError", (errors.RayError,), {})
    ray.exceptions = errors
    for name, one in {"ray": ray, "ray.exceptions": errors}.items():
        monkeypatch.setitem(sys.modules, name, one)
    monkeypatch.setattr(ray_engine, "_LOOK_S", 0.01)
    return errors


class Keeping:
    """A keeper whose reloads end as they are told to: with a list of failures, or with an error."""

    def __init__(self, *ends: object) -> None:
        self._ends = list(ends)
        self.looks = 0

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(type(self), f"on_{name}").__get__(self))

    async def on_look(self) -> Seen:
        self.looks += 1
        return Seen(replicas=1, in_flight=0, lines=())

    async def on_reload(self) -> list[str]:
        end = self._ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end

    async def on_contents(self) -> tuple[int, list[Content]]:
        return 1, [Content(version="new", manifest=b"", cloud=b"")]


async def asked_again(keeper: Keeping, times: int) -> asyncio.Task[None]:
    """The task that looks after the keeper, once it was asked as often to read bundles again."""
    again = asyncio.Event()
    looking = asyncio.create_task(ray_engine._look(keeper, again))
    for _ in range(times):
        again.set()
        seen = keeper.looks
        while keeper.looks < seen + 3 and not looking.done():
            await asyncio.sleep(0.01)
    return looking


def test_a_reload_that_breaks_in_the_keeper_is_told_and_outlived(errors, caplog):
    caplog.set_level(logging.INFO, logger="louver.cloud")
    broken = errors.RayTaskError("ray::Keeper.reload()\n  File somewhere\nValueError: nobody thought of it")

    async def work() -> None:
        looking = await asked_again(Keeping(broken, ["one is damaged"]), 2)
        assert not looking.done()
        looking.cancel()

    asyncio.run(work())
    told = {one.getMessage(): vars(one) for one in caplog.records}
    first = told["bundles not read: what was served goes on"]
    assert (first["levelno"], first["reason"]) == (logging.ERROR, "ValueError: nobody thought of it")
    assert told["bundle not loaded: what was served goes on"]["reason"] == "one is damaged"
    assert told["bundles read"]["versions"] == ["new"]


def test_a_keeper_that_is_lost_ends_the_service(errors):
    async def work() -> None:
        looking = await asked_again(Keeping(errors.RayActorError("the actor died")), 1)
        with pytest.raises(errors.RayActorError):
            looking.result()

    asyncio.run(work())


def test_a_name_that_is_not_served_is_said_before_ray_starts(tmp_path, monkeypatch):
    toy_bundle(tmp_path / "b")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    batching = Batching(max_delay_s_of={"tow": 0.5})
    with pytest.raises(ConfigError, match="no such model is served; served: toy"):
        ray_engine.serve_on_ray(
            [tmp_path], Settings(), batching, Listening(), ray_engine.Scaling(), keep_s=60, started=lambda _: None
        )
