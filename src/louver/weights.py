"""Checkpoints: read, fitted to a network, written. No code of a file is ever run.

`.safetensors` and `.npz` hold arrays only; `.pt` and `.pth` are pickles, read with torch's `weights_only=True`.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from louver.errors import WeightsError, nearest
from louver.storage import write_bytes

__all__ = ["fit_weights", "read_weights", "save_weights", "weights_file"]

SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")
NESTINGS = ("state_dict", "model_state_dict", "model")


def weights_file(weights: str | Path) -> Path:
    """The file that `weights` means: a path, or the name of one in the weights folder of the shared data.

    Raises:
        WeightsError: there is no such file; the message lists the nearest names, or says how to set LOUVER_DATA.
    """
    path = Path(weights)
    if path.is_file():
        return path
    folder = _weights_folder()
    if folder is not None and len(path.parts) == 1:
        for name in (path.name, *(path.name + suffix for suffix in SUFFIXES)):
            if (folder / name).is_file():
                return folder / name
    if folder is None:
        hint = "give the path of a file, or set LOUVER_DATA to the folder whose weights/ holds it"
    else:
        stems = sorted(file.stem for file in folder.iterdir() if file.suffix in SUFFIXES)
        hint = f"give the path of a file, or a name from the weights folder ({nearest(path.name, stems)})"
    raise WeightsError(f"weights {str(weights)!r}: no such file; {hint}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU; an outer {"state_dict": …} and "module." prefixes are taken off.

    Raises:
        WeightsError: the file is damaged, of an unknown kind, holds code, or holds no tensors.
    """
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz, ".pt": _read_pickle, ".pth": _read_pickle}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise WeightsError(
            f"{path}: expected a file that ends in {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'!r}"
        )
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        state = reader(path)
    except OSError as error:
        raise WeightsError(f"{path}: the file cannot be read ({error})") from error
    if not state:
        raise WeightsError(f"{path}: expected tensors by name, got none; save the model's state_dict()")
    while all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def fit_weights(network: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Puts `state` into `network`, all or nothing; dtypes follow the network.

    Counters of batch normalisation (num_batches_tracked) may be missing: inference does not use them.

    Raises:
        WeightsError: a tensor is missing, unexpected, of another shape, or not finite; the message names the first.
    """
    wanted = network.state_dict()
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in wanted]
    shared = [name for name in wanted if name in state]
    misshaped = [name for name in shared if wanted[name].shape != state[name].shape]
    if missing or unexpected or misshaped:
        shapes = [f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}" for name in misshaped]
        parts = [_first("missing", missing), _first("unexpected", unexpected), _first("of another shape", shapes)]
        is_head = bool(misshaped) and not (missing or unexpected) and len(misshaped) <= 2
        n_classes = state[misshaped[0]].shape[0] if is_head and state[misshaped[0]].ndim else None
        remedy = (
            f"set n_classes to the number the weights were trained with (probably {n_classes})"
            if n_classes
            else "these weights belong to another network, or another version of it: name the one they were saved from"
        )
        n_fit = len(shared) - len(misshaped)
        raise WeightsError(
            f"{source} does not fit {type(network).__name__} ({n_fit} of {len(wanted)} tensors fit): "
            f"{'; '.join(part for part in parts if part)}; {remedy}"
        )
    for name in shared:
        if state[name].is_floating_point() and not bool(torch.isfinite(state[name]).all()):
            raise WeightsError(
                f"{source}: tensor {name} holds NaN or infinity; take a checkpoint from before training broke"
            )
    network.load_state_dict({**wanted, **state})


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Writes the weights of `model` to `path` as safetensors; `path` holds either all of them or what it held before.

    Raises:
        StorageError: the disk refused.
    """
    # A clone of each: safetensors refuses tensors that share memory, which tied weights do.
    state = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in model.state_dict().items()}
    write_bytes(Path(path), safetensors.torch.save(state))


def _weights_folder() -> Path | None:
    # Here and not above: naming a file must not need the readers of images.
    from louver.data import data_root

    root = data_root()
    folder = None if root is None else root / "weights"
    return folder if folder is not None and folder.is_dir() else None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({error}); copy or save it again") from error


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        # Opened here and not by numpy, which leaves a file that it cannot read open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise WeightsError(f"{path}: not a whole npz file of plain arrays ({error}); copy or save it again") from error
    state = {}
    for name, values in _unpacked(arrays).items():
        if values.dtype.kind not in "fiub":
            raise WeightsError(f"{path}: array {name} has dtype {values.dtype}; a checkpoint holds numbers only")
        state[name] = torch.from_numpy(np.array(values))
    if path.stem == "squeezenet1_0_imagenet":
        _refold_caffe_input(state)
    return state


def _unpacked(arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    """Arrays with their 8-bit packing undone: NAME__u8 indexes NAME__codebook, or is linear with NAME__q."""
    plain = {name: values for name, values in arrays.items() if "__" not in name}
    for name, codes in arrays.items():
        base, _, kind = name.rpartition("__")
        if kind != "u8":
            continue
        if f"{base}__codebook" in arrays:
            plain[base] = arrays[f"{base}__codebook"][codes.astype(np.int64)]
        else:
            scale, zero, low = arrays[f"{base}__q"].astype(np.float64)
            plain[base] = ((codes.astype(np.float64) - zero) * scale + low).astype(np.float32)
    return plain


def _refold_caffe_input(state: dict[str, Tensor]) -> None:
    """Makes a first layer made for BGR in 0..255, less (104, 117, 123), take RGB normalised the ImageNet way.

    Exact but for rounding: the layer is linear and does not pad, so shift and scale move into its bias and weights.
    """
    weight, bias = state["features.0.weight"].double().flip(1), state["features.0.bias"].double()
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64) * 255
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64) * 255
    subtracted = torch.tensor([123.0, 117.0, 104.0], dtype=torch.float64)
    state["features.0.bias"] = (bias + torch.einsum("ochw,c->o", weight, mean - subtracted)).float()
    state["features.0.weight"] = (weight * std.view(1, 3, 1, 1)).float().contiguous()


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        loaded: object = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"{path}: it holds more than tensors, or is damaged ({reason[:160]}); a pickle can run code when "
            "opened, so it is not opened any other way: where you trust it, convert it with "
            "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors') and give that file"
        ) from error
    for _ in NESTINGS:
        if isinstance(loaded, Mapping):
            loaded = next((loaded[key] for key in NESTINGS if isinstance(loaded.get(key), Mapping)), loaded)
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise WeightsError(
            f"{path}: expected tensors by name, got {type(loaded).__name__}; "
            "save the model's state_dict(), not the model"
        )
    return {str(name): value for name, value in loaded.items()}


def _first(what: str, names: list[str], *, most: int = 3) -> str:
    if not names:
        return ""
    return f"{len(names)} {what} ({', '.join(names[:most])}{', …' if len(names) > most else ''})"
