"""What onnxruntime raises, for both halves."""

from __future__ import annotations

from onnxruntime.capi import onnxruntime_pybind11_state as states

__all__ = ["RUN_ERRORS"]

RUN_ERRORS: tuple[type[Exception], ...] = (
    *(kind for kind in vars(states).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    MemoryError,
    RuntimeError,
    ValueError,
)
"""Its classes have no root of their own, and which of them a graph raises depends on where it is damaged."""
