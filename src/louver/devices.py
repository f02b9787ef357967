"""What the processor at hand is good at."""

from __future__ import annotations

import os

import torch

__all__ = ["has_fast_bfloat16", "n_cores"]


def n_cores() -> int:
    """How many this process may use; all there are, where the system keeps no such list."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 convolutions are faster than float32 here: measured on CPUs with AMX, and on Ampere or newer.

    Without AMX a CPU is slower in bfloat16, and older GPUs only emulate it.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())
