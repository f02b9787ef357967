from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.functional.image import lpips as torchmetrics_lpips

import oracles
from louver.errors import DataError, WeightsError
from louver.measures import MEASURES, MeasureContext, lpips_distance, perceptual_distance
from louver.measures.perceptual import _LPIPS_LAYOUTS, _lpips_layout, load_lpips

N, H, W = 3, 36, 41


def pair(channels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth, guess = torch.rand((2, N, channels, H, W), generator=generator)
    return truth, guess


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3, stride=3)

    def forward(self, images: Tensor) -> list[Tensor]:
        first = self.first(images).relu()
        return [first, self.second(first)]


def library(layout: str) -> nn.Module:
    """torchmetrics' LPIPS: the released heads, which it ships, on a backbone of random weights."""
    torch.manual_seed(0)
    return torchmetrics_lpips._LPIPS(pretrained=True, net=layout, pnet_rand=True)


def as_file(network: nn.Module, path: Path) -> Path:
    tensors = {}
    for key, value in network.state_dict().items():
        if key.startswith("net."):  # "net.slice2.3.weight" or "net.slices.1.3.weight"
            layer = key.removeprefix("net.slices.").removeprefix("net.").split(".", 1)[1]
            tensors["features." + layer] = value
        elif key.startswith("lin") and not key.startswith("lins"):
            tensors[key] = value
    save_file({key: value.clone() for key, value in tensors.items()}, path)
    return path


def test_equal_weights_distance_equals_a_loop():
    torch.manual_seed(1)
    backbone = Pyramid().double().requires_grad_(False)
    truth, guess = (images.double() for images in pair())
    maps = [[m.numpy() for m in backbone(images)] for images in (truth, guess)]
    expected = oracles.feature_distance(*maps, [np.ones(5), np.ones(4)]) / 2
    np.testing.assert_allclose(perceptual_distance(backbone)(truth, guess).numpy(), expected, atol=1e-10)


def test_lpips_equals_a_loop():
    torch.manual_seed(2)
    features = nn.Sequential(nn.Conv2d(3, 6, 5, stride=4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 7, 3), nn.ReLU())
    heads = [torch.rand(6), torch.rand(7)]
    truth, guess = pair()
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    maps = []
    with torch.no_grad():
        for images in (truth, guess):
            x = (2 * images - 1 - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1)
            maps.append([features[:2](x).double().numpy(), features(x).double().numpy()])
    expected = oracles.feature_distance(*maps, [head.double().numpy() for head in heads])
    np.testing.assert_allclose(lpips_distance(features, (1, 4), heads)(truth, guess).numpy(), expected, atol=1e-6)
    assert features[0].weight.requires_grad  # the user's network is left alone


@pytest.mark.parametrize("layout", _LPIPS_LAYOUTS)
def test_layouts_are_recognized_by_their_keys_and_tap_the_right_widths(layout: str):
    with torch.device("meta"):
        features = getattr(torchvision.models, layout)(weights=None).features
        assert _lpips_layout({key: value.shape for key, value in features.state_dict().items()}, "")[0] == layout
        x, widths = torch.empty(1, 3, 64, 64), {}
        for index, layer in enumerate(features):
            x = layer(x)
            widths[index] = x.shape[1]
    assert {index: widths[index] for index in _LPIPS_LAYOUTS[layout]} == _LPIPS_LAYOUTS[layout]


# VGG has the same layout as the other two, and takes ten seconds to fill with random weights.
@pytest.mark.parametrize("layout", ["alex", "squeeze"])
def test_lpips_from_a_file_equals_torchmetrics(layout: str, tmp_path: Path):
    network = library(layout)
    path = as_file(network, tmp_path / "lpips.safetensors")
    truth, guess = pair()
    with torch.no_grad():
        expected = network(2 * truth - 1, 2 * guess - 1).flatten()
    assert expected.min() > 0
    torch.testing.assert_close(load_lpips(path)(truth, guess), expected, rtol=1e-3, atol=1e-7)
    if layout == "alex":
        computed = MEASURES["lpips"].compute(truth, guess, MeasureContext(lpips_weights=path))
        assert computed.dtype == np.float64
        np.testing.assert_allclose(computed, expected.double().numpy(), rtol=1e-3, atol=1e-7)


def test_gray_images_count_as_three_equal_channels():
    torch.manual_seed(3)
    distance = perceptual_distance(Pyramid())
    truth, guess = pair(channels=1)
    torch.testing.assert_close(distance(truth, guess), distance(truth.repeat(1, 3, 1, 1), guess.repeat(1, 3, 1, 1)))


def test_the_true_image_is_at_distance_zero_and_noise_is_further_than_a_trace():
    torch.manual_seed(4)
    distance = perceptual_distance(Pyramid())
    truth, guess = pair()
    assert (distance(truth, truth) == 0).all()
    assert (distance(truth, 0.9 * truth + 0.1 * guess) < distance(truth, guess)).all()


def test_dead_positions_are_not_nan():
    class Dead(nn.Module):
        def forward(self, images: Tensor) -> list[Tensor]:
            return [images * 0]

    assert perceptual_distance(Dead())(*pair()).tolist() == [0.0] * N


def test_shared_weights_see_what_is_alike():
    measure = MEASURES["squeezenet_distance"]
    reason = measure.missing((3, H, W), MeasureContext())
    if reason is not None:
        pytest.skip(reason)
    truth, guess = pair()
    near = (0.9 * truth + 0.1 * guess).clamp(0, 1)
    values = [measure.compute(truth, other, MeasureContext()) for other in (truth, near, guess)]
    assert values[0].tolist() == [0.0] * N
    assert (values[1] < values[2]).all()
    assert (values[2] < measure.bounds[1]).all()
    assert "not LPIPS" in measure.description


def test_files_that_are_not_lpips_are_refused(tmp_path: Path):
    path = tmp_path / "bad.safetensors"
    with pytest.raises(WeightsError, match="cannot be read"):
        load_lpips(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_lpips(path)
    save_file({"features.0.weight": torch.zeros(2)}, path)
    with pytest.raises(WeightsError, match="fit none of them"):
        load_lpips(path)
    features = {
        f"features.{key}": value for key, value in torchvision.models.squeezenet1_1().features.state_dict().items()
    }
    save_file(features, path)
    with pytest.raises(WeightsError, match=r"lin0\.model\.1\.weight .* no such key"):
        load_lpips(path)
    heads = {f"lin{k}.model.1.weight": torch.zeros(1, c, 1, 1) for k, c in enumerate((64, 128, 256, 384, 384, 512))}
    save_file({**features, **heads, "lin6.model.1.weight": torch.zeros(1, 511, 1, 1)}, path)
    with pytest.raises(WeightsError, match=r"lin6.* got \(1, 511, 1, 1\)"):
        load_lpips(path)
    save_file({**features, **heads, "lin6.model.1.weight": torch.full((1, 512, 1, 1), torch.nan)}, path)
    with pytest.raises(WeightsError, match="NaN"):
        load_lpips(path)


def test_small_images_and_odd_channels_are_refused():
    distance = perceptual_distance(Pyramid())
    with pytest.raises(DataError, match="at least 32 pixels"):
        distance(torch.rand(2, 3, 31, 40), torch.rand(2, 3, 31, 40))
    with pytest.raises(DataError, match="1 or 3 channels"):
        distance(torch.rand(2, 2, 36, 40), torch.rand(2, 2, 36, 40))
    with pytest.raises(WeightsError, match="one head for each"):
        lpips_distance(nn.Sequential(nn.ReLU()), (0,), [])
