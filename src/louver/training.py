"""One plain training loop: it keeps the epoch that validation likes best, and resumes where it was stopped.

Order and augmentation of an epoch follow from (seed, epoch) alone, so a resumed run needs no generator states and ends
with the same weights, bit for bit on a CPU with the same number of threads.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from louver.devices import has_fast_bfloat16
from louver.errors import ConfigError, DataError, WeightsError, nearest
from louver.storage import write_bytes
from louver.tasks import Task
from louver.types import Images

__all__ = ["Training", "fit"]

Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train. The rate climbs to `lr` over the first `warmup` of the steps, then falls to zero as a cosine does.

    flip: mirror half of the images left to right. shift: move each image by up to so many pixels, edges repeated.
    weight_decay: on convolution and matrix weights only. gradient_norm: longer gradients are cut to it; None: never.
    precision: "bfloat16" computes layers in it and keeps weights in float32; "auto" does so where it is fast, which is
    CUDA and CPUs with AMX.

    Raises:
        ConfigError: a value out of range.
    """

    epochs: int = 20
    batch_size: int = 128
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 3e-3
    weight_decay: float = 0.02
    warmup: float = 0.25
    label_smoothing: float = 0.0
    flip: bool = False
    shift: int = 0
    gradient_norm: float | None = 5.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    channels_last: bool = True

    def __post_init__(self) -> None:
        rules = {
            "epochs": ("1 or more", self.epochs >= 1),
            "batch_size": ("2 or more", self.batch_size >= 2),
            "lr": ("above 0", 0 < self.lr < math.inf),
            "weight_decay": ("0 or more", 0 <= self.weight_decay < math.inf),
            "warmup": ("a share from 0 to below 1", 0 <= self.warmup < 1),
            "label_smoothing": ("0 to below 1", 0 <= self.label_smoothing < 1),
            "shift": ("0 or more pixels", self.shift >= 0),
            "gradient_norm": ("above 0, or none", self.gradient_norm is None or self.gradient_norm > 0),
        }
        for what, (expected, holds) in rules.items():
            if not holds:
                raise ConfigError(f"training: expected {what} {expected}, got {getattr(self, what)}")
        for what, legal in {
            "optimizer": ["adamw", "sgd"],
            "precision": ["auto", "float32", "bfloat16"],
        }.items():
            value = getattr(self, what)
            if value not in legal:
                raise ConfigError(f"training: no {what} {value!r}; {nearest(value, legal)}")


