"""Whether SiftFunnel's criterion of inversion difficulty orders the splits of a comparison as attacks found them."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from louver.comparison import UNDEFENDED, Comparison, Entry, Order
from louver.errors import DataError
from louver.measures.difficulty import Factors, inversion_difficulty, order_agreement

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
    has_zeros = all(one.facts.information["effective_volume"].mean < prod(one.facts.feature_shape) for one in entries)
    in_directions = not has_zeros and all("effective_dimensions" in one.facts.information for one in entries)

    def factors(one: Entry) -> Factors:
        held = one.facts.information
        return Factors(
            mutual_information=held["mine"].mean,
            entropy=held["entropy"].mean,
            volume=held["effective_dimensions" if in_directions else "effective_volume"].mean,
            volume_by="dimensions" if in_directions else "nonzero",
        )

    reference = factors(base)
    return [inversion_difficulty(factors(one), reference).score for one in entries]
