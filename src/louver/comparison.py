"""Several studied splits side by side: utility against leakage, the Pareto front, and who beats the undefended split.

Each split is a folder with `facts.json` (see `louver.study`) and, in `truth.npz`, the test images it was attacked on.
Nothing here needs torch: a page is drawn from it, and a page computes nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from louver.errors import ConfigError, DataError, nearest
from louver.facts import Estimate, Facts, Leak, load_all, load_facts, read_arrays

__all__ = [
    "EQUAL_COST",
    "STRONGEST",
    "UNDEFENDED",
    "Comparison",
    "Curve",
    "Entry",
    "Front",
    "Order",
    "Standing",
    "compare",
    "load_facts",
    "to_json",
]

Side = Literal["better", "worse", "not told apart"]
Result = Literal["gain", "price", "not told apart", "loss", "no equal"]

UNDEFENDED = "none"
"""How facts name the absence of a defense."""

STRONGEST = "strongest"
"""In place of an attack's name: for each split the attack that leaks most."""

EQUAL_COST = 0.1
"""Edge MACs that differ by no more than this share count as equal."""


# ---------------------------------------------------------------- the comparison


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One split in a comparison.

    `reference` is the undefended split that costs the edge as much, None where there is none; `useful` and `private`
    say whether utility and privacy are better or worse than its, or not told apart because the intervals overlap.
    `costs` is edge MACs as a multiple of the nearest undefended split's, None where nothing undefended is compared.
    """

    label: str
    facts: Facts
    utility: Estimate
    leak: Leak
    is_on_front: bool = False
    reference: str | None = None
    costs: float | None = None
    useful: Side | None = None
    private: Side | None = None


@dataclass(frozen=True, kw_only=True)
class Front:
    """The splits that no other one of at most `budget_macs` beats, from least to most leakage; None: of any cost."""

    budget_macs: int | None
    labels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A sweep of one knob of one defense: labels in order of its strength."""

    defense: str
    variant: str
    knob: str
    labels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What is said of one defense (and variant) as a whole.

    `result` is its best split's: "gain" leaks less than the undefended split of equal edge cost, and its utility is
    not told apart from it (or better); "price" leaks less and is less useful; "not told apart" overlaps it in leakage;
    "loss" leaks more; "no equal" has no undefended split of equal edge cost beside it. `best` is the split that says
    so, `overlaps` those whose leakage interval overlaps that of their undefended split.
    """

    defense: str
    variant: str
    on_front: tuple[str, ...]
    result: Result
    best: str
    overlaps: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Order:
    """Whether the inversion-difficulty criterion orders the splits as measured leakage does (see `order_agreement`)."""

    correlation: float
    low: float
    high: float
    p_value: float
    n_splits: int
    orders: bool
    reference: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Splits side by side: undefended ones first, then defense by defense, each in order of strength.

    `task` is what they do, in words; `attack` is "strongest" or the one that is looked at, `attacks` all that every
    split met; `unfinished` names run folders that were left out because their study had not ended.
    """

    task: str
    groups: tuple[str, ...]
    utility: str
    measure: str
    unit: str
    leaks_when: Literal["high", "low"]
    attack: str
    attacks: tuple[str, ...]
    floor: float
    entries: tuple[Entry, ...]
    fronts: tuple[Front, ...]
    curves: tuple[Curve, ...]
    standings: tuple[Standing, ...]
    unfinished: tuple[str, ...] = ()
    order: Order | None = None
    order_note: str = ""

    def entry(self, label: str) -> Entry:
        """The split of that label."""
        return next(one for one in self.entries if one.label == label)


