"""One defended split, from training to judgement, kept in a folder that comparisons read.

Beside the files of hardening and audit the folder holds `facts.json`: utility, leakage, information and secondary
inference, each with its interval and its floor or chance.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from louver.attacks import Attack, Decoder, View
from louver.audit import FLOOR, Settings, audit
from louver.cut import Split
from louver.defenses.hybrid import explained_variance
from louver.defenses.pca import Reconstruction
from louver.errors import ConfigError
from louver.features import ImageRows, compute_features
from louver.hardening import Origin, defense_knobs, defense_name, harden, save_split
from louver.measures.information import (
    distance_correlation,
    effective_dimensions,
    effective_volume,
    feature_entropy,
    intra_class_radius,
    mutual_information,
)
from louver.measures.ranking import log_rank_privacy, rank_privacy
from louver.measures.statistics import summarize
from louver.probes import (
    LinearProbe,
    MetricProbe,
    NeighborProbe,
    Probe,
    ProbeResult,
    TailProbe,
    completion,
    learned_metric,
    probe,
    reidentify,
)
from louver.probes.identity import LEAST_IDENTITIES
from louver.runs import RunFolder
from louver.stochastic import Noise, Stochastic, drawing_from, silenced, stochastic_layers
from louver.storage import write_json
from louver.tasks import Classification, Task
from louver.thresholds import Rule
from louver.training import Training
from louver.types import Audit, Images, Log, Progress, Roles, Threat

__all__ = ["Judging", "study", "utility", "weakened"]

_STRENGTH = ("blocks", "epochs", "n_sweep", "restarts", "steps", "sweep_steps", "trial_steps", "width")


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How a defended split is judged.

    attacks, settings: of the audit. private: label columns that the task does not need, which probes try to recover
    from features, and with `on_reconstructions` from what the strongest attack rebuilt; images whose label is below 0
    have none. identity: a column whose values differ between the attacker's images and the test images, for
    re-identification by the nearest image, as features come and by a metric learned on the attacker's identities;
    camera: its junk rule. Where the training images show the identities of the test images too, log-rank privacy says
    how well these hide from someone who has such pictures of them. completion_counts: labelled examples a class for
    model completion. information_images: how many test and auxiliary images the information measures look at;
    mine_steps: of each critic.
    """

    attacks: Mapping[str, Attack]
    settings: Settings = field(default_factory=Settings)
    private: tuple[str, ...] = ()
    identity: str | None = None
    camera: str | None = None
    on_reconstructions: bool = False
    completion_counts: tuple[int, ...] = ()
    information_images: int = 2000
    mine_steps: int = 600
    mine_seeds: int = 3


