from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

import oracles
from louver.errors import DataError
from louver.measures import image, ms_ssim, mse, psnr, ssim

N, C, H, W = 7, 3, 18, 23
SMALL = {"mse": mse, "psnr": psnr, "ssim": ssim}


def noisy(*shape: int, seed: int = 0, noise: float = 0.2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(shape, generator=generator)
    return truth, (truth + noise * torch.randn(shape, generator=generator)).clamp(0, 1)


def library_ssim(truth: Tensor, guess: Tensor, data_range: float = 1.0) -> np.ndarray:
    return np.array(
        [
            structural_similarity(
                a.double().numpy(),
                b.double().numpy(),
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                data_range=data_range,
                channel_axis=0,
            )
            for a, b in zip(truth, guess, strict=True)
        ]
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "make",
    [
        lambda c: noisy(N, c, H, W),
        lambda c: noisy(N, c, 11, 29, seed=1, noise=0.02),
        # Bright and almost flat: float32 loses the variance here unless the mean is taken out first.
        lambda c: (0.97 + 0.03 * noisy(N, c, H, W)[0], 0.97 + 0.03 * noisy(N, c, H, W, seed=2)[0]),
        lambda c: (torch.ones(N, c, H, W), torch.zeros(N, c, H, W)),
        lambda c: noisy(2, c, 150, 139, seed=3),
    ],
    ids=["noise", "thin", "bright", "opposite", "large"],
)
def test_ssim_equals_scikit_image(channels: int, make: Callable[[int], tuple[Tensor, Tensor]]):
    truth, guess = make(channels)
    expected = library_ssim(truth, guess)
    np.testing.assert_allclose(ssim(truth, guess).numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(ssim(truth.double(), guess.double()).numpy(), expected, atol=1e-10)


def test_ssim_equals_a_loop_over_windows():
    truth, guess = noisy(2, 3, 13, 16)
    expected = oracles.ssim(truth.double().numpy(), guess.double().numpy())
    np.testing.assert_allclose(ssim(truth, guess).numpy(), expected, atol=1e-6)


def test_both_ways_to_blur_agree(monkeypatch: pytest.MonkeyPatch):
    truth, guess = noisy(N, C, H, W)
    by_matrices = ssim(truth, guess)
    monkeypatch.setattr(image, "_MATMUL_MAX_SIDE", 0)
    torch.testing.assert_close(ssim(truth, guess), by_matrices, atol=1e-6, rtol=0)


def test_gradient_of_ssim_is_right():
    truth, guess = noisy(2, 1, 12, 13)
    guess = guess.double().clamp(0.01, 0.99).requires_grad_()
    assert torch.autograd.gradcheck(lambda g: ssim(truth.double(), g), (guess,), nondet_tol=0.0)


def test_gradient_of_ssim_is_finite_on_flat_images():
    guess = torch.full((N, C, H, W), 0.5, requires_grad=True)
    (1 - ssim(torch.zeros(N, C, H, W), guess).mean()).backward()
    assert guess.grad is not None
    assert torch.isfinite(guess.grad).all()


def test_ssim_climbs_when_it_is_the_loss():
    truth, guess = noisy(N, C, H, W)
    raw = torch.logit(guess.clamp(0.05, 0.95)).requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=0.05)
    first = ssim(truth, raw.sigmoid()).mean().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = 1 - ssim(truth, raw.sigmoid()).mean()
        loss.backward()
        optimizer.step()
    assert 1 - loss.item() > first + 0.1


def test_ssim_after_inference_mode_still_trains():
    image._band.cache_clear()
    truth, guess = noisy(N, C, 17, 19)
    with torch.inference_mode():
        ssim(truth, guess)
    guess.requires_grad_()
    ssim(truth, guess).sum().backward()
    assert guess.grad is not None


def test_ssim_is_not_computed_in_half_precision():
    truth, guess = noisy(N, C, H, W)
    expected = ssim(truth, guess)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ssim(truth, guess), expected, atol=0, rtol=0)
    assert ssim(truth.bfloat16(), guess.bfloat16()).dtype == torch.float32


