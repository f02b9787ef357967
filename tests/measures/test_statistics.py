from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

import oracles
from louver.errors import AttackError, ConfigError, DataError
from louver.measures import row, summarize
from louver.measures.statistics import Summary
from louver.types import Finding, Row

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("leaks_when", ["high", "low"])
@pytest.mark.parametrize("n", [7, 40, 41, 300])
def test_equals_one_resample_at_a_time(leaks_when: str, n: int):
    values, floor = RNG.gamma(2.0, size=n), RNG.gamma(2.0, size=n)
    found = summarize(values, floor, leaks_when, seed=1, resamples=6000)
    means, worsts = oracles.bootstrap(values, leaks_when, seed=2, resamples=6000)
    # Different draws: percentiles agree up to a simulation error, here 5 % of the spread.
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.12 * means.std())
    assert found.worst == pytest.approx(oracles.worst(values, leaks_when))
    low, high = np.percentile(worsts, [2.5, 97.5])
    assert (found.worst_low, found.worst_high) == pytest.approx((low, high), abs=0.25 * worsts.std())
    assert found.floor == pytest.approx(floor.mean())
    assert found.floor_worst == pytest.approx(oracles.worst(floor, leaks_when))


@pytest.mark.parametrize("n", [7, 21, 100])
def test_worst_of_each_resample_is_exact(n: int, monkeypatch: pytest.MonkeyPatch):
    # The same draws, sorted and averaged the slow way; few positions are kept ahead, so the fallback runs as well.
    from louver.measures import statistics

    values = np.sort(RNG.normal(size=n))[::-1].copy()
    n_worst = int(np.ceil(0.05 * n))
    results = statistics._resample(values[None], n_worst, seed=5, resamples=200)
    rng = np.random.default_rng(5)
    draws = [values[rng.integers(0, n, n)] for _ in range(200)]
    np.testing.assert_allclose(results[0], [draw.mean() for draw in draws])
    np.testing.assert_allclose(results[1], [oracles.worst(draw, "high") for draw in draws])


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    n_trials, n_images = 300, 80
    hits = 0
    for trial in range(n_trials):
        values = rng.exponential(size=n_images)
        found = summarize(values, np.zeros(n_images), "high", seed=trial, resamples=400)
        hits += found.low <= 1.0 <= found.high
    assert binomtest(hits, n_trials, 0.93).pvalue > 0.001  # percentile intervals of skewed data come a little short
    assert hits / n_trials > 0.88


def test_chance_seldom_beats_the_floor():
    rng = np.random.default_rng(4)
    wins = 0
    for trial in range(400):
        floor = rng.normal(size=40)
        wins += summarize(floor + rng.normal(size=40), floor, "high", seed=trial, resamples=300).beats_floor
    assert 1 <= wins <= 30  # 2.5 % of 400 is 10, and intervals of 40 images are a little narrow


def test_pairing_sees_what_the_separate_intervals_hide():
    floor = RNG.normal(0.0, 1.0, size=60)
    values = floor + 0.05 + 0.01 * RNG.normal(size=60)
    found = summarize(values, floor, "high", seed=0)
    assert found.beats_floor
    assert found.low < found.floor_high
    assert not summarize(values, floor, "low", seed=0).beats_floor


def test_mistake_the_worst_is_what_leaks_most_not_the_largest_number():
    values = np.linspace(0.0, 1.0, 100)
    assert summarize(values, values, "high", seed=0).worst == pytest.approx(values[-5:].mean())
    assert summarize(values, values, "low", seed=0).worst == pytest.approx(values[:5].mean())


def test_mistake_few_images_without_an_interval():
    with pytest.raises(DataError, match="at least 2 images"):
        summarize(np.ones(1), np.zeros(1), "high", seed=0)
    # Five images above the floor are still chance once in 32 times.
    assert not summarize(np.full(5, 0.9), np.full(5, 0.1), "high", seed=0).beats_floor
    assert summarize(np.full(7, 0.9), np.full(7, 0.1), "high", seed=0).beats_floor


