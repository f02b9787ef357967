"""What a study found about one split, as its `facts.json` says it, checked on the way in."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from numpy.typing import NDArray

from louver.errors import ConfigError, DataError
from louver.storage import DAMAGED, read_npz

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["Completing", "Estimate", "Facts", "Leak", "Probing", "load_all", "load_facts", "read_arrays"]

_FORMAT = 1
_TASKS = {"Classification": "classification of", "ReIdentification": "re-identification by", "Attributes": "attributes"}

Kind = TypeVar("Kind", bound="DataclassInstance")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval; `low` and `high` are None where none was measured."""

    mean: float
    low: float | None = None
    high: float | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        bounds = [value for value in (self.low, self.mean, self.high) if value is not None]
        if any(isinstance(value, bool) or not math.isfinite(value) for value in (self.mean, *bounds)):
            raise ValueError(f"expected finite numbers, got {self}")
        if any(after < before - 1e-9 * max(1.0, abs(before)) for before, after in pairwise(bounds)):
            raise ValueError(f"expected low <= mean <= high, got {self}")


@dataclass(frozen=True, kw_only=True)
class Leak:
    """One attack by one measure, as `louver.types.Row` says it."""

    attack: str
    measure: str
    unit: str
    leaks_when: Literal["high", "low"]
    mean: float
    low: float
    high: float
    worst: float
    worst_low: float
    worst_high: float
    floor: float
    n_images: int
    beats_floor: bool

    def __post_init__(self) -> None:
        if self.leaks_when not in ("high", "low"):
            raise ValueError(f"expected leaks_when high or low, got {self.leaks_when!r}")
        for mean, low, high in ((self.mean, self.low, self.high), (self.worst, self.worst_low, self.worst_high)):
            Estimate(mean=mean, low=low, high=high)
        Estimate(mean=self.floor)

    @property
    def amount(self) -> float:
        """The mean, turned so that more is more leakage."""
        return self.mean if self.leaks_when == "high" else -self.mean


@dataclass(frozen=True, kw_only=True)
class Probing:
    """How well one probe recovers a private label, with its chance level; `on` says what it looked at."""

    column: str
    on: str
    probe: str
    accuracy: float
    low: float
    high: float
    chance: float
    n: int

    def __post_init__(self) -> None:
        Estimate(mean=self.accuracy, low=self.low, high=self.high)
        Estimate(mean=self.chance)


