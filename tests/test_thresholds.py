from __future__ import annotations

import dataclasses
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from louver.errors import AttackError, ConfigError
from louver.measures import MEASURES
from louver.thresholds import Rule, judge, parse_fail_above, parse_rule
from louver.types import Row


def make_row(
    mean: float,
    *,
    measure: str = "ssim",
    cut: str = "layer2",
    attack: str = "decoder",
    half: float = 0.02,
    worst: float | None = None,
    beats_floor: bool = True,
    floor: float = 0.11,
) -> Row:
    worst = mean if worst is None else worst
    return Row(
        cut=cut,
        attack=attack,
        measure=measure,
        unit=MEASURES[measure].unit,
        leaks_when=MEASURES[measure].leaks_when,
        n_images=256,
        mean=mean,
        low=mean - half,
        high=mean + half,
        worst=worst,
        worst_low=worst - half,
        worst_high=worst + half,
        floor=floor,
        floor_low=floor,
        floor_high=floor,
        floor_worst=floor,
        beats_floor=beats_floor,
        seconds=1.0,
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ssim<=0.3", Rule(measure="ssim", limit=0.3)),
        ("  ssim  <=  .3 ", Rule(measure="ssim", limit=0.3)),
        ("mean(ssim)<=0.3", Rule(measure="ssim", limit=0.3)),
        ("worst5(ssim)<=0.5", Rule(measure="ssim", limit=0.5, statistic="worst5")),
        ("decoder.ssim<=0.3", Rule(measure="ssim", limit=0.3, attack="decoder")),
        ("worst5( decoder.ssim ) <= 5e-1", Rule(measure="ssim", limit=0.5, statistic="worst5", attack="decoder")),
        ("ssim@layer3<=0.3", Rule(measure="ssim", limit=0.3, cut="layer3")),
        (
            "known-edge.psnr @ features.3.relu <= 15",
            Rule(measure="psnr", limit=15.0, attack="known-edge", cut="features.3.relu"),
        ),
        (
            "worst5(likelihood.mse)@layer1.0>=0.02",
            Rule(measure="mse", limit=0.02, statistic="worst5", attack="likelihood", cut="layer1.0"),
        ),
        ("reidentified<=0.05", Rule(measure="reidentified", limit=0.05)),
    ],
)
def test_rules_are_read(text: str, expected: Rule):
    assert parse_rule(text) == expected
    assert parse_rule(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ssim",
        "ssim<0.3",
        "ssim==0.3",
        "ssim=0.3",
        "ssim<=",
        "<=0.3",
        "ssim<=0.3<=0.4",
        "0.1<=ssim<=0.3",
        "ssim<=0.3 at layer3",
        "ssim<=30%",
        "ssim<=x",
        "worst5 ssim<=0.3",
        "worst5(ssim<=0.3",
        "ssim@<=0.3",
        ".ssim<=0.3",
        "a.b.ssim<=0.3",
        "ssim<=0.3\nmse",
        "ssim <= 1e",
    ],
)
def test_what_cannot_be_read_shows_the_grammar(text: str):
    with pytest.raises(ConfigError, match=r"\[ATTACK\.\]MEASURE\[@CUT\]<=VALUE"):
        parse_rule(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ssim>=0.3", "write ssim<=0.3"),
        ("worst5(decoder.psnr)@a.b>=15", re.escape("write worst5(decoder.psnr)@a.b<=15")),
        ("mse<=0.02", "leaks when low.*write mse>=0.02"),
        ("sim<=0.3", "nearest: ssim"),
        ("worst1(ssim)<=0.3", "legal: mean, worst5"),
        ("ssim<=nan", "finite"),
        ("ssim<=inf", "finite"),
        ("mse>=-inf", "finite"),
        # Limits that nothing could break: a slip of the unit must not pass everything.
        ("ssim<=1", "nothing could break it"),
        ("ssim<=30", "nothing could break it"),
        ("reidentified<=5", "nothing could break it"),
        ("psnr<=100", "nothing could break it"),
        ("mse>=0", "nothing could break it"),
        ("lpips>=-1", "nothing could break it"),
    ],
)
def test_rules_that_would_fail_open_are_refused(text: str, says: str):
    with pytest.raises(ConfigError, match=says):
        parse_rule(text)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("ssim=0.3", "ssim<=0.3"),
        ("psnr = 15", "psnr<=15"),
        ("mse=0.02", "mse>=0.02"),
        ("worst5(lpips)=0.2", "worst5(lpips)>=0.2"),
        ("decoder.ssim@layer3=0.3", "decoder.ssim@layer3<=0.3"),
    ],
)
def test_fail_above_points_away_from_leakage(text: str, rule: str):
    assert str(parse_fail_above(text)) == rule


