"""A circuit breaker: a cloud that is down is left alone, and tried again now and then by one request."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from louver.errors import CloudAwayError

__all__ = ["Attempt", "Breaker"]

_log = logging.getLogger("louver.edge")


class Attempt:
    """One try at the cloud: `worked` if the server is alive, `failed` if it is not, neither if it was given up."""

    def __init__(self) -> None:
        self.outcome: bool | None = None

    def worked(self) -> None:
        """The server is alive, whatever it answered."""
        self.outcome = True

    def failed(self) -> None:
        """The server was not reached, broke, or was too slow."""
        self.outcome = False


class Breaker:
    """Opens after `failures` failed attempts in a row; after `pause_s` lets one through, whose outcome decides."""

    def __init__(self, failures: int, pause_s: float) -> None:
        self._most, self._pause_s = failures, pause_s
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._opened_at: float | None = None
        self._is_probing = False

    @property
    def is_open(self) -> bool:
        """Whether requests are held back, but for a probe now and then."""
        return self._opened_at is not None

    @property
    def ready_in_s(self) -> float:
        """Seconds until a request may be sent; 0 if one may be now."""
        with self._lock:
            return self._wait()

    @contextmanager
    def attempt(self) -> Iterator[Attempt]:
        """One try at the cloud.

        Raises:
            CloudAwayError: it is held back.
        """
        with self._lock:
            wait = self._wait()
            if wait > 0:
                raise CloudAwayError(
                    f"nothing is sent to the cloud for another {wait:.1f} s, since {self._in_a_row} tries in a row "
                    "failed; wait, or look at the server"
                )
            self._is_probing = is_probe = self._opened_at is not None
        attempt = Attempt()
        try:
            yield attempt
        finally:
            with self._lock:
                if is_probe:
                    self._is_probing = False
                if attempt.outcome is not None:
                    self._note(attempt.outcome)

    def _wait(self) -> float:
        if self._opened_at is None:
            return 0.0
        left = self._opened_at + self._pause_s - time.monotonic()
        # Who comes while another probes waits for its outcome, which takes no longer than a try.
        return max(left, 0.0) if not self._is_probing else max(left, 0.1)

    def _note(self, has_worked: bool) -> None:
        if has_worked:
            if self._opened_at is not None:
                _log.warning("the cloud answers again")
            self._in_a_row, self._opened_at = 0, None
            return
        self._in_a_row += 1
        if self._in_a_row >= self._most:
            if self._opened_at is None:
                _log.warning("the cloud is away: %d tries in a row failed", self._in_a_row)
            self._opened_at = time.monotonic()
