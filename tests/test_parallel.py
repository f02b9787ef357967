"""Several processes: what they tell, how they fail, and that they train what one would."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from louver.cut import Split, split
from louver.defenses import PATROL
from louver.defenses.base import Batch, Pressure
from louver.errors import ConfigError, LouverError, WorkerError
from louver.hardening import harden
from louver.parallel import Tell, messages_of
from louver.tasks import Classification
from louver.training import Training, fit, train
from test_training import TASK, VALIDATION, bars
from toys import pictures

N = 2


def rank() -> int:
    return int(os.environ["LOCAL_RANK"])


def fails(how: str, tell: Tell) -> None:
    tell(rank())
    if rank() == 1:
        if how == "error":
            raise ConfigError("expected 7, got 8")
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()  # what waits for a neighbor waits forever


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("error", ConfigError, "expected 7, got 8"),
        ("kill", WorkerError, "killed by signal 9"),
    ],
)
def test_where_one_fails_all_are_ended(how: str, kind: type[LouverError], message: str) -> None:
    with pytest.raises(kind, match=message):
        list(messages_of(partial(fails, how), N))


def test_work_that_cannot_be_sent_is_refused() -> None:
    with pytest.raises(WorkerError, match="cannot be sent"):
        list(messages_of(lambda tell: tell(1), N))


class Plain(nn.Module):
    """Nothing that depends on the rest of a batch, and nothing random: half batches must give the whole's gradient."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.layers = nn.Sequential(
                nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d((3, 1)), nn.Flatten(), nn.Linear(18, 3)
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


EXACT = Training(epochs=3, batch_size=16, lr=0.05, optimizer="sgd", precision="float32", warmup=0.0)


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    images, told = bars(64, seed=4), []
    alone = fit(Plain(), TASK, images, VALIDATION, config=EXACT, seed=2)
    path = tmp_path / "both.safetensors"
    both = fit(
        Plain(),
        TASK,
        images,
        VALIDATION,
        config=EXACT,
        seed=2,
        devices=N,
        checkpoint=path,
        log=lambda epoch, figures: told.append((epoch, dict(figures))),
    )
    start = Plain().state_dict()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(both.state_dict()[name], value, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(value, start[name], atol=1e-3)
    assert [epoch for epoch, _ in told] == [1, 2, 3]
    # The checkpoint is that of a run: one device takes it up where two have ended.
    again = fit(Plain(), TASK, images, VALIDATION, config=EXACT, seed=2, checkpoint=path)
    assert all(torch.equal(value, both.state_dict()[name]) for name, value in again.state_dict().items())


class Counting(Pressure):
    """Learns something else in each process: its rank, once a step."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = nn.Parameter(torch.zeros(()))

    def before(self, split: Split, batch: Batch) -> None:
        with torch.no_grad():
            self.sum += rank()

    def terms(self, split: Split, batch: Batch) -> dict[str, Tensor]:
        return {"square": 0 * batch.features.mean() + self.sum.detach().square()}


def test_what_a_pressure_learns_is_kept_in_step() -> None:
    images = bars(64, seed=4)
    halves = split(Plain(), "layers.1", torch.from_numpy(images.floats(slice(0, 2))))
    found: list[float] = []
    train(
        halves,
        TASK,
        images,
        VALIDATION,
        Counting(),
        config=EXACT,
        epochs=1,
        seed=2,
        devices=N,
        log=lambda epoch, figures: found.append(figures["square"]),
    )
    # Four steps. The first process sees 0, 0.5, 1, 1.5 and the second 1 more; alone they would see 0 and 1, 2, 3, 4.
    assert found == [pytest.approx((0 + 0.25 + 1 + 2.25 + 1 + 2.25 + 4 + 6.25) / 8)]


def test_patrol_is_hardened_by_two(tmp_path: Path) -> None:
    images, validation = pictures(96, seed=1), pictures(24, seed=2)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 3),
    )
    halves = split(net, "5", torch.from_numpy(images.floats(slice(0, 2))))
    told: list[int] = []
    terms: dict[str, float] = {}

    def log(epoch: int, figures: Mapping[str, float]) -> None:
        told.append(epoch)
        terms.update(figures)

    hard = harden(
        halves,
        Classification("kind", 3),
        images,
        validation,
        PATROL(is_pruned=False),
        config=Training(epochs=2, batch_size=32),
        folder=tmp_path,
        devices=N,
        log=log,
    )
    assert told == [1, 2]
    assert {"lipschitz", "adversary"} <= set(terms)
    assert any(not torch.equal(a, b) for a, b in zip(hard.parameters(), halves.parameters(), strict=True))


@pytest.mark.parametrize(
    ("devices", "batch_size", "message"),
    [(10_000, 16, "which is what this machine has"), (0, 16, "expected 1 to"), (N, 3, "a batch_size of 4 or more")],
)
def test_more_than_there_is_is_refused(devices: int, batch_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(Plain(), TASK, bars(64, seed=4), VALIDATION, config=Training(batch_size=batch_size), devices=devices)
