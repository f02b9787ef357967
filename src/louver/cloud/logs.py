"""Log lines as JSON, one object a line, made of named facts only."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

__all__ = ["JsonLines", "RequestLines", "told_if_ended"]

_log = logging.getLogger("louver.cloud")
_ENCODER = json.JSONEncoder(default=str)
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonLines(logging.Formatter):
    """A record as {"time", "level", "event", ...}; what stands in `extra` becomes keys."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        found: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        found |= {key: value for key, value in vars(record).items() if key not in _OWN and not key.startswith("_")}
        if record.exc_info and record.exc_info[0] is not None:
            # The place and the kind; the message of an exception may hold what a client sent.
            found["error"] = record.exc_info[0].__name__
            trace = record.exc_info[2]
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            if trace is not None:
                found["at"] = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        return _ENCODER.encode(found)


class RequestLines:
    """One line for each request, of the same form. Apart from `logging`, which takes longer than an answer does.

    write: where lines go, each with its end; standard error by default.
    """

    def __init__(self, write: Callable[[str], object] | None = None) -> None:
        self.write = write or sys.stderr.write
        self._second = -1
        self._start = ""

    def add(
        self,
        *,
        protocol: str,
        client: str | None,
        model: str | None,
        version: str | None,
        rows: int,
        status: int,
        ms: float,
    ) -> None:
        """Writes the line. All names are ours: of clients, models and versions, which need no escape."""
        now = time.time()
        second = int(now)
        if second != self._second:
            self._second, self._start = second, datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        client, model, version = (f'"{one}"' if one is not None else "null" for one in (client, model, version))
        self.write(
            f'{{"time": "{self._start}.{int(1000 * (now - second)):03d}+00:00", "level": "info", "event": "infer", '
            f'"protocol": "{protocol}", "client": {client}, "model": {model}, "version": {version}, '
            f'"rows": {rows}, "status": {status}, "ms": {ms:.3f}}}\n'
        )


def told_if_ended(work: Coroutine[Any, Any, None], *, what: str) -> asyncio.Task[None]:
    """A task of `work` which, should it end by an error that nobody thought of, says so in the log at once.

    asyncio says it when the task is let go of, which may be never: nobody waits for what runs beside the requests.
    """
    task = asyncio.get_running_loop().create_task(work)

    def tell(ended: asyncio.Task[None]) -> None:
        error = None if ended.cancelled() else ended.exception()
        if error is not None:
            _log.error("ended by an error", exc_info=error, extra={"what": what})

    task.add_done_callback(tell)
    return task
