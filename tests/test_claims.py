"""How claims are answered from recorded tables: in doubt "not shown", and never the better answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from claims import all_of, apart, judged, lost_points, more_error, patrol, rises_first, siftfunnel  # noqa: E402


def cell(name, *, accuracy=0.9, ssim=0.5, psnr=18.0, spread=0.01, macs=10, entropy=100.0):
    """A recorded cell of 1,000 images, every interval `spread` wide to both sides."""

    def row(measure, mean, floor, by):
        return {
            "attack": "decoder",
            "measure": measure,
            "mean": mean,
            "low": mean - by,
            "high": mean + by,
            "worst": mean,
            "floor": floor,
        }

    return {
        "name": name,
        "defense": name.partition("-")[0],
        "cut": "layer2",
        "edge_macs": macs,
        "utility": {"accuracy": {"mean": accuracy, "low": accuracy - spread, "high": accuracy + spread}},
        "leakage": [row("ssim", ssim, 0.14, spread), row("psnr", psnr, 12.0, 10 * spread)],
        "information": {
            "mine": {"mean": 2.0, "low": 1.9, "high": 2.1},
            "entropy": {"mean": entropy},
            "effective_volume": {"mean": entropy},
        },
    }


def table(*cells):
    return {one["name"]: one for one in cells}


@pytest.mark.parametrize(
    ("value", "above", "below"),
    [((0.4, 0.5, 0.6), "yes", "no"), ((0.1, 0.4, 0.6), "not shown", "not shown"), ((0.1, 0.2, 0.29), "no", "yes")],
)
def test_only_a_whole_interval_answers(value, above, below):
    assert judged(value, 0.3, is_above=True) == above
    assert judged(value, 0.3, is_above=False) == below
    low, _, high = value
    limit = {"low": 0.3, "high": 0.3}
    assert apart({"low": low, "high": high}, limit) == above


def test_what_must_all_hold_holds_only_if_all_do():
    assert all_of(["yes", "yes"]) == "yes"
    assert all_of(["yes", "not comparable"]) == "yes"
    assert all_of(["yes", "not shown"]) == "not shown"
    assert all_of(["not shown", "no", "yes"]) == "no"


def test_points_and_errors_are_differences_of_the_means_with_intervals_around_them():
    one, other = cell("a", accuracy=0.85, psnr=15.0), cell("b", accuracy=0.9, psnr=18.0)
    low, mean, high = lost_points(one, other)
    assert mean == pytest.approx(0.05)
    assert (mean - low, high - mean) == pytest.approx((0.01 * 2**0.5, 0.01 * 2**0.5))
    low, mean, high = more_error(one, other)
    assert mean == pytest.approx(10**0.3 - 1)
    assert low < mean < high
    assert more_error(cell("a", psnr=9.0), other)[1] == pytest.approx(10**0.6 - 1), "no worse than the floor"


def test_siftfunnel_is_set_beside_the_best_baseline_that_is_no_less_useful():
    base = cell("none-layer2-tuned")
    good = cell("siftfunnel-12", psnr=14.0, entropy=10.0)
    weak, useless = cell("bottleneck-12", psnr=17.0), cell("dropout-1", psnr=12.0, accuracy=0.5)
    (row,) = siftfunnel(table(base, good, weak, useless), "none-layer2-tuned")
    assert row["best baseline"] == "bottleneck-12"
    assert row["answer"]["30 % more error"] == "yes"
    assert row["answer"]["half its entropy"] == "yes"
    assert row["answer"]["half its mine"] == row["answer"]["all"] == "not shown", "two lower bounds have no ratio"
    (row,) = siftfunnel(table(base, good, cell("noise-1", psnr=15.0, entropy=500.0)), "none-layer2-tuned")
    assert row["answer"]["half its entropy"] == "not comparable", "the entropy of noise is no information"
    (row,) = siftfunnel(table(base, cell("siftfunnel-12", accuracy=0.8), weak), "none-layer2-tuned")
    assert row["answer"]["all"] == "no"


def test_a_part_of_patrol_protects_if_it_leaks_more_without_it():
    cells = table(
        *(cell("none-a", macs=5, ssim=0.9), cell("none-b", ssim=0.8), cell("patrol-1", macs=5, ssim=0.4)),
        *(cell("patrol-no-adversary", ssim=0.7, macs=5), cell("patrol-no-pruning", ssim=0.3)),
    )
    found = patrol(cells, "none-a", "none-b")
    assert {name: one["leaks more without it"] for name, one in found["parts"].items()} == {
        "adversary": "yes",
        "pruning": "no",
    }
    assert found["each part protects"] == "no"
    assert found["cells"]["patrol-1"]["answer"] == "yes"
    assert (
        patrol({**cells, "patrol-1": cell("patrol-1", macs=6, ssim=0.4)}, "none-a", "none-b")["cells"]["patrol-1"][
            "answer"
        ]
        == "no"
    ), "it costs more than the shallower cut"


def test_the_published_curve_has_its_own_shape():
    assert rises_first([(0.933, 0.025), (0.907, 0.129), (0.764, 0.313)]) == "yes"
    assert rises_first([(0.933, 0.0), (0.9, 0.05), (0.7, 0.3)]) == "no"


def test_the_document_says_in_short_what_was_answered():
    rows = {
        cells[1].strip(): [one.strip() for one in cells[2:6]]
        for line in (ROOT / "docs/measured-defenses.md").read_text(encoding="utf-8").splitlines()
        if len(cells := line.split("|")) == 7
    }
    short = json.loads((ROOT / "benchmarks/results/claims-laptop.json").read_text(encoding="utf-8"))["in short"]
    columns = {"CIFAR-10": 0, "vehicles": 2, "streets": 3}
    for start, claim in (
        ("PATROL", "PATROL"),
        ("Each part of PATROL", "parts of PATROL"),
        ("SiftFunnel:", "SiftFunnel"),
    ):
        (told,) = (row for name, row in rows.items() if name.startswith(start))
        for name, place in columns.items():
            assert told[place].partition(",")[0] in (short[claim][name], ""), (claim, name)
