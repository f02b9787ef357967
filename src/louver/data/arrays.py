"""Pictures that come as arrays: .npz and Parquet files."""
# ruff: noqa: ANN401  (pyarrow comes without types)

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from louver.data.pictures import Wanted, fit, picture, stack
from louver.data.windows import Window
from louver.errors import DataError, MissingExtraError, nearest
from louver.types import Images

__all__ = ["channels_first", "load_npz", "load_parquet"]

_PICTURE_NAMES = ("images", "x", "pixels", "image", "img")
_LABEL_NAMES = ("y", "label", "labels", "target", "targets")
"""What people call the one label column; all of them become `label`."""


def load_npz(path: Path, split: str | None, window: Window, wish: Wanted) -> Images:
    """The pictures `images`, `x` or `pixels` of a .npz file; other (n,) arrays of integers or strings are its labels.

    With a split, arrays are looked for under `NAME_split` (`x_train`, `y_train`). Class names are read from
    `COLUMN_names`, or `classes` for the column `label`. Object arrays are not read: they could run code.

    Raises:
        DataError: no or several arrays of pictures, labels of another length, or pixels that are not pictures.
    """
    try:
        with zipfile.ZipFile(path):  # else a lone .npy array or a pickle would be tried under this name
            pass
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except FileNotFoundError as error:
        raise DataError(f"expected the file {path}, got none; check the path") from error
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path}: expected a .npz file of plain arrays, got one that cannot be read ({error}); "
            "write it again with numpy.savez and without object arrays"
        ) from error
    ending = f"_{split}" if split else ""
    found = [name + ending for name in _PICTURE_NAMES if name + ending in arrays]
    if not found:
        raise DataError(
            f"{path}: expected pictures in an array named {', '.join(name + ending for name in _PICTURE_NAMES[:3])}; "
            f"{nearest('x' + ending, sorted(arrays))}"
        )
    if len(found) > 1:
        raise DataError(f"{path}: expected one array of pictures, got {' and '.join(found)}; keep one")
    pixels = channels_first(arrays[found[0]], str(path))
    labels, classes = _npz_labels(arrays, ending, set(found), len(pixels), path)
    picked = window.range(len(pixels), str(path))
    part = slice(picked.start, picked.stop)
    return fit(
        Images(
            pixels=pixels[part],
            labels={column: values[part] for column, values in labels.items()},
            classes=classes,
            name=str(path),
        ),
        wish,
    )


