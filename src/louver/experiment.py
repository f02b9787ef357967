"""From an experiment to its audit: load, train if asked, cut, attack, judge; each step one call."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from louver.attacks import Attack
from louver.audit import Settings, audit
from louver.config import Experiment, read_experiment
from louver.cost import measure_latency, with_latency
from louver.cut import Split, cuts, split
from louver.data import assign_roles, drop_overlap, load_images
from louver.defenses import Defense
from louver.errors import ConfigError, DataError
from louver.hardening import Origin, defense_name, load_split
from louver.models import load_model, save_weights
from louver.runs import RunFolder, load_audit
from louver.storage import write_bytes
from louver.study import Judging, study, weakened
from louver.tasks import Attributes, Classification, Task
from louver.thresholds import Rule, parse_rule
from louver.training import fit
from louver.types import Audit, Images, Log, Progress, Roles, share_of

__all__ = ["Run", "audit_run", "load_roles", "load_run", "run_experiment"]

_TRAINING_SHARE = 0.2
"""Of the whole run, where the network is trained first."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run folder was made from, and the split that came out of it."""

    experiment: Experiment
    roles: Roles
    notes: tuple[str, ...]
    task: Task | None
    halves: Split


def load_run(folder: Path, *, cut: str | None = None) -> Run:
    """The split of a finished run with its images and task; of a run at several cuts, the one at `cut`.

    Raises:
        ConfigError: no run there, one that has not ended, or several cuts and none named.
        LouverError: whatever reading images and weights refuses.
    """
    path = folder / "config.toml"
    if not path.is_file():
        raise ConfigError(f"expected a run in {folder}, got no config.toml; make one with `louver audit` or `harden`")
    experiment = read_experiment(path, cuts=None if cut is None else [cut])
    names = experiment.audit.cuts
    if len(names) != 1:
        raise ConfigError(f"{folder} holds {len(names)} cuts; name one: {', '.join(names)}")
    roles, notes = load_roles(experiment)
    task = _task(experiment, roles)
    if experiment.defense is not None:
        halves = load_split(folder)
    else:
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise ConfigError(f"{folder} holds no model.safetensors: its run has not ended; run it again with --resume")
        model = _network(experiment, roles, task, weights=str(weights))
        (halves,) = _splits(experiment, model, torch.from_numpy(roles.test.floats(slice(0, 2))))
    return Run(experiment=experiment, roles=roles, notes=tuple(notes), task=task, halves=halves.eval())


