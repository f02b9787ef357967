import math

import numpy as np
import pytest
import torch
from torch import nn

from louver.errors import ConfigError, DataError
from louver.tasks import Classification
from louver.types import Images


def images(n=7, labels=(0, 1, 2, 1, 0, 2, 1)):
    pixels = np.zeros((n, 3, 8, 10), np.uint8)
    # The first pixel holds the class that `Reader` answers.
    pixels[:, 0, 0, 0] = [0, 1, 2, 1, 0, 0, 0][:n]
    return Images(pixels=pixels, labels={"body": np.array(labels[:n], np.int64)})


class Reader(nn.Module):
    """Answers the class that the first pixel holds."""

    def __init__(self, n_classes=3):
        super().__init__()
        self.n_classes = n_classes
        self.inner = nn.Dropout(0.9)

    def forward(self, x):
        answer = (x[:, 0, 0, 0] * 255).round().long()
        return self.inner(nn.functional.one_hot(answer, self.n_classes).float())


class Broken(nn.Module):
    def forward(self, x):
        return torch.full((len(x), 3), math.nan)


TASK = Classification("body", 3)


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_accuracy_counts_right_answers_over_uneven_batches(batch_size):
    # 7 images, of which the last two are read wrongly; dropout would break this if the model were not in eval mode.
    assert TASK.evaluate(Reader().train(), images(), batch_size=batch_size) == {"accuracy": 5 / 7, "n": 7.0}


def test_evaluation_leaves_modes_as_they_were():
    model = Reader().train()
    model.inner.eval()
    TASK.evaluate(model, images())
    assert model.training
    assert not model.inner.training


def test_loss_is_the_cross_entropy_by_hand():
    outputs = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
    targets = torch.tensor([0, 1])
    rows = [math.log(sum(math.exp(v) for v in row)) - row[t] for row, t in zip(outputs.tolist(), [0, 1], strict=True)]
    assert TASK.loss(outputs, targets).item() == pytest.approx(sum(rows) / 2, abs=1e-6)
    assert TASK.loss(outputs, targets, label_smoothing=0.3).item() != pytest.approx(sum(rows) / 2, abs=1e-3)


def test_what_does_not_fit_the_task_is_refused():
    with pytest.raises(ConfigError, match="2 or more"):
        Classification("body", 1)
    with pytest.raises(DataError, match="nearest: body"):
        Classification("bodi", 3).targets(images())
    with pytest.raises(DataError, match=r"expected labels 0\.\.1 .* got 0\.\.2"):
        Classification("body", 2).targets(images())
    with pytest.raises(DataError, match="got none"):
        TASK.targets(images(n=0))
    with pytest.raises(ConfigError, match=r"expected scores of shape \(n, 3\), got \(7, 4\)"):
        TASK.evaluate(Reader(n_classes=4), images())
    with pytest.raises(DataError, match="NaN or infinity"):
        TASK.evaluate(Broken(), images())
