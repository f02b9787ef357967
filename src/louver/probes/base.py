"""What a probe is, and the one place where probes are run and judged: no probe ever sees a label of the test rows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from louver.errors import AttackError, DataError, LouverError
from louver.measures.statistics import summarize

__all__ = ["Labels", "Probe", "ProbeResult", "checked_features", "coded", "probe", "standardized"]

Labels = Tensor | NDArray[np.int64]
"""One integer a row."""

_ROLES = ("train", "validation", "test")
_COLUMNS_AT_ONCE = 4096
_ROUNDING = 1e-12
"""A column whose deviation is below this share of its mean is constant, up to the rounding of float64."""


@runtime_checkable
class Probe(Protocol):
    """A way to learn labels from features. Implementations are frozen dataclasses of knobs."""

    @property
    def name(self) -> str:
        """What results are listed under."""

    def fit_predict(
        self,
        train_x: Tensor,
        train_y: Int[Tensor, " n"],
        validation_x: Tensor,
        validation_y: Int[Tensor, " m"],
        test_x: Tensor,
        *,
        n_classes: int,
        seed: int,
        device: torch.device | str,
    ) -> Int[Tensor, " t"]:
        """A label in 0..n_classes-1 for each test row; learned on train, every choice made on validation."""


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """How well one probe recovers one label, on the test rows.

    `accuracy` in [0,1] with the interval `low`..`high`; `chance` the accuracy of always saying the class that is
    commonest in training; `uniform_chance` is 1/`n_classes`; `luck` what the probe's own answers get when they are
    dealt to the rows at random. `is_informative`: accuracy above `luck`, so the answers say something about the label,
    be it less than the majority does; `beats_chance`: above `luck` and `chance` both, since `chance` alone is low by
    accident where the class commonest in training is rare in test. `correct` is 1.0 or 0.0 for each test row, in order.
    """

    probe: str
    n: int
    n_classes: int
    accuracy: float
    low: float
    high: float
    chance: float
    uniform_chance: float
    luck: float
    is_informative: bool
    beats_chance: bool
    seconds: float
    seed: int
    correct: NDArray[np.float64] = field(repr=False, compare=False)


def probe(
    probes: Sequence[Probe],
    features: Mapping[str, Tensor],
    labels: Mapping[str, Labels],
    *,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    resamples: int = 2000,
    level: float = 0.95,
) -> tuple[ProbeResult, ...]:
    """One result for each probe: accuracy with interval on the test rows, against chance.

    `features` and `labels` have the roles "train", "validation" and "test", one row an image; features may have any
    shape after the batch, reconstructions among them. Labels are any integers; `classes[label]` names one in messages.
    Hits and floor go through `louver.measures.statistics.summarize`: the interval of the accuracy is Wilson's, since
    the bootstrap of no hits (or of hits only) has no width; what is beaten is told by its paired bootstrap, row by row.

    Raises:
        DataError: roles missing, rows that do not match, features that are not finite, fewer than two classes in
            train, or a label in validation or test that train does not know.
        AttackError: a probe failed, or answered something that is not a class for each test row.
        ConfigError: `level` outside (0, 1), or fewer than 100 resamples.

    Example:
        >>> x = {role: torch.randn(60, 3, 4, 5) for role in ("train", "validation", "test")}
        >>> y = {role: (rows[:, 0, 0, 0] > 0).long() for role, rows in x.items()}
        >>> from louver.probes import LinearProbe
        >>> [found.beats_chance for found in probe([LinearProbe()], x, y)]
        [True]
    """
    _check_roles(features, labels)
    x = {role: checked_features(features[role], role) for role in _ROLES}
    y, known = coded({role: labels[role] for role in _ROLES}, x, classes=classes)
    commonest = int(torch.bincount(y["train"]).argmax())
    floor = (y["test"] == commonest).double().numpy()
    results = []
    for one in probes:
        start = time.perf_counter()
        predicted = _predicted(one, x, y, n_classes=len(known), seed=seed, device=device)
        seconds = time.perf_counter() - start
        correct = (predicted == y["test"]).double().numpy()
        by_luck = _luck(predicted, y["test"], len(known))
        found = summarize(correct, floor, "high", seed=seed, resamples=resamples, level=level)
        by_answers = summarize(correct, by_luck, "high", seed=seed, resamples=resamples, level=level)
        results.append(
            ProbeResult(
                probe=one.name,
                n=len(correct),
                n_classes=len(known),
                accuracy=found.mean,
                low=found.low,
                high=found.high,
                chance=found.floor,
                uniform_chance=1 / len(known),
                luck=by_answers.floor,
                is_informative=by_answers.beats_floor,
                beats_chance=found.beats_floor and by_answers.beats_floor,
                seconds=seconds,
                seed=seed,
                correct=correct,
            )
        )
    return tuple(results)


def _predicted(
    one: Probe,
    x: Mapping[str, Tensor],
    y: Mapping[str, Tensor],
    *,
    n_classes: int,
    seed: int,
    device: torch.device | str,
) -> Int[Tensor, " t"]:
    try:
        found = one.fit_predict(
            x["train"],
            y["train"],
            x["validation"],
            y["validation"],
            x["test"],
            n_classes=n_classes,
            seed=seed,
            device=device,
        )
    except LouverError:
        raise
    except Exception as error:
        raise AttackError(
            f"probe {one.name!r} failed: {error}; a probe that breaks says nothing about privacy, mend it and run again"
        ) from error
    n_test = len(x["test"])
    if not isinstance(found, Tensor) or found.shape != (n_test,) or found.is_floating_point():
        got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise AttackError(f"probe {one.name!r}: expected {n_test} integers, one class a test row, got {got}")
    found = found.cpu().long()
    if int(found.min()) < 0 or int(found.max()) >= n_classes:
        raise AttackError(
            f"probe {one.name!r}: expected classes 0..{n_classes - 1}, got {int(found.min())}..{int(found.max())}"
        )
    return found


def _luck(predicted: Int[Tensor, " t"], truth: Int[Tensor, " t"], n_classes: int) -> NDArray[np.float64]:
    """What each row adds to the agreement that answers and labels reach when they are independent of each other.

    The mean is that agreement, the sum over classes of share answered × share true. A row's part is its influence, so
    that the paired difference to the hits varies as the excess of agreement does.
    """
    answered, true = (
        torch.bincount(column, minlength=n_classes).double() / len(column) for column in (predicted, truth)
    )
    return (answered[truth] + true[predicted] - answered @ true).numpy()


def _check_roles(features: Mapping[str, Tensor], labels: Mapping[str, Labels]) -> None:
    for what, given in (("features", features), ("labels", labels)):
        missing = [role for role in _ROLES if role not in given]
        if missing:
            raise DataError(
                f"expected {what} of the roles {', '.join(_ROLES)}, {', '.join(missing)} missing; "
                "choices are made on validation and judged on test, so none can stand in for another"
            )


def checked_features(features: Tensor, role: str) -> Tensor:
    """The features in float32 without gradients; `features` itself where it is so already.

    Raises:
        DataError: no rows, no columns, or NaN or infinity among them.
    """
    if not isinstance(features, Tensor) or features.ndim < 2 or not features.numel():
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise DataError(f"{role}: expected features of shape (n, ...) with n of 1 or more, got {got}")
    features = features.detach().to(torch.float32)
    if not bool(torch.isfinite(features).all()):
        raise DataError(f"{role}: expected finite features, got NaN or infinity; what made them is broken")
    return features


def coded(
    labels: Mapping[str, Labels], features: Mapping[str, Tensor], *, classes: Sequence[str] | None = None
) -> tuple[dict[str, Int[Tensor, " n"]], Int[Tensor, " k"]]:
    """Labels of each role as 0..k-1 on the CPU, and the k labels of the role "train" in order.

    Raises:
        DataError: features and labels of a role have other lengths, feature shapes differ between roles, train has
            fewer than two classes, or another role has a label that train does not.
    """
    values: dict[str, Tensor] = {}
    shape = features["train"].shape[1:]
    for role, given in labels.items():
        column = torch.as_tensor(given).cpu()
        if column.is_floating_point() or column.shape != (len(features[role]),):
            raise DataError(
                f"{role}: expected {len(features[role])} integer labels, one a row of features, "
                f"got {column.dtype} {tuple(column.shape)}"
            )
        if features[role].shape[1:] != shape:
            raise DataError(
                f"{role}: expected features of shape {tuple(shape)} as in train, got {tuple(features[role].shape[1:])}"
            )
        values[role] = column.long()
    known = torch.unique(values["train"])
    if len(known) < 2:
        raise DataError(
            f"train: expected labels of 2 classes or more, got only {known.tolist()}; nothing to tell apart"
        )
    for role, column in values.items():
        strange = [label for label in torch.unique(column).tolist() if label not in set(known.tolist())]
        if strange:
            names = [classes[label] if classes and 0 <= label < len(classes) else str(label) for label in strange]
            shown = ", ".join(names[:5]) + (f", … ({len(names)} in all)" if len(names) > 5 else "")
            raise DataError(
                f"{role}: classes that train does not know: {shown}; a probe needs a closed set, so draw the roles "
                "from the same classes, or use `reidentify` for identities that differ between them"
            )
    return {role: torch.searchsorted(known, column) for role, column in values.items()}, known


def standardized(
    reference: Tensor, *others: Tensor, device: torch.device | str = "cpu"
) -> tuple[Float[Tensor, "_ d"], ...]:
    """`reference` and `others`, flat, with every column in deviations of the reference from its mean; float32.

    Computed in float64, so a column that says something at a scale of 1e-4 beside a large mean still does afterwards.
    Columns that are constant in the reference become 0.
    """
    rows = [x.flatten(1) for x in (reference, *others)]
    results = tuple(torch.empty(x.shape, dtype=torch.float32, device=device) for x in rows)
    for start in range(0, rows[0].shape[1], _COLUMNS_AT_ONCE):
        columns = slice(start, start + _COLUMNS_AT_ONCE)
        known = rows[0][:, columns].to(device).double()
        mean, deviation = known.mean(0), known.std(0, correction=0)
        varies = deviation > _ROUNDING * mean.abs()
        scale = torch.where(varies, 1 / torch.where(varies, deviation, 1.0), 0.0)
        for x, result in zip(rows, results, strict=True):
            result[:, columns] = (x[:, columns].to(device).double() - mean) * scale
    return results