@dataclass(frozen=True, kw_only=True)
class Completing:
    """How well a tail trained on `count` labeled examples of each class does the split's own task."""

    count: int
    accuracy: float
    low: float
    high: float
    chance: float

    def __post_init__(self) -> None:
        Estimate(mean=self.accuracy, low=self.low, high=self.high)
        Estimate(mean=self.chance)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a study found about one split. `knob` is what a sweep turned to `strength`, `folder` where it was read.

    `task` tells tasks apart, knobs and all; `task_title` says to a reader what it is.
    """

    folder: Path
    name: str
    defense: str
    cut: str
    task: str
    edge_macs: int
    edge_parameters: int
    edge_weight_bytes: int
    feature_bytes: int
    feature_shape: tuple[int, ...]
    seed: int
    utility: Mapping[str, Estimate]
    leakage: tuple[Leak, ...]
    information: Mapping[str, Estimate] = field(default_factory=dict)
    probes: tuple[Probing, ...] = ()
    completion: tuple[Completing, ...] = ()
    task_title: str = ""
    knobs: Mapping[str, Any] = field(default_factory=dict)
    knob: str | None = None
    strength: float | None = None
    variant: str = ""
    group: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)


def load_facts(folder: Path) -> Facts:
    """The facts kept in a run folder.

    Raises:
        ConfigError: there are none.
        DataError: the file is damaged, lacks a fact, or is of another version.
    """
    path = folder / "facts.json"
    if not path.is_file():
        raise ConfigError(f"expected facts.json in {folder}, got none; give the folder of a finished study")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != _FORMAT:
            raise DataError(f"{path}: expected format {_FORMAT}, got {record['format']}; run the study again")
        return _facts(folder, record)
    except DataError:
        raise
    except KeyError as error:
        raise DataError(f"{path}: expected the fact {error}, got none; run the study again") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); run the study again") from error


def _facts(folder: Path, record: Mapping[str, Any]) -> Facts:
    kept = {one.name for one in fields(Facts)} & set(record)
    if record["strength"] is not None:
        Estimate(mean=record["strength"])
    return Facts(
        **{
            **{name: record[name] for name in kept},
            "folder": folder,
            "variant": record.get("variant") or "",
            "group": record.get("group") or "",
            "task_title": record.get("task_title") or _title(record["task"]),
            "feature_shape": tuple(record["feature_shape"]),
            "utility": {name: _pick(Estimate, value) for name, value in record["utility"].items()},
            "leakage": tuple(_pick(Leak, leak) for leak in record["leakage"]),
            "information": _information(record),
            "probes": tuple(_pick(Probing, one) for one in record.get("probes") or ()),
            "completion": tuple(_pick(Completing, one) for one in record.get("completion") or ()),
        }
    )


def _title(task: str) -> str:
    """Words for a task of facts that were written before tasks had titles."""
    kind, _, knobs = task.partition("(")
    columns = re.findall(r"('\w+'): \d", knobs) or re.findall(r"^column=('\w+')", knobs)
    return " ".join([_TASKS.get(kind, kind), ", ".join(columns)]).strip()


def _information(record: Mapping[str, Any]) -> dict[str, Estimate]:
    """Every information measure, with what is known of ranks and components; a bare number has no interval."""
    found = {}
    for name, value in record["information"].items():
        if isinstance(value, Mapping):
            # The difficulty criterion calls its value a score.
            found[name] = _pick(Estimate, {"mean": value.get("score"), **value})
        elif value is not None:
            found[name] = Estimate(mean=value)
    for name in ("rank_privacy", "log_rank_privacy"):
        hidden = record.get(name)
        if hidden:
            found[name] = Estimate(
                mean=hidden["privacy"],
                low=hidden.get("low"),
                high=hidden.get("high"),
                unit=f"0 to 1, chance {hidden['chance']:.3g}" if "chance" in hidden else "0 to 1",
            )
    if record.get("explained_variance") is not None:
        found["explained_variance"] = Estimate(mean=record["explained_variance"], unit="share of the features'")
    return found


def _pick(kind: type[Kind], record: Mapping[str, Any]) -> Kind:
    """Facts may say more than is read here: unknown keys are left out, missing ones are errors."""
    return kind(**{one.name: record[one.name] for one in fields(kind) if one.name in record})


def _found_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """(run folders with facts, run folders that were left unfinished) at `folder`, one and two levels below it."""
    if not folder.is_dir():
        raise ConfigError(f"expected a folder of studied splits, got {folder}, which is none")
    if (folder / "facts.json").is_file():
        return [folder], []
    finished = sorted({path.parent for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}/facts.json")})
    begun = sorted({path.parent for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}/units")})
    if not finished:
        raise ConfigError(
            f"expected facts.json in {folder} or up to two folders below it, got none; give folders of finished studies"
        )
    return finished, [path for path in begun if path not in finished]


def load_all(folders: Sequence[Path]) -> tuple[list[Facts], tuple[str, ...]]:
    """(facts of every run folder among `folders` or up to two levels below them, run folders left unfinished).

    Raises:
        ConfigError: fewer than 2 run folders with facts.
        DataError: as `load_facts`.
    """
    finished: dict[Path, Path] = {}
    unfinished: dict[Path, Path] = {}
    for folder in folders:
        whole, begun = _found_in(folder)
        finished |= {path.resolve(): path for path in whole if path.resolve() not in finished}
        unfinished |= {path.resolve(): path for path in begun}
    if len(finished) < 2:
        raise ConfigError(
            f"expected 2 splits or more to compare, got {len(finished)}; give more run folders, or one that holds them"
        )
    return [load_facts(path) for path in finished.values()], tuple(str(path) for path in unfinished.values())


def read_arrays(path: Path, *names: str) -> list[NDArray[Any]]:
    """The arrays `names` of an .npz file of a study.

    Raises:
        DataError: it is missing or damaged, or lacks one of them.
    """
    try:
        arrays = read_npz(path)
        return [arrays[name] for name in names]
    except DAMAGED as error:
        raise DataError(f"{path} is missing or damaged ({error}); run the study again") from error