def compare(
    folders: Sequence[Path], *, utility: str | None = None, measure: str = "ssim", attack: str = STRONGEST
) -> Comparison:
    """The splits in `folders` (each a run folder, or one that holds them up to two levels below) side by side.

    Utility is `utility` (by default the first figure that the facts hold; higher is better), leakage is `measure` under
    `attack`. One split beats another when it is at least as useful, leaks no more, and is better in one of the two. A
    split is on the front when nothing within the smallest budget that it fits in beats it: budgets are the edge MACs
    of the undefended splits and a tenth more, and any cost for those above all of them. Means decide the front,
    intervals everything else.

    Raises:
        ConfigError: no facts, fewer than 2 splits, or no such utility, measure or attack.
        DataError: facts are damaged, or not comparable: other test images, task, attacks or numbers of images.
    """
    loaded, unfinished = load_all(folders)
    _check_same(loaded, measure)
    chosen = utility or next(iter(loaded[0].utility), "")
    for facts in loaded:
        if chosen not in facts.utility:
            raise ConfigError(
                f"expected the utility {chosen!r} in {facts.folder}, got none; {nearest(chosen, list(facts.utility))}"
            )
    attacks = tuple(leak.attack for leak in loaded[0].leakage if leak.measure == measure)
    if attack not in (STRONGEST, *attacks):
        raise ConfigError(f"no attack {attack!r} in these facts; {nearest(attack, [STRONGEST, *attacks])}")
    labels = _labels(loaded)
    entries = [
        Entry(label=label, facts=facts, utility=facts.utility[chosen], leak=_leak(facts, measure, attack))
        for label, facts in zip(labels, loaded, strict=True)
    ]
    if not any(one.leak.beats_floor for one in entries):
        raise DataError(
            f"no attack beats its floor by {measure} in any of these splits, so nothing is shown of any defense: "
            "attacks that work nowhere are no evidence; compare with an undefended split, or attack with stronger ones"
        )
    entries = [_against_undefended(one, entries) for one in _in_order(entries)]
    fronts = _fronts(entries)
    # What nothing beats within a large budget, nothing beats within a smaller one.
    on_front = {label for front in fronts for label in front.labels}
    entries = [replace(one, is_on_front=one.label in on_front) for one in entries]
    most = max(entries, key=lambda one: one.leak.n_images)
    return Comparison(
        task=loaded[0].task_title,
        groups=tuple(dict.fromkeys(facts.group for facts in loaded if facts.group)),
        utility=chosen,
        measure=measure,
        unit=most.leak.unit,
        leaks_when=most.leak.leaks_when,
        attack=attack,
        attacks=attacks,
        floor=most.leak.floor,
        entries=tuple(entries),
        fronts=tuple(fronts),
        curves=tuple(_curves(entries)),
        standings=tuple(_standings(entries)),
        unfinished=unfinished,
    )


def _check_same(loaded: Sequence[Facts], measure: str) -> None:
    """Refuses what would make a comparison a lie."""
    first = loaded[0]
    digest = _digest(first.folder)
    counts = _counts(first, measure)
    if not counts:
        legal = list(dict.fromkeys(leak.measure for leak in first.leakage))
        raise ConfigError(f"expected leakage by {measure!r} in {first.folder}, got none; {nearest(measure, legal)}")
    for other in loaded[1:]:
        both = f"{first.folder} and {other.folder}"
        if other.task != first.task:
            raise DataError(f"{both} do different tasks: {first.task} and {other.task}; compare them apart")
        if _digest(other.folder) != digest:
            raise DataError(f"{both} were attacked on different test images; audit both on the same, or compare apart")
        theirs = _counts(other, measure)
        for lacks, names in ((other, counts.keys() - theirs.keys()), (first, theirs.keys() - counts.keys())):
            if names:
                raise DataError(
                    f"{lacks.folder} lacks the attack {', '.join(sorted(names))} by {measure}, which others have: "
                    "it would look safer than it is; run its study again with the same attacks"
                )
        for name, count in counts.items():
            if theirs[name] != count:
                raise DataError(
                    f"{both}: expected {name} by {measure} on equally many images in the same direction and unit, got "
                    f"{count} and {theirs[name]}; run both studies with the same settings"
                )


