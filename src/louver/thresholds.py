"""Limits on leakage: read from text, judged against the rows of an audit.

    rule       := subject ["@" CUT] ("<=" | ">=") VALUE
    subject    := [ATTACK "."] MEASURE  |  STATISTIC "(" [ATTACK "."] MEASURE ")"
    STATISTIC  := "mean" | "worst5"

`ssim<=0.3` limits the mean of every attack at every cut, `worst5(ssim)<=0.5` the 5 % of images that leak most,
`decoder.ssim@layer3<=0.3` one attack at one cut. The comparison must point away from leakage: `ssim>=0.3` would pass
whatever leaks most, and is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from louver.errors import AttackError, ConfigError, nearest
from louver.measures import MEASURES
from louver.types import Check, Row, Verdict

__all__ = ["GRAMMAR", "Rule", "judge", "parse_fail_above", "parse_rule"]

GRAMMAR = (
    "[ATTACK.]MEASURE[@CUT]<=VALUE, as in ssim<=0.3, psnr<=15, mse>=0.02, worst5(ssim)<=0.5, decoder.ssim@layer3<=0.3"
)
"""What a rule looks like, as error messages show it."""

_SUBJECT = r"(?:(?P<{0}attack>[\w-]+)\.)?(?P<{0}measure>\w+)"
_WHERE = (
    r"(?:(?P<statistic>\w+)\(\s*" + _SUBJECT.format("inner_") + r"\s*\)|" + _SUBJECT.format("") + r")"
    r"\s*(?:@\s*(?P<cut>[^\s<>=]+))?"
)
_RULE = re.compile(r"\s*" + _WHERE + r"\s*(?P<comparison><=|>=)\s*(?P<value>[^\s<>=]+)\s*")
_FAIL_ABOVE = re.compile(r"\s*" + _WHERE + r"\s*=\s*(?P<value>[^\s<>=]+)\s*")

_SEEN_TO_WORK = ("ssim", "psnr", "mse")
"""An attack works somewhere if it beats the floor by one of these."""


ENOUGH_FOR_WORST = 200
"""Test images below which the interval of the worst 5 % is too narrow to trust: it covers the truth too seldom."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One limit. `attack` and `cut` are None where it holds for all of them.

    Raises:
        ConfigError: an unknown measure, a limit that is not finite, or one that no value could ever break.
    """

    measure: str
    limit: float
    statistic: Literal["mean", "worst5"] = "mean"
    attack: str | None = None
    cut: str | None = None

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ConfigError(f"threshold: unknown measure {self.measure!r}; {nearest(self.measure, sorted(MEASURES))}")
        if not math.isfinite(self.limit):
            raise ConfigError(f"threshold on {self.measure}: expected a finite limit, got {self.limit}")
        least, greatest = MEASURES[self.measure].bounds
        if (self.limit >= greatest) if self.comparison == "<=" else (self.limit <= least):
            raise ConfigError(
                f"threshold {self}: {self.measure} lies in [{least:g}, {greatest:g}], so nothing could break it; "
                "give the limit in the measure's own unit"
            )

    @property
    def comparison(self) -> Literal["<=", ">="]:
        """The direction that limits leakage."""
        return "<=" if MEASURES[self.measure].leaks_when == "high" else ">="

    def __str__(self) -> str:
        subject = self.measure if self.attack is None else f"{self.attack}.{self.measure}"
        subject = subject if self.statistic == "mean" else f"{self.statistic}({subject})"
        return f"{subject}{'' if self.cut is None else '@' + self.cut}{self.comparison}{self.limit:.12g}"

    def excess(self, value: float) -> float:
        """How far `value` is beyond the limit, in the measure's unit; at most 0 where the limit is kept."""
        return value - self.limit if self.comparison == "<=" else self.limit - value

    def matches(self, row: Row) -> bool:
        """Whether this rule speaks of that row."""
        return row.measure == self.measure and self.attack in (None, row.attack) and self.cut in (None, row.cut)


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """A rule, its check, and the row that decided it."""

    rule: Rule
    check: Check
    row: Row

    @property
    def relative_excess(self) -> float:
        """How far the interval is beyond the limit, in units of the limit: comparable between measures."""
        _, low, high = _figures(self.rule, self.row)
        return max(self.rule.excess(low), self.rule.excess(high)) / max(abs(self.rule.limit), 1e-9)