def audit_run(
    run: Run,
    halves: Split,
    folder: Path | None,
    *,
    name: str,
    notes: Sequence[str] = (),
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Audit:
    """The audit of `halves` with the attacks, images and rules of `run`.

    Raises:
        LouverError: whatever the audit refuses.
    """
    return _audit(run.experiment, [halves], run.roles, run.task, folder, name, [*run.notes, *notes], device, progress)


def _audit(
    experiment: Experiment,
    splits: Sequence[Split],
    roles: Roles,
    task: Task | None,
    folder: Path | None,
    name: str,
    notes: Sequence[str],
    device: torch.device | str,
    progress: Progress | None,
) -> Audit:
    attacks = _attacks(experiment)
    return audit(
        splits,
        roles,
        attacks,
        threat=experiment.threat,
        task=task,
        label=experiment.data.label,
        rules=_rules(experiment),
        settings=_audit_settings(experiment),
        seed=experiment.seed,
        name=name,
        defense="none" if experiment.defense is None else defense_name(experiment.defense),
        notes=[*notes, *weakened(attacks)],
        config=experiment.table,
        folder=folder,
        device=device,
        progress=progress,
    )


def _attacks(experiment: Experiment) -> dict[str, Attack]:
    return {name: entry.attack for name, entry in experiment.attacks.items()}


def _rules(experiment: Experiment) -> list[Rule]:
    return [parse_rule(rule) for rule in experiment.thresholds]


def run_experiment(
    experiment: Experiment,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    devices: int = 1,
    progress: Progress | None = None,
    log: Log | None = None,
) -> Audit:
    """Runs an experiment in `folder`; what is finished there already, from a run that was stopped, is not redone.

    Raises:
        LouverError: whatever any step refuses; what was finished is kept.
    """
    if progress is not None:
        progress("reading images", 0.0)
    roles, notes = load_roles(experiment)
    task = _task(experiment, roles)
    model = _victim(experiment, roles, task, folder, device, share_of(progress, 0.0, _TRAINING_SHARE))
    if experiment.training is not None:
        progress = share_of(progress, _TRAINING_SHARE, 1.0)
    splits = _splits(experiment, model, torch.from_numpy(roles.test.floats(slice(0, 2))))
    # Only now is the folder a run's: what was refused before leaves none behind.
    RunFolder(folder).forget_audit()
    write_bytes(folder / "config.toml", experiment.to_toml().encode())
    save_weights(model, folder / "model.safetensors")
    if experiment.defense is not None:
        attacks = _attacks(experiment)
        assert task is not None
        study(
            splits[0],
            _origin(experiment, experiment.defense, task, roles, splits[0]),
            roles,
            task,
            Judging(
                attacks=attacks,
                settings=_audit_settings(experiment),
                private=experiment.probes.columns,
                identity=experiment.probes.identity,
                camera=experiment.probes.camera,
                on_reconstructions=experiment.probes.reconstructions,
                completion_counts=experiment.probes.completion,
            ),
            config=experiment.hardening,
            folder=folder,
            name=experiment.name,
            label=experiment.data.label,
            threat=experiment.threat,
            rules=_rules(experiment),
            notes=[*notes, *weakened(attacks)],
            table=experiment.table,
            seed=experiment.seed,
            device=device,
            devices=devices,
            progress=progress,
            log=log,
        )
        return load_audit(folder)
    return _audit(experiment, splits, roles, task, folder, experiment.name, notes, device, progress)


def _audit_settings(experiment: Experiment) -> Settings:
    options = experiment.audit
    return Settings(
        measures=options.measures,
        test_images=options.test_images,
        limits={n: e.test_images for n, e in experiment.attacks.items() if e.test_images is not None},
        mirror_auxiliary=options.mirror_auxiliary,
        observations=options.observations,
        validation_share=options.validation_share,
        memory_bytes=options.memory_mib * 2**20,
        lpips_weights=None if options.lpips_weights is None else Path(options.lpips_weights),
    )


def _origin(experiment: Experiment, defense: Defense, task: Task, roles: Roles, halves: Split) -> Origin:
    options = experiment.model
    return Origin(
        model=options.name,
        n_classes=options.n_classes or _n_outputs(task),
        image_shape=roles.test.image_shape,
        cut=halves.cut.name,
        defense=defense,
        mean=options.mean,
        std=options.std,
    )


def _n_outputs(task: Task | None) -> int | None:
    """How many numbers the network must answer with, where the task says so; embeddings may be of any length."""
    if isinstance(task, Classification):
        return task.n_classes
    return sum(task.columns.values()) if isinstance(task, Attributes) else None


def load_roles(experiment: Experiment) -> tuple[Roles, list[str]]:
    """The images of each role, none in two of them, and a note for each role that lost some to that rule."""
    options = experiment.data

    def load(source: str | None) -> Images | None:
        return None if source is None else load_images(source, download=options.download, size=options.size)

    test, auxiliary = load(options.test), load(options.auxiliary)
    assert test is not None
    assert auxiliary is not None
    nothing = test.take(slice(0, 0))
    train, validation = load(options.train) or nothing, load(options.validation) or nothing
    _check_classes(options.label, [train, validation, test, auxiliary])
    if options.on_overlap == "error":
        return assign_roles(train=train, validation=validation, test=test, auxiliary=auxiliary), []
    roles, dropped = drop_overlap(train=train, validation=validation, test=test, auxiliary=auxiliary)
    notes = [
        f"{count} images of role {role} were dropped: another role holds them too."
        for role, count in dropped.items()
        if count
    ]
    return roles, notes


def _check_classes(label: str | None, roles: list[Images]) -> None:
    """A class must have the same number in every role; folders number theirs each for itself."""
    named = [images for images in roles if len(images) and label in images.classes]
    for images in named[1:]:
        if images.classes[label or ""] != named[0].classes[label or ""]:
            raise DataError(
                f"label {label!r}: expected the same classes in every role, got {images.classes[label or '']} in "
                f"{images.name} and {named[0].classes[label or '']} in {named[0].name}; give every folder the same "
                "subfolders, since classes are numbered by them"
            )


def _task(experiment: Experiment, roles: Roles) -> Task | None:
    if experiment.task is not None:
        return experiment.task
    label = experiment.data.label
    if label is None:
        return None
    named = roles.test.classes.get(label)
    count = experiment.model.n_classes or (len(named) if named else None)
    if count is None:
        held = [images.column(label) for images in (roles.train, roles.validation, roles.test) if len(images)]
        count = 1 + max(int(column.max()) for column in held)
    return Classification(label, count)


def _victim(
    experiment: Experiment,
    roles: Roles,
    task: Task | None,
    folder: Path,
    device: torch.device | str,
    progress: Progress | None,
) -> nn.Module:
    model = _network(experiment, roles, task, weights=experiment.model.weights)
    if experiment.training is None:
        return model
    if task is None or not len(roles.train) or not len(roles.validation):
        raise DataError("training needs labelled images in the roles train and validation, got none")
    return fit(
        model,
        task,
        roles.train,
        roles.validation,
        config=experiment.training,
        seed=experiment.seed,
        checkpoint=folder / "training.safetensors",
        progress=None
        if progress is None
        else lambda what, fraction: progress(f"training the network: {what}", fraction),
        device=device,
    )


def _network(experiment: Experiment, roles: Roles, task: Task | None, *, weights: str | None) -> nn.Module:
    options = experiment.model
    return load_model(
        options.name,
        n_classes=options.n_classes or _n_outputs(task),
        weights=weights,
        mean=options.mean,
        std=options.std,
        seed=experiment.seed,
        image_shape=roles.test.image_shape,
    )


def _splits(experiment: Experiment, model: nn.Module, example: torch.Tensor) -> list[Split]:
    """A split for each cut that was asked for, in network order."""
    names = experiment.audit.cuts
    if not names:
        raise ConfigError("expected at least one cut in audit.cuts, got none; `louver cuts MODEL` lists them")
    if experiment.defense is not None and len(names) != 1:
        raise ConfigError(f"expected one cut in audit.cuts to harden, got {len(names)}; write a file for each")
    order = {cut.name: place for place, cut in enumerate(cuts(model, example))}
    splits = sorted((split(model, name, example) for name in names), key=lambda s: order[s.cut.name])
    for before, after in itertools.pairwise(splits):
        if before.cut.name == after.cut.name:
            raise ConfigError(f"cut {after.cut.name!r} is named twice in audit.cuts; name it once")
    if experiment.audit.latency:
        for each in splits:
            each.cut = with_latency(each.cut, *measure_latency(each, example[:1]))
    return splits
