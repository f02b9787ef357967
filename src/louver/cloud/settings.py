"""What an operator may set, each with the default that we would run ourselves."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from louver.errors import ConfigError

__all__ = ["Batching", "Limits", "Settings"]

_MB = 2**20
_MOST_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How requests are put together and computed, for each model.

    max_rows: images in one run of the network. max_delay_s: how long the first of a batch waits for more; 0 takes
    whatever waits when a worker is free, which is quick alone and full under load. queue: requests that may wait.
    workers: runs at a time, over all models. threads: threads of onnxruntime within one run.

    max_rows_of, max_delay_s_of: by its name, what a model has instead of max_rows and max_delay_s, in all its versions.

    Two workers by default, so that one batch is put together and answered while another is computed; between them they
    use each core once.
    """

    max_rows: int = 32
    max_delay_s: float = 0.0
    queue: int = 256
    workers: int = 2
    threads: int = field(default_factory=lambda: max(1, (os.cpu_count() or 1) // 2))
    max_rows_of: Mapping[str, int] = field(default_factory=dict)
    max_delay_s_of: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_rows", "queue", "workers", "threads"):
            _need(name, getattr(self, name), least=1)
        _need("max_delay_s", self.max_delay_s, least=0, most=10)
        for name, rows in self.max_rows_of.items():
            _need(f"max_rows_of {name}", rows, least=1)
        for name, delay_s in self.max_delay_s_of.items():
            _need(f"max_delay_s_of {name}", delay_s, least=0, most=10)

    @property
    def names(self) -> set[str]:
        """The models that have a value of their own."""
        return {*self.max_rows_of, *self.max_delay_s_of}

    def of(self, name: str) -> Batching:
        """What holds for the model of that name."""
        return replace(
            self,
            max_rows=self.max_rows_of.get(name, self.max_rows),
            max_delay_s=self.max_delay_s_of.get(name, self.max_delay_s),
        )


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may cost, and all of them together.

    body_bytes: as received; over gRPC, after decompression as well. decoded_bytes: after decompression.
    header_bytes: the JSON before a binary tensor. json_bytes: a body whose tensor is written as JSON, which costs many
    times its size. rows: images in one request. held_bytes: bodies of all requests at one moment. body_s: to send a
    body. answer_s: to take an answer.
    """

    body_bytes: int = 16 * _MB
    decoded_bytes: int = 64 * _MB
    header_bytes: int = 2**16
    json_bytes: int = 4 * _MB
    rows: int = 256
    held_bytes: int = 512 * _MB
    body_s: float = 30.0
    answer_s: float = 30.0

    def __post_init__(self) -> None:
        most = {"body_bytes": 2**30, "decoded_bytes": 2**34, "header_bytes": 2**24, "json_bytes": 2**30, "rows": 2**20}
        for name, value in most.items():
            _need(name, getattr(self, name), least=1, most=value)
        _need("held_bytes", self.held_bytes, least=1)
        for name in ("body_s", "answer_s"):
            _need(name, getattr(self, name), least=0.01, most=_MOST_S)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How requests are judged.

    tokens: the file of clients; without it nobody is asked who they are. budgets: where the images that each client has
    used are kept; beside `tokens` by default. retry_window_s: how long a request that is sent again counts as the same.
    """

    limits: Limits = field(default_factory=Limits)
    tokens: Path | None = None
    budgets: Path | None = None
    retry_window_s: float = 600.0

    def __post_init__(self) -> None:
        _need("retry_window_s", self.retry_window_s, least=0)
        if self.budgets is not None and self.tokens is None:
            raise ConfigError("budgets are kept by client: name the file of their tokens too, or leave budgets out")

    @property
    def budgets_path(self) -> Path | None:
        """Where budgets are kept, if clients are known at all."""
        if self.budgets is not None or self.tokens is None:
            return self.budgets
        return self.tokens.with_name(self.tokens.name + ".budgets")


def _need(name: str, value: float, *, least: float, most: float = math.inf) -> None:
    if not least <= value <= most:
        upper = f" and at most {most:g}" if most < math.inf else ""
        raise ConfigError(f"{name}: expected at least {least:g}{upper}, got {value!r}")