@dataclass
class _Run:
    """All that changes while training; what a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    best: dict[str, Tensor]
    best_score: float = -math.inf
    epoch: int = 0
    """Epochs done."""


def fit(
    model: nn.Module,
    task: Task,
    train: Images,
    validation: Images,
    *,
    config: Training | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """A trained copy of `model`, in eval mode, with the weights of the epoch that scored best on `validation`.

    `model` itself is left as it was. `checkpoint` is a safetensors file, rewritten after each epoch and read first if
    it is there: a stopped run goes on, a finished one returns at once. `progress(what, fraction)` is called after each
    epoch.

    Raises:
        ConfigError: nothing to train, or the loss became NaN; the checkpoint then holds the last good epoch.
        DataError: no images, or labels that are not the task's.
        StorageError: the checkpoint cannot be written; the one of the epoch before is kept.
        WeightsError: the checkpoint is of another run, or damaged.
    """
    config = config or Training()
    device = torch.device(device)
    targets = task.targets(train)
    task.targets(validation)
    if len(train) < 2:
        raise DataError(f"{train.name}: expected 2 images or more to train on, got {len(train)}")
    fingerprint = _fingerprint(model, task, train, validation, config, seed)
    run = _begin(model, config, device)
    if checkpoint is not None and checkpoint.exists():
        _restore(run, checkpoint, fingerprint)
    while run.epoch < config.epochs:
        with _seeded(seed, run.epoch, device):
            mean_loss = _train_epoch(run, task, train, targets, config, seed)
        if not (
            math.isfinite(mean_loss) and all(bool(torch.isfinite(value).all()) for value in run.model.parameters())
        ):
            kept = f"{checkpoint} holds epoch {run.epoch}" if checkpoint and run.epoch else "no epoch was finished"
            raise ConfigError(
                f"training broke in epoch {run.epoch + 1} of {config.epochs}: the loss is {mean_loss}; "
                f"lower lr (now {config.lr:g}) or lengthen warmup, and train from the start ({kept})"
            )
        run.epoch += 1
        score = task.evaluate(run.model, validation, device=device)[task.score]
        # Not >=: of equal epochs the first is kept, so that more epochs never change a tie.
        if score > run.best_score:
            run.best, run.best_score = _cloned(run.model.state_dict()), score
        if checkpoint is not None:
            _save(run, checkpoint, fingerprint)
        if progress is not None:
            what = f"epoch {run.epoch} of {config.epochs}: loss {mean_loss:.3f}, {task.score} {score:.3f} on validation"
            progress(what, run.epoch / config.epochs)
    # Into a fresh copy: the one that was trained may lie on another device and in another memory format.
    trained = copy.deepcopy(model)
    trained.load_state_dict(run.best)
    return trained.eval()


def _begin(model: nn.Module, config: Training, device: torch.device) -> _Run:
    trained = copy.deepcopy(model).to(device)
    if config.channels_last:
        trained = trained.to(memory_format=torch.channels_last)
    parameters = [value for value in trained.parameters() if value.requires_grad]
    if not parameters:
        raise ConfigError(f"{type(model).__name__}: expected parameters that require gradients, got none to train")
    groups = [
        {"params": [value for value in parameters if value.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [value for value in parameters if value.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=config.lr)
    else:
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)
    return _Run(model=trained, optimizer=optimizer, best=_cloned(trained.state_dict()))


def _train_epoch(run: _Run, task: Task, images: Images, targets: Tensor, config: Training, seed: int) -> float:
    """Mean loss of one pass over `images`, each seen once."""
    generator = torch.Generator().manual_seed(_epoch_seed(seed, run.epoch))
    device = next(run.model.parameters()).device
    # Even batches: a last one of a single image would break batch normalization.
    n_batches = max(1, round(len(images) / config.batch_size))
    batches = torch.randperm(len(images), generator=generator).tensor_split(n_batches)
    total = torch.zeros((), device=device)
    run.model.train()
    for index, batch in enumerate(batches):
        for group in run.optimizer.param_groups:
            group["lr"] = _rate(run.epoch * n_batches + index, config.epochs * n_batches, config)
        pixels = _augmented(torch.from_numpy(images.pixels[batch.numpy()]), config, generator).to(device)
        x = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        if config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=_is_bfloat16(config.precision, device)):
            outputs = run.model(x)
        loss = task.loss(outputs.float(), targets[batch].to(device), label_smoothing=config.label_smoothing)
        run.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        if config.gradient_norm is not None:
            nn.utils.clip_grad_norm_(run.model.parameters(), config.gradient_norm)
        run.optimizer.step()
        total += loss.detach() * len(batch)
    return float(total) / len(images)


def _rate(step: int, steps: int, config: Training) -> float:
    """Learning rate of one step: a straight climb over the warm-up, then half a cosine down to zero."""
    climb = config.warmup * steps
    if step < climb:
        return config.lr * (step + 1) / (climb + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - climb) / max(steps - climb, 1)))


def _augmented(
    pixels: UInt8[Tensor, "n c h w"] | Float[Tensor, "n c h w"], config: Training, generator: torch.Generator
) -> UInt8[Tensor, "n c h w"] | Float[Tensor, "n c h w"]:
    """Each picture moved and mirrored by chance. One gather does both, and leaves the channels last in memory."""
    n, _, h, w = pixels.shape
    if not config.flip and not config.shift:
        return pixels
    rows = torch.arange(h) + _offsets(n, config.shift, generator)
    columns = torch.arange(w) + _offsets(n, config.shift, generator)
    if config.flip:
        is_mirrored = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(is_mirrored, w - 1 - columns, columns)
    rows, columns = rows.clamp(0, h - 1), columns.clamp(0, w - 1)
    picked: Int[Tensor, "n h w c"] | Float[Tensor, "n h w c"]
    picked = pixels[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def _offsets(n: int, shift: int, generator: torch.Generator) -> Int[Tensor, "n 1"]:
    return torch.randint(-shift, shift + 1, (n, 1), generator=generator)


def _is_bfloat16(precision: str, device: torch.device) -> bool:
    return has_fast_bfloat16(device) if precision == "auto" else precision == "bfloat16"


def _epoch_seed(seed: int, epoch: int) -> int:
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextlib.contextmanager
def _seeded(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Dropout and its like draw from torch's global generators: seeded in here, as they were before outside."""
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if is_cuda else []):
        torch.default_generator.manual_seed(_epoch_seed(seed, epoch))
        if is_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(_epoch_seed(seed, epoch))
        yield


