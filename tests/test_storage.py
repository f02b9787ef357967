"""Files are whole or absent, and rows beyond memory are the rows that were written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from louver.errors import StorageError
from louver.storage import RowFile, write_bytes, write_json, write_npz, write_with


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "deep" / "file", b"first")

    def fill(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match=r"No space left.*--resume"):
        write_with(path, fill)
    assert path.read_bytes() == b"first"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def fill(file: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_with(tmp_path / "file", fill)
    assert list(tmp_path.iterdir()) == []


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        assert write_bytes(tmp_path / "file", b"").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(umask)


def test_a_file_that_was_narrowed_stays_so(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "f", b"one")
    path.chmod(0o600)
    write_bytes(path, b"two")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"two", 0o600)


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file", {"psnr": float("nan")})


def test_npz_comes_back_without_pickle(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", {"x": np.arange(5), "y": np.ones(2)})
    with np.load(path, allow_pickle=False) as arrays:
        assert sorted(arrays) == ["x", "y"]
        np.testing.assert_array_equal(arrays["x"], np.arange(5))


@pytest.mark.parametrize("memory_bytes", [0, 10_000])
def test_rows_come_back_from_memory_and_from_disk(tmp_path: Path, memory_bytes: int) -> None:
    rows = np.random.default_rng(0).normal(size=(11, 3, 4, 5)).astype(np.float32)
    file = RowFile(11, (3, 4, 5), memory_bytes=memory_bytes, folder=tmp_path)
    assert file.is_spilled == (memory_bytes == 0)
    file.write(0, rows[:4])
    file.write(4, np.asfortranarray(rows[4:]))
    index = np.array([7, 0, 10, 7, 4])
    np.testing.assert_array_equal(file.read(index), rows[index])
    assert list(tmp_path.iterdir()) == []  # a file without a name cannot be left behind


def test_a_full_disk_under_rows_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = RowFile(3, (2, 2), memory_bytes=0, folder=tmp_path)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match="No space left"):
        file.write(0, np.zeros((3, 2, 2), np.float32))
