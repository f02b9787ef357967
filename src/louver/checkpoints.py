"""Checkpoints of training: one safetensors file with its facts as JSON in the header, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from louver.errors import WeightsError
from louver.storage import write_bytes

__all__ = ["cloned", "read_checkpoint", "restore_optimizer", "write_checkpoint"]


def cloned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy on the CPU in plain memory order, which is what a file holds."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}


def write_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], marks: Mapping[str, str]
) -> None:
    """One file for tensors ("part/name") and the rest: two files could be of two epochs after a crash.

    Raises:
        StorageError: the disk refused; what was there before is kept.
    """
    facts = json.dumps({**header, "marks": dict(marks)})
    write_bytes(path, safetensors.torch.save(cloned(tensors), metadata={"louver": facts}))


def read_checkpoint(path: Path, marks: Mapping[str, str]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by part, and the header.

    Raises:
        WeightsError: the file is damaged, or of a run with other marks; the message names them.
    """
    remedy = "remove it to train from the start, or name another file"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["louver"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            written = header["marks"]
    except (safetensors.SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path}: not a training checkpoint, or damaged ({error}); {remedy}") from error
    other = [what for what in (*marks, *written) if written.get(what) != marks.get(what)]
    if other:
        raise WeightsError(
            f"{path}: the checkpoint is of a run with another {', '.join(dict.fromkeys(other))}; {remedy}"
        )
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = value
    return parts, header


def restore_optimizer(optimizer: torch.optim.Optimizer, slots: Mapping[str, Tensor]) -> None:
    """Puts back what `optimizer.state_dict()` gave as "index/slot" tensors, in each parameter's memory order."""
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in slots.items():
        index, _, slot = name.partition("/")
        like = parameters[int(index)]
        # In the memory order of its parameter: a kernel for another order may round differently.
        is_alike = value.shape == like.shape
        state.setdefault(int(index), {})[slot] = torch.empty_like(like).copy_(value) if is_alike else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
