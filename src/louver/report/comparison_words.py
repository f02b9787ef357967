"""What a comparison found, in words: names of splits, sentences, limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from louver.comparison import EQUAL_COST, STRONGEST, UNDEFENDED, Comparison, Entry, Standing
from louver.facts import Estimate, Leak
from louver.report import words

__all__ = [
    "PERCENT",
    "RESULTS",
    "direction",
    "family_in_words",
    "glossary",
    "headline",
    "joined",
    "knob_in_words",
    "leak_in_words",
    "limits",
    "measure",
    "order_in_words",
    "reason",
    "strength_in_words",
    "titles",
    "use_in_words",
]

PERCENT = f"{100 * EQUAL_COST:.0f}{words.NARROW}%"

_DEFENSES = {
    UNDEFENDED: "undefended",
    "patrol": "PATROL",
    "siftfunnel": "SiftFunnel",
    "privynet": "PrivyNet",
    "hybrid": "Hybrid",
    "nopeek": "NoPeek",
}

_KNOBS = {"beta": "β", "gamma": "γ", "lam": "λ", "sigma": "σ", "std": "σ", "noise_std": "σ", "n_channels": "D"}

RESULTS: dict[str, tuple[str, str]] = {
    "gain": ("leaks less", "passed"),
    "price": ("at a price", "unshown"),
    "not told apart": ("not told apart", "nothing"),
    "loss": ("leaks more", "broken"),
    "no equal": ("no equal", "nothing"),
}
"""Word and class of each result of a standing."""

_TERMS = ("Edge and cloud", "Cut", "Feature", "Attack", "Floor", "MACs")


# ---------------------------------------------------------------- names


def _defense(name: str) -> str:
    return _DEFENSES.get(name.lower(), name.replace("_", " "))


def family_in_words(defense: str, variant: str) -> str:
    """A defense and its variant."""
    name = _defense(defense)
    if variant in ("", "full"):
        return name
    return f"{name} {variant}" if variant.startswith("without ") else f"{name} ({variant})"


def knob_in_words(name: str) -> str:
    """A knob by its sign, where the field has one."""
    return _KNOBS.get(name.lower(), name.replace("_", " "))


def strength_in_words(one: Entry) -> str:
    """The knob that was swept and how far it was turned; empty where none was."""
    if one.facts.knob is None or one.facts.strength is None:
        return ""
    return f"{knob_in_words(one.facts.knob)} {one.facts.strength:g}"


def titles(found: Comparison) -> dict[str, str]:
    """How the page names each split: defense, variant and strength; cut, seed and label only where they tell apart."""

    def title(one: Entry, n_parts: int) -> str:
        facts = one.facts
        text = family_in_words(facts.defense, facts.variant)
        if facts.defense == UNDEFENDED and facts.cut not in text:
            text += f" ({facts.cut})"
        if facts.knob is not None and facts.strength is not None:
            text += f", {strength_in_words(one)}"
        return ", ".join([text, facts.cut, f"seed {facts.seed}", one.label][: n_parts + 1])

    told: dict[str, str] = {}
    for one in found.entries:
        for n_parts in range(4):
            name = title(one, n_parts)
            others = [title(other, n_parts) for other in found.entries if other is not one]
            if name not in others:
                break
        told[one.label] = name
    return told


# ---------------------------------------------------------------- what was found, in sentences


def joined(names: Sequence[str]) -> str:
    """Names in a row: "a, b and c"."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def headline(found: Comparison) -> str:
    """What was found, in a few sentences."""
    if not found.standings:
        return "No defense is among these splits: they are compared only with one another."
    by_result: dict[str, list[str]] = {}
    for standing in found.standings:
        by_result.setdefault(standing.result, []).append(family_in_words(standing.defense, standing.variant))
    count = len(found.standings)
    label = words.measure_words(found.measure).label
    told = [
        ("gain", "Leaking less, with no loss of {u} beyond the intervals"),
        ("price", "Leaking less, and losing {u}"),
        ("not told apart", "Not told apart in leakage"),
        ("loss", "Leaking more"),
        ("no equal", "With no such undefended split here, so that nothing is said of them"),
    ]
    parts = [
        f"{sentence.format(u=found.utility)}: {len(names)} of {count} ({'; '.join(names)})."
        for result, sentence in told
        if (names := by_result.get(result))
    ]
    whom = "the attack that does best on each split" if found.attack == STRONGEST else f"the attack {found.attack}"
    return (
        "Each defense and variant, at its best strength, beside the undefended split of equal edge cost, "
        f"by {label} under {whom}. " + " ".join(parts)
    )


def reason(standing: Standing, found: Comparison, names: Mapping[str, str]) -> str:
    """What stands behind the standing of a defense: its best split and the undefended one, in numbers."""
    best = found.entry(standing.best)
    use, leak = use_in_words(found, best.utility), leak_in_words(best.leak)
    text = f"{names[best.label]}: {words.measure_words(found.measure).label} {leak}, {found.utility} {use}"
    if best.reference is not None:
        beside = found.entry(best.reference)
        text += f"; {names[beside.label]}: {leak_in_words(beside.leak)}, {use_in_words(found, beside.utility)}"
    elif best.costs is not None:
        text += f"; it costs the edge {best.costs:.2f} times the MACs of the nearest undefended split"

    def short(labels: Sequence[str]) -> str:
        return joined([strength_in_words(found.entry(label)) or names[label] for label in labels])

    if standing.overlaps:
        text += f". Leakage overlaps that of the undefended split at {short(standing.overlaps)}"
    return f"{text}. On the front: {short(standing.on_front) if standing.on_front else 'none of it'}."


