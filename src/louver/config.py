"""Experiment files: TOML in, validated frozen objects out, and back.

A file describes one run whole; `read_experiment` refuses what it does not know, with the nearest legal name.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import tomli_w

from louver import attacks as attack_kinds
from louver.audit import FLOOR
from louver.defenses import DEFENSES, Defense
from louver.errors import ConfigError, nearest
from louver.tasks import Attributes, Classification, ReIdentification, Task
from louver.thresholds import parse_rule
from louver.training import Training
from louver.types import Threat

__all__ = ["ATTACKS", "AttackEntry", "AuditOptions", "DataOptions", "Experiment", "ModelOptions", "read_experiment"]

ATTACKS: Mapping[str, type] = {
    "decoder": attack_kinds.Decoder,
    "likelihood": attack_kinds.Likelihood,
    "shadow": attack_kinds.Shadow,
}
"""Attacks by the name that experiment files and `--attack` use. The floor runs always and is not named."""

TASKS: Mapping[str, type] = {
    "attributes": Attributes,
    "classification": Classification,
    "reidentification": ReIdentification,
}
"""Tasks by the name that `kind` in a [task] table uses."""

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The victim: `name`, `weights`, `mean` and `std` as in `louver.load_model`.

    n_classes is counted from the label column when left out. Without weights, a [training] table must say how to
    train it.
    """

    name: str
    weights: str | None = None
    n_classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The images of each role, as `louver.load_images` reads them, such as "cifar10/test[:1000]".

    label: the column that the network was trained on. train, validation: what the victim was trained and tuned on;
    named even for a network that comes trained, so that overlaps with the attacker's images are found. size: side in
    pixels to which folders of pictures are brought. on_overlap: "error" stops at a picture that two roles share, "drop"
    takes it from the attacker or the victim and never from the test images. download: let torchvision fetch.
    """

    test: str
    auxiliary: str
    train: str | None = None
    validation: str | None = None
    label: str | None = None
    size: int | None = None
    on_overlap: typing.Literal["error", "drop"] = "error"
    download: bool = False


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """Where to cut and how to score. `cuts` are names from `louver cuts`; the rest is as in `louver.audit.Settings`."""

    cuts: tuple[str, ...]
    measures: tuple[str, ...] | None = None
    test_images: int = 1000
    mirror_auxiliary: bool = True
    observations: int = 1
    validation_share: float = 0.1
    memory_mib: int = 2048
    latency: bool = False
    lpips_weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class AttackEntry:
    """One [attacks.NAME] table: the attack with its knobs, and on how many of the test images it runs."""

    attack: attack_kinds.Attack
    test_images: int | None = None


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """What a hardened split is asked besides its task.

    columns: label columns that must not be read from the features; probes try. identity, camera: columns for
    nearest-neighbor re-identification of the features. reconstructions: probe rebuilt pictures too. completion:
    labelled examples a class from which a new cloud half is trained.
    """

    columns: tuple[str, ...] = ()
    identity: str | None = None
    camera: str | None = None
    reconstructions: bool = False
    completion: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run. `thresholds` are rules such as "ssim<=0.3"; `table` is the file as read.

    With a `defense` the one cut is hardened, by `hardening`, before it is audited; `task` is then what it is kept good
    for, classification of `data.label` where it is None.
    """

    name: str
    model: ModelOptions
    data: DataOptions
    audit: AuditOptions
    attacks: Mapping[str, AttackEntry]
    threat: Threat = field(default_factory=Threat)
    training: Training | None = None
    task: Task | None = None
    defense: Defense | None = None
    hardening: Training | None = None
    probes: ProbeOptions = field(default_factory=ProbeOptions)
    thresholds: tuple[str, ...] = ()
    seed: int = 0
    table: Mapping[str, Any] = field(default_factory=dict)

    def to_toml(self) -> str:
        """The file, with what the command line changed."""
        return tomli_w.dumps(self.table, multiline_strings=True)


_SECTIONS = (
    "attacks",
    "audit",
    "data",
    "defense",
    "hardening",
    "model",
    "name",
    "probes",
    "seed",
    "task",
    "threat",
    "thresholds",
    "training",
)


