"""Hardening: a split trained so that its features give away less, and the files that keep it.

- split.json: what to build it from (network, cut, defense with its knobs)
- split.safetensors: every number in it
- training-1.safetensors, training-2.safetensors: checkpoints, before and after `finish`
- secret.json: what a defense that keeps a secret draws it from; for the owner's eyes only, needed to resume
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from louver.checkpoints import cloned
from louver.cut import Split, joined, split
from louver.defenses import DEFENSES, Defense, PrivyNet
from louver.errors import ConfigError, WeightsError, nearest
from louver.models import load_model
from louver.storage import write_bytes, write_json
from louver.tasks import Task
from louver.training import Training, train
from louver.types import Images

__all__ = ["Origin", "defense_knobs", "defense_name", "describe", "harden", "load_split", "save_split"]

_CHOOSE_AFTER = 0.5
"""Weights are chosen among the second half of the epochs: before, pressure has not yet acted."""


def harden(
    halves: Split,
    task: Task,
    training: Images,
    validation: Images,
    defense: Defense,
    *,
    config: Training | None = None,
    seed: int = 0,
    folder: Path | None = None,
    progress: Callable[[str, float], None] | None = None,
    log: Callable[[int, Mapping[str, float]], None] | None = None,
    device: torch.device | str = "cpu",
    devices: int = 1,
) -> Split:
    """A new split, trained under `defense`, in eval mode; `halves` is left untouched.

    It starts from the weights of `halves`, trained or not. Weights are those of the epoch, among the second half, that
    `task` scores best on `validation`; nothing else is looked at. `folder` keeps checkpoints: a stopped run goes on and
    ends with the same weights, bit for bit on a CPU. The result cuts, costs and audits like any split; noise stays on.

    Raises:
        ConfigError: a knob that does not fit this cut, an unreachable budget, or a term of the loss became NaN.
        DataError: no images, labels that are not the task's, or too few for a term.
        StorageError: the disk is full; the checkpoint before is kept.
        WeightsError: a checkpoint in `folder` is of another run.
    """
    config = config or Training()
    defense = _with_secret(defense, folder)
    targets = task.targets(training)
    mending = _mending_epochs(defense, config.epochs)
    example = torch.from_numpy(training.floats(slice(0, 2)))
    identity = {"defense": describe(defense)}

    def trained(part: Split, epochs: int, stage: int) -> Split:
        before = 0 if stage == 1 else config.epochs - mending

        def logged(epoch: int, figures: Mapping[str, float]) -> None:
            if log is not None:
                log(before + epoch, figures)

        def told(what: str, fraction: float) -> None:
            if progress is not None:
                progress(
                    ("training: " if stage == 1 else "mending: ") + what, (before + fraction * epochs) / config.epochs
                )

        found = train(
            part,
            task,
            training,
            validation,
            defense.pressure(part, is_mending=stage == 2, seed=seed),
            config=config,
            epochs=epochs,
            seed=seed + stage,
            checkpoint=None if folder is None else folder / f"training-{stage}.safetensors",
            identity=identity | {"stage": str(stage), "number of epochs": str(epochs)},
            choose_after=_CHOOSE_AFTER,
            progress=told,
            log=logged,
            device=device,
            devices=devices,
        )
        assert isinstance(found, Split)
        return found

    hard = trained(defense.operate(halves, training, targets, seed=seed), config.epochs - mending, 1)
    hard = defense.finish(hard, training, targets, seed=seed)
    if mending:
        hard = trained(hard, mending, 2)
    return joined(hard.edge, hard.cloud, example, name=halves.cut.name).eval()


def _with_secret(defense: Defense, folder: Path | None) -> Defense:
    """The defense with a secret from the operating system, the same each time for a run that is kept in `folder`."""
    if not isinstance(defense, PrivyNet) or defense.secret_seed is not None or folder is None:
        return defense
    path = folder / "secret.json"
    if not path.is_file():
        write_json(path, {"secret_seed": secrets.randbits(62)})
        path.chmod(0o600)
    try:
        return replace(defense, secret_seed=int(json.loads(path.read_text(encoding="utf-8"))["secret_seed"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); remove the folder and harden again") from error


def _mending_epochs(defense: Defense, epochs: int) -> int:
    if defense.mending == 0:
        return 0
    if epochs < 2:
        raise ConfigError(
            f"{type(defense).__name__}: expected 2 epochs or more, one to train and one to mend, got {epochs}"
        )
    return min(epochs - 1, max(1, round(defense.mending * epochs)))


def describe(defense: Defense) -> str:
    """A stable text of a defense and its knobs."""
    return json.dumps([defense_name(defense), defense_knobs(defense)], sort_keys=True)


def defense_name(defense: Defense) -> str:
    """The name that files use for the kind of `defense`."""
    known = (name for name, kind in DEFENSES.items() if type(defense) is kind)
    return next(known, type(defense).__name__)


def defense_knobs(defense: Defense) -> dict[str, object]:
    """Its knobs as JSON values, without a secret."""
    knobs: dict[str, object] = json.loads(json.dumps(asdict(defense), default=str))  # type: ignore[call-overload]
    knobs.pop("secret_seed", None)  # which channels were drawn is no one's business, and the weights hold it anyway
    return knobs


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a split is built from again: the network as in `louver.load_model`, the cut, the defense."""

    model: str
    n_classes: int | None
    image_shape: tuple[int, int, int]
    cut: str
    defense: Defense
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def undefended(self) -> Split:
        """The split as it was first cut, with random weights."""
        model = load_model(
            self.model, n_classes=self.n_classes, mean=self.mean, std=self.std, image_shape=self.image_shape
        )
        return split(model, self.cut, torch.rand(2, *self.image_shape, generator=torch.Generator().manual_seed(0)))


