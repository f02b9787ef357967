"""One plain training loop: it keeps the epoch that validation likes best, and resumes where it was stopped.

Devices and precision are Lightning Fabric's. Order, augmentation and noise of an epoch follow from (seed, epoch)
alone, so a resumed run needs no generator states and ends with the same weights, bit for bit on a CPU with the same
number of threads.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, Int, UInt8
from lightning_fabric import Fabric
from torch import Tensor, nn

from louver.checkpoints import cloned, read_checkpoint, restore_optimizer, write_checkpoint
from louver.cut import Split
from louver.defenses.base import Batch, Pressure
from louver.devices import has_fast_bfloat16, n_cores
from louver.errors import ConfigError, DataError, nearest
from louver.parallel import Tell, messages_of
from louver.stochastic import drawing_from
from louver.tasks import Criterion, Task
from louver.types import Images, Log, Progress

__all__ = ["Training", "fit", "train"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train. The rate climbs to `lr` over the first `warmup` of the steps, then falls to zero as a cosine does.

    flip: mirror half of the images left to right. shift: move each image by up to so many pixels, edges repeated.
    weight_decay: on convolution and matrix weights only. gradient_norm: longer gradients are cut to it; None: never.
    patience: end after so many epochs without a better one on validation; None: never early.
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
    patience: int | None = None
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
            "patience": ("1 or more, or none", self.patience is None or self.patience >= 1),
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


def fit(
    model: nn.Module,
    task: Task,
    training: Images,
    validation: Images,
    *,
    config: Training | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    log: Log | None = None,
    device: torch.device | str = "cpu",
    devices: int = 1,
) -> nn.Module:
    """A trained copy of `model`, in eval mode, with the weights of the epoch that scored best on `validation`.

    `model` itself is left as it was. `checkpoint` is a safetensors file, rewritten after each epoch and read first if
    it is there: a stopped run goes on, a finished one returns at once. `progress(what, fraction)` is called after each
    epoch. `devices` GPUs, or processes of a CPU, share each batch (data parallel); each is a process of its own, which
    imports the main script again, so keep `if __name__ == "__main__"` there. A run resumes bit for bit on one device.

    Raises:
        ConfigError: nothing to train, more devices than there are, or the loss became NaN; the checkpoint then holds
            the last good epoch.
        DataError: no images, or labels that are not the task's.
        StorageError: the checkpoint cannot be written; the one of the epoch before is kept.
        WeightsError: the checkpoint is of another run, or damaged.
        WorkerError: one of several processes was lost.
    """
    config = config or Training()
    return train(
        model,
        task,
        training,
        validation,
        Pressure(),
        config=config,
        epochs=config.epochs,
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
        log=log,
        device=device,
        devices=devices,
    )


@dataclass
class _Run:
    """All that changes while training; what a checkpoint holds."""

    trainee: _Trainee
    pressure: Pressure
    optimizer: torch.optim.Optimizer
    best: dict[str, Tensor]
    best_score: float = -math.inf
    best_epoch: int = 0
    epoch: int = 0
    """Epochs done."""
    history: list[dict[str, float]] = field(default_factory=list)


class _Trainee(nn.Module):
    """Network and criterion as one module, which is what several devices copy and keep in step."""

    def __init__(self, network: nn.Module, criterion: Criterion) -> None:
        super().__init__()
        self.network = network
        self.criterion = criterion

    def forward(self, x: Tensor, targets: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
        """Features (those of a network that is not cut are empty), outputs, and the task's loss."""
        if isinstance(self.network, Split):
            features = self.network.edge(x)
            outputs = self.network.cloud(features).float()
        else:
            outputs = self.network(x).float()
            features = outputs[:, :0]
        with torch.autocast(x.device.type, enabled=False):
            loss = self.criterion(outputs, targets, label_smoothing=label_smoothing)
        return features.float(), outputs, loss


