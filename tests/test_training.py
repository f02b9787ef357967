import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from louver.errors import ConfigError, DataError, StorageError, WeightsError
from louver.tasks import Classification, Criterion
from louver.training import Training, _augmented, _rate, fit
from louver.types import Images

TASK = Classification("side", 3)
CONFIG = Training(epochs=4, batch_size=16, lr=1e-2, flip=True, shift=1)


def bars(n, *, seed, noise=40.0):
    """Pictures with a bright bar of one of three heights: learnable in a few steps."""
    rng = np.random.default_rng(seed)
    side = rng.integers(0, 3, n)
    pixels = rng.normal(90, noise, (n, 3, 9, 11))
    for row, height in zip(pixels, side, strict=True):
        row[:, 3 * height : 3 * height + 3] += 90
    return Images(pixels=pixels.clip(0, 255).astype(np.uint8), labels={"side": side.astype(np.int64)}, name="bars")


TRAIN, VALIDATION = bars(75, seed=1), bars(30, seed=2)


class Small(nn.Module):
    """Convolution, batch normalization and dropout: weights, buffers and global randomness to keep right."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.layers = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1, bias=False),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d((3, 1)),
                nn.Flatten(),
                nn.Dropout(0.2),
                nn.Linear(24, 3),
            )

    def forward(self, x):
        return self.layers(x)


def states_equal(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


class StoppedError(Exception):
    pass


def stop_after(epochs):
    def progress(what, fraction):
        if what.startswith(f"epoch {epochs} "):
            raise StoppedError

    return progress


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_it_learns_and_leaves_the_model_as_it_was(optimizer):
    model = Small().eval()
    model.layers[1].train()
    trained = fit(model, TASK, TRAIN, VALIDATION, config=dataclasses.replace(CONFIG, optimizer=optimizer, epochs=8))
    assert TASK.evaluate(trained, VALIDATION)["accuracy"] >= 0.9
    assert TASK.evaluate(model, VALIDATION)["accuracy"] < 0.7
    assert states_equal(model, Small())
    assert not model.training
    assert model.layers[1].training
    assert all(not module.training for module in trained.modules())
    assert all(value.grad is None for value in model.parameters())


def test_a_seed_says_all_and_global_generators_go_on_as_they_were():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = fit(Small(), TASK, TRAIN, VALIDATION, config=CONFIG, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)
    assert states_equal(first, fit(Small(), TASK, TRAIN, VALIDATION, config=CONFIG, seed=3))
    assert not states_equal(first, fit(Small(), TASK, TRAIN, VALIDATION, config=CONFIG, seed=4))


@pytest.mark.parametrize(
    "change",
    [{}, {"optimizer": "sgd"}, {"precision": "float32", "channels_last": False}, {"precision": "bfloat16"}],
    ids=str,
)
def test_a_killed_run_ends_with_the_same_weights(tmp_path, change):
    config, path = dataclasses.replace(CONFIG, **change), tmp_path / "run.safetensors"
    # Noisy pictures, so that the best epoch is not simply the last one that both runs reach.
    hard = bars(75, seed=1, noise=150.0)
    whole = fit(Small(), TASK, hard, VALIDATION, config=config, seed=3)
    with pytest.raises(StoppedError):
        fit(Small(), TASK, hard, VALIDATION, config=config, seed=3, checkpoint=path, progress=stop_after(2))
    seen = []
    resumed = fit(
        Small(), TASK, hard, VALIDATION, config=config, seed=3, checkpoint=path, progress=lambda *a: seen.append(a)
    )
    assert [what.split(":")[0] for what, _ in seen] == ["epoch 3 of 4", "epoch 4 of 4"]
    assert [fraction for _, fraction in seen] == [0.75, 1.0]
    assert states_equal(whole, resumed)
    again = fit(Small(), TASK, hard, VALIDATION, config=config, seed=3, checkpoint=path, progress=stop_after(4))
    assert states_equal(whole, again)
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]


def test_the_best_epoch_is_chosen_on_validation():
    scores = iter([0.2, 0.9, 0.5, 0.9])
    states = []

    class Scored(Classification):
        def evaluate(self, model, images, *, batch_size=256, device="cpu"):
            assert images is VALIDATION
            states.append({name: value.clone().contiguous() for name, value in model.state_dict().items()})
            return {"accuracy": next(scores), "n": 1.0}

    trained = fit(Small(), Scored("side", 3), TRAIN, VALIDATION, config=CONFIG)
    # Of the two epochs at 0.9 the first.
    assert all(torch.equal(value, states[1][name]) for name, value in trained.state_dict().items())
    assert not all(torch.equal(value, states[3][name]) for name, value in trained.state_dict().items())


class Told(Classification):
    """Validation says what it is told to, epoch by epoch, and every state that it judges is kept."""

    scores = (0.2, 0.4, 0.9, 0.3, 0.9, 0.95, 0.96, 0.97)

    def __init__(self):
        super().__init__("side", 3)
        self.__dict__["states"] = []

    def evaluate(self, model, images, *, batch_size=256, device="cpu"):
        self.states.append({name: value.clone().contiguous() for name, value in model.state_dict().items()})
        return {"accuracy": self.scores[len(self.states) - 1], "n": 1.0}


@pytest.mark.parametrize(("patience", "ran", "kept"), [(1, 4, 3), (2, 5, 3), (3, 8, 8), (None, 8, 8)])
def test_patience_ends_it_with_the_weights_of_the_best_epoch(tmp_path, patience, ran, kept):
    task, path, seen = Told(), tmp_path / "run.safetensors", []
    options = {"config": dataclasses.replace(CONFIG, epochs=8, patience=patience), "checkpoint": path}
    trained = fit(Small(), task, TRAIN, VALIDATION, **options, log=lambda epoch, figures: seen.append(epoch))
    # An epoch that only equals the best one is no better: patience does not begin anew.
    assert seen == list(range(1, ran + 1))
    assert all(torch.equal(value, task.states[kept - 1][name]) for name, value in trained.state_dict().items())
    others = [state for number, state in enumerate(task.states, start=1) if number != kept]
    assert not any(torch.equal(trained.state_dict()["layers.6.weight"], one["layers.6.weight"]) for one in others)
    # What has ended early has ended: nothing is trained when it is called again.
    again = fit(Small(), task, TRAIN, VALIDATION, **options, log=lambda epoch, figures: seen.append(epoch))
    assert len(seen) == ran
    assert states_equal(trained, again)


def test_patience_ends_a_resumed_run_where_the_whole_one_ended(tmp_path):
    path, config = tmp_path / "run.safetensors", dataclasses.replace(CONFIG, epochs=8, patience=2)
    whole = fit(Small(), Told(), TRAIN, VALIDATION, config=config)
    task = Told()
    with pytest.raises(StoppedError):
        fit(Small(), task, TRAIN, VALIDATION, config=config, checkpoint=path, progress=stop_after(4))
    assert states_equal(whole, fit(Small(), task, TRAIN, VALIDATION, config=config, checkpoint=path))
    assert len(task.states) == 5


class BreaksAt(Classification):
    """The loss becomes NaN in the third epoch."""

    calls = 0

    def criterion(self, outputs, targets, *, seed):
        inner = super().criterion(outputs, targets, seed=seed)

        class Breaking(Criterion):
            def forward(self, outputs, targets, *, label_smoothing=0.0):
                BreaksAt.calls += 1
                loss = inner(outputs, targets, label_smoothing=label_smoothing)
                return loss * math.nan if BreaksAt.calls > 2 * 5 else loss

        return Breaking()


class Breaking(Criterion):
    def __init__(self, sound):
        super().__init__()
        self.sound = sound

    def forward(self, outputs, targets, *, label_smoothing=0.0):
        BreaksAt.calls += 1
        loss = self.sound(outputs, targets, label_smoothing=label_smoothing)
        return loss * math.nan if BreaksAt.calls > 2 * 5 else loss


def test_a_loss_of_nan_names_the_epoch_and_keeps_the_last_good(tmp_path):
    path = tmp_path / "run.safetensors"
    BreaksAt.calls = 0
    with pytest.raises(
        ConfigError, match=r"broke in epoch 3 of 4: the loss is nan, through 'task'; lower lr .* holds epoch 2"
    ):
        fit(Small(), BreaksAt("side", 3), TRAIN, VALIDATION, config=CONFIG, checkpoint=path)
    kept = path.read_bytes()
    BreaksAt.calls = -1000
    good = fit(Small(), BreaksAt("side", 3), TRAIN, VALIDATION, config=CONFIG, checkpoint=path)
    assert path.read_bytes() != kept
    assert all(bool(torch.isfinite(value).all()) for value in good.parameters())


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    config = dataclasses.replace(CONFIG, epochs=1)
    fit(Small(), TASK, TRAIN, VALIDATION, config=config, seed=3, checkpoint=path)
    kept = path.read_bytes()

    def again(*, model=None, train=TRAIN, config=config, seed=3):
        fit(model or Small(), TASK, train, VALIDATION, config=config, seed=seed, checkpoint=path)

    other = Small()
    with torch.no_grad():
        other.layers[6].bias += 1
    for what, change in {
        "seed": {"seed": 4},
        "training options": {"config": CONFIG},
        "training images": {"train": bars(75, seed=9)},
        "initial weights": {"model": other},
    }.items():
        with pytest.raises(WeightsError, match=f"another {what}; remove it"):
            again(**change)
    assert path.read_bytes() == kept
    path.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(WeightsError, match="damaged"):
        again()


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    import os

    path = tmp_path / "run.safetensors"
    kept = []

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    def fill_after_two(what, fraction):
        if fraction == 0.5:
            kept.append(path.read_bytes())
            monkeypatch.setattr(os, "fsync", refuse)

    with pytest.raises(StorageError, match="No space left"):
        fit(Small(), TASK, TRAIN, VALIDATION, config=CONFIG, checkpoint=path, progress=fill_after_two)
    assert path.read_bytes() == kept[0]
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]


def test_the_rate_climbs_then_falls_to_nothing():
    config = Training(lr=0.5, warmup=0.25)
    rates = [_rate(step, 40, config) for step in range(40)]
    top = rates.index(max(rates))
    assert top == 10
    assert max(rates) == 0.5
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[0] < 0.1
    assert 0 < rates[-1] < 0.01
    assert _rate(0, 40, dataclasses.replace(config, warmup=0.0)) == 0.5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augmentation_moves_and_mirrors_and_no_more(dtype):
    n, c, h, w = 40, 3, 6, 9
    pixels = (torch.arange(n * c * h * w).view(n, c, h, w) % 251).to(dtype)
    moved = _augmented(pixels, Training(flip=True, shift=2), torch.Generator().manual_seed(1))
    assert moved.dtype == dtype
    seen = set()
    for before, after in zip(pixels, moved, strict=True):
        padded = nn.functional.pad(before[None].float(), (2, 2, 2, 2), mode="replicate")[0]
        # Slow and obviously right: every place the picture could have gone to.
        options = {
            (down, right, is_mirrored): torch.flip(padded, [2])[:, down : down + h, right : right + w]
            if is_mirrored
            else padded[:, down : down + h, right : right + w]
            for down in range(5)
            for right in range(5)
            for is_mirrored in (False, True)
        }
        fits = {key for key, value in options.items() if torch.equal(value, after.float())}
        assert len(fits) == 1
        seen |= fits
    assert {down for down, _, _ in seen} == set(range(5))
    assert {right for _, right, _ in seen} == set(range(5))
    assert {is_mirrored for _, _, is_mirrored in seen} == {False, True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs 1 or more, got 0"),
        ({"batch_size": 1}, "batch_size 2 or more"),
        ({"lr": math.nan}, "lr above 0"),
        ({"weight_decay": -1.0}, "weight_decay 0 or more"),
        ({"warmup": 1.0}, "warmup a share"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"shift": -1}, "shift 0 or more"),
        ({"patience": 0}, "patience 1 or more, or none"),
        ({"gradient_norm": 0.0}, "gradient_norm above 0"),
        ({"optimizer": "adam"}, "nearest: adamw"),
        ({"precision": "float16"}, "nearest: bfloat16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Training(**options)


def test_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="got none to train"):
        fit(Small().requires_grad_(False), TASK, TRAIN, VALIDATION)
    with pytest.raises(DataError, match="2 images or more"):
        fit(Small(), TASK, TRAIN.take(slice(0, 1)), VALIDATION)
    with pytest.raises(DataError, match="got none"):
        fit(Small(), TASK, TRAIN, VALIDATION.take(slice(0, 0)))


def test_frozen_layers_stay():
    model = Small()
    model.layers[0].requires_grad_(False)
    trained = fit(model, TASK, TRAIN, VALIDATION, config=dataclasses.replace(CONFIG, epochs=1))
    assert torch.equal(trained.layers[0].weight, model.layers[0].weight)
    assert not torch.equal(trained.layers[6].weight, model.layers[6].weight)
