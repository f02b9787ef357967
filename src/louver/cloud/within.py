"""A bound on how long something takes, cheap enough for each request."""

from __future__ import annotations

import asyncio
from types import TracebackType

__all__ = ["Within"]


class Within:
    """`asyncio.timeout` for one task, of which two on each request would be a tenth of what the server adds to it.

    Raises:
        TimeoutError: what is within took longer than `seconds`.
    """

    __slots__ = ("_cancelling", "_has_ended", "_seconds", "_task", "_timer")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._has_ended = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._end)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if not self._has_ended or self._task.uncancel() > self._cancelling:
            return  # cancelled by somebody else, which goes on
        if isinstance(error, asyncio.CancelledError):
            raise TimeoutError from error

    def _end(self) -> None:
        self._has_ended = True
        self._task.cancel()
