"""Log lines as JSON, one object a line, made of named facts only."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

__all__ = ["JsonLines"]

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