def study(
    halves: Split,
    origin: Origin,
    roles: Roles,
    task: Task,
    judging: Judging,
    *,
    config: Training | None,
    folder: Path,
    name: str,
    group: str = "",
    knob: str | None = None,
    strength: float | None = None,
    variant: str = "",
    label: str | None = None,
    threat: Threat | None = None,
    rules: Sequence[Rule] = (),
    notes: Sequence[str] = (),
    table: Mapping[str, object] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    devices: int = 1,
    progress: Progress | None = None,
    log: Log | None = None,
) -> dict[str, Any]:
    """Hardens `halves` with `origin.defense`, audits the result, and writes `facts.json`; returns its content.

    Without `config` the split is judged as it is. The probes learn from the attacker's auxiliary images and their
    labels, and are scored on the test images that the audit drew.

    Raises:
        LouverError: whatever `harden`, `audit` and the probes refuse. Nothing is written then: no facts, no privacy.
    """
    tell = progress or (lambda what, fraction: None)
    if judging.completion_counts and not isinstance(task, Classification):
        raise ConfigError(f"model completion is of classifications, got {type(task).__name__}; leave completion out")
    if judging.on_reconstructions and not judging.private:
        raise ConfigError("expected label columns to probe reconstructions for, got none; name them, or leave it out")
    defense = origin.defense
    started = time.monotonic()
    hard = halves
    if config is not None:
        hard = harden(
            halves,
            task,
            roles.train,
            roles.validation,
            defense,
            config=config,
            seed=seed,
            folder=folder,
            progress=lambda what, fraction: tell(f"harden: {what}", 0.4 * fraction),
            log=log,
            device=device,
            devices=devices,
        )
    save_split(hard, folder, origin)
    hardened = time.monotonic()
    found = audit(
        [hard],
        roles,
        judging.attacks,
        task=task if isinstance(task, Classification) else None,
        label=label,
        threat=threat,
        rules=rules,
        notes=notes,
        config=table,
        settings=judging.settings,
        seed=seed,
        name=name,
        defense=defense_name(defense),
        folder=folder,
        device=device,
        progress=lambda what, fraction: tell(f"audit: {what}", 0.4 + 0.4 * fraction),
    )
    audited = time.monotonic()
    tell("information and probes", 0.85)
    sent = _Sent(hard, roles, judging, seed, torch.device(device), folder)
    facts: dict[str, Any] = {
        "format": 1,
        "name": name,
        "group": group,
        "defense": defense_name(defense),
        "knobs": defense_knobs(defense),
        "knob": knob,
        "strength": strength,
        "variant": variant,
        "is_trained": config is not None,
        "cut": hard.cut.name,
        "edge_macs": hard.cut.cost.edge.macs,
        "edge_parameters": hard.cut.cost.edge.parameters,
        "edge_weight_bytes": hard.cut.cost.edge.weight_bytes,
        "feature_bytes": hard.cut.cost.feature_bytes,
        "feature_shape": list(hard.cut.feature_shape),
        "seed": seed,
        "task": repr(task),
        "task_title": task.title,
        "utility": utility(task, hard, roles.test, seed=seed, device=device),
        "leakage": _leakage(found),
        "information": _information(sent, task, judging, seed),
        "probes": _probes(sent, hard, roles, judging, found, folder, seed, device),
        "completion": _completion(sent, hard, task, judging, seed, device),
        "rank_privacy": _rank_privacy(hard, sent, judging.settings.observations, seed),
        "log_rank_privacy": _log_rank_privacy(hard, sent, roles, judging, seed),
        "explained_variance": _explained(hard),
    }
    facts["seconds"] = {
        "harden": round(hardened - started, 1),
        "audit": round(audited - hardened, 1),
        "all": round(time.monotonic() - started, 1),
    }
    write_json(folder / "facts.json", facts)
    tell("done", 1.0)
    return facts


def utility(
    task: Task, model: torch.nn.Module, images: Images, *, seed: int, device: torch.device | str = "cpu"
) -> dict[str, dict[str, float]]:
    """Each figure of the task with its 95 % interval over images (queries, for re-identification)."""
    with drawing_from(seed, torch.device(device)):
        values = task.per_image(model, images, device=device)
    return {name: _interval(per_image, seed) for name, per_image in values.items()}


def weakened(attacks: Mapping[str, Attack]) -> list[str]:
    """A note for each attack whose knobs are below their defaults: what it failed to rebuild, a stronger one may."""
    notes = []
    for name, attack in attacks.items():
        default = type(attack)()
        weaker = [
            f"{knob} {getattr(attack, knob)} (default {getattr(default, knob)})"
            for knob in _STRENGTH
            if hasattr(default, knob) and getattr(attack, knob) < getattr(default, knob)
        ]
        if weaker:
            notes.append(
                f"{name} ran below its default strength: {', '.join(weaker)}. At full strength it may rebuild more."
            )
    return notes


def _interval(per_image: NDArray[np.float64], seed: int) -> dict[str, float]:
    found = summarize(per_image, np.zeros_like(per_image), "high", seed=seed)
    return {"mean": found.mean, "low": found.low, "high": found.high, "n": len(per_image)}


def _leakage(found: Audit) -> list[dict[str, Any]]:
    keys = ("attack", "measure", "unit", "leaks_when", "mean", "low", "high", "worst", "worst_low", "worst_high")
    more = ("floor", "n_images", "beats_floor")
    return [{key: asdict(row)[key] for key in (*keys, *more)} for row in found.rows if row.attack != FLOOR]


class _Sent:
    """What the defended edge sends: for the test images that were scored, and for the attacker's own."""

    def __init__(
        self, hard: Split, roles: Roles, judging: Judging, seed: int, device: torch.device, folder: Path
    ) -> None:
        index = RunFolder(folder).truth_index()
        self.test = roles.test.take(index)
        # Probes choose on a tenth of the attacker's images, as attacks do.
        apart = _set_apart(roles.auxiliary, judging.identity or "identity", seed + 3)
        self.validation_images = roles.auxiliary.take(apart)
        self.train_images = roles.auxiliary.take(np.setdiff1d(np.arange(len(roles.auxiliary)), apart))

        self._edge, self._shape, self._device = hard.edge, hard.cut.feature_shape, device
        self._observations = judging.settings.observations
        self.features = {
            "test": self.of(self.test, seed + 11),
            "train": self.of(self.train_images, seed + 12),
            "validation": self.of(self.validation_images, seed + 13),
        }
        self.images = {"test": self.test, "train": self.train_images, "validation": self.validation_images}

    def of(self, images: Images, noise_seed: int = 0, *, is_silent: bool = False) -> Tensor:
        """What the edge sends for any images, or would send without its noise."""
        rows = compute_features(
            silenced(self._edge) if is_silent else self._edge,
            ImageRows(images),
            self._shape,
            device=self._device,
            memory_bytes=2**31,
            seed=noise_seed,
            observations=1 if is_silent else self._observations,
        )
        return rows.rows(np.arange(len(images)))


