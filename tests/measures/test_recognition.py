from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import oracles
from louver.errors import AttackError, DataError
from louver.measures import MEASURES, MeasureContext, recognized, reidentified

N, C, H, W = 7, 3, 18, 23


def images(n: int = N, seed: int = 0, channels: int = C) -> Tensor:
    return torch.rand((n, channels, H, W), generator=torch.Generator().manual_seed(seed))


class Brightness(nn.Module):
    """Class = which fifth of the range the mean pixel is in; known without training."""

    def forward(self, batch: Tensor) -> Tensor:
        centers = torch.arange(5) / 5 + 0.1
        return -(batch.mean(dim=(1, 2, 3)).unsqueeze(1) - centers).abs()


def flat(*levels: float) -> Tensor:
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, C, H, W).clone()


def test_recognized_by_true_labels():
    guess = flat(0.1, 0.3, 0.5, 0.7, 0.9)
    assert recognized(Brightness(), torch.arange(5), guess).tolist() == [1.0] * 5
    assert recognized(Brightness(), torch.tensor([0, 1, 0, 3, 0]), guess).tolist() == [1.0, 1.0, 0.0, 1.0, 0.0]


def test_recognized_by_the_models_own_word_on_the_true_images():
    assert recognized(Brightness(), flat(0.1, 0.3, 0.5), flat(0.15, 0.9, 0.55)).tolist() == [1.0, 0.0, 1.0]


def test_mistake_batch_norm_left_in_train_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(C, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 16 * 21, 5))
    model.train()
    model[0].eval()  # modes differ between modules, and each must come back
    before = {key: value.clone() for key, value in model.state_dict().items()}
    together = recognized(model, torch.arange(5), images(5))
    alone = [recognized(model, torch.tensor([k]), images(5)[k : k + 1]).item() for k in range(5)]
    assert together.tolist() == alone
    assert [module.training for module in model.modules()] == [True, False, True, True, True]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_modes_come_back_after_an_error():
    class Broken(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            return torch.full((len(batch), 3), torch.nan)

    model = Broken().train()
    with pytest.raises(AttackError, match="NaN"):
        recognized(model, torch.zeros(N, dtype=torch.int64), images())
    assert model.training


@pytest.mark.parametrize(
    ("labels", "says"),
    [(torch.arange(6), "expected 7 labels"), (torch.arange(7), r"0\.\.4"), (torch.arange(7) - 1, r"got -1\.\.5")],
)
def test_labels_that_do_not_fit_are_refused(labels: Tensor, says: str):
    with pytest.raises(DataError, match=says):
        recognized(Brightness(), labels, images())


def test_a_model_that_does_not_classify_is_refused():
    with pytest.raises(DataError, match="does not classify"):
        recognized(nn.Identity(), torch.zeros(N, dtype=torch.int64), images())


def test_recognized_through_the_table_takes_labels_or_predictions():
    truth, guess = flat(0.1, 0.3, 0.5), flat(0.1, 0.9, 0.5)
    compute = MEASURES["recognized"].compute
    assert compute(truth, guess, MeasureContext(model=Brightness())).tolist() == [1.0, 0.0, 1.0]
    labels = np.array([3, 4, 2])
    assert compute(truth, guess, MeasureContext(model=Brightness(), labels=labels)).tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("channels", [1, 3])
def test_search_equals_a_loop(channels: int):
    pool = images(11, channels=channels)
    guess = (0.03 * pool[:N] + 0.97 * images(N, seed=1, channels=channels)).clamp(0, 1)
    hits, ranks = reidentified(pool, guess)
    expected = oracles.search_ranks(pool.double().numpy(), guess.double().numpy())
    assert ranks.tolist() == expected
    assert len(set(expected)) > 1
    assert hits.tolist() == [float(rank == 1) for rank in expected]


def test_brightness_and_contrast_do_not_hide_an_image():
    pool = images()
    for guess in (0.1 * pool + 0.7, pool / 255, (pool * 0.5 + 0.1)):
        assert reidentified(pool, guess)[0].tolist() == [1.0] * N
    # The negative is as far as can be.
    assert reidentified(pool, 1 - pool)[1].tolist() == [N] * N


def test_a_know_nothing_guess_is_right_once_in_n():
    pool = images(40)
    mean = images(200, seed=1).mean(dim=0, keepdim=True).expand(40, -1, -1, -1)
    assert reidentified(pool, mean)[0].sum() == 1.0


def test_a_guess_without_structure_points_nowhere():
    hits, ranks = reidentified(images(), flat(*[0.5] * N))
    assert hits.sum() == 0
    assert ranks.tolist() == [N] * N


def test_the_same_picture_twice_counts_as_one():
    pool = images()
    pool[4] = pool[2]
    assert reidentified(pool, pool)[0].tolist() == [1.0] * N


def test_search_in_chunks_gives_the_same(monkeypatch: pytest.MonkeyPatch):
    from louver.measures import recognition

    pool = images(20)
    guess = (0.03 * pool + 0.97 * images(20, seed=1)).clamp(0, 1)
    whole = reidentified(pool, guess)
    monkeypatch.setattr(recognition, "_SEARCH_CHUNK", 3)
    parts = reidentified(pool, guess)
    assert whole[1].tolist() == parts[1].tolist()
    assert len(set(whole[1].tolist())) > 3


def test_large_images_are_searched_at_64_pixels():
    pool = torch.rand(5, C, 130, 151)
    assert reidentified(pool, (0.3 * pool + 0.7 * torch.rand_like(pool)))[0].tolist() == [1.0] * 5


def test_pools_that_cannot_tell_are_refused():
    with pytest.raises(DataError, match="at least 2"):
        reidentified(images(1), images(1))
    with pytest.raises(DataError, match="starts with the true ones"):
        reidentified(images(5), images(6))
    bad = images(9)
    bad[8] = 2.0
    with pytest.raises(DataError, match="finite and in"):
        reidentified(bad, images())
