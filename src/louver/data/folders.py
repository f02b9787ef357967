"""Pictures in folders: a class a subfolder, and the layouts of the re-identification sets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from louver.data.pictures import SUFFIXES, Wanted, picture, stack
from louver.data.windows import Window
from louver.errors import DataError
from louver.types import Images

__all__ = ["load_folder", "load_market1501", "load_vehicleid", "load_veri776"]

_MARKET = re.compile(r"(?P<identity>-?\d+)_c(?P<camera>\d+)s\d+_\d+_\d+")
_VERI = re.compile(r"(?P<identity>\d+)_c(?P<camera>\d+)_\d+_\d+")
_JUNK = -1


def load_folder(folder: Path, window: Window, wish: Wanted) -> Images:
    """Pictures of a folder with a subfolder a class (column `label`), or of a flat one (no labels), sorted by path.

    Raises:
        DataError: a class without pictures, pictures beside class folders, sizes or channels that differ, or a
            corrupt picture.
        MissingExtraError: Pillow is not installed.
    """
    _check_folder(folder)
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    loose = _pictures_in(folder)
    if not names:
        return _load(loose, {}, {}, folder, window, wish)
    if loose:
        raise DataError(
            f"{folder}: expected a folder a class, got pictures beside the folders, such as {loose[0].name}; "
            "move them into a class"
        )
    paths: list[Path] = []
    label: list[int] = []
    for number, name in enumerate(names):
        here = _pictures_in(folder / name, is_deep=True)
        if not here:
            raise DataError(
                f"{folder}: expected pictures in every class folder, got none in {name!r} "
                f"({', '.join(sorted(SUFFIXES))} are read); fill or remove it"
            )
        paths += here
        label += [number] * len(here)
    return _load(paths, {"label": np.array(label, np.int64)}, {"label": tuple(names)}, folder, window, wish)


def load_market1501(folder: Path, window: Window, wish: Wanted) -> Images:
    """Pictures of one Market-1501 folder with `identity` and `camera` as in their names.

    Junk (identity -1) is left out, as in the standard evaluation; distractors (identity 0) stay.

    Raises:
        DataError: a picture that is not named `0002_c1s1_000451_03.jpg`, or as in `load_folder`.
    """
    return _load_named(folder, _MARKET, "0002_c1s1_000451_03.jpg", window, wish)


def load_veri776(folder: Path, window: Window, wish: Wanted) -> Images:
    """Pictures of one VeRi-776 folder (image_train, image_query, image_test) with `identity` and `camera`.

    Raises:
        DataError: a picture that is not named `0002_c002_00030600_0.jpg`, or as in `load_folder`.
    """
    return _load_named(folder, _VERI, "0002_c002_00030600_0.jpg", window, wish)


def load_vehicleid(place: Path, window: Window, wish: Wanted) -> Images:
    """Pictures of one VehicleID list with `identity`, in list order.

    `place` is the list file, or ROOT/NAME for ROOT/train_test_split/NAME_list.txt (`train`) or NAME.txt
    (`test_list_800`). A line is "image identity"; pictures are ROOT/image/IMAGE.jpg.

    Raises:
        DataError: no such list, a line of another form, a picture that is listed and missing, or as in `load_folder`.
    """
    file = _vehicleid_list(place)
    folders = [base / "image" for base in (file.parent, file.parent.parent) if (base / "image").is_dir()]
    if not folders:
        raise DataError(
            f"{file}: expected a folder 'image' beside the list or one level up, got none; check the layout"
        )
    paths: list[Path] = []
    identity: list[int] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        words = line.split()
        if len(words) != 2 or not words[1].isdecimal():
            raise DataError(f'{file} line {number}: expected "image identity", got {line!r}; mend the list')
        path = folders[0] / (words[0] if words[0].endswith(".jpg") else words[0] + ".jpg")
        if not path.is_file():
            raise DataError(
                f"{file} line {number}: expected the picture {path}, got none; the list does not match the folder"
            )
        paths.append(path)
        identity.append(int(words[1]))
    return _load(paths, {"identity": np.array(identity, np.int64)}, {}, file, window, wish)


def _vehicleid_list(place: Path) -> Path:
    if place.is_file():
        return place
    lists = place.parent / "train_test_split"
    for file in (lists / f"{place.name}_list.txt", lists / f"{place.name}.txt"):
        if file.is_file():
            return file
    found = sorted(
        path.name for path in (place / "train_test_split", lists) if path.is_dir() for path in path.glob("*.txt")
    )
    raise DataError(
        f"expected a VehicleID list at {place}, got none; name a list file, or ROOT/train for "
        f"ROOT/train_test_split/train_list.txt (lists found: {', '.join(found) or 'none'})"
    )


def _load_named(folder: Path, pattern: re.Pattern[str], example: str, window: Window, wish: Wanted) -> Images:
    _check_folder(folder)
    paths: list[Path] = []
    identity: list[int] = []
    camera: list[int] = []
    for path in _pictures_in(folder):
        match = pattern.match(path.name)
        if match is None:
            raise DataError(f"{path}: expected a name like {example}, got {path.name!r}; is this the right layout?")
        if int(match["identity"]) == _JUNK:
            continue
        paths.append(path)
        identity.append(int(match["identity"]))
        camera.append(int(match["camera"]))
    labels = {"identity": np.array(identity, np.int64), "camera": np.array(camera, np.int64)}
    return _load(paths, labels, {}, folder, window, wish)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(
            f"expected a folder at {folder}, got {'a file' if folder.exists() else 'nothing'}; check the path"
        )


def _pictures_in(folder: Path, *, is_deep: bool = False) -> list[Path]:
    found = folder.rglob("*") if is_deep else folder.iterdir()
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))


def _load(
    paths: Sequence[Path],
    labels: dict[str, NDArray[np.int64]],
    classes: dict[str, tuple[str, ...]],
    source: Path,
    window: Window,
    wish: Wanted,
) -> Images:
    if not paths:
        raise DataError(f"{source}: expected pictures ({', '.join(sorted(SUFFIXES))}), got none; check the path")
    picked = window.range(len(paths), str(source))
    part = slice(picked.start, picked.stop)
    pixels = stack(len(picked), ((str(path), picture(path, str(path), wish)) for path in paths[part]), str(source))
    kept = {column: values[part] for column, values in labels.items()}
    return Images(pixels=pixels, labels=kept, classes=classes, name=str(source))