def channels_first(array: NDArray[Any], source: str) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Pictures (n, c, h, w) as uint8 or float32, from (n, h, w), (n, h, w, c) or (n, c, h, w).

    Raises:
        DataError: another shape or type, or a shape that can be read both ways.
    """
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4:
        is_first, is_last = array.shape[1] in (1, 3), array.shape[3] in (1, 3)
        if is_first and is_last:
            raise DataError(
                f"{source}: expected pictures with channels first or last, got {array.shape}, which may be either; "
                "store pictures larger than 3 pixels"
            )
        if is_last:
            array = np.moveaxis(array, 3, 1)
    if array.ndim != 4 or array.shape[1] not in (1, 3):
        raise DataError(
            f"{source}: expected pictures of shape (n, h, w), (n, h, w, c) or (n, c, h, w) with 1 or 3 channels, "
            f"got {array.shape}; drop any alpha channel"
        )
    if not len(array) or 0 in array.shape:
        raise DataError(f"{source}: expected at least one picture, got shape {array.shape}")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(
            f"{source}: expected pixels as uint8, or floats in [0,1], got {array.dtype}; convert them to uint8"
        )
    return np.ascontiguousarray(array, dtype=np.float32)


def _npz_labels(
    arrays: Mapping[str, NDArray[Any]], ending: str, taken: set[str], count: int, path: Path
) -> tuple[dict[str, NDArray[np.int64]], dict[str, tuple[str, ...]]]:
    labels: dict[str, NDArray[np.int64]] = {}
    classes: dict[str, tuple[str, ...]] = {}
    named = {_column_of(key): key for key in arrays if _names_classes(key)}
    for key, values in arrays.items():
        if key in taken or key in named.values() or values.ndim != 1 or not key.endswith(ending):
            continue
        column = key.removesuffix(ending) if ending else key
        is_main = column in _LABEL_NAMES
        if not (_is_integral(values) or values.dtype.kind in "US"):
            if is_main:
                raise DataError(
                    f"{path}: expected integers or strings in label array {key!r}, got {values.dtype}; convert it"
                )
            continue  # scores and coordinates are no labels
        if not ending and len(values) != count and any(key.endswith(f"_{part}") for part in ("train", "test", "val")):
            continue
        if len(values) != count:
            raise DataError(
                f"{path}: expected {count} labels in {key!r}, one a picture, got {len(values)}; the labels do not match"
            )
        add_column(labels, classes, "label" if is_main else column, values, str(path))
    for column, key in named.items():
        if column in labels and column not in classes:
            classes[column] = tuple(str(name) for name in arrays[key])
    check_classes(labels, classes, str(path))
    return labels, classes


def _names_classes(key: str) -> bool:
    return key == "classes" or key.endswith("_names")


def _column_of(names: str) -> str:
    column = names.removesuffix("_names")
    return "label" if column in ("classes", *_LABEL_NAMES) else column


def _is_integral(values: NDArray[Any]) -> bool:
    return values.dtype.kind in "iub"


def add_column(
    labels: dict[str, NDArray[np.int64]],
    classes: dict[str, tuple[str, ...]],
    column: str,
    values: NDArray[Any],
    source: str,
) -> None:
    """Adds a label column; strings become their place in the sorted list of names, which becomes `classes`."""
    if column in labels:
        raise DataError(f"{source}: expected one column {column!r}, got two that read so; rename or remove one")
    if _is_integral(values):
        labels[column] = values.astype(np.int64)
        return
    names, codes = np.unique(values.astype(str), return_inverse=True)
    labels[column], classes[column] = codes.astype(np.int64), tuple(str(name) for name in names)


def check_classes(labels: Mapping[str, NDArray[np.int64]], classes: Mapping[str, tuple[str, ...]], source: str) -> None:
    """Refuses labels that have no name although the file lists names."""
    for column, names in classes.items():
        values = labels[column]
        if len(values) and (values.min() < 0 or values.max() >= len(names)):
            raise DataError(
                f"{source}: expected {column!r} in 0..{len(names) - 1}, as {len(names)} names are given, "
                f"got {values.min()}..{values.max()}; the names do not match the labels"
            )


def load_parquet(path: Path, window: Window, wish: Wanted) -> Images:
    """The pictures of a Parquet file, with every integer or string column as labels.

    Pictures are encoded (a binary column, or a struct with `bytes` as Hugging Face writes them) or nested lists of
    levels; class names come from the Hugging Face header where there is one. Only the row groups asked for are read.

    Raises:
        DataError: no or several columns of pictures, a missing or corrupt picture, or a null label.
        MissingExtraError: pyarrow or Pillow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("reading Parquet files needs pyarrow: pip install 'louver[lab]'") from error
    if not path.is_file():
        raise DataError(f"expected the file {path}, got none; check the path")
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            column = _picture_column(schema, path)
            picked = window.range(file.metadata.num_rows, str(path))
            labels, classes = _parquet_labels(file, column, path)
            pixels = _parquet_pixels(file, column, picked, path, wish)
    except pa.ArrowException as error:
        raise DataError(
            f"{path}: expected a Parquet file, got one that cannot be read ({error}); write it again"
        ) from error
    part = slice(picked.start, picked.stop)
    kept = {name: values[part] for name, values in labels.items()}
    return fit(Images(pixels=pixels, labels=kept, classes=classes, name=str(path)), wish)


def _picture_column(schema: Any, path: Path) -> str:
    import pyarrow.types as kinds

    def holds_pictures(kind: Any) -> bool:
        if kinds.is_struct(kind):
            return bool(kind.get_field_index("bytes") >= 0)
        return bool(kinds.is_binary(kind) or kinds.is_large_binary(kind) or _is_list(kind))

    found = [field.name for field in schema if holds_pictures(field.type)]
    preferred = [name for name in _PICTURE_NAMES if name in found]
    if not found:
        raise DataError(
            f"{path}: expected a column of pictures (bytes, a struct with bytes, or nested lists), got columns "
            f"{', '.join(schema.names)}; add one named image"
        )
    if len(found) > 1 and len(preferred) != 1:
        raise DataError(f"{path}: expected one column of pictures, got {' and '.join(found)}; name one of them image")
    return (preferred or found)[0]