def use_in_words(found: Comparison, value: Estimate) -> str:
    """A utility with its interval."""
    say = partial(words.utility_in_words, found.utility)
    return say(value.mean) + (
        "" if value.low is None or value.high is None else f" ({say(value.low)} to {say(value.high)})"
    )


def leak_in_words(leak: Leak) -> str:
    """Leakage with its interval."""
    say = partial(words.value_in_words, leak.measure, leak.unit)
    return f"{say(leak.mean)} ({say(leak.low)} to {say(leak.high)})"


def order_in_words(found: Comparison, names: Mapping[str, str]) -> str:
    """Whether the criterion of inversion difficulty orders the splits; empty where nobody asked."""
    if found.order is None:
        return f"No order is tested: {found.order_note}." if found.order_note else ""
    order = found.order
    say = partial(words.value_in_words, "ssim", "")
    beside = f", relative to {names[order.reference]}" if order.reference else ""
    verdict = "It orders them better than chance." if order.orders else "It does not order them better than chance."
    return (
        "The criterion of inversion difficulty (mutual information, entropy and effective volume together"
        f"{beside}) was compared with measured leakage over {order.n_splits} splits: Spearman’s rank correlation of "
        f"difficulty with less leakage is {say(order.correlation)} ({say(order.low)} to {say(order.high)}), "
        f"p {'< 0.001' if order.p_value < 0.001 else f'= {say(order.p_value)}'}. {verdict}"
    )


# ---------------------------------------------------------------- limits and words


def limits(found: Comparison) -> list[tuple[str, str]]:
    """What the comparison does not show, as (claim, sentence) pairs; some hold only for this one."""
    counts = sorted({one.leak.n_images for one in found.entries})
    seeds = sorted({one.facts.seed for one in found.entries})
    told = [
        (
            "It is no guarantee.",
            "An attack shows that at least so much leaks. A defense may hold off these attacks only because they are "
            f"weak against it: {', '.join(found.attacks)} were tried, each trained anew against every split.",
        ),
        (
            "Intervals are over test pictures.",
            f"Leakage was scored on {' or '.join(f'{n:,}' for n in counts)} of them. Training a split again with "
            "another seed moves its mark too, and the intervals do not say by how much "
            f"(seed{'' if len(seeds) == 1 else 's'} here: {', '.join(map(str, seeds))}).",
        ),
        (
            "Overlap is not equality.",
            "Where two intervals overlap, the splits are not told apart; they may still differ. Where many splits are "
            "looked at, a few may seem to differ by chance.",
        ),
        (
            "The front is drawn through means.",
            "A split just behind it may be as good as one on it.",
        ),
        (
            "Equal cost means edge MACs.",
            f"Costs within {PERCENT} count as equal. Memory, bytes sent and time on a real device are not weighed in; "
            "the table holds bytes and parameters.",
        ),
        (
            f"Only {words.measure_words(found.measure).label} is drawn.",
            "A picture that scores low can still show what matters. Look at the pictures, and at the private labels "
            "that probes recover, which need no picture.",
        ),
    ]
    if any(standing.result == "no equal" for standing in found.standings):
        told.append(
            (
                "Some defenses have nothing undefended of equal cost beside them.",
                "An undefended split that may spend as much on the edge can be cut deeper, and may leak less for it.",
            )
        )
    if found.unfinished:
        told.append(
            (
                "Some studies have not ended.",
                f"They are left out: {', '.join(found.unfinished)}.",
            )
        )
    return told


def glossary(found: Comparison) -> list[tuple[str, str]]:
    """Words that the page uses, each explained once."""
    measure = words.measure_words(found.measure)
    terms = dict(words.TERMS)
    return [
        (measure.label, measure.sentence),
        *((name, terms[name]) for name in _TERMS),
        (
            "Pareto front",
            "The splits that no other one of at most their edge cost beats: none is as useful and leaks less, or leaks "
            "as little and is more useful.",
        ),
        (
            f"95{words.NARROW}% interval",
            "Had other pictures of the same kind been drawn, the mean would usually fall in this range.",
        ),
        (f"Worst 5{words.NARROW}%", dict(words.TERMS)[f"Worst 5{words.NARROW}%"]),
        ("Chance", "What a guess tells right that never looks at the features."),
    ]


def direction(found: Comparison) -> str:
    """Which way leakage points."""
    return "higher leaks more" if found.leaks_when == "high" else "lower leaks more"


def measure(found: Comparison) -> str:
    """The measure of leakage with its unit."""
    unit = f" ({found.unit})" if found.unit not in {"", "1"} else ""
    return words.measure_words(found.measure).label + unit