def _counts(facts: Facts, measure: str) -> dict[str, tuple[int, str, str]]:
    return {
        leak.attack: (leak.n_images, leak.leaks_when, leak.unit) for leak in facts.leakage if leak.measure == measure
    }


def _digest(folder: Path) -> str:
    arrays = read_arrays(folder / "truth.npz", "images", "index")
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _leak(facts: Facts, measure: str, attack: str) -> Leak:
    """The strongest attack, or the floor where that is no stronger: anyone can send the mean picture."""
    leaks = [leak for leak in facts.leakage if leak.measure == measure and attack in (STRONGEST, leak.attack)]
    return max((_floored(leak) for leak in leaks), key=lambda leak: leak.amount)


def _floored(leak: Leak) -> Leak:
    bound = max if leak.leaks_when == "high" else min
    figures = ("mean", "low", "high", "worst", "worst_low", "worst_high")
    return replace(leak, **{name: bound(getattr(leak, name), leak.floor) for name in figures})


def _labels(loaded: Sequence[Facts]) -> list[str]:
    """Names, with the folder where two splits share one."""
    names = [facts.name for facts in loaded]
    return [
        f"{name} ({facts.folder})" if names.count(name) > 1 else name for name, facts in zip(names, loaded, strict=True)
    ]


def _in_order(entries: Sequence[Entry]) -> list[Entry]:
    """Undefended splits by cost, then defenses and their variants as they came, each by strength."""
    defenses = list(dict.fromkeys(one.facts.defense for one in entries))
    variants = list(dict.fromkeys(_family(one) for one in entries))

    def place(one: Entry) -> tuple[Any, ...]:
        facts = one.facts
        if facts.defense == UNDEFENDED:
            return (-1, facts.edge_macs, 0, 0.0)
        return (defenses.index(facts.defense), 0, variants.index(_family(one)), _turned(one))

    return sorted(entries, key=place)


def _family(one: Entry) -> tuple[str, str]:
    return one.facts.defense, one.facts.variant


def _costs_equal(a: int, b: int) -> bool:
    return abs(a - b) <= EQUAL_COST * min(a, b)


def _against_undefended(one: Entry, entries: Sequence[Entry]) -> Entry:
    undefended = [other for other in entries if other.facts.defense == UNDEFENDED]
    if one.facts.defense == UNDEFENDED or not undefended:
        return one
    macs = max(one.facts.edge_macs, 1)

    def distance(other: Entry) -> tuple[bool, float, float]:
        # Nearest in cost; of the same cost the more useful one, which is the harder to beat.
        other_macs = max(other.facts.edge_macs, 1)
        return other.facts.seed != one.facts.seed, round(abs(math.log(macs / other_macs)), 6), -other.utility.mean

    equal = [other for other in undefended if _costs_equal(one.facts.edge_macs, other.facts.edge_macs)]
    beside = min(equal or undefended, key=distance)
    costs = macs / max(beside.facts.edge_macs, 1)
    if not equal:
        return replace(one, costs=costs)
    useful = _side(_bounds(one.utility), _bounds(beside.utility))
    leaks = _side((one.leak.low, one.leak.high), (beside.leak.low, beside.leak.high))
    turned: dict[Side, Side] = {"better": "worse", "worse": "better", "not told apart": "not told apart"}
    private = turned[leaks] if one.leak.leaks_when == "high" else leaks
    return replace(one, costs=costs, reference=beside.label, useful=useful, private=private)


def _bounds(found: Estimate) -> tuple[float, float]:
    low, high = found.low, found.high
    return (found.mean if low is None else low, found.mean if high is None else high)


def _side(ours: tuple[float, float], theirs: tuple[float, float]) -> Side:
    if ours[0] > theirs[1]:
        return "better"
    return "worse" if ours[1] < theirs[0] else "not told apart"


def _beats(one: Entry, other: Entry) -> bool:
    ours, theirs = (one.utility.mean, -one.leak.amount), (other.utility.mean, -other.leak.amount)
    return ours != theirs and ours[0] >= theirs[0] and ours[1] >= theirs[1]


