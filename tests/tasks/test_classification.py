import math

import numpy as np
import pytest
import torch
from torch import nn

from louver.cut import split
from louver.errors import ConfigError, DataError
from louver.tasks import Classification, Criterion, Task
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


class Doubled(nn.Module):
    def forward(self, x):
        return torch.zeros(2 * len(x), 3)


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
    criterion = TASK.criterion(outputs, targets, seed=0)
    rows = [math.log(sum(math.exp(v) for v in row)) - row[t] for row, t in zip(outputs.tolist(), [0, 1], strict=True)]
    assert criterion(outputs, targets).item() == pytest.approx(sum(rows) / 2, abs=1e-6)
    assert criterion(outputs, targets, label_smoothing=0.3).item() != pytest.approx(sum(rows) / 2, abs=1e-3)
    assert isinstance(TASK, Task)
    assert isinstance(criterion, Criterion)
    assert not list(criterion.parameters())


@pytest.mark.parametrize(("n", "batch_size", "sizes"), [(7, 3, [4, 3]), (7, 16, [7]), (11, 4, [4, 4, 3])])
def test_batches_hold_each_image_once_and_are_even(n, batch_size, sizes):
    batches = TASK.batches(torch.zeros(n), batch_size, torch.Generator().manual_seed(1))
    assert [len(batch) for batch in batches] == sizes
    order = torch.cat(batches).tolist()
    assert sorted(order) == list(range(n))
    assert order == torch.randperm(n, generator=torch.Generator().manual_seed(1)).tolist()


def test_a_split_is_judged_like_the_network_it_was():
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 6 * 8, 3)).eval()
    halves = split(network, "1", torch.rand(2, 3, 8, 10))
    assert TASK.evaluate(halves, images(), batch_size=3) == TASK.evaluate(network, images())


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
    with pytest.raises(ConfigError, match=r"expected one row an image .* 14 rows for 7"):
        TASK.evaluate(Doubled(), images())
    with pytest.raises(ConfigError, match=r"got \(7, 4\)"):
        TASK.criterion(torch.zeros(7, 4), torch.zeros(7).long(), seed=0)
    criterion = TASK.criterion(torch.zeros(7, 3), torch.zeros(7).long(), seed=0)
    with pytest.raises(ConfigError, match="got list"):
        criterion([torch.zeros(7, 3)], torch.zeros(7).long())
