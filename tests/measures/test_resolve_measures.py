from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from louver.errors import ConfigError, DataError
from louver.measures import MEASURES, MeasureContext, perceptual, resolve_measures

SHAPE = (3, 36, 41)
MODEL = nn.Sequential(nn.Flatten(), nn.Linear(3 * 36 * 41, 5))


def names(*arguments: object) -> list[str]:
    return [measure.name for measure in resolve_measures(*arguments)]  # type: ignore[arg-type]


@pytest.fixture
def without_shared_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    perceptual.shared_distance.cache_clear()
    monkeypatch.setenv("LOUVER_DATA", str(tmp_path))
    yield
    perceptual.shared_distance.cache_clear()


def test_the_table_names_itself():
    assert list(MEASURES) == [measure.name for measure in MEASURES.values()]
    assert set(MEASURES) == {
        "lpips",
        "ms_ssim",
        "mse",
        "psnr",
        "recognized",
        "reidentified",
        "squeezenet_distance",
        "ssim",
    }


def test_default_without_weights_or_model(without_shared_weights: None):
    assert names(None, SHAPE) == ["mse", "psnr", "ssim", "reidentified"]
    assert names(None, (1, 10, 41)) == ["mse", "psnr", "reidentified"]
    assert names(None, (3, 161, 170), MeasureContext(model=MODEL)) == [
        "mse",
        "psnr",
        "ssim",
        "ms_ssim",
        "recognized",
        "reidentified",
    ]
    assert "ms_ssim" not in names(None, (3, 160, 170))


def test_default_takes_the_shared_weights_where_they_are():
    if MEASURES["squeezenet_distance"].missing(SHAPE, MeasureContext()) is not None:
        pytest.skip("the shared weights are not here")
    assert names(None, SHAPE) == ["mse", "psnr", "ssim", "squeezenet_distance", "reidentified"]


def test_names_come_back_in_their_order():
    assert names(["ssim", "mse"], SHAPE) == ["ssim", "mse"]
    assert names([], SHAPE) == []


@pytest.mark.parametrize(
    ("wanted", "shape", "says"),
    [
        ("sim", SHAPE, "nearest: ssim"),
        ("ms_ssim", (3, 160, 170), "needs 161 pixels"),
        ("ssim", (3, 10, 41), "needs 11 pixels"),
        ("recognized", SHAPE, "needs the victim model"),
        ("lpips", SHAPE, "LPIPS weights"),
        ("squeezenet_distance", SHAPE, "weights were not loaded"),
    ],
)
def test_what_is_asked_for_is_never_left_out_in_silence(
    wanted: str, shape: tuple[int, int, int], says: str, without_shared_weights: None
):
    with pytest.raises(ConfigError, match=says):
        resolve_measures(["mse", wanted], shape)
    assert wanted not in MEASURES or not MEASURES[wanted].available(shape)


def test_a_measure_named_twice_is_refused():
    with pytest.raises(ConfigError, match="twice"):
        resolve_measures(["ssim", "ssim"], SHAPE)


@pytest.mark.parametrize(
    "name", ["mse", "psnr", "ssim", "ms_ssim", "recognized", "reidentified", "squeezenet_distance"]
)
def test_contract_one_finite_value_an_image_that_points_the_right_way(name: str):
    measure = MEASURES[name]
    shape = (3, 161, 163) if name == "ms_ssim" else SHAPE
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * shape[1] * shape[2], 5))
    context = MeasureContext(model=model)
    reason = measure.missing(shape, context)
    if reason is not None:
        pytest.skip(reason)
    truth = torch.rand(7, *shape)
    near, far = (0.95 * truth + 0.05 * torch.rand_like(truth)), torch.rand_like(truth)
    copies = truth.clone(), near.clone()
    values = {what: measure.compute(truth, guess, context) for what, guess in (("near", near), ("far", far))}
    assert torch.equal(copies[0], truth)
    assert torch.equal(copies[1], near)
    for value in values.values():
        assert value.shape == (7,)
        assert value.dtype == np.float64
        assert np.isfinite(value).all()
        assert (value >= measure.bounds[0]).all()
        assert (value <= measure.bounds[1]).all()
    sign = 1 if measure.leaks_when == "high" else -1
    assert sign * values["near"].mean() > sign * values["far"].mean()
    with pytest.raises(DataError):
        measure.compute(truth, torch.full_like(truth, torch.nan), context)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch):
    import louver.measures

    truth, guess = torch.rand(11, *SHAPE), torch.rand(11, *SHAPE)
    context = MeasureContext()
    whole = MEASURES["ssim"].compute(truth, guess, context)
    monkeypatch.setattr(louver.measures, "_CHUNK", 4)
    np.testing.assert_allclose(MEASURES["ssim"].compute(truth, guess, context), whole, atol=1e-12)
