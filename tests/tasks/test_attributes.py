import math

import numpy as np
import pytest
import torch
from torch import nn

from louver.errors import ConfigError, DataError
from louver.tasks import Attributes, Criterion, Task
from louver.types import Images

TASK = Attributes({"kind": 4, "color": 2, "open": 3})
KIND = [0, 1, 2, 3, 0, 1, 2]
COLOR = [0, 1, 0, 1, 1, 0, 1]
OPEN = [2, 2, 1, 0, 1, 0, 0]


def images():
    labels = {"open": OPEN, "kind": KIND, "color": COLOR}
    pixels = np.zeros((7, 3, 8, 10), np.uint8)
    pixels[:, :, 0, 0] = np.array([KIND, COLOR, OPEN]).T
    # `Reader` gets one kind and three colors wrong.
    pixels[2, 0, 0, 0] = 3
    pixels[4:, 1, 0, 0] ^= 1
    return Images(pixels=pixels, labels={name: np.array(values, np.int64) for name, values in labels.items()})


class Reader(nn.Module):
    """Answers the three attributes that the first pixel holds."""

    def forward(self, x):
        pixel = (x[:, :, 0, 0] * 255).round().long()
        return torch.cat([nn.functional.one_hot(pixel[:, i], k).float() for i, k in enumerate([4, 2, 3])], dim=1)


@pytest.mark.parametrize("batch_size", [2, 256])
def test_accuracy_of_each_attribute_and_their_mean(batch_size):
    figures = TASK.evaluate(Reader(), images(), batch_size=batch_size)
    expected = {"accuracy.kind": 6 / 7, "accuracy.color": 4 / 7, "accuracy.open": 1.0, "n": 7.0}
    assert figures == pytest.approx(expected | {"accuracy": (6 / 7 + 4 / 7 + 1) / 3})
    assert TASK.score in figures


def test_targets_are_in_the_order_of_the_columns():
    assert torch.equal(TASK.targets(images()), torch.tensor([KIND, COLOR, OPEN]).T)


def cross_entropy(scores, right, smoothing):
    """Of one row, in plain Python."""
    total = math.log(sum(math.exp(v) for v in scores))
    log_shares = [v - total for v in scores]
    return -(1 - smoothing) * log_shares[right] - smoothing * sum(log_shares) / len(scores)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_the_mean_of_the_cross_entropies(smoothing):
    outputs = torch.randn(7, 9, generator=torch.Generator().manual_seed(3)).requires_grad_()
    targets = TASK.targets(images())
    criterion = TASK.criterion(outputs, targets, seed=0)
    slow = [
        cross_entropy(row[low:high], target[k], smoothing)
        for row, target in zip(outputs.tolist(), targets.tolist(), strict=True)
        for k, (low, high) in enumerate([(0, 4), (4, 6), (6, 9)])
    ]
    loss = criterion(outputs, targets, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(sum(slow) / len(slow), abs=1e-5)
    loss.backward()
    # A right answer's score is pushed up, every other down.
    is_right = torch.cat([nn.functional.one_hot(targets[:, i], k) for i, k in enumerate([4, 2, 3])], dim=1).bool()
    if not smoothing:
        assert (outputs.grad[is_right] < 0).all()
        assert (outputs.grad[~is_right] > 0).all()
    assert isinstance(criterion, Criterion)


def test_it_is_a_task_and_keeps_its_own_columns():
    columns = {"kind": 4}
    task = Attributes(columns)
    columns["color"] = 2
    assert isinstance(task, Task)
    assert task == Attributes({"kind": 4})
    batches = task.batches(torch.zeros(11, 1), 4, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(batches).tolist()) == list(range(11))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="one label column or more"):
        Attributes({})
    with pytest.raises(ConfigError, match="'color': expected n_classes of 2 or more, got 1"):
        Attributes({"kind": 4, "color": 1})
    with pytest.raises(DataError, match="no label column 'colour'; nearest: color"):
        Attributes({"kind": 4, "colour": 2}).targets(images())
    with pytest.raises(DataError, match=r"expected labels 0\.\.1 in column 'open', got 0\.\.2"):
        Attributes({"kind": 4, "open": 2}).targets(images())
    with pytest.raises(
        ConfigError, match=r"kind 4, color 2, open 3\): expected scores of shape \(n, 9\), got \(7, 8\)"
    ):
        TASK.criterion(torch.zeros(7, 8), TASK.targets(images()), seed=0)
    with pytest.raises(ConfigError, match=r"got \(7, 3, 8, 10\)"):
        TASK.evaluate(nn.Identity(), images())
