"""Requests that wait on disk for the cloud: bounded, encrypted, in order, whole after a crash at any moment.

    FOLDER/
    ├── queue.json          what the queue is of (format, bundle), a check of the key, and where unused places begin
    ├── lock                held by the one process that uses the queue
    ├── 000000000007.entry  one request: nonce, then AES-256-GCM of its head and body
    └── *.damaged           entries that did not open; kept for whoever wants to know why

An entry is written under another name, synced, renamed, and its folder synced before it counts as kept; what a crash
leaves half-written is swept away on opening. Its place and bundle are authenticated with it, so that entries cannot
change places; and no place is used twice, so that a copy of a delivered one cannot pass for another. It is deleted when
its answer has been delivered, and not before. No image is ever here.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
from functools import partial
from itertools import count
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from louver.bundle import Bundle
from louver.edge.settings import Settings
from louver.edge.wire import Request
from louver.errors import BusyError, ConfigError, DamagedError, MissingExtraError, StorageError
from louver.storage import refusals

if TYPE_CHECKING:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

__all__ = ["Outbox"]

_FORMAT = 1
_NONCE, _TAG, _KEY_BYTES = 12, 16, 32
_MOST_HEAD = 2**12
_DIGITS = 12
_BLOCK = 1000
"""So many places are reserved in queue.json at once, so that few entries write it; a restart skips what is left."""

_refusals = partial(refusals, then="what the queue had acknowledged is whole; free space or mend the disk")


class Outbox:
    """The queue in `settings.queue_folder`, held by this process until it is closed."""

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        if settings.queue_folder is None:
            raise ConfigError('policy "queue": expected queue_folder, got none; name a folder for what waits')
        self.folder = settings.queue_folder.absolute()
        self._bundle_id, self._settings = bundle.id, settings
        self._guard = Lock()
        self._lock_file = -1
        if settings.queue_key is None and not self.folder.name:
            raise ConfigError(
                f"queue_folder: expected a folder with a name, for the key is made beside it, got {self.folder}; name "
                "another, or a file with queue_key"
            )
        key_file = settings.queue_key or self.folder.with_name(self.folder.name + ".key")
        with _refusals(self.folder):
            _make(self.folder, mode=0o700)
            self._lock_file = _locked(self.folder)
        try:
            with _refusals(self.folder):
                self._open(key_file)
        except BaseException:
            self.close()
            raise

    def _open(self, key_file: Path) -> None:
        cipher_of, self._wrong_key = _cryptography()
        for left in self.folder.glob("*.part"):
            left.unlink()
        entries = sorted(self.folder.glob(f"{'[0-9]' * _DIGITS}.entry"))
        head = self.folder / "queue.json"
        if not head.exists() and entries:
            raise StorageError(f"{self.folder}: expected queue.json beside the entries, got none; restore it")
        self._cipher = cipher_of(_key(key_file, is_new=not head.exists()))
        self._sizes = {int(path.stem): path.stat().st_size for path in entries}
        if head.exists():
            self._head = self._read_head(head, key_file)
            self._reserved = _reserved(self._head, head)
            self._next = max(self._reserved, max(self._sizes, default=-1) + 1)
        else:
            nonce = os.urandom(_NONCE)
            check = base64.b64encode(nonce + self._cipher.encrypt(nonce, b"", self._bundle_id.encode())).decode()
            self._head = {"format": _FORMAT, "bundle": self._bundle_id, "key_check": check}
            self._next = 0
            self._reserve(0)
        self._places: set[int] = set()

    def _read_head(self, head: Path, key_file: Path) -> dict[str, object]:
        """What queue.json holds, if it is of this bundle and this key."""
        try:
            content: dict[str, object] = json.loads(head.read_bytes())
            found, bundle_id, check = content["format"], content["bundle"], base64.b64decode(str(content["key_check"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StorageError(
                f"{head} is damaged ({type(error).__name__}); restore it, or remove the queue"
            ) from error
        if found != _FORMAT:
            raise StorageError(f"{head}: expected format {_FORMAT}, got {found!r}; use the Louver that wrote it")
        if bundle_id != self._bundle_id:
            raise ConfigError(
                f"{self.folder} holds features of bundle {bundle_id}, this is {self._bundle_id}; send them with that "
                "bundle first, or choose another queue_folder"
            )
        # Cut short it would say nothing of the key: the cipher refuses the nonce itself, as no error of ours.
        if len(check) != _NONCE + _TAG:
            raise StorageError(
                f"{head} is damaged (key_check: expected {_NONCE + _TAG} bytes, got {len(check)}); restore it, or "
                "remove the queue"
            )
        try:
            self._cipher.decrypt(check[:_NONCE], check[_NONCE:], self._bundle_id.encode())
        except self._wrong_key as error:
            raise ConfigError(
                f"queue_key: {key_file} is not the key of {self.folder}; name the key it was made with"
            ) from error
        return content

    def __len__(self) -> int:
        return len(self._sizes)

    def close(self) -> None:
        """Lets another process use the queue; nothing more is kept here."""
        with self._guard:
            if self._lock_file >= 0:
                os.close(self._lock_file)
                self._lock_file = -1

    def take_place(self) -> int:
        """A place in the order, for a request that may have to wait; `leave` it when the request has ended."""
        with self._guard:
            place = self._next
            self._next += 1
            self._places.add(place)
        return place

    def leave(self, place: int) -> None:
        """Nothing more comes to a place."""
        with self._guard:
            self._places.discard(place)

    def put(self, request: Request, place: int) -> None:
        """Keeps a request at its place; when this returns, it survives a crash and a power cut.

        Raises:
            BusyError: the queue is full; nothing was kept.
            StorageError: the disk refused; nothing was kept, and what was there is whole.
        """
        head = {
            "id": request.id,
            "n_images": request.n_images,
            "header_length": request.header_length,
            "compression": request.compression,
        }
        text = json.dumps(head).encode()
        nonce = os.urandom(_NONCE)
        plain = b"".join((len(text).to_bytes(4, "little"), text, request.body))
        sealed = self._cipher.encrypt(nonce, plain, self._seal(place))
        size = len(nonce) + len(sealed)
        with self._guard:
            if self._lock_file < 0:
                raise StorageError(f"{self.folder} was closed; nothing was kept; open it again")
            self._check_room(size)
            with _refusals(self.folder):
                if place >= self._reserved:
                    self._reserve(place)
                _write(self._path(place), [nonce, sealed])
            self._sizes[place] = size

    def _reserve(self, place: int) -> None:
        """Writes down that places up to a block from `place` may be in use, before the first of them is."""
        most = place + _BLOCK
        content = json.dumps(self._head | {"places": most})
        _write(self.folder / "queue.json", [content.encode()], is_replacing=True)
        self._reserved = most

    def _check_room(self, size: int) -> None:
        most, most_bytes = self._settings.queue_most_entries, self._settings.queue_most_bytes
        held = sum(self._sizes.values())
        if len(self._sizes) >= most or held + size > most_bytes:
            raise BusyError(
                f"the queue is full: expected at most {most} requests of {most_bytes} bytes, got {len(self._sizes)} of "
                f"{held} and one more of {size}; nothing was kept; wait for the cloud, or raise the bounds"
            )

    def places(self) -> list[int]:
        """The places of what waits, oldest first, as far as nothing before them can come any more."""
        with self._guard:
            bound = min(self._places, default=self._next)
            return sorted(place for place in self._sizes if place < bound)

    def get(self, place: int) -> Request:
        """One request that waits.

        Raises:
            DamagedError: it was cut short or changed.
            StorageError: the disk does not give it.
        """
        path = self._path(place)
        with _refusals(path, doing="read"):
            content = path.read_bytes()
        try:
            plain = self._cipher.decrypt(content[:_NONCE], content[_NONCE:], self._seal(place))
            length = int.from_bytes(plain[:4], "little")
            assert length < _MOST_HEAD, "written by us and authenticated"
            return Request(**json.loads(plain[4 : 4 + length]), body=plain[4 + length :])
        except (self._wrong_key, ValueError) as error:
            raise DamagedError(f"{path} does not open: it was cut short or changed") from error

    def remove(self, place: int) -> None:
        """Forgets a request whose answer was delivered, or that its owner gives up."""
        with self._guard, _refusals(self.folder):
            self._path(place).unlink(missing_ok=True)
            _sync(self.folder)
            self._sizes.pop(place, None)

    def set_aside(self, place: int) -> Path:
        """Moves a damaged entry out of the way; where it is now."""
        path = self._path(place)
        with self._guard, _refusals(self.folder):
            aside = path.with_suffix(".damaged")
            for n in count(1):
                if not aside.exists():
                    break
                aside = path.with_suffix(f".{n}.damaged")
            path.replace(aside)
            _sync(self.folder)
            self._sizes.pop(place, None)
        return aside

    def _path(self, place: int) -> Path:
        return self.folder / f"{place:0{_DIGITS}d}.entry"

    def _seal(self, place: int) -> bytes:
        return f"louver queue {_FORMAT} {self._bundle_id} {place}".encode()


def _reserved(head: dict[str, object], path: Path) -> int:
    """The first place that was never used; 0 in a queue of before they were noted, whose entries alone say it."""
    places = head.get("places", 0)
    # With more, names would have more digits than are looked for, and entries would be lost.
    if type(places) is not int or not 0 <= places < 10**_DIGITS // 2:
        raise StorageError(f"{path} is damaged (places: {places!r}); restore it, or remove the queue")
    return places


def _cryptography() -> tuple[type[AESGCM], type[InvalidTag]]:
    try:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ModuleNotFoundError as error:
        raise MissingExtraError("a queue on disk is encrypted, which needs: pip install 'louver[edge]'") from error
    return AESGCM, InvalidTag


def _key(path: Path, *, is_new: bool) -> bytes:
    """The key in `path`, which is made if there is none and nothing was encrypted yet."""
    if not path.exists():
        if not is_new:
            raise ConfigError(f"queue_key: expected the key of the queue in {path}, got no such file; restore it")
        _make(path.absolute().parent)
        _write(path, [os.urandom(_KEY_BYTES)])
    # By the open file, so that what is judged is what is read.
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        key = file.read(_KEY_BYTES + 1)
    if mode & 0o077:
        raise ConfigError(
            f"queue_key: expected {path} to be for its owner alone, got mode {mode & 0o777:04o}; chmod 600 it"
        )
    if len(key) != _KEY_BYTES:
        raise ConfigError(f"queue_key: expected {_KEY_BYTES} random bytes in {path}, got another size; name another")
    return key


def _make(folder: Path, *, mode: int = 0o777) -> None:
    """Makes `folder` and those that it lies in, none of which a power cut takes once this returns."""
    if folder.is_dir():
        return
    _make(folder.parent)
    folder.mkdir(mode=mode, exist_ok=True)
    _sync(folder.parent)


def _locked(folder: Path) -> int:
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConfigError(f"{folder} is in use by another process; end it, or choose another queue_folder") from error
    return descriptor


def _write(path: Path, parts: list[bytes], *, is_replacing: bool = False) -> None:
    """Writes `path` for its owner alone, whole or not at all, and not lost by a power cut once this returns.

    is_replacing: where it fails, `path` stays, as it was or as it was to be.
    """
    part = path.with_name(path.name + ".part")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            for piece in parts:
                view = memoryview(piece)
                while view:
                    view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        part.replace(path)
        _sync(path.parent)
    except BaseException:
        # After the rename the file may be whole and unsynced: it was not promised, so it must not stay.
        part.unlink(missing_ok=True)
        if not is_replacing:
            path.unlink(missing_ok=True)
        raise


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