@pytest.mark.parametrize("text", ["ssim", "ssim<=0.3", "ssim=nan", "ssim=1", "zzz=1", "ssim=="])
def test_fail_above_refuses(text: str):
    with pytest.raises(ConfigError):
        parse_fail_above(text)


@given(name=st.sampled_from(sorted(MEASURES)), limit=st.floats(-1e4, 1e4), worst=st.booleans())
def test_text_of_a_rule_reads_back(name: str, limit: float, worst: bool):
    least, greatest = MEASURES[name].bounds
    try:
        rule = Rule(measure=name, limit=limit, statistic="worst5" if worst else "mean", cut="a.b-c", attack="x_1")
    except ConfigError:
        assert limit >= greatest if MEASURES[name].leaks_when == "high" else limit <= least
        return
    again = parse_rule(str(rule))
    assert math.isclose(again.limit, limit, rel_tol=1e-11)
    assert dataclasses.replace(again, limit=limit) == rule


@pytest.mark.parametrize(
    ("rule", "row", "status"),
    [
        ("ssim<=0.3", make_row(0.25), "holds"),
        ("ssim<=0.75", make_row(0.5, half=0.25), "holds"),  # the interval ends on the limit
        ("ssim<=0.3", make_row(0.29), "not shown"),
        ("ssim<=0.3", make_row(0.31), "broken"),
        ("ssim<=0.3", make_row(0.2, worst=0.9), "holds"),
        ("worst5(ssim)<=0.3", make_row(0.2, worst=0.9), "broken"),
        ("worst5(ssim)<=0.3", make_row(0.2, worst=0.29), "not shown"),
        ("worst5(ssim)<=0.3", make_row(0.9, worst=0.2), "holds"),
        ("mse>=0.02", make_row(0.05, measure="mse"), "holds"),
        ("mse>=0.02", make_row(0.03, measure="mse"), "not shown"),
        ("mse>=0.02", make_row(0.01, measure="mse"), "broken"),
        ("psnr<=15", make_row(14.0, measure="psnr"), "holds"),
        ("psnr<=15", make_row(16.0, measure="psnr"), "broken"),
    ],
)
def test_a_rule_holds_only_if_the_whole_interval_does(rule: str, row: Row, status: str):
    verdict = judge([parse_rule(rule)], [row])
    assert [check.status for check in verdict.checks] == [status]
    assert verdict.passed == (status == "holds")
    assert verdict.headline.startswith({"holds": "Passed", "broken": "Not passed", "not shown": "Not shown"}[status])
    assert verdict.warnings == ()


def test_the_worst_of_few_images_is_never_shown_to_be_harmless():
    rule = parse_rule("worst5(ssim)<=0.3")
    few, enough = (dataclasses.replace(make_row(0.1, worst=0.1), n_images=n) for n in (199, 200))
    verdict = judge([rule], [few])
    assert verdict.checks[0].status == "not shown"
    assert "199 images are too few" in verdict.checks[0].reason
    assert not verdict.passed
    assert judge([rule], [enough]).passed
    assert judge([rule], [dataclasses.replace(few, worst=0.9, worst_high=0.95)]).checks[0].status == "broken"


def test_a_rule_stands_on_the_attack_that_it_speaks_of():
    rows = [
        make_row(0.2, attack="decoder", cut="layer1"),
        dataclasses.replace(make_row(0.1, attack="likelihood", cut="layer1"), beats_floor=False),
    ]
    verdict = judge([parse_rule("likelihood.ssim<=0.3")], rows)
    assert not verdict.passed
    assert any(warning.startswith("likelihood beats the know-nothing guess at no cut") for warning in verdict.warnings)
    assert judge([parse_rule("decoder.ssim<=0.3")], rows).passed
    assert judge([parse_rule("ssim<=0.3")], rows).passed


