"""The file of clients: who may ask, by the hash of a token, and how much.

    {"clients": [{"name": "camera-1", "sha256": "…", "images_per_day": 10000}]}

A token is 256 random bits, so its plain hash says nothing of it: nobody can try them all. After a rotation the hash of
the token before is there too, as `old_sha256`, and the time in UTC at which that ends, as `old_until`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from louver.errors import ConfigError
from louver.storage import refusals, write_json

__all__ = ["Client", "add_client", "locked", "read_clients", "remove_client", "rotate_client", "token_hash"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")
_MOST_BYTES = 2**24
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_MOST_OVERLAP_S = 365 * 86400


@dataclass(frozen=True, kw_only=True)
class Client:
    """One who may ask. None stands for no limit.

    requests_per_s: on average; burst: at once (by default what a second allows). images_per_day: from midnight to
    midnight UTC; images_total: ever. An attacker who rebuilds images needs many queries: the budget is how many a
    stolen token is good for. old_sha256: of the token before, which is refused from old_until on.
    """

    name: str
    sha256: str
    requests_per_s: float | None = None
    burst: int | None = None
    images_per_day: int | None = None
    images_total: int | None = None
    old_sha256: str | None = None
    old_until: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"client: expected a name of letters, digits, '.', '_', '@' and '-', at most 64, got {self.name!r}"
            )
        if (self.old_sha256 is None) != (self.old_until is None):
            raise ConfigError(f"client {self.name}: expected both old_sha256 and old_until, or neither")
        try:
            hashes = [sha256 for sha256, _ in self.hashes]
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"client {self.name}: expected old_until to be a time in UTC such as 2026-01-31T23:59:59Z"
            ) from error
        if not all(isinstance(one, str) and _HASH.fullmatch(one) for one in hashes):
            raise ConfigError(f"client {self.name}: expected the SHA-256 of a token as 64 hexadecimal digits")
        for key in ("requests_per_s", "burst", "images_per_day", "images_total"):
            value = getattr(self, key)
            kinds = (int, float) if key == "requests_per_s" else (int,)
            if value is None:
                continue
            if type(value) not in kinds or not 0 < value < 2**53:
                raise ConfigError(f"client {self.name}: expected {key} to be a number above 0, got {value!r}")
        if self.burst is not None and self.requests_per_s is None:
            raise ConfigError(f"client {self.name}: burst says how far requests_per_s may be passed; set that too")

    @property
    def has_budget(self) -> bool:
        """Whether images are counted for this client."""
        return self.images_per_day is not None or self.images_total is not None

    @property
    def hashes(self) -> list[tuple[str, float]]:
        """The SHA-256 of each of its tokens, and from when on it is refused, in seconds since 1970."""
        known = [(self.sha256, math.inf)]
        if self.old_sha256 is not None and self.old_until is not None:
            until = datetime.strptime(self.old_until, _TIME).replace(tzinfo=UTC)
            known.append((self.old_sha256, until.timestamp()))
        return known


def token_hash(token: str) -> str:
    """What the file holds of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def read_clients(path: Path) -> tuple[Client, ...]:
    """The clients in a file.

    Raises:
        ConfigError: no such file, or not as it must be. The message never holds a hash.
    """
    try:
        _refuse_folder(path)
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"{path}: expected at most {_MOST_BYTES} bytes")
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; make it with `louver token add NAME --file {path}`") from error
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({type(error).__name__}); make it again with `louver token`") from error
    if not isinstance(content, dict) or not isinstance(content.get("clients"), list) or len(content) != 1:
        raise ConfigError(f'{path}: expected {{"clients": [...]}} and nothing else')
    known = [field.name for field in fields(Client)]
    clients = []
    for i, one in enumerate(content["clients"]):
        if not isinstance(one, dict) or not {"name", "sha256"} <= one.keys():
            raise ConfigError(f"{path}: client {i}: expected an object with a name and a sha256")
        if unknown := sorted(one.keys() - set(known)):
            raise ConfigError(f"{path}: client {i}: unknown key {unknown[0]!r}; known: {', '.join(known)}")
        try:
            clients.append(Client(**one))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    names = [one.name for one in clients]
    hashes = [sha256 for one in clients for sha256, _ in one.hashes]
    for key, values in (("name", names), ("sha256", hashes)):
        if len(set(values)) != len(values):
            raise ConfigError(f"{path}: two clients have the same {key}")
    return tuple(clients)


