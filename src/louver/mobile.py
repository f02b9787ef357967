"""The edge half as an ExecuTorch program (.pte), for phones and boards that run no onnxruntime."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from louver.errors import CutError, MissingExtraError

__all__ = ["to_executorch"]


def to_executorch(module: nn.Module, inputs: dict[str, Tensor]) -> bytes:
    """`module` lowered to XNNPACK where that has its operations, for exactly one image at a time.

    Raises:
        MissingExtraError: executorch is not installed.
        CutError: the module uses an operation that ExecuTorch does not have.
    """
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    except ImportError as error:
        raise MissingExtraError("ExecuTorch programs need executorch: pip install 'louver[executorch]'") from error
    one = tuple(value[:1].contiguous() for value in inputs.values())
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the lowering's own future
            program = torch.export.export(module, one)
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            content: bytes = lowered.to_executorch().buffer
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise CutError(f"this edge cannot be written for ExecuTorch: {str(error).splitlines()[0]}") from error
    return content
