"""The shared image sets: their names, their labels, and the packed files they come in.

A packed file is a plain .npz. Pictures under a key `k` are either lossless WebP mosaics (`k__webp`, with
`k__meta` = count, height, width, channels, tiles a mosaic, mosaic columns) or one JPEG each (`k__jpeg`); `k__off` holds
where each mosaic or JPEG begins. Members are stored, not deflated, so that what is not asked for is not read.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from louver.data.pictures import Wanted, fit, picture, require_pillow, stack
from louver.data.windows import Window
from louver.errors import DataError, nearest
from louver.types import Images

__all__ = ["DATA_NAMES", "load_shared"]

_AS_STORED = Wanted()


@dataclass(frozen=True, kw_only=True)
class _SharedSet:
    """`parts` are stored apart (`x_train`); `selectors` pick by the value of a column. Both are written NAME/THAT."""

    file: str
    labels: Mapping[str, str]
    classes: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    selectors: Mapping[str, tuple[str, int]] = field(default_factory=dict)


_SETS: dict[str, _SharedSet] = {
    "celeba299_faces": _SharedSet(
        file="celeba299_faces.npz",
        labels={"identity": "id_index", "female": "female", "split": "split", "group": "id_group"},
        classes={"female": ("male", "female"), "split": ("train", "test"), "group": ("target", "attacker")},
        selectors={"train": ("split", 0), "test": ("split", 1), "targets": ("group", 0), "attackers": ("group", 1)},
    ),
    "cifar10": _SharedSet(
        file="cifar10.npz", labels={"label": "y"}, classes={"label": "classes"}, parts=("train", "test")
    ),
    "cifar100": _SharedSet(file="cifar100_10k.npz", labels={"label": "y"}, classes={"label": "classes"}),
    "fashion_mnist": _SharedSet(
        file="fashion_mnist.npz", labels={"label": "y"}, classes={"label": "classes"}, parts=("train", "test")
    ),
    "imagenet1000": _SharedSet(file="imagenet1000_128.npz", labels={"label": "label"}, classes={"label": "name"}),
    "vehicle_reid": _SharedSet(
        file="vehicle_reid.npz",
        labels={"identity": "vehicle_id", "camera": "cam", "type": "type", "split": "split"},
        classes={"type": "type_names", "split": ("train", "validation", "test")},
        selectors={"train": ("split", 0), "val": ("split", 1), "validation": ("split", 1), "test": ("split", 2)},
    ),
}

DATA_NAMES: tuple[str, ...] = tuple(_SETS)
"""The shared sets that `load_images` knows by name."""


def load_shared(root: Path, name: str, selectors: tuple[str, ...], window: Window, wish: Wanted) -> Images:
    """The pictures of shared set `name` that all `selectors` and the window pick, in file order.

    Without a selector a set stored in parts comes whole, with a `split` column that tells them apart.

    Raises:
        DataError: an unknown selector, an empty choice, or a file that is missing or damaged.
        MissingExtraError: Pillow is not installed.
    """
    require_pillow()
    shared = _SETS[name]
    for selector in selectors:
        legal = [*shared.parts, *shared.selectors]
        if selector not in legal:
            raise DataError(f"{name}: no split {selector!r}; {nearest(selector, legal)}")
    path = root / shared.file
    with _reading(path), zipfile.ZipFile(path) as archive:
        stored = {member.removesuffix(".npy") for member in archive.namelist()}
        parts = [part for part in shared.parts if selectors in ((), (part,))] or [""]
        keys = ["x" + (part and "_" + part) for part in parts]
        labels, counts = _labels(archive, shared, parts)
        keep = np.ones(sum(counts), bool)
        for selector in selectors:
            if selector in shared.selectors:
                column, value = shared.selectors[selector]
                keep &= labels[column] == value
        index = window.pick(np.flatnonzero(keep), "/".join((name, *selectors)))
        classes = {
            column: names if isinstance(names, tuple) else tuple(str(one) for one in _array(archive, names))
            for column, names in shared.classes.items()
        }
        if len(parts) > 1:
            classes["split"] = tuple(parts)
        begins = np.cumsum([0, *counts])
        pixels = [
            _pictures(archive, stored, key, index[(index >= begin) & (index < end)] - begin, name)
            for key, begin, end in zip(keys, begins[:-1], begins[1:], strict=True)
            if ((index >= begin) & (index < end)).any()
        ]
        images = Images(
            pixels=pixels[0] if len(pixels) == 1 else np.concatenate(pixels),
            labels={column: values[index] for column, values in labels.items()},
            classes=classes,
            name=name,
        )
    return fit(images, wish)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"expected the file {path}, got none; set LOUVER_DATA to the folder that holds it") from error
    except DataError:
        raise
    except (zipfile.BadZipFile, KeyError, EOFError, OSError, ValueError) as error:
        raise DataError(f"{path}: expected a whole packed file, got a damaged one ({error}); fetch it again") from error


def _labels(
    archive: zipfile.ZipFile, shared: _SharedSet, parts: list[str]
) -> tuple[dict[str, NDArray[np.int64]], list[int]]:
    """Every label column over `parts` one after the other, and how many pictures each part has."""
    columns: dict[str, list[NDArray[np.int64]]] = {column: [] for column in shared.labels}
    counts: list[int] = []
    for part in parts:
        for column, key in shared.labels.items():
            columns[column].append(_array(archive, key + (part and "_" + part)).astype(np.int64))
        counts.append(len(columns[next(iter(shared.labels))][-1]))
    labels = {column: np.concatenate(values) for column, values in columns.items()}
    if len(parts) > 1:
        labels["split"] = np.repeat(np.arange(len(parts)), counts)
    return labels, counts


def _pictures(
    archive: zipfile.ZipFile, stored: set[str], key: str, index: NDArray[np.int64], name: str
) -> NDArray[np.uint8]:
    offsets = _array(archive, key + "__off")
    is_mosaic = key + "__webp" in stored
    with archive.open(key + ("__webp.npy" if is_mosaic else "__jpeg.npy")) as member:
        begin = _skip_header(member)

        def encoded(number: int) -> bytes:
            member.seek(begin + int(offsets[number]))
            return member.read(int(offsets[number + 1] - offsets[number]))

        if not is_mosaic:
            each = ((f"{name} image {i}", picture(encoded(i), f"{name} image {i}", _AS_STORED)) for i in index.tolist())
            return stack(len(index), each, name)
        _, h, w, c, per_mosaic, columns = _array(archive, key + "__meta").tolist()
        out = np.empty((len(index), c, h, w), np.uint8)
        for number in np.unique(index // per_mosaic).tolist():
            mosaic = picture(encoded(number), f"{name} mosaic {number}", _AS_STORED)[:, :, :c]
            rows = mosaic.shape[0] // h
            tiles = mosaic.reshape(rows, h, columns, w, c).transpose(0, 2, 4, 1, 3).reshape(rows * columns, c, h, w)
            here = index // per_mosaic == number
            out[here] = tiles[index[here] % per_mosaic]
        return out


def _skip_header(member: IO[bytes]) -> int:
    """Where the numbers of a stored row of bytes begin."""
    from numpy.lib import format as npy

    read = npy.read_array_header_1_0 if npy.read_magic(member) == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(member)
    if len(shape) != 1 or dtype != np.uint8:
        raise ValueError(f"pictures are {dtype} of shape {shape} instead of a row of bytes")
    return member.tell()


def _array(archive: zipfile.ZipFile, key: str) -> NDArray[np.generic]:
    with archive.open(key + ".npy") as member:
        array: NDArray[np.generic] = np.lib.format.read_array(member, allow_pickle=False)
    return array