def _set_apart(images: Images, identity: str, seed: int) -> NDArray[np.int64]:
    """About a tenth of the images, in order, to choose on; with one picture of somebody, all of them.

    Where people or vehicles come in pairs, by two cameras for instance, a twin among those that a probe learns from
    would say what not to answer, and every choice would be made by that. An identity below 0 is nobody's.
    """
    who = np.arange(len(images))
    if identity in images.labels:
        told = images.column(identity)
        who = np.where(told < 0, -1 - who, told)
    wanted = max(2, len(images) // 10)
    chosen = np.zeros(len(images), bool)
    for one in np.random.default_rng(seed).permutation(np.unique(who)):
        if chosen.sum() >= wanted:
            break
        chosen |= who == one
    if chosen.sum() > len(images) // 3:  # too few people to keep any apart
        return np.sort(np.random.default_rng(seed).permutation(len(images))[:wanted])
    return np.flatnonzero(chosen)


def _information(sent: _Sent, task: Task, judging: Judging, seed: int) -> dict[str, Any]:
    n = judging.information_images
    x = torch.cat([torch.from_numpy(sent.images[role].floats(slice(0, n))) for role in ("test", "train")])[:n]
    z = torch.cat([sent.features[role][:n] for role in ("test", "train")])[:n]
    mine = mutual_information(x, z, seeds=judging.mine_seeds, steps=judging.mine_steps, seed=seed)
    entropy = feature_entropy(z)
    out: dict[str, Any] = {
        "mine": {"mean": mine.value, "low": mine.low, "high": mine.high, "unit": "nats, lower bound"},
        "entropy": {"mean": entropy.total_bits, "unit": "bits"},
        "effective_volume": {"mean": effective_volume(z), "unit": "elements that are not 0"},
        "effective_dimensions": {"mean": effective_dimensions(z), "unit": "directions"},
        "distance_correlation": {"mean": float(distance_correlation(x[:512], z[:512])), "unit": "0 to 1"},
    }
    targets = task.targets(sent.test)
    if targets.ndim == 1 and len(targets.unique()) * 2 <= len(targets):
        out["intra_class_radius"] = {"mean": intra_class_radius(sent.features["test"], targets), "unit": "of variance"}
    return out


def _probe_row(column: str, on: str, found: ProbeResult) -> dict[str, Any]:
    keys = ("probe", "accuracy", "low", "high", "chance", "uniform_chance", "beats_chance", "n")
    return {"column": column, "on": on, **{key: asdict(found)[key] for key in keys}}


def _probes(
    sent: _Sent,
    hard: Split,
    roles: Roles,
    judging: Judging,
    found: Audit,
    folder: Path,
    seed: int,
    device: torch.device | str,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for column in judging.private:
        features, labels = _labeled(sent, sent.features, column)
        probes: list[Probe] = [LinearProbe(), NeighborProbe(), TailProbe(cloud=hard.cloud)]
        results = probe(probes, features, labels, seed=seed, device=device)
        rows += [_probe_row(column, "features", result) for result in results]
    if judging.identity is not None:
        labels_of = sent.test.column(judging.identity)
        cameras = None if judging.camera is None else sent.test.column(judging.camera)
        known, known_of = sent.features["train"], sent.images["train"].column(judging.identity)
        (learned,) = learned_metric(known, known_of, sent.features["test"], seed=seed, device=device)
        for how, rows_of in (("nearest image", sent.features["test"]), ("learned metric", learned)):
            is_scaled = rows_of is learned
            seen = reidentify(rows_of, labels_of, cameras, is_scaled=is_scaled, seed=seed, device=device)
            keys = ("accuracy", "low", "high", "chance", "beats_chance")
            facts = {key: asdict(seen)[key] for key in keys}
            rows.append({"column": judging.identity, "on": "features", "probe": how, **facts, "n": seen.n_queries})
    rows += _probes_of_known(sent, hard, roles, judging, seed, device)
    if judging.on_reconstructions and judging.private:
        rows += _probes_on_pictures(sent, hard, judging, found, folder, seed, device)
    return rows


def _probes_of_known(
    sent: _Sent, hard: Split, roles: Roles, judging: Judging, seed: int, device: torch.device | str
) -> list[dict[str, Any]]:
    """How well people are told apart by someone who has pictures of them; none where the training images show others.

    A tenth of the pictures, of people who have three or more, is kept apart to choose on.
    """
    if not _knows(roles, sent.test, judging):
        return []
    assert judging.identity is not None
    who = roles.train.column(judging.identity)
    order = np.random.default_rng(seed + 5).permutation(len(who))
    counts = dict(zip(*np.unique(who, return_counts=True), strict=True))
    apart = np.array([i for i in order if counts[who[i]] >= 3][: max(2, len(who) // 10)])
    # One picture of each at most, so that everyone keeps some to learn from.
    apart = apart[np.unique(who[apart], return_index=True)[1]]
    rest = np.setdiff1d(order, apart)
    parts = {"train": roles.train.take(rest), "validation": roles.train.take(np.sort(apart))}
    features = {role: sent.of(images, seed + 14 + place) for place, (role, images) in enumerate(parts.items())}
    labels = {role: images.column(judging.identity) for role, images in parts.items()}
    probes: list[Probe] = [NeighborProbe(), TailProbe(cloud=hard.cloud)]
    if sum(count >= 3 for count in counts.values()) >= LEAST_IDENTITIES:
        probes.append(MetricProbe())
    results = probe(
        probes,
        features | {"test": sent.features["test"]},
        labels | {"test": sent.test.column(judging.identity)},
        seed=seed,
        device=device,
    )
    return [_probe_row(judging.identity, "features, people known", result) for result in results]


def _knows(roles: Roles, test: Images, judging: Judging) -> bool:
    """Whether the training images show everyone whom the test images show."""
    if judging.identity is None or judging.identity not in roles.train.labels:
        return False
    return bool(np.isin(test.column(judging.identity), roles.train.column(judging.identity)).all())


def _labeled(
    sent: _Sent, rows: Mapping[str, Tensor], column: str
) -> tuple[dict[str, Tensor], dict[str, NDArray[np.int64]]]:
    """Of each role the rows whose images have a label in `column` that the attacker's own show too, and the labels."""
    own = sent.images["train"].column(column)
    known = np.unique(own[own >= 0])
    found, labels = {}, {}
    for role, images in sent.images.items():
        column_of = images.column(column)[: len(rows[role])]
        has_label = np.isin(column_of, known)
        found[role], labels[role] = rows[role][torch.from_numpy(has_label)], column_of[has_label]
    return found, labels


def _probes_on_pictures(
    sent: _Sent, hard: Split, judging: Judging, found: Audit, folder: Path, seed: int, device: torch.device | str
) -> list[dict[str, Any]]:
    """Probes that look at what the strongest attack rebuilt, having learned on the attacker's own pictures.

    A decoder rebuilds those too, from their features, in one pass; of probes that learned on the true ones and on the
    rebuilt ones the better counts. Other attacks take as long for each picture as they did for those under test, so
    that against them probes learn on the true ones alone.
    """
    measures = {row.measure for row in found.rows}
    measure = next((name for name in ("ssim", "psnr") if name in measures), found.rows[0].measure)
    scored = [row for row in found.rows if row.measure == measure and row.attack != FLOOR]
    strongest = max(scored, key=lambda row: row.mean if row.leaks_when == "high" else -row.mean)
    kept = RunFolder(folder)
    seen = torch.from_numpy(kept.pictures(strongest.cut, strongest.attack).astype(np.float32) / 255)
    own = {"true": {role: torch.from_numpy(sent.images[role].floats()) for role in ("train", "validation")}}
    attack, state = judging.attacks[strongest.attack], kept.state(strongest.cut, strongest.attack)
    # A decoder that learned nothing shows one picture, of which nothing can be learned.
    if isinstance(attack, Decoder) and "image" not in state:
        own["rebuilt"] = _rebuilt(attack, state, hard, sent, torch.device(device))
    rows = []
    for column in judging.private:
        shown = {what: _labeled(sent, pictures | {"test": seen}, column) for what, pictures in own.items()}
        what, result = _better(shown, seed, device)
        on = f"reconstructions ({strongest.attack})"
        rows.append(_probe_row(column, on, result) | {"learned_on": f"{what} pictures"})
    return rows


def _rebuilt(
    attack: Attack, state: Mapping[str, Tensor], hard: Split, sent: _Sent, device: torch.device
) -> dict[str, Tensor]:
    """What the attack makes of the features of the attacker's own pictures, in 256 levels as under test."""
    view = View(
        image_shape=sent.test.image_shape,
        feature_shape=hard.cut.feature_shape,
        cloud=hard.cloud,
        edge=None,
        train=None,
        validation=None,
        device=device,
    )
    inverter = attack.restore(view, state)
    return {role: (inverter(sent.features[role]) * 255).round() / 255 for role in ("train", "validation")}


def _better(
    shown: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, NDArray[np.int64]]]],
    seed: int,
    device: torch.device | str,
) -> tuple[str, ProbeResult]:
    """The probe that recovers most, and which pictures it learned on; an attacker would find out, too."""
    results = {
        what: probe([TailProbe(is_half=True)], pictures, labels, seed=seed, device=device)[0]
        for what, (pictures, labels) in shown.items()
    }
    best = max(results, key=lambda what: results[what].accuracy)
    return best, results[best]


def _completion(
    sent: _Sent, hard: Split, task: Task, judging: Judging, seed: int, device: torch.device | str
) -> list[dict[str, Any]]:
    if not judging.completion_counts:
        return []
    assert isinstance(task, Classification)
    labels = {role: images.column(task.column) for role, images in sent.images.items()}
    results = completion(
        hard.cloud, sent.features, labels, counts=judging.completion_counts, seed=seed, device=device, steps=150
    )
    return [{key: value for key, value in asdict(one).items() if isinstance(value, int | float)} for one in results]


def _log_rank_privacy(hard: Split, sent: _Sent, roles: Roles, judging: Judging, seed: int) -> dict[str, float] | None:
    """How well identities hide from someone with clean features of the training images of the same people."""
    if not _knows(roles, sent.test, judging):
        return None
    assert judging.identity is not None
    known_of, wanted = (torch.from_numpy(one.column(judging.identity)) for one in (roles.train, sent.test))
    layers = stochastic_layers(hard.edge)
    if not all(_is_gaussian(layer) for layer in layers):
        return None
    std = _deviation(layers) / judging.settings.observations**0.5
    clean = sent.of(roles.train, is_silent=True)
    found = log_rank_privacy(clean, known_of, sent.features["test"], wanted, noise_std=std)
    return _hidden(found.privacy, found.chance, found.top1, found.log_ranks, found.hits, seed)


def _hidden(
    privacy: float, chance: float, top1: float, ranks: NDArray[np.float64], hits: NDArray[np.float64], seed: int
) -> dict[str, float]:
    by_rank, by_hit = _interval(ranks, seed), _interval(hits, seed)
    return {
        "privacy": privacy,
        "low": by_rank["low"],
        "high": by_rank["high"],
        "chance": chance,
        "top1": top1,
        "top1_low": by_hit["low"],
        "top1_high": by_hit["high"],
        "n": len(ranks),
    }


def _is_gaussian(layer: Stochastic) -> bool:
    """Distances rank by likelihood under Gaussian noise alone; under other noise they would flatter the defense."""
    return isinstance(layer, Noise) and layer.kind == "gaussian"


def _deviation(layers: Sequence[Stochastic]) -> float:
    """That of the noise which is added last, or 0."""
    last = layers[-1] if layers else None
    return float(last.std) if isinstance(last, Noise) else 0.0


def _explained(hard: Split) -> float | None:
    """The share of the features' variance that the sent components carry; None where whole features are sent."""
    if not any(isinstance(module, Reconstruction) for module in hard.cloud.modules()):
        return None
    return float(explained_variance(hard).sum())


def _rank_privacy(hard: Split, sent: _Sent, observations: int, seed: int) -> dict[str, float] | None:
    """How well a picture's noisy features hide among those of other test pictures; None without Gaussian noise."""
    layers = stochastic_layers(hard.edge)
    if not layers or not all(_is_gaussian(layer) for layer in layers):
        return None
    clean = sent.of(sent.test, is_silent=True)
    found = rank_privacy(clean, sent.features["test"], _deviation(layers) / observations**0.5)
    return _hidden(found.privacy, found.chance, found.top1, found.ranks, found.hits, seed)
