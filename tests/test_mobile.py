"""The edge as an ExecuTorch program: it sends what the split's edge sends, and says what is missing."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from louver.errors import MissingExtraError
from louver.graphs import given_noise
from louver.mobile import to_executorch
from louver.stochastic import Noise
from toys import SHAPE, Wide


def test_without_executorch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    monkeypatch.setitem(sys.modules, "executorch.backends.xnnpack.partition.xnnpack_partitioner", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'louver\[executorch\]'"):
        to_executorch(Wide(), {"image": torch.rand(2, *SHAPE)})


@pytest.mark.filterwarnings("ignore")  # of executorch's own imports
def test_a_program_computes_what_the_edge_computes() -> None:
    pytest.importorskip("executorch.runtime", reason="executorch is not installed: louver[executorch]")
    from executorch.runtime import Runtime

    edge = nn.Sequential(Wide(channels=6), Noise(0.5), nn.ReLU()).eval()
    images, noise = torch.rand(3, *SHAPE), torch.randn(3, 6, *SHAPE[1:])
    given = given_noise(edge, images)
    content = to_executorch(given, {"image": images, "noise_0": noise})
    program = Runtime.get().load_program(content).load_method("forward")
    for i in range(3):
        inputs = [images[i : i + 1].contiguous(), noise[i : i + 1].contiguous()]
        (got,) = program.execute(inputs)
        torch.testing.assert_close(got, given(*inputs).detach(), atol=1e-5, rtol=1e-4)