def test_no_hit_among_twenty_images_is_not_never():
    none = summarize(np.zeros(20), np.zeros(20), "high", seed=0)
    assert none.mean == none.low == 0.0
    expected = binomtest(0, 20).proportion_ci(method="wilson").high
    assert none.high == none.floor_high == pytest.approx(expected)
    assert none.worst == 0.0
    assert none.worst_high == 1.0  # one hit more would fill the worst 5 %, a single image
    some = summarize(np.r_[np.ones(6), np.zeros(34)], np.zeros(40), "high", seed=0)
    expected_some = binomtest(6, 40).proportion_ci(method="wilson")
    assert (some.low, some.high) == pytest.approx((expected_some.low, expected_some.high))
    assert some.beats_floor
    assert some.worst == 1.0


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 100.0])
@pytest.mark.parametrize("leaks_when", ["high", "low"])
def test_equal_values_have_no_width_and_beat_nothing(value: float, leaks_when: str):
    values = np.full(23, value)
    found = summarize(values, np.full(23, value), leaks_when, seed=0)
    assert not found.beats_floor
    assert found.low <= found.mean <= found.high
    if value != 0.0:
        assert found.high - found.low < 1e-12
        assert found.worst_high - found.worst_low < 1e-12


def test_same_seed_same_figures_and_other_seed_other_figures():
    values, floor = RNG.random(50), RNG.random(50)
    first = summarize(values, floor, "high", seed=7)
    assert first == summarize(values, floor, "high", seed=7)
    assert first.low != summarize(values, floor, "high", seed=8).low
    before = values.copy()
    summarize(values, floor, "low", seed=7)
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["attack", "floor"])
def test_a_broken_attack_is_an_error(bad: float, where: str):
    values, floor = RNG.random(9), RNG.random(9)
    (values if where == "attack" else floor)[3] = bad
    with pytest.raises(AttackError, match=f"1 of 9 values of the {where} .* broken attack"):
        summarize(values, floor, "high", seed=0)


def test_wrong_arguments_are_refused():
    with pytest.raises(DataError, match="same images"):
        summarize(np.ones(9), np.ones(8), "high", seed=0)
    with pytest.raises(DataError, match="one value"):
        summarize(np.ones((9, 2)), np.ones((9, 2)), "high", seed=0)
    with pytest.raises(ConfigError, match="level"):
        summarize(np.ones(9), np.ones(9), "high", seed=0, level=95.0)
    with pytest.raises(ConfigError, match="resamples"):
        summarize(np.ones(9), np.ones(9), "high", seed=0, resamples=10)


def test_row_is_the_finding_in_figures():
    values, floor = RNG.random(30) + 0.5, RNG.random(30)
    finding = Finding(
        cut="layer1",
        attack="decoder",
        measure="ssim",
        unit="",
        leaks_when="high",
        per_image=values,
        floor=floor,
        threat="full access",
        defense="none",
        seed=11,
        seconds=2.5,
    )
    made = row(finding)
    summary = summarize(values, floor, "high", seed=11)
    assert isinstance(made, Row)
    assert {field.name for field in dataclasses.fields(Summary)} <= {field.name for field in dataclasses.fields(Row)}
    assert all(getattr(made, field.name) == getattr(summary, field.name) for field in dataclasses.fields(Summary))
    assert (made.cut, made.attack, made.measure, made.seconds) == ("layer1", "decoder", "ssim", 2.5)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=60),
    shift=st.floats(-10, 10),
    seed=st.integers(0, 1000),
)
def test_properties(values: list[float], shift: float, seed: int):
    array = np.array(values)
    high = summarize(array, array - shift, "high", seed=seed, resamples=200)
    low = summarize(-array, -(array - shift), "low", seed=seed, resamples=200)
    for found in (high, low):
        assert found.low <= found.mean <= found.high
        assert found.worst_low <= found.worst <= found.worst_high
        assert found.floor_low <= found.floor <= found.floor_high
    assert high.worst >= high.mean - 1e-9
    assert low.worst <= low.mean + 1e-9
    # Turning both the sign and the direction changes nothing.
    assert high.beats_floor == low.beats_floor
    assert high.worst == pytest.approx(-low.worst, abs=1e-9)


def test_ten_thousand_images_fit_in_little_memory():
    import tracemalloc

    values, floor = RNG.random(10_000), RNG.random(10_000)
    tracemalloc.start()
    summarize(values, floor, "high", seed=0, resamples=300)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 * 2**20