def test_one_bad_row_among_good_ones_decides():
    rows = [
        make_row(0.1, cut="layer3"),
        make_row(0.62, cut="layer1", attack="likelihood"),
        make_row(0.4, cut="layer1"),
        make_row(0.29, cut="layer2"),
    ]
    verdict = judge([parse_rule("ssim<=0.3")], rows)
    assert not verdict.passed
    assert verdict.headline == (
        "Not passed: ssim<=0.3 is broken; at layer1, likelihood reaches ssim 0.62 "
        "(95 % interval 0.6 to 0.64; know-nothing guess 0.11)."
    )
    assert judge([parse_rule("ssim@layer3<=0.3")], rows).passed
    assert judge([parse_rule("ssim@layer2<=0.3")], rows).checks[0].status == "not shown"
    # Broken outranks "not shown", even where the interval of another row reaches further.
    wide = make_row(0.295, cut="layer4", half=0.9)
    narrow = make_row(0.305, cut="layer1", half=0.001)
    assert judge([parse_rule("ssim<=0.3")], [wide, narrow]).checks[0].status == "broken"


def test_the_headline_names_the_worst_offender_in_units_of_its_limit():
    rows = [make_row(0.33), make_row(29.0, measure="psnr", half=0.5), make_row(0.03, measure="mse")]
    verdict = judge([parse_rule(text) for text in ("ssim<=0.3", "psnr<=15", "mse>=0.02")], rows)
    assert [check.status for check in verdict.checks] == ["broken", "broken", "not shown"]
    assert verdict.headline.startswith("Not passed: psnr<=15 is broken (2 of 3 thresholds); at layer2, decoder reaches")
    assert "psnr 29 dB (95 % interval 28.5 to 29.5; know-nothing guess 0.11)" in verdict.headline


def test_passing_names_the_closest_call():
    rows = [make_row(0.1, cut="layer3"), make_row(0.25, cut="layer2"), make_row(9.0, measure="psnr")]
    verdict = judge([parse_rule("ssim<=0.3"), parse_rule("psnr<=15")], rows)
    assert verdict.passed
    assert verdict.headline == (
        "Passed: all 2 thresholds hold; ssim<=0.3 in all 2 rows, the closest being: at layer2, decoder reaches "
        "ssim 0.25 (95 % interval 0.23 to 0.27; know-nothing guess 0.11)."
    )


@pytest.mark.parametrize("text", ["psnr<=15", "shadow.ssim<=0.3", "ssim@layer9<=0.3", "decoder.ssim@layer22<=0.3"])
def test_a_rule_that_speaks_of_nothing_is_an_error(text: str):
    with pytest.raises(ConfigError, match=r"speaks of nothing that was measured; .*ssim@layer2"):
        judge([parse_rule("ssim<=0.3"), parse_rule(text)], [make_row(0.1)])


def test_attacks_that_work_nowhere_do_not_pass():
    rows = [make_row(0.1, beats_floor=False), make_row(10.0, measure="psnr", beats_floor=False)]
    verdict = judge([parse_rule("ssim<=0.3")], rows)
    assert [check.status for check in verdict.checks] == ["holds"]
    assert not verdict.passed
    assert "not seen to work" in verdict.headline
    assert "not seen to work" in verdict.warnings[0]
    # Recognition alone is no sight of a working attack, one measure of pixels at one cut is.
    recognition = make_row(0.4, measure="reidentified", cut="conv1")
    assert not judge([parse_rule("ssim<=0.3")], [*rows, recognition]).passed
    assert judge([parse_rule("ssim<=0.3")], [*rows, make_row(0.1, measure="mse", cut="conv1")]).passed


def test_without_rules_nothing_is_judged_and_the_headline_says_so():
    rows = [make_row(0.2), make_row(0.91, cut="conv1"), make_row(30.0, measure="psnr", cut="layer3")]
    verdict = judge([], rows)
    assert verdict.passed
    assert verdict.checks == ()
    assert verdict.headline.startswith("No threshold was set")
    assert "at conv1, decoder reaches ssim 0.91" in verdict.headline
    assert any("nothing was judged" in warning for warning in verdict.warnings)
    low = judge([], [make_row(0.2, measure="mse"), make_row(0.01, measure="mse", cut="conv1")])
    assert "at conv1" in low.headline


@pytest.mark.parametrize("field", ["mean", "low", "high", "worst", "worst_low", "worst_high", "floor"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_figure_that_is_not_finite_is_no_verdict(field: str, bad: float):
    with pytest.raises(AttackError, match="not finite"):
        judge([parse_rule("ssim<=0.3")], [dataclasses.replace(make_row(0.1), **{field: bad})])


def test_no_rows_are_refused():
    with pytest.raises(ConfigError, match="no rows"):
        judge([], [])