def test_ms_ssim_equals_torchmetrics_up_to_its_border():
    # torchmetrics lets the window hang over the border at the coarsest scale (and only there). Weight 0 takes that
    # scale out; scikit-image, whose border rule is ours, gives what is missing.
    truth, guess = noisy(3, C, 176, 192, noise=0.3)
    guess = (guess * 0.8 + 0.1).clamp(0, 1)
    weights = (0.0448, 0.2856, 0.3001, 0.2363)
    finer = multiscale_structural_similarity_index_measure(
        guess,
        truth,
        data_range=1.0,
        sigma=1.5,
        kernel_size=11,
        reduction="none",
        normalize="relu",
        betas=(*weights, 0.0),
    )
    coarsest = [torch.nn.functional.avg_pool2d(images, 16) for images in (truth, guess)]
    expected = finer.numpy() * np.maximum(library_ssim(*coarsest), 0) ** 0.1333
    np.testing.assert_allclose(ms_ssim(truth, guess).numpy(), expected, atol=1e-5)


def test_ms_ssim_equals_a_loop_at_the_smallest_and_odd_size():
    truth, guess = noisy(1, 1, 161, 167, noise=0.3)
    expected = oracles.ms_ssim(truth[0, 0].double().numpy(), guess[0, 0].double().numpy())
    np.testing.assert_allclose(ms_ssim(truth, guess).item(), expected, atol=1e-5)


def test_ms_ssim_of_a_negative_trains_without_nan():
    truth = noisy(1, 1, 161, 167)[0]
    guess = (1 - truth).requires_grad_()
    value = ms_ssim(truth, guess)
    value.sum().backward()
    assert guess.grad is not None
    assert torch.isfinite(guess.grad).all()
    assert 0 <= value.item() < 0.01


def test_psnr_equals_scikit_image():
    truth, guess = noisy(N, C, H, W)
    expected = [
        peak_signal_noise_ratio(a.double().numpy(), b.double().numpy(), data_range=1.0)
        for a, b in zip(truth, guess, strict=True)
    ]
    np.testing.assert_allclose(psnr(truth, guess).numpy(), expected, atol=1e-4)


# Mistakes found in published code (methods.md, section 7), as far as they concern measures.


def test_mistake_peak_255():
    truth = torch.zeros(N, C, H, W)
    assert psnr(truth, truth + 0.1).tolist() == pytest.approx([20.0] * N, abs=1e-4)  # 68.1 dB with peak 255
    with pytest.raises(DataError, match="divide by 255"):
        psnr(truth, truth + 200)
    with pytest.raises(DataError, match="uint8"):
        image.check_pair(truth.to(torch.uint8), truth)


def test_mistake_psnr_pooled_over_the_batch():
    truth = torch.zeros(2, C, H, W)
    guess = torch.stack([torch.full((C, H, W), 0.01), torch.full((C, H, W), 0.5)])
    values = psnr(truth, guess)
    assert values.tolist() == pytest.approx([40.0, 6.0206], abs=1e-3)
    pooled = 10 * torch.log10(1 / (truth - guess).square().mean())
    assert abs(values.mean() - pooled) > 10


@pytest.mark.parametrize("name", SMALL)
def test_mistake_images_of_a_batch_mixed(name: str):
    truth, guess = noisy(N, C, H, W)
    values = SMALL[name](truth, guess)
    assert values.shape == (N,)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    torch.testing.assert_close(SMALL[name](truth[order], guess[order]), values[order])
    alone = torch.cat([SMALL[name](truth[i : i + 1], guess[i : i + 1]) for i in range(N)])
    torch.testing.assert_close(alone, values)


def test_mistake_range_inferred_from_the_prediction():
    truth, _ = noisy(N, C, H, W)
    guess = 0.45 + 0.1 * truth  # little contrast: an inferred range of 0.1 would change the constants
    fixed, inferred = (
        library_ssim(truth, guess),
        library_ssim(truth, guess, data_range=float(guess.max() - guess.min())),
    )
    assert np.abs(fixed - inferred).min() > 1e-3
    np.testing.assert_allclose(ssim(truth, guess).numpy(), fixed, atol=1e-5)