def _limit(front: Front) -> float:
    return math.inf if front.budget_macs is None else front.budget_macs * (1 + EQUAL_COST)


def _fronts(entries: Sequence[Entry]) -> list[Front]:
    budgets: list[int] = []
    for macs in sorted(one.facts.edge_macs for one in entries if one.facts.defense == UNDEFENDED):
        if not budgets or not _costs_equal(budgets[-1], macs):
            budgets.append(macs)
    fronts = [_front(budget, entries) for budget in budgets]
    if not fronts or any(one.facts.edge_macs > _limit(fronts[-1]) for one in entries):
        fronts.append(_front(None, entries))
    return fronts


def _front(budget: int | None, entries: Sequence[Entry]) -> Front:
    within = [one for one in entries if one.facts.edge_macs <= _limit(Front(budget_macs=budget, labels=()))]
    best = [one for one in within if not any(_beats(other, one) for other in within)]
    best.sort(key=lambda one: (one.leak.amount, one.utility.mean))
    return Front(budget_macs=budget, labels=tuple(one.label for one in best))


def _curves(entries: Sequence[Entry]) -> list[Curve]:
    """Sweeps of two strengths or more; where a strength comes twice, cuts and then seeds are curves of their own."""
    keys: tuple[Callable[[Entry], Any], ...] = (lambda one: one.facts.cut, lambda one: one.facts.seed)

    def parted(points: list[Entry], depth: int) -> list[list[Entry]]:
        strengths = [one.facts.strength for one in points]
        if len(set(strengths)) == len(strengths) or depth == len(keys):
            return [points]
        parts = groupby(sorted(points, key=keys[depth]), key=keys[depth])
        return [part for _, own in parts for part in parted(list(own), depth + 1)]

    families: dict[tuple[str, str, str], list[Entry]] = {}
    for one in entries:
        if one.facts.knob is not None and one.facts.strength is not None:
            families.setdefault((*_family(one), one.facts.knob), []).append(one)
    return [
        Curve(
            defense=defense, variant=variant, knob=knob, labels=tuple(one.label for one in sorted(points, key=_turned))
        )
        for (defense, variant, knob), own in families.items()
        for points in parted(own, 0)
        if len(points) > 1
    ]


def _turned(one: Entry) -> float:
    return -math.inf if one.facts.strength is None else one.facts.strength


def _result(one: Entry) -> Result:
    if one.private is None:
        return "no equal"
    if one.private == "better":
        return "price" if one.useful == "worse" else "gain"
    return "loss" if one.private == "worse" else "not told apart"


def _standings(entries: Sequence[Entry]) -> list[Standing]:
    ranks: tuple[Result, ...] = ("gain", "price", "not told apart", "loss", "no equal")
    standings = []
    for defense, variant in dict.fromkeys(_family(one) for one in entries if one.facts.defense != UNDEFENDED):
        own = [one for one in entries if _family(one) == (defense, variant)]
        # Of those with the same result: one that gains privacy by how little leaks, one that pays by how useful it is.
        best = min(own, key=lambda one: (ranks.index(_result(one)), -one.utility.mean, one.leak.amount))
        gains = [one for one in own if _result(one) == "gain"]
        best = min(gains, key=lambda one: one.leak.amount) if gains else best
        standings.append(
            Standing(
                defense=defense,
                variant=variant,
                on_front=tuple(one.label for one in own if one.is_on_front),
                result=_result(best),
                best=best.label,
                overlaps=tuple(one.label for one in own if one.private == "not told apart"),
            )
        )
    return standings


def to_json(found: Comparison) -> dict[str, Any]:
    """The comparison as plain JSON values."""

    def plain(value: Any) -> Any:  # noqa: ANN401 - any value of a dataclass field
        if isinstance(value, Mapping):
            return {str(key): plain(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        return value if isinstance(value, str | int | float | bool | None) else str(value)

    out: dict[str, Any] = plain(asdict(found))
    return out
