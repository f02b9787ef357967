"""The only place where images, attacks and measures meet.

For each cut and each attack: build the view that the threat model grants, let the attack prepare, hand it the features
of test images, score what comes back beside the floor. One (cut, attack) is a *unit*; a finished unit is kept in the
run folder, and not run again when the audit resumes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from louver.attacks import Attack, Auxiliary, Inverter, MeanImage, View
from louver.cut import Split
from louver.errors import AttackError, ConfigError, DataError, ThreatError, nearest
from louver.features import FreshRows, ImageRows, compute_features, observed
from louver.measures import Measure, MeasureContext, resolve_measures
from louver.measures.statistics import row
from louver.runs import RunFolder, Unit
from louver.stochastic import drawing_from, stochastic_layers
from louver.tasks import Task
from louver.thresholds import Rule, judge
from louver.types import Audit, Finding, Images, Progress, Roles, Threat, share_of

__all__ = ["FLOOR", "Settings", "audit"]

FLOOR = "mean_image"
"""The attack that looks at no feature; its score stands beside every other as the floor."""

_SCHEME = 4
"""Raised when a change makes finished units mean something else; they are then run again."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to audit. `test_images` are drawn from the test role by the seed; an attack named in `limits` gets so many.

    measures: names, or None for those that are available. mirror_auxiliary: the attacker also uses its images
    mirrored. observations: how often the attacker sees each picture sent, and takes the mean, where the edge draws
    noise. validation_share: of the auxiliary images, kept apart to choose epochs and weights on. memory_bytes:
    features beyond it go to disk.

    Raises:
        ConfigError: a value out of range.
    """

    measures: tuple[str, ...] | None = None
    test_images: int = 1000
    limits: Mapping[str, int] = field(default_factory=dict)
    mirror_auxiliary: bool = True
    observations: int = 1
    validation_share: float = 0.1
    memory_bytes: int = 2 * 2**30
    lpips_weights: Path | None = None

    def __post_init__(self) -> None:
        for name, count in {"test_images": self.test_images, **self.limits}.items():
            if count < 2:
                raise ConfigError(f"{name}: expected 2 test images or more, got {count}; an interval needs them")
        if self.observations < 1:
            raise ConfigError(f"expected observations of 1 or more, got {self.observations}")
        if not 0 < self.validation_share < 1:
            raise ConfigError(f"expected validation_share between 0 and 1, got {self.validation_share}")
        if self.memory_bytes < 2**20:
            raise ConfigError(f"expected memory_bytes of at least 1 MiB, got {self.memory_bytes}")


def audit(
    splits: Sequence[Split],
    roles: Roles,
    attacks: Mapping[str, Attack],
    *,
    threat: Threat | None = None,
    task: Task | None = None,
    label: str | None = None,
    rules: Sequence[Rule] = (),
    settings: Settings | None = None,
    seed: int = 0,
    name: str = "audit",
    defense: str = "none",
    notes: Sequence[str] = (),
    config: Mapping[str, object] | None = None,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Audit:
    """What each attack rebuilds from the features at each cut, scored, beside the floor, and judged by `rules`.

    `splits` are cuts of one network, in network order. `label` names the label column that the network was trained
    on (for "recognized", and for attacks that need labels). `notes` join the verdict's warnings. With a `folder`,
    units are kept there as they finish; a second call with the same arguments takes them from there.

    Raises:
        ThreatError: an attack needs what `threat` does not grant.
        ConfigError: no cut, no attack, an unknown measure, or a rule that speaks of nothing here.
        DataError: images of another shape than the network takes, or too few of them.
        AttackError: an attack broke. Nothing is reported for it, and the audit stops: it never counts as privacy.
        StorageError: the disk is full; finished units are kept.
    """
    threat, settings = threat or Threat(), settings or Settings()
    device = torch.device(device)
    if not splits or not set(attacks) - {FLOOR}:
        raise ConfigError("nothing to audit: expected at least one cut and one attack besides the floor")
    _check_grants(attacks, threat)
    started = time.monotonic()
    tell = progress or (lambda what, fraction: None)
    chosen = _choose(len(roles.test), settings.test_images, seed)
    test = roles.test.take(chosen)
    labels = test.column(label) if label is not None else None
    # Copies: the user's stay where they are, and in the mode that they are in.
    splits = [copy.deepcopy(split).eval().to(device) for split in splits]
    victim = splits[0]
    context = MeasureContext(
        model=victim if task is not None else None,
        labels=labels,
        lpips_weights=settings.lpips_weights,
        device=str(device),
    )
    measures = resolve_measures(settings.measures, test.image_shape, context)
    known = _known_images(roles.auxiliary, threat, settings, seed)
    run = RunFolder(folder)
    run.save_truth(test.pixels, chosen)
    attacks = {FLOOR: MeanImage(), **attacks}
    rules = _resolved(rules, splits, attacks, measures)
    versions = [metadata.version(package) for package in ("louver", "torch")]
    if settings.lpips_weights is not None:
        versions.append(hashlib.blake2b(settings.lpips_weights.read_bytes()).hexdigest())
    seconds_before = 0.0
    data_key = _digest(*(_content(images, label) for images in (test, *known)), str(label))

    findings: list[Finding] = []
    for position, split in enumerate(splits):
        site = _Site(split, test, known, threat, settings, seed, device, folder, label)
        model_key = _network(split)
        earlier: dict[str, Callable[[], Inverter]] = {}
        floor: Unit | None = None
        keys: list[str] = []
        for order, (attack_name, attack) in enumerate(attacks.items()):
            n_images = min(settings.limits.get(attack_name, len(test)), len(test))
            keys.append(
                _digest(
                    str(_SCHEME),
                    *versions,
                    model_key,
                    data_key,
                    split.cut.name,
                    attack_name,
                    _described(attack),
                    _described(threat),
                    str(seed),
                    str(n_images),
                    json.dumps([m.name for m in measures]),
                    str(settings.mirror_auxiliary),
                    str(settings.observations),
                    str(settings.validation_share),
                    *keys,
                )
            )
            done = (position * len(attacks) + order) / (len(splits) * len(attacks))

            def told(
                what: str, fraction: float, where: str = f"{split.cut.name} · {attack_name}", done: float = done
            ) -> None:
                tell(f"{where}: {what}", done + fraction / (len(splits) * len(attacks)))

            unit = run.load_unit(split.cut.name, attack_name, keys[-1])
            if unit is None:
                unit = site.run(attack_name, attack, earlier, measures, context, n_images, told)
                run.save_unit(split.cut.name, attack_name, keys[-1], unit)
            else:
                seconds_before += unit.seconds
            told("done", 1.0)
            floor = floor or unit
            if attack_name != FLOOR:
                earlier[attack_name] = _restorer(site, attack, unit)
            findings.extend(
                Finding(
                    cut=split.cut.name,
                    attack=attack_name,
                    measure=measure.name,
                    unit=measure.unit,
                    leaks_when=measure.leaks_when,
                    per_image=unit.values[measure.name],
                    floor=floor.values[measure.name][:n_images],
                    threat=threat.name,
                    defense=defense,
                    seed=seed,
                    seconds=unit.seconds,
                )
                for measure in measures
            )
    rows = tuple(row(finding) for finding in findings)
    tell("judging", 1.0)
    verdict = judge(rules, [r for r in rows if r.attack != FLOOR])
    result = Audit(
        name=name,
        threat=threat,
        cuts=tuple(split.cut for split in splits),
        findings=tuple(findings),
        rows=rows,
        verdict=replace(verdict, warnings=(*verdict.warnings, *notes)),
        utility=_utility(task, victim, roles.test, device),
        config=config or {},
        environment=_environment(device),
        seconds=time.monotonic() - started + seconds_before,
    )
    run.save_audit(result)
    return result


def _utility(task: Task | None, victim: Split, test: Images, device: torch.device) -> dict[str, float]:
    """What the network is good for, without the number of images, which is no figure of merit."""
    figures = {} if task is None else task.evaluate(victim, test, device=device)
    return {name: value for name, value in figures.items() if name != "n"}


def _check_grants(attacks: Mapping[str, Attack], threat: Threat) -> None:
    granted = threat.grants | ({"query"} if "edge" in threat.grants else set())
    if "auxiliary" not in granted:
        raise ThreatError(
            f"threat {threat.name!r} grants no auxiliary images, so there is no floor to compare with; grant "
            '"auxiliary": an attacker always has some pictures'
        )
    for name, attack in attacks.items():
        lacking = sorted(attack.needs - granted)
        if lacking:
            raise ThreatError(
                f"attack {name!r} needs {', '.join(lacking)}, which threat {threat.name!r} does not grant (it grants "
                f"{', '.join(sorted(granted))}); grant it, or drop the attack"
            )


def _resolved(
    rules: Sequence[Rule], splits: Sequence[Split], attacks: Mapping[str, Attack], measures: Sequence[Measure]
) -> list[Rule]:
    """The rules with cuts by their own names; one that speaks of nothing is refused before hours are spent."""
    names = {alias: split.cut.name for split in splits for alias in (split.cut.name, *split.cut.aliases)}
    for rule in rules:
        for what, said, legal in (
            ("attack", rule.attack, sorted(set(attacks) - {FLOOR})),
            ("measure", rule.measure, [measure.name for measure in measures]),
            ("cut", rule.cut, list(names)),
        ):
            if said is not None and said not in legal:
                raise ConfigError(f"threshold {rule}: no {what} {said!r} in this audit; {nearest(said, legal)}")
    return [rule if rule.cut is None else replace(rule, cut=names[rule.cut]) for rule in rules]


def _choose(available: int, wanted: int, seed: int) -> NDArray[np.int64]:
    """Indices of the test images that are scored: a random draw, so that the first k of them are one too."""
    if available < 2:
        raise DataError(f"expected 2 test images or more, got {available}")
    return np.random.default_rng(seed).permutation(available)[:wanted].astype(np.int64)


def _known_images(auxiliary: Images, threat: Threat, settings: Settings, seed: int) -> tuple[Images, Images]:
    """What the attacker owns, parted into images to fit on and images to choose on."""
    asks = "query" in threat.grants and "edge" not in threat.grants
    limits = [threat.n_auxiliary, threat.query_budget if asks else None]
    mirrored = 2 if settings.mirror_auxiliary else 1
    limits[1] = None if limits[1] is None else limits[1] // mirrored
    count = min([len(auxiliary), *(limit for limit in limits if limit is not None)])
    n_validation = max(2, round(settings.validation_share * count))
    if count - n_validation < 2:
        raise DataError(
            f"expected at least 4 auxiliary images to attack with, got {count}; add images, or raise the threat's "
            "n_auxiliary and query_budget"
        )
    order = np.random.default_rng(seed + 1).permutation(len(auxiliary))[:count].astype(np.int64)
    return auxiliary.take(np.sort(order[n_validation:])), auxiliary.take(np.sort(order[:n_validation]))


@dataclass
class _Site:
    """One cut under attack: holds the features that its attacks share, computed when the first of them asks."""

    split: Split
    test: Images
    known: tuple[Images, Images]
    threat: Threat
    settings: Settings
    seed: int
    device: torch.device
    folder: Path | None
    label: str | None
    _view: View | None = None

    def view(self, progress: Progress | None = None) -> View:
        """What the threat model grants at this cut."""
        if self._view is None:
            has_features = bool(self.threat.grants & {"edge", "query"})
            most, few = share_of(progress, 0.0, 0.9), share_of(progress, 0.9, 1.0)
            owned, chosen_on = self.known
            train = self._auxiliary(owned, has_features, self.settings.mirror_auxiliary, self.seed + 1, most)
            validation = self._auxiliary(chosen_on, has_features, False, self.seed + 2, few)
            self._view = View(
                image_shape=self.test.image_shape,
                feature_shape=self.split.cut.feature_shape,
                cloud=self.split.cloud,
                edge=self.split.edge if "edge" in self.threat.grants else None,
                train=train,
                validation=validation,
                device=self.device,
                observations=self.settings.observations,
            )
        return self._view

    def _auxiliary(
        self, images: Images, has_features: bool, is_mirrored: bool, noise_seed: int, progress: Progress | None
    ) -> Auxiliary:
        rows = ImageRows(images, is_mirrored)
        labels = None
        if self.label is not None and self.label in images.labels:
            column = torch.from_numpy(np.ascontiguousarray(images.labels[self.label]))
            labels = torch.cat([column, column]) if is_mirrored else column
        features = (
            compute_features(
                self.split.edge,
                rows,
                self.split.cut.feature_shape,
                device=self.device,
                memory_bytes=self.settings.memory_bytes // 2,
                seed=noise_seed,
                observations=self.settings.observations,
                folder=None if self.folder is None else self.folder / "scratch",
                progress=progress,
            )
            if has_features
            else None
        )
        is_drawn = bool(stochastic_layers(self.split.edge))
        fresh = (
            FreshRows(self.split.edge, rows, self.device, noise_seed, self.settings.observations)
            if is_drawn and "edge" in self.threat.grants
            else None
        )
        return Auxiliary(images=rows, labels=labels, features=features, fresh=fresh)

    def run(
        self,
        name: str,
        attack: Attack,
        earlier: Mapping[str, Callable[[], Inverter]],
        measures: Sequence[Measure],
        context: MeasureContext,
        n_images: int,
        progress: Progress,
    ) -> Unit:
        """One attack at this cut, from preparation to scores. The attack sees features of test images, never them."""
        view = replace(self.view(share_of(progress, 0.0, 0.1)), earlier={k: make() for k, make in earlier.items()})
        started = time.monotonic()
        inverter = attack.prepare(view, seed=self.seed, progress=share_of(progress, 0.1, 0.7))
        guesses = self._invert(name, inverter, n_images, share_of(progress, 0.7, 1.0))
        seconds = time.monotonic() - started
        truth = torch.from_numpy(self.test.floats(slice(0, n_images)))
        values = {}
        for measure in measures:
            # Nearest-neighbor search goes among all test images, whatever share of them an attack was run on.
            pool = torch.from_numpy(self.test.floats()) if measure.name == "reidentified" else truth
            scored = replace(context, labels=None if context.labels is None else context.labels[:n_images])
            values[measure.name] = measure.compute(pool, guesses, scored)
            _check_values(values[measure.name], n_images, f"{name} at {self.split.cut.name}, {measure.name}")
        pictures = (guesses * 255).round().to(torch.uint8).numpy()
        return Unit(values=values, pictures=pictures, state=inverter.state(), seconds=seconds)

    def _invert(self, name: str, inverter: Inverter, n_images: int, progress: Progress) -> Float[Tensor, "n c h w"]:
        guesses = []
        step = max(1, min(256, 2**26 // int(np.prod(self.split.cut.feature_shape))))
        for start in range(0, n_images, step):
            stop = min(start + step, n_images)
            images = torch.from_numpy(self.test.floats(slice(start, stop)))
            with torch.no_grad(), drawing_from(hash((self.seed, start)) & 0x7FFFFFFF, self.device):
                features = observed(self.split.edge, images.to(self.device), self.settings.observations)

            def told(what: str, fraction: float, start: int = start, count: int = stop - start) -> None:
                progress(what, (start + fraction * count) / n_images)

            guess = inverter(features, progress=told)
            if guess.shape != images.shape or not bool(guess.isfinite().all()):
                raise AttackError(
                    f"{name} at {self.split.cut.name}: expected finite pictures of shape {tuple(images.shape)}, got "
                    f"{tuple(guess.shape)} or NaN; a broken attack is not a defense"
                )
            guesses.append(guess.clamp(0, 1))
        return torch.cat(guesses)


def _restorer(site: _Site, attack: Attack, unit: Unit) -> Callable[[], Inverter]:
    return lambda: attack.restore(site.view(), unit.state)


def _check_values(values: NDArray[np.float64], n_images: int, what: str) -> None:
    if values.shape != (n_images,) or not np.isfinite(values).all():
        raise AttackError(f"{what}: expected {n_images} finite values, got shape {values.shape}, some not finite")


def _described(thing: Any) -> str:  # noqa: ANN401 - any frozen dataclass
    """A stable text of a frozen dataclass, for keys."""
    assert is_dataclass(thing)
    assert not isinstance(thing, type)

    def plain(value: object) -> object:
        return sorted(value) if isinstance(value, frozenset) else str(value)

    return json.dumps([type(thing).__name__, asdict(thing)], sort_keys=True, default=plain)


def _content(images: Images, label: str | None) -> str:
    """A digest of pictures and of the labels that the audit uses."""
    arrays = [images.pixels, *([images.labels[label]] if label is not None and label in images.labels else [])]
    parts = [(str(a.dtype), str(a.shape), hashlib.blake2b(np.ascontiguousarray(a).data).digest()) for a in arrays]
    return _digest(*(part for parts_of_one in parts for part in parts_of_one))


def _network(split: Split) -> str:
    """A digest of both halves: what they compute, step by step, and every number that they compute with."""
    parts: list[str | bytes] = []
    for half in (split.edge, split.cloud):
        parts += [repr(half), *(str(m.graph) for m in half.modules() if isinstance(m, torch.fx.GraphModule))]
        for name, tensor in (*half.named_parameters(), *half.named_buffers()):
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            parts += [name, str(tensor.dtype), str(tuple(tensor.shape)), hashlib.blake2b(content.data).digest()]
    return _digest(*parts)


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def _environment(device: torch.device) -> dict[str, str]:
    versions = {name: metadata.version(name) for name in ("louver", "numpy", "torch", "torchvision")}
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        **versions,
        "python": platform.python_version(),
        "system": platform.system(),
        "device": f"{device.type} ({hardware})",
        "threads": str(torch.get_num_threads()),
    }