def _is_list(kind: Any) -> bool:
    import pyarrow.types as kinds

    return bool(kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind))


def _parquet_labels(
    file: Any,
    pictures: str,
    path: Path,
) -> tuple[dict[str, NDArray[np.int64]], dict[str, tuple[str, ...]]]:
    import pyarrow.types as kinds

    labels: dict[str, NDArray[np.int64]] = {}
    classes: dict[str, tuple[str, ...]] = {}
    tests = (kinds.is_integer, kinds.is_boolean, kinds.is_string, kinds.is_large_string)
    names = [f.name for f in file.schema_arrow if f.name != pictures and any(test(f.type) for test in tests)]
    table = file.read(columns=names)
    for name in names:
        values = table.column(name)
        if values.null_count:
            raise DataError(f"{path}: expected a label in every row of column {name!r}, got {values.null_count} empty")
        array = values.to_numpy()
        add_column(labels, classes, "label" if name in _LABEL_NAMES else name, array, str(path))
    header = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    for name, feature in header.get("info", {}).get("features", {}).items():
        column = "label" if name in _LABEL_NAMES else name
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and column in labels:
            classes[column] = tuple(feature["names"])
    check_classes(labels, classes, str(path))
    return labels, classes


def _parquet_pixels(
    file: Any,
    column: str,
    picked: range,
    path: Path,
    wish: Wanted,
) -> NDArray[np.uint8] | NDArray[np.float32]:
    import pyarrow.types as kinds

    kind = file.schema_arrow.field(column).type
    if _is_list(kind):
        parts = [_nested(chunk, path) for _, chunk in _chunks(file, column, picked)]
        if len({part.shape[1:] for part in parts}) > 1:
            raise DataError(f"{path}: expected pictures of one shape, got {sorted({part.shape[1:] for part in parts})}")
        return channels_first(np.concatenate(parts), str(path))

    def pictures() -> Iterator[tuple[str, NDArray[np.uint8]]]:
        for first, chunk in _chunks(file, column, picked):
            content = chunk.field("bytes") if kinds.is_struct(kind) else chunk
            for row, encoded in enumerate(content, first):
                name = f"{path} row {row}"
                if not encoded.is_valid:
                    raise DataError(
                        f"{name}: expected an encoded picture, got none; store the bytes and not only a path"
                    )
                yield name, picture(encoded.as_py(), name, wish)

    return stack(len(picked), pictures(), str(path))


def _chunks(file: Any, column: str, picked: range) -> Iterator[tuple[int, Any]]:
    """Pieces of a column that cover `picked`, each with its first row; other row groups are not read."""
    begin = 0
    for group in range(file.num_row_groups):
        end = begin + file.metadata.row_group(group).num_rows
        if begin < picked.stop and end > picked.start:
            start = max(begin, picked.start)
            values = file.read_row_group(group, columns=[column]).column(column)
            for chunk in values.slice(start - begin, min(end, picked.stop) - start).chunks:
                yield start, chunk
                start += len(chunk)
        begin = end


def _nested(chunk: Any, path: Path) -> NDArray[Any]:
    """Nested lists of one shape as an array; flattened level by level, as Python lists would take minutes."""
    shape = [len(chunk)]
    while _is_list(chunk.type):
        flat = chunk.flatten()
        if chunk.null_count or len(flat) % max(1, len(chunk)) or len(set(_lengths(chunk))) > 1:
            raise DataError(
                f"{path}: expected nested lists of one shape, got rows that differ or are empty; store encoded bytes"
            )
        shape.append(len(flat) // max(1, len(chunk)))
        chunk = flat
    if len(shape) < 3:
        raise DataError(
            f"{path}: expected pictures nested as rows and columns, got flat lists; store (h, w, c) or encoded bytes"
        )
    values: NDArray[Any] = chunk.to_numpy(zero_copy_only=False).reshape(shape)
    if (
        np.issubdtype(values.dtype, np.integer)
        and values.dtype != np.uint8
        and values.min() >= 0
        and values.max() <= 255
    ):
        values = values.astype(np.uint8)  # writers widen lists of levels to int64
    return values


def _lengths(chunk: Any) -> list[int]:
    import pyarrow.compute as pc

    unique: list[int] = pc.unique(pc.list_value_length(chunk)).to_pylist()
    return unique