def test_mistake_mse_summed_over_channels():
    assert mse(torch.zeros(N, 3, H, W), torch.full((N, 3, H, W), 0.5)).tolist() == [0.25] * N


def test_perfect_reconstruction_leaves_means_finite():
    truth, guess = noisy(N, C, H, W)
    guess[0] = truth[0]
    assert psnr(truth, guess)[0].item() == image.PSNR_CAP_DB == 100.0
    assert torch.isfinite(psnr(truth, guess)).all()
    assert mse(truth, guess)[0] == 0
    assert ssim(truth, guess)[0].item() == pytest.approx(1.0, abs=1e-6)


def test_mse_of_many_pixels_keeps_its_digits():
    truth = torch.zeros(1, 3, 600, 700)
    guess = truth.clone()
    guess[:, 0] = 1.0
    guess[:, 1:] = 1e-3
    assert mse(truth, guess).item() == pytest.approx((1 + 2e-6) / 3, rel=1e-7)


@pytest.mark.parametrize("function", [mse, psnr, ssim, ms_ssim])
@pytest.mark.parametrize(
    ("truth", "guess", "says"),
    [
        (torch.rand(1, 3, 161, 170), torch.full((1, 3, 161, 170), torch.nan), "finite"),
        (torch.rand(1, 3, 161, 170), torch.full((1, 3, 161, 170), torch.inf), "finite"),
        (torch.full((1, 3, 161, 170), -0.01), torch.rand(1, 3, 161, 170), "truth finite and in"),
        (torch.rand(1, 3, 161, 170), torch.full((1, 3, 161, 170), 1.01), "guess finite and in"),
        (torch.rand(0, 3, 161, 170), torch.rand(0, 3, 161, 170), "at least one image"),
    ],
    ids=["nan", "infinity", "negative", "above one", "empty"],
)
def test_bad_images_are_refused(function: Callable[[Tensor, Tensor], Tensor], truth: Tensor, guess: Tensor, says: str):
    with pytest.raises(DataError, match=says):
        function(truth, guess)


@pytest.mark.parametrize("shape", [(7, 3, 23, 18), (6, 3, 18, 23), (7, 1, 18, 23), (3, 18, 23)])
def test_pairs_of_other_shapes_are_refused(shape: tuple[int, ...]):
    # Held against the guard itself: where tests check shapes in signatures, the measures never get to see these.
    for pair in ((torch.rand(N, C, H, W), torch.rand(shape)), (torch.rand(shape), torch.rand(N, C, H, W))):
        with pytest.raises(DataError, match="one shape"):
            image.check_pair(*pair)
    with pytest.raises(DataError, match="one shape"):
        image.check_pair(torch.rand(3, 18, 23), torch.rand(3, 18, 23))


def test_too_small_images_are_refused_by_size():
    with pytest.raises(DataError, match="at least 11 pixels"):
        ssim(torch.rand(N, C, 10, 23), torch.rand(N, C, 10, 23))
    with pytest.raises(DataError, match="at least 161 pixels"):
        ms_ssim(torch.rand(1, C, 170, 160), torch.rand(1, C, 170, 160))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), noise=st.floats(0.0, 1.0), channels=st.sampled_from([1, 3]))
def test_properties(seed: int, noise: float, channels: int):
    truth, guess = noisy(2, channels, 12, 15, seed=seed, noise=noise)
    error, ratio, similarity = mse(truth, guess), psnr(truth, guess), ssim(truth, guess)
    assert ((error >= 0) & (error <= 1)).all()
    assert ((ratio >= 0) & (ratio <= 100)).all()
    assert (similarity.abs() <= 1 + 1e-6).all()
    torch.testing.assert_close(similarity, ssim(guess, truth), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(error, mse(guess, truth))
    torch.testing.assert_close(ssim(truth, truth), torch.ones(2))
    torch.testing.assert_close(10 ** (-ratio / 10), error.clamp_min(1e-10), rtol=1e-4, atol=1e-10)
