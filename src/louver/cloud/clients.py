"""Who asks, and how fast: tokens looked up by their hash, and a bucket of requests for each client."""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

from louver.cloud.refusals import Refusal
from louver.cloud.tokens import Client, read_clients
from louver.errors import ConfigError

__all__ = ["ANYONE", "Clients", "file_mark"]

ANYONE = Client(name="anyone", sha256="0" * 64)
"""Who asks when nobody is asked for a token."""

_NOBODY = (ANYONE, ANYONE.sha256, math.inf)
_LOOK_EVERY_S = 1.0
_log = logging.getLogger("louver.cloud")


class Clients:
    """The clients of a file, read again within a second of a change.

    A file that has become unreadable leaves the clients that were known, and says so in the log; a file that is gone
    leaves nobody: whoever takes it away means to shut the door. Without a file, they are those of the last `replace`.
    wall_clock: by which a token that was replaced ends, with or without a look at the file.

    Raises:
        ConfigError: the file is not as it must be now.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._clock = clock
        self._wall_clock = wall_clock
        self._mark = file_mark(path) if path is not None else None
        self._all: list[Client] = []
        self._known: dict[bytes, tuple[Client, str, float]] = {}
        self._buckets: dict[str, tuple[float, float]] = {}
        if path is not None:
            self.replace(read_clients(path))
        self._looked = clock()

    @property
    def all(self) -> list[Client]:
        """Everyone known now."""
        self._refresh()
        return list(self._all)

    def identify(self, authorization: bytes | None) -> Client:
        """The client whose token this header holds.

        Raises:
            Refusal: 401.
        """
        self._refresh()
        if authorization is None:
            raise Refusal(401, "expected the header Authorization: Bearer TOKEN, got none")
        scheme, _, token = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            raise Refusal(401, "expected the header Authorization: Bearer TOKEN, got another scheme")
        digest = hashlib.sha256(token.strip()).digest()
        # The look-up by hash takes a time that depends on the hash alone, which nobody can steer towards one in the
        # file; the comparison of what was found takes the same time whatever it finds.
        client, sha256, until = self._known.get(digest, _NOBODY)
        if not hmac.compare_digest(sha256, digest.hex()) or until <= self._wall_clock():
            raise Refusal(401, "unknown token: it is wrong, or has been revoked")
        return client

    def admit(self, client: Client) -> None:
        """Counts one request.

        Raises:
            Refusal: 429, when the client asks faster than it may.
        """
        if client.requests_per_s is None:
            return
        rate, now = client.requests_per_s, self._clock()
        most = client.burst if client.burst is not None else max(1.0, rate)
        left, since = self._buckets.get(client.name, (most, now))
        left = min(most, left + (now - since) * rate)
        if left < 1:
            self._buckets[client.name] = (left, now)
            raise Refusal(429, f"client {client.name} may ask {rate:g} times a second", retry_after_s=(1 - left) / rate)
        self._buckets[client.name] = (left - 1, now)

    def replace(self, clients: tuple[Client, ...]) -> None:
        """Knows these from now on, and nobody else."""
        self._all = list(clients)
        self._known = {bytes.fromhex(sha256): (one, sha256, until) for one in clients for sha256, until in one.hashes}
        names = {one.name for one in clients}
        self._buckets = {name: bucket for name, bucket in self._buckets.items() if name in names}

    def _refresh(self) -> None:
        now = self._clock()
        if self._path is None or now - self._looked < _LOOK_EVERY_S:
            return
        self._looked = now
        mark = file_mark(self._path)
        if mark == self._mark:
            return
        self._mark = mark
        if mark is None:
            self.replace(())
            _log.error("tokens gone: nobody is known anymore", extra={"file": str(self._path)})
            return
        try:
            self.replace(read_clients(self._path))
        except ConfigError as error:
            _log.error("tokens not read: those known before go on", extra={"reason": str(error)})
        else:
            _log.info("tokens read", extra={"clients": len(self._all)})


def file_mark(path: Path) -> tuple[int, int, int] | None:
    """What changes when the file does; None for no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
