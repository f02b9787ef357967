"""Files written whole or not at all and read with suspicion, and rows that do not fit in memory."""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from louver.errors import StorageError

__all__ = [
    "DAMAGED",
    "RowFile",
    "read_npz",
    "refusals",
    "unit_folder",
    "write_bytes",
    "write_json",
    "write_npz",
    "write_with",
]

DAMAGED = (EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)
"""What reading a file that was cut short or changed can raise."""


_RUN_AGAIN = "free space or choose another folder, then run again with --resume: what was finished is kept"


@contextmanager
def refusals(what: Path | str, *, doing: str = "write", then: str = _RUN_AGAIN) -> Iterator[None]:
    """Turns the operating system's refusal into a `StorageError` that says what to do then."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot {doing} {what}: {error.strerror or error}; {then}") from error


def write_with(path: Path, fill: Callable[[BinaryIO], object]) -> Path:
    """Writes `path` by `fill(file)` under a temporary name beside it, then renames: a reader sees all of it or none.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    with refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(_mode(path))
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    return path


def _mode(path: Path) -> int:
    """Who may read the file that is there may read the next one; a new one is as open as the umask lets it be."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        umask = os.umask(0)
        os.umask(umask)
        return 0o666 & ~umask


def write_bytes(path: Path, content: bytes) -> Path:
    """Writes `content` to `path`, whole or not at all."""
    return write_with(path, lambda file: file.write(content))


def write_json(path: Path, content: object) -> Path:
    """Writes `content` as JSON; NaN and infinity are refused, since no reader agrees on them."""
    return write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_npz(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> Path:
    """Writes named arrays as a compressed .npz (no object arrays, so never a pickle)."""
    assert all(array.dtype != object for array in arrays.values())

    def fill(file: BinaryIO) -> None:
        # The stub takes arrays by keyword and cannot tell them from its own option.
        np.savez_compressed(file, **dict(arrays))  # type: ignore[arg-type]

    return write_with(path, fill)


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file, never a pickle; one of `DAMAGED` where it is missing or damaged."""
    # Opened here: numpy leaves a file open that it cannot read.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def unit_folder(folder: Path, cut: str, attack: str) -> Path:
    """Where a run keeps what `attack` made of `cut`, whose name may hold any sign: only harmless ones are used."""
    safe = [re.sub(r"[^\w.-]", "_", name) for name in (cut, attack)]
    return folder / "units" / safe[0] / safe[1]


class RowFile:
    """Rows of float32, in memory while they fit in `memory_bytes`, else in a file without a name.

    The file is read and written by position instead of being mapped: mapped pages count as the process's memory, and
    a file without a name is gone with the process, however that ends.

    Raises:
        StorageError: the disk is full.
    """

    def __init__(self, count: int, shape: tuple[int, ...], *, memory_bytes: int, folder: Path | None = None) -> None:
        self.shape = shape
        self._count = count
        self._row_bytes = 4 * int(np.prod(shape))
        self._memory: NDArray[np.float32] | None = None
        if count * self._row_bytes <= memory_bytes:
            self._memory = np.empty((count, *shape), np.float32)
            return
        with refusals(folder or tempfile.gettempdir()):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as the object
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return self._count

    @property
    def is_spilled(self) -> bool:
        """Whether the rows are on disk."""
        return self._memory is None

    def write(self, start: int, rows: NDArray[np.float32]) -> None:
        """Sets rows from `start` on."""
        assert rows.shape[1:] == self.shape
        assert rows.dtype == np.float32
        if self._memory is not None:
            self._memory[start : start + len(rows)] = rows
            return
        view, position = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data, start * self._row_bytes
        with refusals("features that do not fit in memory"):
            while view:
                written = os.pwrite(self._file.fileno(), view, position)
                view, position = view[written:], position + written

    def read(self, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows at `index`, copied."""
        if self._memory is not None:
            return self._memory[index]
        out = np.empty((len(index), *self.shape), np.float32)
        for row, i in zip(out, index, strict=True):
            view, position = row.reshape(-1).view(np.uint8).data, int(i) * self._row_bytes
            while view:
                got = os.preadv(self._file.fileno(), [view], position)
                if got == 0:
                    raise StorageError("features on disk are shorter than written: the temporary folder lost them")
                view, position = view[got:], position + got
        return out
