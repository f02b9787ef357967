"""What an `Edge` may be told: one frozen object, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from louver.errors import ConfigError

if TYPE_CHECKING:
    from louver.signing import Maker

__all__ = ["Compression", "Policy", "Settings"]

Policy = Literal["fail", "queue", "local"]
"""When the cloud is away: raise, keep the feature and send it later, or answer with the bundle's small head."""

Compression = Literal["zstd", "gzip", "none"]

_TIMES = (
    *("connect_timeout_s", "read_timeout_s", "deadline_s", "backoff_s", "most_backoff_s", "most_retry_after_s"),
    *("breaker_pause_s", "slot_timeout_s"),
)
_COUNTS = ("threads", "tries", "breaker_failures", "most_in_flight", "queue_most_entries", "queue_most_bytes")
_LEVELS = {"zstd": range(1, 20), "gzip": range(1, 10), "none": range(1, 20)}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How an edge computes, packs, sends and waits. Times are in seconds.

    Computing. `threads`: processor threads of the edge half.

    Packing. `compression` and its `level`. `is_padded`: the body is filled up to one of `buckets_per_doubling` lengths
    between a power of two and the next (1, 2, 4, 8 or 16), so that its length says little of the picture; 8 costs at
    most 12.5 % and 1 says least. Without compression the length depends on the shapes alone, and nothing is filled up.

    Sending. `connect_timeout_s` is for reaching the server and for each 64 KiB sent, `read_timeout_s` for each piece of
    the answer, `deadline_s` for everything. `tries`: how often a request is sent at most. Between tries it waits
    anything up to `backoff_s`, doubled with each try, up to `most_backoff_s`; where the server says how long to wait,
    that long, up to `most_retry_after_s`. After `breaker_failures` failed tries in a row nothing is sent for
    `breaker_pause_s`, then one request probes. `is_triton`: the server is Triton, where the bundle's id is part of the
    model's name.

    Trust. `ca`: a file of the only authorities to trust, instead of the system's; `cert` and `key`: this device's own
    certificate. `maker_key`: the public key by which the bundle must be signed; or `maker_identity`, for which
    `maker_issuer` vouches: who must have signed it without a key, which is looked up over the network.
    `allow_plain_http`: send over plain HTTP to another machine, where everyone on the way reads along.

    Waiting. At most `most_in_flight` requests at once; one more waits up to `slot_timeout_s`.

    Queue (policy "queue"). `queue_folder` keeps the features, encrypted under the key in `queue_key`, which is made
    beside the folder unless it is named; at most `queue_most_entries` requests of `queue_most_bytes` together.

    Raises:
        ConfigError: a value that cannot be.
    """

    threads: int = 1
    compression: Compression = "zstd"
    level: int = 1
    is_padded: bool = True
    buckets_per_doubling: int = 8
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 10.0
    deadline_s: float = 30.0
    tries: int = 4
    backoff_s: float = 0.2
    most_backoff_s: float = 5.0
    most_retry_after_s: float = 10.0
    breaker_failures: int = 5
    breaker_pause_s: float = 10.0
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    maker_key: Path | None = None
    maker_identity: str | None = None
    maker_issuer: str | None = None
    is_triton: bool = False
    allow_plain_http: bool = False
    most_in_flight: int = 4
    slot_timeout_s: float = 30.0
    queue_folder: Path | None = None
    queue_key: Path | None = None
    queue_most_entries: int = 1000
    queue_most_bytes: int = 2**30

    def __post_init__(self) -> None:
        if self.compression not in get_args(Compression):
            raise ConfigError(
                f"compression: expected {', '.join(get_args(Compression))}, got {self.compression!r}; choose one"
            )
        levels = _LEVELS[self.compression]
        if self.level not in levels:
            raise ConfigError(
                f"level: expected {levels[0]} to {levels[-1]} for {self.compression}, got {self.level!r}; 1 is the "
                "fastest"
            )
        if self.buckets_per_doubling not in (1, 2, 4, 8, 16):
            raise ConfigError(
                f"buckets_per_doubling: expected 1, 2, 4, 8 or 16, got {self.buckets_per_doubling!r}; 1 says least of "
                "the picture, 16 fills up least"
            )
        for name in _TIMES:
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 < value <= 86_400):
                raise ConfigError(f"{name}: expected seconds above 0 and up to a day, got {value!r}; give another")
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}: expected a whole number of 1 or more, got {value!r}; give another")
        if self.is_triton and self.compression == "zstd":
            raise ConfigError("compression: expected gzip or none for Triton, which knows no zstd; give another")
        if self.key is not None and self.cert is None:
            raise ConfigError("key: expected a certificate with it, got none; give `cert` too")
        _ = self.maker

    @property
    def maker(self) -> Maker | None:
        """By whom the bundle must be signed, if by anyone."""
        if self.maker_key is None and self.maker_identity is None and self.maker_issuer is None:
            return None
        from louver.signing import Maker

        return Maker(key=self.maker_key, identity=self.maker_identity, issuer=self.maker_issuer)
