from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn

from louver.defenses.pca import Projection, Reconstruction, feature_chunks, fit_components
from louver.errors import ConfigError, DataError
from louver.stochastic import Noise
from louver.types import Images


def rows(n: int, p: int, *, offset: float = 0.0, decay: float = 0.7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n + p)
    basis = torch.linalg.qr(torch.randn(p, p, generator=generator, dtype=torch.float64)).Q
    scale = decay ** torch.arange(p, dtype=torch.float64)
    return (torch.randn(n, p, generator=generator, dtype=torch.float64) * scale @ basis.T + offset).float()


def chunked(z: torch.Tensor, size: int = 13):
    return lambda: iter(z.split(size))


@pytest.mark.parametrize(("n", "p", "k", "offset"), [(97, 24, 5, 0.0), (11, 30, 7, 0.0), (97, 24, 24, 50.0)])
def test_components_are_those_of_scikit_learn(n, p, k, offset):
    z = rows(n, p, offset=offset)
    theirs = PCA(k, svd_solver="full").fit(z.double().numpy())
    ours = fit_components(chunked(z), k, seed=0)
    assert np.allclose(ours.mean, theirs.mean_, rtol=1e-6, atol=1e-6)
    assert np.allclose(ours.variance, theirs.explained_variance_, rtol=1e-3, atol=1e-6)
    assert np.allclose(ours.explained, theirs.explained_variance_ratio_, rtol=1e-3, atol=1e-6)
    alike = np.abs((ours.components.numpy() * theirs.components_).sum(1))
    firm = theirs.explained_variance_ > 1e-4
    assert firm.sum() >= 5
    assert np.allclose(alike[firm], 1, atol=1e-4)


@pytest.mark.parametrize("decay", [0.9, 0.99])
@pytest.mark.parametrize("rows_held", [0, 52, 300])
def test_wide_features_lose_less_than_a_thousandth_of_the_variance(decay, rows_held):
    z, k = rows(211, 190, decay=decay), 9
    exact = fit_components(chunked(z), k, seed=0)
    wide = fit_components(chunked(z), k, seed=0, widest_exact=50, memory_bytes=rows_held * 190 * 4)
    centered = z - z.mean(0)
    kept = (centered @ wide.components.T).square().sum() / centered.square().sum()
    assert 0.999 * exact.explained.sum() <= kept <= exact.explained.sum() + 1e-5
    assert torch.allclose(wide.explained.sum(), kept, atol=1e-4)
    assert torch.allclose(wide.components @ wide.components.T, torch.eye(k), atol=1e-5)
    assert torch.allclose(wide.mean, exact.mean, atol=1e-5)


def test_rows_that_fit_in_memory_are_made_twice_and_others_a_few_times():
    z, passes = rows(211, 190, decay=0.9), []

    def chunks():
        passes.append(1)
        return iter(z.split(13))

    fit_components(chunks, 5, seed=0, widest_exact=50)
    assert len(passes) == 2
    passes.clear()
    fit_components(chunks, 5, seed=0, widest_exact=50, memory_bytes=100 * 190 * 4)
    assert 4 <= len(passes) <= 6


def test_the_size_of_chunks_changes_nothing():
    z = rows(60, 18, offset=3.0)
    one, many = (fit_components(chunked(z, size), 4, seed=0) for size in (60, 7))
    assert torch.allclose(one.components, many.components, atol=1e-4)
    assert torch.allclose(one.variance, many.variance, rtol=1e-4)


def test_reconstruction_undoes_projection_where_nothing_is_dropped():
    z = rows(40, 24).view(40, 2, 3, 4)
    found = fit_components(chunked(z), 24, seed=0)
    sent = Projection(found.mean, found.components)(z)
    back = Reconstruction(found.mean, found.components, found.explained, (2, 3, 4))(sent)
    assert sent.shape == (40, 24)
    assert torch.allclose(back, z, atol=1e-5)
    few = Projection(found.mean, found.components[:3])(z)
    assert torch.allclose(few.var(0), found.variance[:3], rtol=1e-3)


def test_what_cannot_be_reduced_is_refused():
    z = rows(9, 12)
    with pytest.raises(ConfigError, match="1 to 12 components"):
        fit_components(chunked(z), 13, seed=0)
    with pytest.raises(ConfigError, match="at most 9 components"):
        fit_components(chunked(z), 10, seed=0)
    with pytest.raises(DataError, match="the same features"):
        fit_components(chunked(torch.full((9, 12), 0.7)), 2, seed=0)
    with pytest.raises(DataError, match="got none"):
        fit_components(lambda: iter(()), 2, seed=0)


def test_chunks_cover_all_images_in_order_without_noise_and_leave_the_edge_as_it_was():
    pixels = np.random.default_rng(0).random((300, 3, 8, 10), dtype=np.float32)
    edge = nn.Sequential(nn.BatchNorm2d(3), Noise(1.0)).train()
    sent = list(feature_chunks(edge, Images(pixels=pixels)))
    assert len(sent) > 1
    assert torch.allclose(torch.cat(sent), torch.from_numpy(pixels), atol=1e-4)
    assert edge.training
    assert int(edge[0].num_batches_tracked) == 0
    broken = nn.Conv2d(3, 2, 1)
    nn.init.constant_(broken.weight, torch.nan)
    with pytest.raises(DataError, match="NaN or infinity"):
        next(feature_chunks(broken, Images(pixels=pixels)))
