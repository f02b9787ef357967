"""The contact sheet: what a person sees of a set."""

import errno
import os
import sys

import numpy as np
import pytest
from PIL import Image

from louver.data import contact_sheet
from louver.errors import DataError, MissingExtraError, StorageError
from louver.types import Images

SET = Images(
    pixels=np.random.default_rng(4).integers(0, 256, (7, 3, 8, 10), dtype=np.uint8),
    labels={"place": np.arange(7) % 2, "number": np.arange(7)},
    classes={"place": ("sea", "park")},
)


def test_pictures_are_shown_in_order(tmp_path):
    path = contact_sheet(SET, tmp_path / "sheet.png", columns=3, scale=12)
    sheet = np.asarray(Image.open(path))
    for index in (0, 2, 3, 6):
        column, row = index % 3, index // 3
        left, top = 6 + column * (120 + 6), 6 + row * (96 + 24 + 6)
        shown = sheet[top : top + 96 : 12, left : left + 120 : 12]
        assert np.array_equal(shown, SET.pixels[index].transpose(1, 2, 0))


def test_captions_tell_labels_apart(tmp_path):
    def caption(value, columns, classes=SET.classes):
        one = Images(pixels=SET.pixels[:1], labels={name: np.array([value]) for name in columns}, classes=classes)
        return np.asarray(Image.open(contact_sheet(one, tmp_path / "one.png", scale=16)))[6 + 128 :]

    assert not np.array_equal(caption(0, ["place"]), caption(1, ["place"]))
    assert not np.array_equal(caption(0, ["place"]), caption(0, ["other"]))
    assert len(caption(0, ["place", "other"])) > len(caption(0, ["place"]))
    assert not np.array_equal(caption(1, ["place", "other"]), caption(1, ["place", "other"], {"place": ("a", "1")}))
    assert len(caption(9, ["place"]))


@pytest.mark.parametrize("channels", [1, 3])
def test_float_and_gray_pictures(tmp_path, channels):
    floats = Images(pixels=np.full((2, channels, 8, 10), 0.2, np.float32))
    sheet = np.asarray(Image.open(contact_sheet(floats, tmp_path / "sheet.png", n=99)))
    assert sheet[10, 10].tolist() == [51, 51, 51]


@pytest.mark.parametrize("bad", [{"n": 0}, {"columns": 0}, {"scale": 0}])
def test_a_sheet_of_nothing_is_an_error(tmp_path, bad):
    with pytest.raises(DataError, match="1 or more"):
        contact_sheet(SET, tmp_path / "sheet.png", **bad)
    with pytest.raises(DataError, match="at least one image"):
        contact_sheet(SET.take(slice(0, 0)), tmp_path / "sheet.png")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"sheet\.png"):
        contact_sheet(SET, tmp_path / "file" / "sheet.png")


def test_a_full_disk_leaves_the_old_sheet(tmp_path, monkeypatch):
    path = contact_sheet(SET, tmp_path / "sheet.png")
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        contact_sheet(SET.take(slice(0, 3)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_pillow_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'louver\[lab\]'"):
        contact_sheet(SET, tmp_path / "sheet.png")