def train(
    network: nn.Module,
    task: Task,
    images: Images,
    validation: Images,
    pressure: Pressure,
    *,
    config: Training,
    epochs: int,
    seed: int,
    checkpoint: Path | None = None,
    identity: Mapping[str, str] | None = None,
    choose_after: float = 0.0,
    progress: Progress | None = None,
    log: Log | None = None,
    device: torch.device | str = "cpu",
    devices: int = 1,
) -> nn.Module:
    """A copy of `network` (a `Split`, or any network) trained for `epochs` under `pressure`; see `fit`.

    The best epoch is looked for among those after the first `choose_after` of all: early ones, before pressure has
    acted, would win on accuracy alone. `identity` says what else makes this run the run it is, for the checkpoint.

    Raises:
        ConfigError, DataError, StorageError, WeightsError: as `fit`.
    """
    device = torch.device(device)
    targets = task.targets(images)
    task.targets(validation)
    if len(images) < 2:
        raise DataError(f"{images.name}: expected 2 images or more to train on, got {len(images)}")
    _check_devices(device, devices, config)
    job = _Job(
        network=network,
        task=task,
        images=images,
        targets=targets,
        validation=validation,
        pressure=pressure,
        config=config,
        epochs=epochs,
        seed=seed,
        checkpoint=checkpoint,
        marks=_marks(network, task, images, validation, config, seed) | dict(identity or {}),
        choose_after=choose_after,
        device=device,
        devices=devices,
    )

    def hear(epoch: int, figures: dict[str, float]) -> None:
        if log is not None:
            log(epoch, figures)
        if progress is not None:
            *losses, (_, score) = figures.items()
            told = ", ".join(f"{name} {value:.3f}" for name, value in losses)
            progress(f"epoch {epoch} of {epochs}: {told}, {task.score} {score:.3f} on validation", epoch / epochs)

    best = _best_weights(job, _fabric(job), hear) if devices == 1 else _best_weights_of_several(job, hear)
    # Into a fresh copy: the one that was trained may lie on another device and in another memory format.
    trained = copy.deepcopy(network)
    trained.load_state_dict(best)
    return trained.eval()


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is to be trained, on what and how: the arguments of `train`, as they cross to other processes."""

    network: nn.Module
    task: Task
    images: Images
    targets: Tensor
    validation: Images
    pressure: Pressure
    config: Training
    epochs: int
    seed: int
    checkpoint: Path | None
    marks: Mapping[str, str]
    choose_after: float
    device: torch.device
    devices: int


def _check_devices(device: torch.device, devices: int, config: Training) -> None:
    if devices == 1:
        return
    there = {"cuda": torch.cuda.device_count(), "cpu": n_cores()}.get(device.type, 1)
    if not 1 <= devices <= there:
        raise ConfigError(
            f"devices: expected 1 to {there}, which is what this machine has of {device.type}, got {devices}"
        )
    if config.batch_size < 2 * devices:
        raise ConfigError(
            f"devices: expected a batch_size of {2 * devices} or more, 2 images for each of {devices}, got "
            f"{config.batch_size}"
        )


def _best_weights_of_several(job: _Job, hear: Callable[[int, dict[str, float]], None]) -> dict[str, Tensor]:
    best: dict[str, Tensor] = {}
    for told in messages_of(partial(_share_of_training, job), job.devices):
        if isinstance(told, bytes):
            best = safetensors.torch.load(told)
        else:
            assert isinstance(told, tuple)
            hear(*told)
    return best


def _share_of_training(job: _Job, tell: Tell) -> None:
    """What one of several processes does; the first of them speaks for all."""
    # What was sent lies in memory that all processes share; the network is copied anyway.
    job = dataclasses.replace(job, pressure=copy.deepcopy(job.pressure))
    fabric = _fabric(job)
    best = _best_weights(job, fabric, lambda epoch, figures: tell((epoch, figures)) if fabric.is_global_zero else None)
    if fabric.is_global_zero:
        tell(safetensors.torch.save(best))


def _best_weights(job: _Job, fabric: Fabric, hear: Callable[[int, dict[str, float]], None]) -> dict[str, Tensor]:
    """Trains, and returns the weights of the epoch that validation liked best; `hear(epoch, figures)` after each."""
    run = _begin(job, fabric)
    if job.checkpoint is not None and job.checkpoint.exists():
        _restore(run, job.checkpoint, job.marks)
    wrapped = fabric.setup(run.trainee, run.optimizer, move_to_device=False)
    while run.epoch < job.epochs and not _is_stale(run, job.config):
        # Dropout and its like draw from torch's global generators.
        with drawing_from(_epoch_seed(job.seed, run.epoch) + fabric.global_rank, fabric.device):
            losses = _train_epoch(run, wrapped, job, fabric)
        run.epoch += 1
        # Noise that stays on in use is drawn here too: the same in every epoch, so that they are compared alike.
        with drawing_from(_epoch_seed(job.seed, 0), fabric.device):
            score = job.task.evaluate(run.trainee.network, job.validation, device=fabric.device)[job.task.score]
        # Statistics of batches differ between processes; that they stop at the same epoch must not hang on it.
        score = fabric.broadcast(score)
        run.history.append({**losses, f"validation_{job.task.score}": score})
        # Not >=: of equal epochs the first is kept, so that more epochs never change a tie.
        if run.epoch > job.choose_after * job.epochs and score > run.best_score:
            run.best, run.best_score, run.best_epoch = cloned(run.trainee.network.state_dict()), score, run.epoch
        if job.checkpoint is not None and fabric.is_global_zero:
            _save(run, job.checkpoint, job.marks)
        hear(run.epoch, run.history[-1])
    return run.best


def _is_stale(run: _Run, config: Training) -> bool:
    return config.patience is not None and run.best_epoch > 0 and run.epoch - run.best_epoch >= config.patience


def _fabric(job: _Job) -> Fabric:
    precision, device, devices = job.config.precision, job.device, job.devices
    is_half = has_fast_bfloat16(device) if precision == "auto" else precision == "bfloat16"
    # It announces its precision and looks for a cluster to warn about; neither is news to the user.
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        which: Any = [device.index] if device.index is not None and devices == 1 else devices
        accelerator = {"cuda": "cuda", "mps": "mps"}.get(device.type, "cpu")
        fabric = Fabric(accelerator=accelerator, devices=which, precision="bf16-mixed" if is_half else "32-true")
        if devices > 1:
            fabric.launch()
    return fabric


def _begin(job: _Job, fabric: Fabric) -> _Run:
    network, task, pressure, config = job.network, job.task, job.pressure, job.config
    trained = copy.deepcopy(network)
    if pressure.freezes_edge and isinstance(trained, Split):
        trained.edge.requires_grad_(False)
    if not any(value.requires_grad for value in trained.parameters()):
        raise ConfigError(f"{type(network).__name__}: expected parameters that require gradients, got none to train")
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        example = copy.deepcopy(trained).eval()(torch.from_numpy(job.images.floats(slice(0, 2))))
    criterion = task.criterion(example, job.targets, seed=job.seed)
    trainee = _Trainee(trained, criterion).to(fabric.device)
    if config.channels_last:
        trainee = trainee.to(memory_format=torch.channels_last)
    parameters = [value for value in trainee.parameters() if value.requires_grad]
    groups = [
        {"params": [value for value in parameters if value.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [value for value in parameters if value.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True, fused=True)
    return _Run(
        trainee=trainee,
        pressure=pressure.to(fabric.device),
        optimizer=optimizer,
        best=cloned(trained.state_dict()),
    )


def _train_epoch(
    run: _Run,
    wrapped: Any,  # noqa: ANN401 - Fabric's own (module, optimizer)
    job: _Job,
    fabric: Fabric,
) -> dict[str, float]:
    """Mean of the loss and of each of its terms over one pass of `task.batches`."""
    config, epochs, checkpoint = job.config, job.epochs, job.checkpoint
    generator = torch.Generator().manual_seed(_epoch_seed(job.seed, run.epoch))
    batches = job.task.batches(job.targets, config.batch_size, generator)
    if fabric.global_rank:
        # The order is that of all, what is done to the pictures is each process's own.
        generator.manual_seed(_epoch_seed(job.seed, run.epoch) + fabric.global_rank)
    module, optimizer = wrapped
    network, pressure, device = run.trainee.network, run.pressure, fabric.device
    smoothing = config.label_smoothing if pressure.label_smoothing is None else pressure.label_smoothing
    totals: dict[str, float] = {}
    n_seen = 0
    run.trainee.train()
    if pressure.freezes_edge and isinstance(network, Split):
        network.edge.eval()
    for index, whole in enumerate(batches):
        # Neighbors stay together: rows of one identity, which a metric loss compares, follow one another.
        is_shared = len(whole) >= 2 * fabric.world_size
        batch = whole.tensor_split(fabric.world_size)[fabric.global_rank] if is_shared else whole
        rate = _rate(run.epoch * len(batches) + index, epochs * len(batches), config)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        pixels = _augmented(torch.from_numpy(job.images.pixels[batch.numpy()]), config, generator).to(device)
        x = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        if config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        wanted = job.targets[batch].to(device)
        done = (run.epoch + index / len(batches)) / epochs
        terms = _terms(run, module, x, wanted, smoothing, done, fabric, is_first=True)
        loss = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        fabric.backward(loss)
        if config.gradient_norm is None:
            norm = nn.utils.get_total_norm(p.grad for p in run.trainee.parameters() if p.grad is not None)
        else:
            found = fabric.clip_gradients(module, optimizer, max_norm=config.gradient_norm, error_if_nonfinite=False)
            assert found is not None
            norm = found
        # Read all at once, since a GPU is waited for each time that a number is read.
        told = torch.stack([norm, loss, *terms.values()]).tolist()
        values = dict(zip(("loss", *terms), told[1:], strict=True))
        _check_finite(run, values, config, epochs, checkpoint)
        if not math.isfinite(told[0]):
            again = _terms(run, module, x, wanted, smoothing, done, fabric, is_first=False)
            _check_finite(run, _gradients_of(again, run.trainee), config, epochs, checkpoint, what="the gradient")
        optimizer.step()
        if isinstance(network, Split):
            pressure.after(network, learning_rate=rate)
            _keep_in_step(pressure, fabric)
        for name, value in values.items():
            totals[name] = totals.get(name, 0.0) + value * len(batch)
        n_seen += len(batch)
    for name, parameter in run.trainee.named_parameters():
        if not bool(parameter.isfinite().all()):
            _check_finite(run, {name.removeprefix("network."): math.nan}, config, epochs, checkpoint)
    means = {name: total / n_seen for name, total in totals.items()}
    if fabric.world_size > 1:
        together = fabric.all_reduce(torch.tensor(list(means.values()), device=device), reduce_op="mean")
        assert isinstance(together, Tensor)
        means = dict(zip(means, together.tolist(), strict=True))
    return means if len(means) > 2 else {"loss": means["loss"]}


def _keep_in_step(pressure: Pressure, fabric: Fabric) -> None:
    """What a pressure learned by itself becomes the mean over the processes; Fabric does so for the network only."""
    if fabric.world_size == 1:
        return
    for value in pressure.state_dict().values():
        if value.is_floating_point():
            value.copy_(fabric.all_reduce(value, reduce_op="mean"))


def _terms(
    run: _Run,
    module: Any,  # noqa: ANN401 - Fabric's own
    x: Tensor,
    wanted: Tensor,
    smoothing: float,
    done: float,
    fabric: Fabric,
    *,
    is_first: bool,
) -> dict[str, Tensor]:
    """Every term of the loss on one batch, by name; the adversary of a pressure takes its step only the first time."""
    network, pressure = run.trainee.network, run.pressure
    features, outputs, task_loss = module(x, wanted, smoothing)
    terms = {"task": pressure.task_weight * task_loss}
    if isinstance(network, Split):
        seen = Batch(images=x, features=features, outputs=outputs, targets=wanted, done=done, autocast=fabric.autocast)
        if is_first:
            pressure.before(network, seen)
        terms |= pressure.terms(network, seen)
    return terms


def _gradients_of(terms: Mapping[str, Tensor], trainee: nn.Module) -> dict[str, float]:
    """For each term NaN where its gradient is not finite, else 0; "loss" is NaN: the whole of them was not."""
    parameters = [p for p in trainee.parameters() if p.requires_grad]
    found = {"loss": math.nan}
    for name, term in terms.items():
        if not term.requires_grad:
            continue
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        is_finite = all(bool(one.isfinite().all()) for one in gradients if one is not None)
        found[name] = 0.0 if is_finite else math.nan
    return found


def _check_finite(
    run: _Run,
    values: Mapping[str, float],
    config: Training,
    epochs: int,
    checkpoint: Path | None,
    *,
    what: str = "the loss",
) -> None:
    broken = {name: value for name, value in values.items() if not math.isfinite(value)}
    if not broken:
        return
    # The loss is the sum of the others; where one of them is broken, it is that one that is to be mended.
    name = next((name for name in broken if name != "loss"), "loss")
    kept = f"{checkpoint} holds epoch {run.epoch}" if checkpoint and run.epoch else "no epoch was finished"
    raise ConfigError(
        f"training broke in epoch {run.epoch + 1} of {epochs}: {what} is {values.get('loss', broken[name])}, through "
        f"{name!r}; lower lr (now {config.lr:g}), the weight of that term, or lengthen warmup, and train from the "
        f"start ({kept})"
    )


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


def _epoch_seed(seed: int, epoch: int) -> int:
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _marks(
    network: nn.Module, task: Task, images: Images, validation: Images, config: Training, seed: int
) -> dict[str, str]:
    """What makes two runs the same run, so that a checkpoint is never taken for that of another."""
    weights = hashlib.sha256()
    for name, value in cloned(network.state_dict()).items():
        weights.update(name.encode())
        weights.update(value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return {
        "task": repr(task),
        "training options": json.dumps(dataclasses.asdict(config), sort_keys=True),
        "seed": str(seed),
        "initial weights": weights.hexdigest(),
        "training images": _hash(images, task.targets(images)),
        "validation images": _hash(validation, task.targets(validation)),
    }


def _hash(images: Images, targets: Tensor) -> str:
    digest = hashlib.sha256(repr(images.pixels.shape).encode())
    digest.update(np.ascontiguousarray(images.pixels).data)
    digest.update(np.ascontiguousarray(targets.numpy()).data)
    return digest.hexdigest()


def _save(run: _Run, path: Path, marks: Mapping[str, str]) -> None:
    tensors = {f"network/{name}": value for name, value in run.trainee.network.state_dict().items()}
    tensors |= {f"criterion/{name}": value for name, value in run.trainee.criterion.state_dict().items()}
    tensors |= {f"pressure/{name}": value for name, value in run.pressure.state_dict().items()}
    tensors |= {f"held/{name}": value for name, value in run.pressure.held().items()}
    tensors |= {f"best/{name}": value for name, value in run.best.items()}
    for index, slots in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{slot}": value for slot, value in slots.items()}
    header = {
        "epoch": run.epoch,
        "best_score": run.best_score,
        "best_epoch": run.best_epoch,
        "history": run.history,
    }
    write_checkpoint(path, tensors, header, marks)


def _restore(run: _Run, path: Path, marks: Mapping[str, str]) -> None:
    parts, header = read_checkpoint(path, marks)
    run.trainee.network.load_state_dict(parts.get("network", {}))
    run.trainee.criterion.load_state_dict(parts.get("criterion", {}))
    run.pressure.load_state_dict(parts.get("pressure", {}))
    run.pressure.hold(parts.get("held", {}))
    run.best = parts["best"]
    run.best_score, run.best_epoch = header["best_score"], header["best_epoch"]
    run.epoch, run.history = header["epoch"], header["history"]
    restore_optimizer(run.optimizer, parts.get("optimizer", {}))