def add_client(
    path: Path,
    name: str,
    *,
    requests_per_s: float | None = None,
    burst: int | None = None,
    images_per_day: int | None = None,
    images_total: int | None = None,
) -> str:
    """A new token for a new client, whose hash is in the file when this returns. The token itself is kept nowhere.

    Raises:
        ConfigError: there is a client of that name, or a limit that cannot be.
        StorageError: the file cannot be written.
    """
    token = secrets.token_urlsafe(32)
    client = Client(
        name=name,
        sha256=token_hash(token),
        requests_per_s=requests_per_s,
        burst=burst,
        images_per_day=images_per_day,
        images_total=images_total,
    )
    with locked(path):
        clients = read_clients(path) if path.exists() else ()
        if any(one.name == name for one in clients):
            raise ConfigError(
                f"{path}: there is a client {name} already; `louver token rotate` makes it a new token, "
                "or choose another name"
            )
        _write(path, (*clients, client))
    return token


def rotate_client(path: Path, name: str, *, overlap_s: float) -> str:
    """A new token for a client that keeps its limits; what it has used is counted on, since that goes by the name.

    The token before is valid for `overlap_s` more, so that devices have time to change; one that is older ends now.

    Raises:
        ConfigError: there is no client of that name, or an overlap that cannot be.
        StorageError: the file cannot be written.
    """
    if not 0 <= overlap_s <= _MOST_OVERLAP_S:
        raise ConfigError(f"expected an overlap of 0 to {_MOST_OVERLAP_S // 86400} days, got {overlap_s:,} s")
    token = secrets.token_urlsafe(32)
    with locked(path):
        clients = read_clients(path)
        known = _named(path, clients, name)
        new = replace(known, sha256=token_hash(token), old_sha256=None, old_until=None)
        if overlap_s > 0:
            until = datetime.fromtimestamp(math.ceil(time.time() + overlap_s), UTC)
            new = replace(new, old_sha256=known.sha256, old_until=until.strftime(_TIME))
        _write(path, [new if one is known else one for one in clients])
    return token


def remove_client(path: Path, name: str) -> None:
    """Takes a client out of the file: a server that reads it refuses its tokens within seconds.

    Raises:
        ConfigError: there is no client of that name.
        StorageError: the file cannot be written.
    """
    with locked(path):
        clients = read_clients(path)
        known = _named(path, clients, name)
        _write(path, [one for one in clients if one is not known])


def _named(path: Path, clients: Sequence[Client], name: str) -> Client:
    for one in clients:
        if one.name == name:
            return one
    raise ConfigError(f"{path}: no client {name}; known: {', '.join(one.name for one in clients) or 'none'}")


def _write(path: Path, clients: Sequence[Client]) -> None:
    known = [{key: value for key, value in asdict(one).items() if value is not None} for one in clients]
    write_json(path, {"clients": known})


def _refuse_folder(path: Path) -> None:
    if not path.name or path.is_dir():
        raise ConfigError(f"expected the name of a file, got the folder {path}")


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds the lock of a file against other processes. The lock is a file beside it, since that one is replaced.

    Raises:
        BlockingIOError: without `wait`, another process holds it.
        ConfigError: `path` is a folder.
        StorageError: the folder cannot be written.
    """
    with refusals(path):
        _refuse_folder(path)
        beside = path.with_name(f".{path.name}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = beside.open("w")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
