from __future__ import annotations

import math

import pytest

from louver.report import words
from louver.types import GRANTS, Check, Threat, Verdict


def checks(*statuses):
    return tuple(Check(rule="ssim<=0.3", status=status, reason="") for status in statuses)


@pytest.mark.parametrize(
    ("passed", "statuses", "expected"),
    [
        (True, ("holds", "holds"), "passed"),
        (True, (), "nothing judged"),
        (False, (), "nothing judged"),
        (False, ("holds", "not shown"), "not shown"),
        (False, ("not shown", "broken"), "broken"),
        # All thresholds hold, but no attack was seen to work anywhere.
        (False, ("holds",), "not shown"),
        # A verdict that contradicts its checks is not believed.
        (True, ("holds", "broken"), "broken"),
        (True, ("not shown",), "not shown"),
    ],
)
def test_the_verdict_is_never_kinder_than_its_checks(passed, statuses, expected):
    assert words.status_of(Verdict(passed=passed, headline="", checks=checks(*statuses))) == expected


@pytest.mark.parametrize(
    ("measure", "unit", "value", "expected"),
    [
        ("psnr", "dB", 19.449, "19.4"),
        ("psnr", "dB", math.inf, "∞"),
        ("psnr", "dB", math.nan, "undefined"),
        ("ssim", "", 0.81249, "0.812"),
        ("ssim", "", -0.0001, "0.000"),
        ("ssim", "", -0.2, "−0.200"),
        ("recognized", "share", 0.9263, "92.6\u202f%"),
        ("reidentified", "", 0.001, "0.1\u202f%"),
        ("own", "rate", 0.5, "50.0\u202f%"),
        ("mse", "", 0.0612345, "0.0612"),
        ("mse", "", 0.00000612, "6.12×10^−6"),
        ("mse", "", 0.0, "0"),
        ("own", "m", 12345.6, "12,346"),
    ],
)
def test_values_have_the_digits_of_their_measure(measure, unit, value, expected):
    assert words.value_in_words(measure, unit, value) == expected


@pytest.mark.parametrize(
    ("function", "value", "expected"),
    [
        (words.count_in_words, 0, "0"),
        (words.count_in_words, 999, "999"),
        (words.count_in_words, 999_900, "1.00 M"),
        (words.count_in_words, 40_560_000, "40.6 M"),
        (words.bytes_in_words, 512, "512 B"),
        (words.bytes_in_words, 3072, "3.00 KiB"),
        (words.bytes_in_words, 5 * 1024**3, "5.00 GiB"),
        (words.seconds_in_words, 0.04, "0.0 s"),
        (words.seconds_in_words, 9.96, "10 s"),
        (words.seconds_in_words, 59.7, "1 min 0 s"),
        (words.seconds_in_words, 3599.9, "1 h 0 min"),
        (words.seconds_in_words, 7260, "2 h 1 min"),
        (lambda v: words.utility_in_words("accuracy", v), 0.9263, "92.6\u202f%"),
        (lambda v: words.utility_in_words("images", v), 10_000.0, "10,000"),
        (lambda v: words.utility_in_words("loss", v), 0.25, "0.2500"),
    ],
)
def test_quantities_in_words(function, value, expected):
    assert function(value) == expected


def test_every_grant_is_either_told_or_withheld():
    for grant in GRANTS:
        with_it = Threat(grants=frozenset({grant}), knows_defense=False)
        without = Threat(grants=frozenset(), knows_defense=False)
        assert len(words.threat_grants(with_it)) == len(words.threat_grants(without)) + 1, grant
        assert len(words.threat_withholds(with_it)) < len(words.threat_withholds(without)), grant


def test_budgets_are_told_as_numbers():
    told = str(words.threat_grants(Threat(query_budget=12_345, n_auxiliary=6_789)))
    assert "at most 12,345" in told
    assert "at most 6,789" in told
    assert "at most" not in str(words.threat_grants(Threat()))


def test_whoever_holds_the_edge_is_not_said_to_lack_queries():
    assert "Running the edge half" not in str(words.threat_withholds(Threat(grants=frozenset({"edge"}))))


def test_every_measure_of_the_library_is_explained():
    measures = pytest.importorskip("louver.measures", reason="measures need the lab extra")
    for name in measures.MEASURES:
        assert "no description" not in words.measure_words(name).sentence, name
    assert "no description" in words.measure_words("a measure of the user's").sentence


def test_measures_are_sorted_by_what_they_tell():
    assert words.by_importance(["mse", "own", "psnr", "ssim", "psnr"]) == ["ssim", "psnr", "mse", "own"]


def test_limits_name_the_attacks_and_the_bar_only_where_ssim_was_measured(make_audit):
    told = str(words.limits(make_audit()))
    assert "Decoder, Likelihood, Shadow" in told
    assert "SSIM below 0.3" in told
    assert "SSIM below 0.3" not in str(words.limits(make_audit(n_measures=1)))
