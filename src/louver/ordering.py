"""Whether SiftFunnel's criterion of inversion difficulty orders the splits of a comparison as attacks found them."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from louver.comparison import UNDEFENDED, Comparison, Entry, Order
from louver.errors import DataError
from louver.measures.difficulty import inversion_difficulty, order_agreement, recorded_factors

__all__ = ["ordered"]

_SCORE = "difficulty"


def ordered(found: Comparison) -> Comparison:
    """`found` with the rank correlation of difficulty and leakage, or with a note that says why there is none.

    A score that the facts hold ("difficulty") is taken as it is; otherwise it is computed from mutual information,
    entropy and effective volume, next to the undefended split that leaks most. Volume is counted in elements that are
    not 0, or in directions where a split has no element that is ever 0.
    """
    undefended = [one for one in found.entries if one.facts.defense == UNDEFENDED]
    try:
        if all(_SCORE in one.facts.information for one in found.entries):
            scores, reference = [one.facts.information[_SCORE].mean for one in found.entries], ""
        elif not undefended:
            return replace(found, order_note="no undefended split is compared, and difficulty is relative to one")
        else:
            base = max(undefended, key=lambda one: one.leak.amount)
            scores, reference = _scores(found.entries, base), base.label
        agreed = order_agreement(scores, [one.leak.amount for one in found.entries])
    except DataError as error:
        return replace(found, order_note=str(error))
    order = Order(
        correlation=agreed.correlation,
        low=agreed.low,
        high=agreed.high,
        p_value=agreed.p_value,
        n_splits=agreed.n_splits,
        orders=agreed.orders,
        reference=reference,
    )
    return replace(found, order=order)


def _scores(entries: tuple[Entry, ...], base: Entry) -> list[float]:
    for one in entries:
        lacking = [name for name in ("mine", "entropy", "effective_volume") if name not in one.facts.information]
        if lacking:
            raise DataError(f"{one.label} lacks {', '.join(lacking)}")
    factors = recorded_factors(
        [{name: figure.mean for name, figure in one.facts.information.items()} for one in entries],
        [prod(one.facts.feature_shape) for one in entries],
    )
    reference = factors[entries.index(base)]
    return [inversion_difficulty(one, reference).score for one in factors]
