"""The file of clients: who may ask, by the hash of a token, and how much.

    {"clients": [{"name": "camera-1", "sha256": "…", "images_per_day": 10000}]}

A token is 256 random bits, so its plain hash says nothing of it: nobody can try them all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from louver.errors import ConfigError
from louver.storage import refusals, write_json

__all__ = ["Client", "add_client", "locked", "read_clients", "remove_client", "token_hash"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")
_MOST_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class Client:
    """One who may ask. None stands for no limit.

    requests_per_s: on average; burst: at once (by default what a second allows). images_per_day: from midnight to
    midnight UTC; images_total: ever. An attacker who rebuilds images needs many queries: the budget is how many a
    stolen token is good for.
    """

    name: str
    sha256: str
    requests_per_s: float | None = None
    burst: int | None = None
    images_per_day: int | None = None
    images_total: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"client: expected a name of letters, digits, '.', '_', '@' and '-', at most 64, got {self.name!r}"
            )
        if not isinstance(self.sha256, str) or not _HASH.fullmatch(self.sha256):
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


def token_hash(token: str) -> str:
    """What the file holds of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def read_clients(path: Path) -> tuple[Client, ...]:
    """The clients in a file.

    Raises:
        ConfigError: no such file, or not as it must be. The message never holds a hash.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"{path}: expected at most {_MOST_BYTES} bytes")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; make it with `louver token add NAME --file {path}`") from error
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
    for key in ("name", "sha256"):
        values = [getattr(one, key) for one in clients]
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
            raise ConfigError(f"{path}: there is a client {name} already; remove it first, or choose another name")
        _write(path, (*clients, client))
    return token


def remove_client(path: Path, name: str) -> None:
    """Takes a client out of the file: a server that reads it refuses the token within seconds.

    Raises:
        ConfigError: there is no client of that name.
        StorageError: the file cannot be written.
    """
    with locked(path):
        clients = read_clients(path)
        left = [one for one in clients if one.name != name]
        if len(left) == len(clients):
            raise ConfigError(f"{path}: no client {name}; known: {', '.join(one.name for one in clients) or 'none'}")
        _write(path, left)


def _write(path: Path, clients: Sequence[Client]) -> None:
    known = [{key: value for key, value in asdict(one).items() if value is not None} for one in clients]
    write_json(path, {"clients": known})


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds the lock of a file against other processes. The lock is a file beside it, since that one is replaced.

    Raises:
        BlockingIOError: without `wait`, another process holds it.
        StorageError: the folder cannot be written.
    """
    beside = path.with_name(f".{path.name}.lock")
    with refusals(beside):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = beside.open("w")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
