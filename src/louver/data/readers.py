"""One string names any set of pictures: `cifar10/train[:40000]`, `streets/7[:3000]`, `veri776:VeRi/image_train`."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from louver.data.arrays import load_npz, load_parquet
from louver.data.folders import load_folder, load_market1501, load_vehicleid, load_veri776
from louver.data.packed import DATA_NAMES, load_shared
from louver.data.pictures import Wanted, fit, from_pil, stack, wanted
from louver.data.windows import Window, split_window
from louver.errors import DataError, MissingExtraError, nearest
from louver.types import Images

__all__ = ["data_root", "load_images"]

_FOLDERS: dict[str, Callable[[Path, Window, Wanted], Images]] = {
    "folder": load_folder,
    "market1501": load_market1501,
    "vehicleid": load_vehicleid,
    "veri776": load_veri776,
}
_PREFIX = re.compile(r"(?P<kind>\w+):(?P<rest>.+)", re.DOTALL)
_ARRAYS = re.compile(r"(?P<path>.+\.(?P<kind>npz|parquet))(?:/(?P<split>\w+))?", re.DOTALL | re.IGNORECASE)


def data_root() -> Path | None:
    """The folder of the shared image sets: `LOUVER_DATA`, else `../shared/data` by the repository or here, else None.

    Raises:
        DataError: `LOUVER_DATA` names what is not a folder.
    """
    named = os.environ.get("LOUVER_DATA")
    if named:
        if not Path(named).is_dir():
            raise DataError(f"expected a folder in LOUVER_DATA, got {named!r}; correct it or unset it")
        return Path(named)
    repository = Path(__file__).resolve().parents[3]
    beside = (base.parent / "shared" / "data" for base in (repository, Path.cwd()))
    return next((folder for folder in beside if folder.is_dir()), None)


def load_images(
    source: str,
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    download: bool = False,
) -> Images:
    """The pictures that `source` names, in a fixed order, with their labels.

    `source` is one of these, each with an optional `[a:b]` behind it, read as a Python slice:

    - `NAME` or `NAME/SPLIT`: a shared set (`DATA_NAMES`); splits can be chained: `celeba299_faces/targets/train`.
    - `streets/SEED[:N]`: the first N pictures of the generated world.
    - `FILE.npz`, `FILE.npz/SPLIT`, `FILE.parquet`, or a folder with a subfolder a class.
    - `folder:PATH`, `veri776:PATH`, `vehicleid:PATH`, `market1501:PATH`: a layout, said outright.
    - `torchvision:NAME/SPLIT`: one of its data sets, kept in `LOUVER_CACHE` or found with the shared sets.

    A path that is spelled like a shared set needs `./` or `folder:` before it. `size` (height, width) resizes to cover
    and crops to the center; `channels` makes gray pictures color (3) or the reverse (1). `download` lets torchvision
    fetch what is missing; nothing else touches the network.

    Raises:
        DataError: an unknown or empty source, or pictures or labels that are damaged or do not fit together.
        MissingExtraError: the source needs an optional package.

    >>> load_images("streets/7[:5]", size=48).image_shape
    (3, 48, 48)
    """
    wish = wanted(size, channels)
    body, window = (source, Window()) if Path(source).exists() else split_window(source)
    return dataclasses.replace(_load(body, window, wish, download), name=source)


def _load(body: str, window: Window, wish: Wanted, download: bool) -> Images:
    prefix = _PREFIX.fullmatch(body)
    if prefix is not None and prefix["kind"] in _FOLDERS:
        return _FOLDERS[prefix["kind"]](Path(prefix["rest"]), window, wish)
    if prefix is not None and prefix["kind"] == "torchvision":
        return _load_torchvision(prefix["rest"], window, wish, download)
    name, *selectors = body.split("/")
    if name == "streets":
        return _load_streets(selectors, window, wish)
    if name in DATA_NAMES:
        root = data_root()
        if root is None:
            raise DataError(
                f"{body}: expected the shared image sets, got no folder; set LOUVER_DATA to the one that holds them"
            )
        return load_shared(root, name, tuple(selectors), window, wish)
    arrays = _ARRAYS.fullmatch(body)
    if arrays is not None and not Path(body).is_dir():
        if arrays["kind"].lower() == "npz":
            return load_npz(Path(arrays["path"]), arrays["split"], window, wish)
        if arrays["split"] is None:
            return load_parquet(Path(arrays["path"]), window, wish)
    if Path(body).is_dir():
        return load_folder(Path(body), window, wish)
    raise DataError(
        f"expected a data set, a .npz or .parquet file or a folder, optionally with [a:b] behind it, got {body!r}; "
        + nearest(name, [*DATA_NAMES, "streets", *(f"{kind}:PATH" for kind in _FOLDERS), "torchvision:NAME"])
    )


def _load_streets(selectors: list[str], window: Window, wish: Wanted) -> Images:
    from louver.data.streets import streets

    seed = selectors[0] if selectors else "0"
    if len(selectors) > 1 or not seed.isdecimal():
        raise DataError(f"expected streets/SEED with a whole number, got streets/{'/'.join(selectors)}")
    start, stop = window.start or 0, window.stop
    if stop is None or stop < 1 or not 0 <= start < stop:
        raise DataError(f"streets/{seed}: expected how many to make, such as streets/{seed}[:3000], got {window}")
    if wish.size is not None and wish.size[0] == wish.size[1]:
        made = streets(stop, seed=int(seed), size=wish.size[0])
    else:
        made = streets(stop, seed=int(seed))
    return fit(made.take(slice(start, stop)), wish)


def _load_torchvision(rest: str, window: Window, wish: Wanted, download: bool) -> Images:
    name, _, split = rest.partition("/")
    try:
        from torchvision import datasets
    except ImportError as error:
        raise MissingExtraError("torchvision data sets need torchvision: pip install 'louver[lab]'") from error
    if name not in datasets.__all__:
        raise DataError(f"torchvision has no data set {name!r}; {nearest(name, sorted(datasets.__all__))}")
    factory = getattr(datasets, name)
    takes = set(inspect.signature(factory).parameters)
    options: dict[str, Any] = {}
    if split and "train" in takes:
        if split not in ("train", "test"):
            raise DataError(f"torchvision:{name}: no split {split!r}; {nearest(split, ['train', 'test'])}")
        options["train"] = split == "train"
    elif split and "split" in takes:
        options["split"] = split
    elif split:
        raise DataError(f"torchvision:{name}: expected no split, as this set has none, got {split!r}")
    if "download" in takes:
        options["download"] = download
    dataset = _construct(factory, name, options, "root" in takes)
    picked = window.range(len(dataset), f"torchvision:{name}")
    label = np.empty(len(picked), np.int64)

    def pictures() -> Iterator[tuple[str, NDArray[np.uint8]]]:
        for place, index in enumerate(picked):
            opened, target = dataset[index]
            if not hasattr(opened, "convert") or not isinstance(target, (int, np.integer)):
                raise DataError(
                    f"torchvision:{name}: expected pictures with one whole number as label, got "
                    f"{type(opened).__name__} with {type(target).__name__}; this set is not one of classes"
                )
            label[place] = target
            yield f"{name} image {index}", from_pil(opened, f"{name} image {index}", wish)

    pixels = stack(len(picked), pictures(), f"torchvision:{name}")
    names = getattr(dataset, "classes", None)
    has_names = isinstance(names, (list, tuple)) and all(isinstance(one, str) for one in names)
    return Images(
        pixels=pixels, labels={"label": label}, classes={"label": tuple(names)} if has_names and names else {}
    )


def _construct(factory: Any, name: str, options: dict[str, Any], takes_root: bool) -> Any:  # noqa: ANN401 - any data set
    cache = Path(os.environ.get("LOUVER_CACHE") or Path.home() / ".cache" / "louver")
    shared = None if options.get("download") else data_root()
    roots = [root for root in (cache, shared) if root is not None] if takes_root else [None]
    reason: Exception | None = None
    for root in roots:
        try:
            return factory(**({} if root is None else {"root": str(root)}), **options)
        except (RuntimeError, OSError) as error:
            reason = reason or error
        except ValueError as error:
            raise DataError(f"torchvision:{name}: {error}") from error
    raise DataError(
        f"torchvision:{name}: expected its files in {' or '.join(str(root) for root in roots)}, got: {reason}; "
        "allow the download, or put the files there (LOUVER_CACHE names another folder)"
    ) from reason