def save_split(halves: Split, folder: Path, origin: Origin) -> None:
    """Writes `split.safetensors` and, last, `split.json`.

    Raises:
        StorageError: the disk refused; what was there before is kept.
    """
    (folder / "split.json").unlink(missing_ok=True)
    write_bytes(folder / "split.safetensors", safetensors.torch.save(cloned(halves.state_dict())))
    record = {
        "format": 1,
        "model": origin.model,
        "n_classes": origin.n_classes,
        "mean": origin.mean,
        "std": origin.std,
        "image_shape": list(origin.image_shape),
        "cut": origin.cut,
        "defense": defense_name(origin.defense),
        "knobs": defense_knobs(origin.defense),
    }
    write_json(folder / "split.json", record)


def load_split(folder: Path, *, undefended: Split | None = None) -> Split:
    """The split that `save_split` kept, in eval mode; it computes bit for bit what was saved.

    `undefended` is the split as first cut, for a network that `louver.load_model` cannot build by name.

    Raises:
        ConfigError: no split there, or its defense is unknown to this version.
        WeightsError: the files are damaged or do not belong together.
    """
    path = folder / "split.json"
    if not path.is_file():
        raise ConfigError(f"expected a hardened split in {folder}, got no split.json; run `louver harden FILE` first")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        kind = DEFENSES.get(record["defense"])
        if kind is None:
            raise ConfigError(f"{path}: unknown defense {record['defense']!r}; {nearest('', sorted(DEFENSES))}")
        knobs = {k: tuple(v) if isinstance(v, list) else v for k, v in record["knobs"].items()}
        origin = Origin(
            model=record["model"],
            n_classes=record["n_classes"],
            image_shape=tuple(record["image_shape"]),
            cut=record["cut"],
            defense=kind(**knobs),
            mean=None if record["mean"] is None else tuple(record["mean"]),
            std=None if record["std"] is None else tuple(record["std"]),
        )
        state = safetensors.torch.load_file(folder / "split.safetensors")
        built = origin.defense.rebuild(undefended or origin.undefended(), state)
        built.load_state_dict(state)
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise WeightsError(
            f"{folder}: split.json and split.safetensors are damaged or not of one split ({error}); harden again"
        ) from error
    example = torch.rand(2, *origin.image_shape, generator=torch.Generator().manual_seed(0))
    return joined(built.edge, built.cloud, example, name=built.cut.name).eval()