def read_experiment(
    path: Path, *, cuts: list[str] | None = None, attacks: list[str] | None = None, thresholds: list[str] | None = None
) -> Experiment:
    """The experiment in a TOML file; `cuts`, `attacks` and `thresholds`, where given, replace those in the file.

    An attack that the file does not configure runs with its defaults.

    Raises:
        ConfigError: no such file, no TOML, an unknown key (with the nearest legal one) or a value of the wrong kind.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give an experiment file (TOML)") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    if cuts:
        table["audit"] = {**_table(table, "audit", path), "cuts": cuts}
    if attacks:
        configured = _table(table, "attacks", path)
        table["attacks"] = {name: configured.get(name, {}) for name in attacks}
    if thresholds:
        table["thresholds"] = thresholds
    return _experiment(table, path)


def _experiment(table: dict[str, Any], path: Path) -> Experiment:
    _refuse_unknown(table, list(_SECTIONS), str(path))
    for section in ("name", "model", "data", "audit", "attacks"):
        if section not in table:
            raise ConfigError(f"{path}: expected {section!r}, got none; add it (see examples/)")
    rules = _value(tuple[str, ...], table.get("thresholds", ()), f"{path}, thresholds")
    for rule in rules:
        parse_rule(rule)
    entries = {name: _attack(name, entry, path) for name, entry in _table(table, "attacks", path).items()}
    if not entries:
        raise ConfigError(f"{path}: expected at least one [attacks.NAME] table; {nearest('', sorted(ATTACKS))}")
    training = table.get("training")
    model = _section(ModelOptions, table, "model", path)
    data = _section(DataOptions, table, "data", path)
    if training is not None and model.weights is not None:
        raise ConfigError(
            f"{path}: expected [training] or model.weights, got both; a trained network is not trained again"
        )
    task = _kind(TASKS, table, "task", path)
    defense = _kind(DEFENSES, table, "defense", path)
    if ("hardening" in table) != (defense is not None):
        raise ConfigError(f"{path}: expected [defense] and [hardening] together, got one without the other")
    for section in ("training", "hardening"):
        if section in table and (data.train is None or data.validation is None or (data.label or task) is None):
            raise ConfigError(f"{path}: [{section}] needs data.train, data.validation, and data.label or a [task]")
    if training is None and model.weights is None and defense is None:
        raise ConfigError(
            f"{path}: model {model.name} has no weights and no [training] table; features of random weights say "
            "nothing about a network in use"
        )
    name, seed = _value(str, table["name"], f"{path}, name"), _value(int, table.get("seed", 0), f"{path}, seed")
    if not re.fullmatch(r"\w[\w .+-]*", name):
        raise ConfigError(
            f"{path}: expected a name of letters, digits, spaces and . + - _, got {name!r}; it names a folder"
        )
    if not 0 <= seed < 2**63:
        raise ConfigError(f"{path}: expected a seed of 0 or more and below 2**63, got {seed}")
    return Experiment(
        name=name,
        model=model,
        data=data,
        audit=_section(AuditOptions, table, "audit", path),
        attacks=entries,
        threat=_section(Threat, table, "threat", path) if "threat" in table else Threat(),
        training=None if training is None else _section(Training, table, "training", path),
        task=task,
        defense=defense,
        hardening=None if defense is None else _section(Training, table, "hardening", path),
        probes=_section(ProbeOptions, table, "probes", path),
        thresholds=rules,
        seed=seed,
        table=table,
    )


def _attack(name: str, entry: object, path: Path) -> AttackEntry:
    where = f"{path}, [attacks.{name}]"
    if name == FLOOR:
        raise ConfigError(f"{where}: the floor is part of every audit; leave it out")
    if name not in ATTACKS:
        raise ConfigError(f"{where}: unknown attack {name!r}; {nearest(name, sorted(ATTACKS))}")
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: expected a table, got {entry!r}")
    knobs = {key: value for key, value in entry.items() if key != "test_images"}
    attack: attack_kinds.Attack = _build(ATTACKS[name], knobs, where, also=["test_images"])
    return AttackEntry(attack=attack, test_images=_value(int | None, entry.get("test_images"), f"{where}, test_images"))


def _kind(kinds: Mapping[str, type], table: Mapping[str, Any], section: str, path: Path) -> Any:  # noqa: ANN401
    """What a table with a `kind` and its knobs describes; None if there is no such table."""
    if section not in table:
        return None
    entry = _table(table, section, path)
    name, where = entry.get("kind"), f"{path}, [{section}]"
    if not isinstance(name, str) or name not in kinds:
        raise ConfigError(f"{where}: expected a kind, got {name!r}; {nearest(str(name or ''), sorted(kinds))}")
    return _build(kinds[name], {k: v for k, v in entry.items() if k != "kind"}, where, also=["kind"])


def _table(table: Mapping[str, Any], section: str, path: Path) -> dict[str, Any]:
    found = table.get(section, {})
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a table [{section}], got {found!r}")
    return found


def _section(kind: type[_T], table: Mapping[str, Any], section: str, path: Path) -> _T:
    return _build(kind, _table(table, section, path), f"{path}, [{section}]")


def _build(kind: type[_T], table: Mapping[str, Any], where: str, also: list[str] | None = None) -> _T:
    """`kind(**table)`, types checked, nested dataclasses too; every unknown key is an error."""
    hints = typing.get_type_hints(kind)
    _refuse_unknown(table, [*hints, *(also or [])], where)
    for key, value in table.items():
        nested = _dataclass_in(hints[key])
        if nested is not None and isinstance(value, dict):
            _refuse_unknown(value, [f.name for f in dataclasses.fields(nested)], f"{where}, {key}")
    built: _T = _value(kind, dict(table), where)
    return built


def _dataclass_in(hint: object) -> Any:  # noqa: ANN401 - a dataclass type or None
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _refuse_unknown(table: Mapping[str, Any], legal: list[str], where: str) -> None:
    for key in table:
        if key not in legal:
            raise ConfigError(f"{where}: unknown key {key!r}; {nearest(key, sorted(legal))}")


def _value(kind: Any, value: object, where: str) -> Any:  # noqa: ANN401 - whatever `kind` describes
    try:
        # As JSON and strict: a list is a tuple there, but "3" is no number and true is no count.
        return pydantic.TypeAdapter(kind).validate_json(json.dumps(value, default=str), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "missing":
            raise ConfigError(f"{where}: expected {place!r}, got none; add it") from error
        if first["type"] == "value_error":
            raise ConfigError(f"{where}: {message}") from error
        raise ConfigError(f"{where}{', ' + place if place else ''}: {message}, got {first['input']!r}") from error
