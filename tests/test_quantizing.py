"""Whole numbers on the wire: how far off, packed how, and what no step can say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from louver.errors import ConfigError, DataError
from louver.quantizing import channel_dimension, fit_quantization, rounded

SHAPES = {"maps": (5, 3, 4), "odd": (3, 5, 7), "tokens": (7, 6), "row": (9,)}


def features(shape: tuple[int, ...], n: int = 40, seed: int = 0) -> Tensor:
    """Channels that differ a hundredfold in scale, and in sign."""
    dimension = channel_dimension(shape)
    count = shape[dimension]
    view = [1] * (len(shape) + 1)
    view[dimension + 1] = count
    scale, shift = torch.logspace(-1, 1, count).view(view), torch.linspace(-1, 1, count).view(view)
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)).tanh() * scale + 2 * shift * scale


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_each_channel_has_steps_of_its_own(shape: tuple[int, ...], bits: int) -> None:
    x = features(shape)
    quantize, dequantize = fit_quantization(x, bits)
    sent = quantize(x)
    assert sent.dtype == torch.uint8
    count = torch.Size(shape).numel()
    assert sent.shape[1:] == (shape if bits == 8 else (-(-count // 2),))
    back = dequantize(sent)
    assert back.shape == x.shape
    dimension = channel_dimension(shape) + 1
    spread = x.movedim(dimension, 0).flatten(1)
    off = (back - x).movedim(dimension, 0).flatten(1).square().mean(1).sqrt() / spread.std(1)
    assert float(off.max()) < (0.01 if bits == 8 else 0.12)
    # Not cut off: within half a step.
    inside = (x >= quantize.low) & (x <= quantize.low + (2**bits - 1) * quantize.step)
    assert bool(((back - x).abs() <= quantize.step * 0.5001)[inside].all())


def test_packing_is_that_of_a_slow_loop() -> None:
    x = features((3, 5, 7), n=2)
    quantize, _ = fit_quantization(x, 4)
    numbers = ((x - quantize.low) / quantize.step).round().clamp(0, 15).flatten(1).int()
    for row, sent in zip(numbers.tolist(), quantize(x).tolist(), strict=True):
        padded = [*row, 0]
        assert sent == [padded[i] + 16 * padded[i + 1] for i in range(0, len(padded), 2)]


def test_a_rare_giant_costs_the_others_little() -> None:
    x = features((4, 6, 6), n=60)
    x[0, 0, 0, 0] = 1000.0
    quantize, dequantize = fit_quantization(x, 8)
    plain = (1000.0 - float(x[:, 0].min())) / 255
    assert float(quantize.step[0, 0]) < plain
    assert float((dequantize(quantize(x)) - x)[1:].abs().max()) < 4


def test_what_never_changes_comes_back_and_zero_stays_zero() -> None:
    x = torch.relu(features((4, 3, 5)))
    x[:, 1] = 0.7
    x[:, 2] = 0.0
    quantize, dequantize = fit_quantization(x, 8)
    back = dequantize(quantize(x))
    torch.testing.assert_close(back[:, 1:3], x[:, 1:3])
    assert bool((back[x == 0] == 0).all())


def test_gradients_pass_the_rounding() -> None:
    x = features((3, 4, 5), n=3).requires_grad_()
    quantize, dequantize = fit_quantization(x, 8)
    out = rounded(x, quantize, dequantize)
    assert torch.equal(out.detach(), dequantize(quantize(x)))
    (gradient,) = torch.autograd.grad((3 * out).sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 3))


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="4 or 8 bits"):
        fit_quantization(torch.randn(4, 3), 3)
    with pytest.raises(DataError, match="finite"):
        fit_quantization(torch.full((4, 3), torch.nan), 8)
    with pytest.raises(DataError, match="2 finite"):
        fit_quantization(torch.randn(1, 3), 8)
