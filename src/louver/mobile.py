"""The edge half as an ExecuTorch program (.pte), for phones and boards that run no onnxruntime."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from louver.errors import CutError, MissingExtraError

__all__ = ["executorch_program", "to_executorch"]

_MISSING = "ExecuTorch programs need executorch: pip install 'louver[executorch]'"


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
        raise MissingExtraError(_MISSING) from error
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


def executorch_program(content: bytes) -> Callable[[Sequence[Tensor]], Tensor]:
    """What `to_executorch` made, as a function of its inputs, of one image at a time.

    Raises:
        MissingExtraError: executorch is not installed, or without its runtime.
    """
    try:
        from executorch.runtime import Runtime
    except ImportError as error:
        raise MissingExtraError(_MISSING) from error
    program = Runtime.get().load_program(content)
    method = program.load_method("forward")
    # It reads from these for as long as it runs, and keeps none of them alive.
    kept = content, program

    def run(inputs: Sequence[Tensor], _kept: object = kept) -> Tensor:
        found: Tensor
        (found,) = method.execute([one.contiguous() for one in inputs])
        return found.clone()  # the next run writes into the same memory

    return run