def _cloned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy on the CPU in plain memory order, which is what a file holds."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}


def _fingerprint(
    model: nn.Module, task: Task, train: Images, validation: Images, config: Training, seed: int
) -> dict[str, str]:
    """What makes two runs the same run, so that a checkpoint is never taken for that of another."""
    weights = hashlib.sha256()
    for name, value in _cloned(model.state_dict()).items():
        weights.update(name.encode())
        weights.update(value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return {
        "task": repr(task),
        "training options": json.dumps(dataclasses.asdict(config), sort_keys=True),
        "seed": str(seed),
        "initial weights": weights.hexdigest(),
        "training images": _hash(train, task.targets(train)),
        "validation images": _hash(validation, task.targets(validation)),
    }


def _hash(images: Images, targets: Tensor) -> str:
    digest = hashlib.sha256(repr(images.pixels.shape).encode())
    digest.update(np.ascontiguousarray(images.pixels).data)
    digest.update(np.ascontiguousarray(targets.numpy()).data)
    return digest.hexdigest()


def _save(run: _Run, path: Path, fingerprint: Mapping[str, str]) -> None:
    """One file for tensors and, in its header, the rest as JSON: two files could be of two epochs after a crash."""
    tensors = {f"model/{name}": value for name, value in run.model.state_dict().items()}
    tensors |= {f"best/{name}": value for name, value in run.best.items()}
    for index, slots in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{slot}": value for slot, value in slots.items()}
    header = {"fingerprint": dict(fingerprint), "epoch": run.epoch, "best_score": run.best_score}
    write_bytes(path, safetensors.torch.save(_cloned(tensors), metadata={"louver": json.dumps(header)}))


def _restore(run: _Run, path: Path, fingerprint: Mapping[str, str]) -> None:
    remedy = "remove it to train from the start, or name another file"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["louver"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (safetensors.SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path}: not a training checkpoint, or damaged ({error}); {remedy}") from error
    other = [what for what, value in fingerprint.items() if header["fingerprint"].get(what) != value]
    if other:
        raise WeightsError(f"{path}: the checkpoint is of a run with another {', '.join(other)}; {remedy}")
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimizer": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    run.model.load_state_dict(parts["model"])
    run.best, run.best_score, run.epoch = parts["best"], header["best_score"], header["epoch"]
    _restore_optimizer(run.optimizer, parts["optimizer"])


def _restore_optimizer(optimizer: torch.optim.Optimizer, slots: Mapping[str, Tensor]) -> None:
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in slots.items():
        index, _, slot = name.partition("/")
        like = parameters[int(index)]
        # In the memory order of its parameter: a kernel for another order may round differently.
        is_alike = value.shape == like.shape
        state.setdefault(int(index), {})[slot] = torch.empty_like(like).copy_(value) if is_alike else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
