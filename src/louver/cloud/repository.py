"""The models that are served, by name and version, read from folders and read again while requests are answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from louver.bundle import MANIFEST
from louver.cloud.batching import Batcher, Workers
from louver.cloud.models import Model, load_model
from louver.cloud.refusals import Refusal, shown
from louver.cloud.settings import Batching
from louver.errors import BundleError, ConfigError, LouverError
from louver.signing import Maker

__all__ = ["Repository", "Served", "bundles_in", "read_each"]

_Read = TypeVar("_Read")


@dataclass(frozen=True, kw_only=True, eq=False)
class Served:
    """A model with its queue."""

    model: Model
    batcher: Batcher
    told: list[Callable[[int], None]] = field(default_factory=list)
    """Called with the rows of each batch, in the event loop."""


@dataclass(frozen=True, kw_only=True)
class _State:
    """What is served at one moment; replaced as a whole, so that no request sees half a change."""

    folders: Mapping[Path, Served]
    leaving: Mapping[str, tuple[Served, float]] = field(default_factory=dict)
    """By version: replaced, and served until this moment of the monotonic clock."""

    def versions(self, name: str) -> dict[str, Served]:
        return {one.model.version: one for one in self.folders.values() if one.model.name == name}


class Repository:
    """The bundles in `paths`, each a bundle or a folder of bundles.

    keep_s: how long a version that was replaced is still answered, so that devices with its edge half have time to
    follow. What is in flight is finished in any case. maker: by whom every bundle must be signed. may_lack_names:
    `batching` may name models that are not served (any more), as they may after a reload in any case.

    Raises:
        BundleError: a path holds no bundle, or a bundle is not as it was exported.
        ConfigError: no path, a time that cannot be, a maker's key that cannot be read, or `batching` names a model that
            is not served.
    """

    def __init__(
        self,
        paths: Sequence[Path | str],
        *,
        batching: Batching | None = None,
        keep_s: float = 600.0,
        maker: Maker | None = None,
        may_lack_names: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not paths:
            raise ConfigError("expected at least one bundle to serve, got none; make one with `louver export`")
        if not 0 <= keep_s < float("inf"):
            raise ConfigError(f"keep_s: expected seconds of at least 0, got {keep_s!r}")
        self.batching = batching or Batching()
        self._paths = [Path(path) for path in paths]
        self._keep_s = keep_s
        self._maker = maker
        self._clock = clock
        self._workers = Workers(self.batching.workers)
        self._changing = threading.Lock()
        try:
            self._state = _State(folders=self._read({}, failures=None))
            served = {one.model.name for one in self.current}
            if not may_lack_names and (unknown := sorted(self.batching.names - served)):
                names = ", ".join(sorted(served))
                raise ConfigError(f"batching of {shown(unknown[0])}: no such model is served; served: {names}")
        except LouverError:
            self._workers.close()
            raise

    def close(self) -> None:
        """Ends the threads, once what runs is done."""
        self._workers.close()

    @property
    def current(self) -> list[Served]:
        """What is served and not about to leave, by name and version."""
        unique = {one.model.version: one for one in self._state.folders.values()}
        return sorted(unique.values(), key=lambda one: (one.model.name, one.model.version))

    @property
    def leaving(self) -> list[Served]:
        """Replaced versions that are still answered."""
        return [one for one, until in self._state.leaving.values() if self._clock() < until]

    def find(self, name: str, version: str | None) -> Served:
        """The model of that name and version; without a version, the only one.

        Raises:
            Refusal: 404 for what is not served, 400 for a name that stands for several.
        """
        state = self._state
        versions = state.versions(name)
        if version:
            if version in versions:
                return versions[version]
            if version in state.leaving:
                one, until = state.leaving[version]
                if one.model.name == name and self._clock() < until:
                    return one
        elif len(versions) == 1:
            return next(iter(versions.values()))
        known = ", ".join(sorted(versions))
        if not versions:
            names = ", ".join(sorted({one.model.name for one in state.folders.values()}))
            raise Refusal(404, f"no model {shown(name)} is served here; served: {names}")
        if not version:
            raise Refusal(400, f"model {name} is served in several versions, name one of {known}")
        raise Refusal(
            404, f"model {name} has no version {shown(version)} here; served: {known}; update the half on the device"
        )

    def reload(self) -> list[str]:
        """Reads the paths again, and says what could not be loaded; where a bundle fails, what was there stays.

        Takes as long as loading takes, and may be called from a thread, one call at a time.
        """
        before = self._state
        failures: list[str] = []
        folders = self._read(before.folders, failures=failures)
        now = self._clock()
        stays = {one.model.version for one in folders.values()}
        leaving = {
            version: (one, until)
            for version, (one, until) in before.leaving.items()
            if version not in stays and now < until
        }
        for one in before.folders.values():
            if one.model.version not in stays:
                leaving[one.model.version] = (one, now + self._keep_s)
        with self._changing:
            self._state = _State(folders=folders, leaving=leaving)
        return failures

    def sweep(self) -> None:
        """Lets go of versions whose time is over, and of their memory once nothing is in flight."""
        now = self._clock()
        with self._changing:  # what a thread has just read again must not be lost
            state = self._state
            if any(until <= now for _, until in state.leaving.values()):
                leaving = {version: pair for version, pair in state.leaving.items() if now < pair[1]}
                self._state = _State(folders=state.folders, leaving=leaving)

    def _read(self, before: Mapping[Path, Served], *, failures: list[str] | None) -> dict[Path, Served]:
        known = {one.model.version: one for one in before.values()}

        def read(folder: Path) -> Served:
            model = load_model(folder, threads=self.batching.threads, maker=self._maker)
            # The very same content is served once, and goes on with the session and the queue that it has.
            return known.setdefault(model.version, self._served(model))

        return read_each(self._paths, read, before, failures=failures)

    def _served(self, model: Model) -> Served:
        told: list[Callable[[int], None]] = []

        def tell(rows: int) -> None:
            for one in told:
                one(rows)

        batching = self.batching.of(model.name)
        return Served(model=model, batcher=Batcher(model.run, self._workers, batching, told=tell), told=told)


def read_each(
    paths: Sequence[Path], read: Callable[[Path], _Read], before: Mapping[Path, _Read], *, failures: list[str] | None
) -> dict[Path, _Read]:
    """What `read` makes of each bundle in `paths`, by folder.

    With a list for failures, each goes there and `before` fills its place, so that one bundle holds up no other.

    Raises:
        LouverError: without that list, the first failure.
    """
    found: dict[Path, _Read] = {}
    for path in paths:
        try:
            folders = bundles_in(path)
        except LouverError as error:
            if failures is None:
                raise
            failures.append(str(error))
            found |= {folder: one for folder, one in before.items() if folder == path or folder.parent == path}
            continue
        for folder in folders:
            try:
                found[folder] = read(folder)
            except LouverError as error:  # the maker's key may be gone as well
                if failures is None:
                    raise
                failures.append(str(error))
                if folder in before:
                    found[folder] = before[folder]
    return found


def bundles_in(path: Path) -> list[Path]:
    """The folders of bundles that `path` is or holds.

    Raises:
        BundleError: it neither is a bundle nor holds any.
    """
    try:
        if (path / MANIFEST).is_file():
            return [path]
        folders = sorted(folder for folder in path.iterdir() if (folder / MANIFEST).is_file())
    except OSError as error:
        raise BundleError(f"expected a bundle or a folder of bundles in {path}, got {error.strerror}") from error
    if not folders:
        raise BundleError(
            f"expected a bundle or a folder of bundles in {path}, got neither; make one with `louver export`"
        )
    return folders