def parse_rule(text: str) -> Rule:
    """The rule that `text` states, such as "ssim<=0.3".

    Raises:
        ConfigError: text outside of the grammar (the message shows it), an unknown measure or statistic, a value that
            is not a finite number, a comparison that would fail open, or a limit that nothing could break.

    Example:
        >>> str(parse_rule("worst5(decoder.ssim) @ layer3 <= 0.5"))
        'worst5(decoder.ssim)@layer3<=0.5'
    """
    match = _RULE.fullmatch(text)
    if match is None:
        raise ConfigError(f"threshold {text!r}: cannot be read; expected {GRAMMAR}")
    rule = _rule(match, text)
    if match["comparison"] != rule.comparison:
        raise ConfigError(
            f"threshold {text!r}: {rule.measure} leaks when {MEASURES[rule.measure].leaks_when}, so this would pass "
            f"whatever leaks most; write {rule}"
        )
    return rule


def parse_fail_above(text: str) -> Rule:
    """The rule for `--fail-above "ssim=0.3"`: fail where leakage is above what this value stands for.

    Above means more leakage: `ssim=0.3` is `ssim<=0.3`, but `mse=0.02` is `mse>=0.02`, since a small error leaks more.

    Raises:
        ConfigError: as in `parse_rule`.

    Example:
        >>> str(parse_fail_above("ssim=0.3")), str(parse_fail_above("mse=0.02"))
        ('ssim<=0.3', 'mse>=0.02')
    """
    match = _FAIL_ABOVE.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"fail above {text!r}: cannot be read; expected [ATTACK.]MEASURE[@CUT]=VALUE, as in ssim=0.3, psnr=15 or "
            "worst5(ssim)=0.5"
        )
    return _rule(match, text)


def judge(rules: Sequence[Rule], rows: Sequence[Row]) -> Verdict:
    """The judgement of `rows`: one check per rule, and one sentence for a person, verdict first.

    A rule is "broken" where the figure itself is beyond its limit in any row that it speaks of, "not shown" where only
    the interval reaches across, and "holds" where every interval stays within. The verdict passes if all rules hold
    and the attacks are seen to work: each rule speaks of at least one that beats the floor somewhere by SSIM, PSNR or
    MSE. Attacks that work nowhere say nothing about privacy. A limit on the worst 5 % cannot be shown to hold on fewer
    than `ENOUGH_FOR_WORST` images: no resample holds worse images than those that were drawn.

    Without rules nothing is judged: there are no checks, a warning and the headline say so, and `passed` is true only
    in the sense that no threshold failed, which is what an exit code can tell.

    Raises:
        ConfigError: there is no row, or a rule speaks of none (an absent figure never passes in silence).
        AttackError: a figure is NaN or infinite.
    """
    if not rows:
        raise ConfigError("nothing to judge: the audit has no rows; give it at least one cut, attack and measure")
    for row in rows:
        if not all(math.isfinite(value) for value in (row.mean, row.low, row.high, *_worst(row), row.floor)):
            raise AttackError(f"{row.attack} at {row.cut}: {row.measure} is not finite; a broken attack is no verdict")
    judged = [_judge_rule(rule, rows) for rule in rules]
    checks = tuple(each.check for each in judged)

    warnings = []
    attacks = list(dict.fromkeys(row.attack for row in rows))
    working = {row.attack for row in rows if row.beats_floor and row.measure in _SEEN_TO_WORK}
    # A rule on one attack stands on that attack: that another works says nothing of it.
    has_worked = bool(working) and all(
        any(row.attack in working for row in rows if rule.matches(row)) for rule in rules
    )
    warnings += [
        f"{attack} beats the know-nothing guess at no cut: it was not seen to work, and its figures show no privacy."
        for attack in attacks
        if working and attack not in working
    ]
    if not working:
        warnings.append(
            "The attacks were not seen to work: none beats the know-nothing guess by SSIM, PSNR or MSE at any cut. "
            "Add a cut near the input, where they must succeed, before reading this as privacy."
        )
    if not rules:
        warnings.append("No threshold was set, so nothing was judged.")
        return Verdict(passed=True, headline=_unjudged(rows), checks=(), warnings=tuple(warnings))

    passed = has_worked and all(check.status == "holds" for check in checks)
    return Verdict(passed=passed, headline=_headline(judged, has_worked), checks=checks, warnings=tuple(warnings))


def _rule(match: re.Match[str], text: str) -> Rule:
    statistic = match["statistic"] or "mean"
    if statistic not in ("mean", "worst5"):
        raise ConfigError(f"threshold {text!r}: unknown statistic {statistic!r}; legal: mean, worst5")
    try:
        limit = float(match["value"])
    except ValueError:
        raise ConfigError(f"threshold {text!r}: {match['value']!r} is not a number; expected {GRAMMAR}") from None
    return Rule(
        measure=match["inner_measure"] or match["measure"],
        limit=limit,
        statistic="worst5" if statistic == "worst5" else "mean",
        attack=match["inner_attack"] or match["attack"],
        cut=match["cut"],
    )


def _worst(row: Row) -> tuple[float, float, float]:
    return row.worst, row.worst_low, row.worst_high


def _figures(rule: Rule, row: Row) -> tuple[float, float, float]:
    """The figure that the rule limits, and its interval."""
    return (row.mean, row.low, row.high) if rule.statistic == "mean" else _worst(row)


def _judge_rule(rule: Rule, rows: Sequence[Row]) -> _Judged:
    """One rule, decided by the row that is furthest beyond its limit, or nearest to it."""
    matching = [row for row in rows if rule.matches(row)]
    if not matching:
        measured = sorted({f"{row.attack}.{row.measure}@{row.cut}" for row in rows})
        raise ConfigError(
            f"threshold {rule} speaks of nothing that was measured; {nearest(_wanted(rule), measured)}; "
            "mend the rule, or add the attack, measure or cut"
        )

    def beyond(row: Row) -> tuple[float, float]:
        """How far the figure, and the bad end of its interval, are beyond the limit."""
        figure, low, high = _figures(rule, row)
        return rule.excess(figure), max(rule.excess(low), rule.excess(high))

    def rank(row: Row) -> tuple[bool, float]:
        figure, end = beyond(row)
        return (True, figure) if figure > 0 else (False, end)

    decisive = max(matching, key=rank)
    figure, end = beyond(decisive)
    status: Literal["holds", "broken", "not shown"] = "broken" if figure > 0 else "not shown" if end > 0 else "holds"
    if status == "holds" and rule.statistic == "worst5":
        few = min(row.n_images for row in matching)
        if few < ENOUGH_FOR_WORST:
            reason = f"{few} images are too few to know the worst 5 % ({ENOUGH_FOR_WORST} are needed): "
            check = Check(rule=str(rule), status="not shown", reason=reason + _sentence(decisive, rule.statistic))
            return _Judged(rule=rule, check=check, row=decisive)
    where = {
        "broken": "",
        "not shown": "the interval reaches across the limit: ",
        "holds": f"in all {len(matching)} rows, the closest being: " if len(matching) > 1 else "",
    }[status]
    reason = where + _sentence(decisive, rule.statistic)
    return _Judged(rule=rule, check=Check(rule=str(rule), status=status, reason=reason), row=decisive)


def _wanted(rule: Rule) -> str:
    return f"{rule.attack or ''}.{rule.measure}@{rule.cut or ''}"


def _headline(judged: Sequence[_Judged], has_worked: bool) -> str:
    """One sentence: the verdict, then the rule that decides it and the row behind it."""
    words = {"broken": "Not passed: {} is broken", "not shown": "Not shown: {} is neither kept nor broken"}
    for status, phrase in words.items():
        bad = [each for each in judged if each.check.status == status]
        if bad:
            worst = max(bad, key=lambda each: each.relative_excess).check
            share = f" ({len(bad)} of {len(judged)} thresholds)" if len(judged) > 1 else ""
            return f"{phrase.format(worst.rule)}{share}; {worst.reason}."
    if not has_worked:
        return (
            "Not passed: the limits are kept, but the attacks were not seen to work at any cut, so this shows nothing."
        )
    closest = max(judged, key=lambda each: each.relative_excess).check
    count = "the threshold holds" if len(judged) == 1 else f"all {len(judged)} thresholds hold"
    return f"Passed: {count}; {closest.rule} {closest.reason}."


def _unjudged(rows: Sequence[Row]) -> str:
    """What to say where no threshold was set: the strongest leakage, by the first measure that a person can read."""
    present = {row.measure for row in rows}
    measure = next((name for name in _SEEN_TO_WORK if name in present), rows[0].measure)
    candidates = [row for row in rows if row.measure == measure]
    sign = 1.0 if candidates[0].leaks_when == "high" else -1.0
    strongest = max(candidates, key=lambda row: sign * row.mean)
    return f"No threshold was set, so nothing was judged; the most leaks here: {_sentence(strongest, 'mean')}."


def _sentence(row: Row, statistic: Literal["mean", "worst5"]) -> str:
    """One row in words: cut, attack, measure, value with its interval, and the floor."""
    if statistic == "mean":
        what, (value, low, high), floor = "", (row.mean, row.low, row.high), row.floor
    else:
        what, (value, low, high), floor = "on the worst 5 % of images ", _worst(row), row.floor_worst
    unit = f" {row.unit}" if row.unit and row.unit != "share" else ""
    return (
        f"at {row.cut}, {row.attack} reaches {what}{row.measure} {value:.3g}{unit} "
        f"(95 % interval {low:.3g} to {high:.3g}; know-nothing guess {floor:.3g})"
    )
