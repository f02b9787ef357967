"""Splits side by side: who is on the front, who beats the undefended split, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from louver import cli
from louver.comparison import EQUAL_COST, compare, load_facts, to_json
from louver.errors import ConfigError, DataError
from louver.ordering import ordered
from louver.storage import unit_folder
from louver.strips import pictures
from studies import N_IMAGES, bench, blurred, facts, scene, sweep, write


def both(leak: float) -> dict[str, float]:
    return {"decoder": leak, "likelihood": leak - 0.05}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return bench(tmp_path_factory.mktemp("bench"))


def pair(tmp_path, **changed):
    """An undefended split, and a defended one with facts changed."""
    write(tmp_path / "none", facts("none", "none", 0.9, both(0.8)))
    accuracy, leak = changed.pop("accuracy", 0.88), changed.pop("leak", 0.4)
    write(tmp_path / "other", facts("other", "noise", accuracy, both(leak), **changed))
    return tmp_path


# Facts


def test_facts_are_read_whole(tmp_path):
    hidden = {"privacy": 0.31, "low": 0.3, "high": 0.33, "chance": 0.4988, "top1": 0.1, "n": 400}
    completion = [{"count": 5, "accuracy": 0.6, "low": 0.5, "high": 0.7, "chance": 0.11, "n": 400, "seconds": 1.0}]
    made = facts("a", "hybrid", 0.9, both(0.5), knob="sigma", strength=2, rank_privacy=hidden, completion=completion)
    made["information"] |= {"difficulty": {"score": 0.7, "entropy": 0.4}, "bare": 3, "absent": None}
    found = load_facts(write(tmp_path / "a", made))
    assert (found.name, found.defense, found.strength, found.feature_shape) == ("a", "hybrid", 2, (32, 8, 8))
    assert found.utility["accuracy"].low == pytest.approx(0.88)
    assert [(leak.attack, leak.measure) for leak in found.leakage][:2] == [("decoder", "ssim"), ("decoder", "psnr")]
    assert found.information["difficulty"].mean == 0.7
    assert found.information["bare"].mean == 3
    assert "absent" not in found.information
    assert found.information["rank_privacy"].high == 0.33
    assert "0.499" in found.information["rank_privacy"].unit
    assert found.probes[0].chance == 0.21
    assert found.completion[0].count == 5


def broken_facts():
    def without(key):
        made = facts("a", "noise", 0.9, both(0.5))
        del made[key]
        return json.dumps(made)

    def leaking(**changed):
        made = facts("a", "noise", 0.9, both(0.5))
        made["leakage"][0] |= changed
        return json.dumps(made)

    return {
        "cut short": ('{"format": 1, "na', "damaged"),
        "no object": ("[1]", "damaged"),
        "no facts": ("{}", "'format'"),
        "another format": (json.dumps(facts("a", "noise", 0.9, both(0.5), format=2)), "expected format 1, got 2"),
        "no utility": (without("utility"), "expected the fact 'utility', got none"),
        "no cost": (without("edge_macs"), "edge_macs"),
        "not a number": (leaking(mean=float("nan")), "finite"),
        "text": (leaking(mean="high"), "damaged"),
        "outside its interval": (leaking(mean=0.9), "low <= mean <= high"),
        "no direction": (leaking(leaks_when="up"), "leaks_when"),
        "a leak without floor": (leaking(floor=None), "damaged"),
    }


@pytest.mark.parametrize("case", broken_facts())
def test_broken_facts_are_refused(tmp_path, case):
    text, told = broken_facts()[case]
    (tmp_path / "facts.json").write_text(text)
    with pytest.raises(DataError, match=told) as refused:
        load_facts(tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert "run the study again" in str(refused.value)


# What is compared


def test_folders_are_searched_two_levels_deep_and_none_is_read_twice(tmp_path):
    write(tmp_path / "a", facts("a", "none", 0.9, both(0.8)))
    write(tmp_path / "table" / "b", facts("b", "noise", 0.9, both(0.7)))
    write(tmp_path / "table" / "deep" / "c", facts("c", "noise", 0.9, both(0.6)))
    (tmp_path / "table" / "begun" / "units").mkdir(parents=True)
    found = compare([tmp_path / "a", tmp_path / "table", tmp_path / "table" / "b"])
    assert [one.label for one in found.entries] == ["a", "b", "c"]
    assert found.unfinished == (str(tmp_path / "table" / "begun"),)


def test_two_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for folder in ("x", "y"):
        write(tmp_path / folder, facts("same", "noise", 0.9, both(0.5)))
    labels = [one.label for one in compare([tmp_path]).entries]
    assert labels == [f"same ({tmp_path / 'x'})", f"same ({tmp_path / 'y'})"]


@pytest.mark.parametrize(
    ("changed", "kind", "told"),
    [
        ({"task": "Classification(column='body', n_classes=6)"}, DataError, "different tasks.*compare them apart"),
        ({"leakage": facts("x", "noise", 0.9, {"decoder": 0.4})["leakage"]}, DataError, "lacks the attack likelihood"),
        (
            {"leakage": facts("x", "noise", 0.9, both(0.4) | {"shadow": 0.3})["leakage"]},
            DataError,
            "none lacks the attack shadow",
        ),
        (
            {"leakage": [row | {"n_images": 8} for row in facts("x", "noise", 0.9, both(0.4))["leakage"]]},
            DataError,
            "equally many images",
        ),
        ({"utility": {"mAP": {"mean": 0.4, "low": 0.3, "high": 0.5}}}, ConfigError, "expected the utility 'accuracy'"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, changed, kind, told):
    with pytest.raises(kind, match=told):
        compare([pair(tmp_path, **changed)])


def test_other_test_images_are_refused(tmp_path):
    pair(tmp_path)
    other = scene(40)
    other[7, 1, 3, 4] ^= 1
    np.savez_compressed(tmp_path / "other" / "truth.npz", images=other, index=np.arange(40) * 3 + 5)
    with pytest.raises(DataError, match="different test images"):
        compare([tmp_path])
    # The same pictures from other places of the test role are other images too.
    np.savez_compressed(tmp_path / "other" / "truth.npz", images=scene(40), index=np.arange(40))
    with pytest.raises(DataError, match="different test images"):
        compare([tmp_path])
    (tmp_path / "other" / "truth.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"truth\.npz is missing or damaged"):
        compare([tmp_path])


def test_options_that_name_nothing_are_refused(table, tmp_path):
    for knobs, told in (
        ({"utility": "acuracy"}, "nearest: accuracy"),
        ({"measure": "sim"}, "nearest: ssim"),
        ({"attack": "decodr"}, "nearest: decoder"),
    ):
        with pytest.raises(ConfigError, match=told):
            compare([table], **knobs)
    with pytest.raises(ConfigError, match="2 splits or more"):
        compare([table / "none-layer1"])
    with pytest.raises(ConfigError, match="up to two folders below"):
        compare([tmp_path])
    with pytest.raises(ConfigError, match="which is none"):
        compare([tmp_path / "nowhere"])


# Strongest attack, front, standing


def test_each_split_is_judged_by_its_own_strongest_attack(tmp_path):
    pair(tmp_path)
    write(tmp_path / "third", facts("third", "hybrid", 0.9, {"decoder": 0.3, "likelihood": 0.5}))
    judged = {one.label: (one.leak.attack, one.leak.mean) for one in compare([tmp_path]).entries}
    assert judged == {"none": ("decoder", 0.8), "other": ("decoder", 0.4), "third": ("likelihood", 0.5)}
    # Of an error the smallest leaks most.
    by_error = {one.label: one.leak.attack for one in compare([tmp_path], measure="mse").entries}
    assert by_error == {"none": "decoder", "other": "decoder", "third": "likelihood"}
    only = {one.leak.attack for one in compare([tmp_path], attack="likelihood").entries}
    assert only == {"likelihood"}


@pytest.mark.parametrize("measure", ["ssim", "mse"])
@pytest.mark.parametrize("seed", range(4))
def test_the_front_is_what_nothing_within_budget_beats(tmp_path, measure, seed):
    rng = np.random.default_rng(seed)
    made = []
    for number in range(14):
        defense = "none" if number in (0, 5) else "noise"
        # Coarse values, so that ties happen.
        accuracy, leak = int(rng.integers(10, 16)) / 20, int(rng.integers(3, 16)) / 20
        macs = int(rng.choice([10_000_000, 10_900_000, 20_000_000, 35_000_000]))
        made.append(facts(f"s{number}", defense, accuracy, both(leak), edge_macs=macs))
        write(tmp_path / f"s{number:02}", made[-1], has_units=False)
    found = compare([tmp_path], measure=measure)

    def shown(one):
        # The error was made as 0.1 (1 - SSIM): who leaks less by one leaks less by the other.
        return one["utility"]["accuracy"]["mean"], one["leakage"][0]["mean"], one["edge_macs"]

    undefended = sorted({one["edge_macs"] for one in made if one["defense"] == "none"})
    if len(undefended) == 2 and undefended[1] <= (1 + EQUAL_COST) * undefended[0]:
        undefended.pop()
    limits = [*(macs * (1 + EQUAL_COST) for macs in undefended), float("inf")]
    expected = set()
    for one in made:
        accuracy, leak, macs = shown(one)
        budget = min(limit for limit in limits if macs <= limit)
        rivals = [shown(other) for other in made if other["edge_macs"] <= budget]
        beaten = any(a >= accuracy and b <= leak and (a, b) != (accuracy, leak) for a, b, _ in rivals)
        if not beaten:
            expected.add(one["name"])
    assert {one.label for one in found.entries if one.is_on_front} == expected
    for front in found.fronts:
        amounts = [found.entry(label).leak.amount for label in front.labels]
        assert amounts == sorted(amounts)
        gained = [found.entry(label).utility.mean for label in front.labels]
        assert gained == sorted(gained)


@pytest.mark.parametrize(
    ("accuracy", "leak", "macs", "result"),
    [
        (0.87, 0.4, 10_000_000, "gain"),
        (0.97, 0.4, 10_000_000, "gain"),
        (0.8, 0.4, 10_000_000, "price"),
        (0.9, 0.77, 10_000_000, "not told apart"),
        (0.8, 0.83, 10_000_000, "not told apart"),
        (0.95, 0.9, 10_000_000, "loss"),
        (0.87, 0.4, 11_000_000, "gain"),
        (0.87, 0.4, 11_000_001, "no equal"),
        (0.87, 0.4, 5_000_000, "no equal"),
    ],
)
@pytest.mark.parametrize("measure", ["ssim", "mse"])
def test_a_defense_stands_against_the_undefended_split_of_equal_cost(tmp_path, accuracy, leak, macs, result, measure):
    found = compare([pair(tmp_path, accuracy=accuracy, leak=leak, edge_macs=macs)], measure=measure)
    (standing,) = found.standings
    assert (standing.defense, standing.result) == ("noise", result)
    assert standing.overlaps == (("other",) if result == "not told apart" else ())
    other = found.entry("other")
    assert other.costs == pytest.approx(macs / 10_000_000)
    assert other.reference == (None if result == "no equal" else "none")


def test_of_a_sweep_the_best_strength_stands_for_the_defense(tmp_path):
    write(tmp_path / "none", facts("none", "none", 0.9, both(0.8)))
    sweep(tmp_path, "noise", "std", (0.5, 1, 2, 4), (0.9, 0.89, 0.88, 0.6), (0.79, 0.6, 0.5, 0.2))
    (standing,) = compare([tmp_path]).standings
    assert (standing.result, standing.best) == ("gain", "noise-2")
    assert standing.overlaps == ("noise-0.5",)
    assert standing.on_front == ("noise-0.5", "noise-1", "noise-2", "noise-4")


def test_the_undefended_split_beside_is_the_nearest_and_then_the_most_useful(tmp_path):
    pair(tmp_path, edge_macs=10_300_000)
    write(tmp_path / "near", facts("near", "none", 0.85, both(0.8), edge_macs=10_400_000))
    assert compare([tmp_path]).entry("other").reference == "near"
    write(tmp_path / "tuned", facts("tuned", "none", 0.87, both(0.8), edge_macs=10_400_000))
    assert compare([tmp_path]).entry("other").reference == "tuned"
    write(tmp_path / "seeded", facts("seeded", "none", 0.99, both(0.8), edge_macs=10_400_000, seed=1))
    assert compare([tmp_path]).entry("other").reference == "tuned"


@pytest.mark.parametrize("measure", ["ssim", "mse"])
def test_an_attack_below_its_floor_is_no_privacy(tmp_path, measure):
    """A broken attack at 0.02 must not beat a defense that leaks the floor's 0.12: anyone can send the mean picture."""
    pair(tmp_path, leak=0.13)
    write(tmp_path / "broken", facts("broken", "siftfunnel", 0.87, {"decoder": 0.02, "likelihood": 0.01}))
    found = compare([tmp_path], measure=measure)
    assert found.entry("broken").leak.mean == found.entry("broken").leak.floor
    assert found.entry("broken").leak.low == found.entry("broken").leak.high == found.entry("broken").leak.floor


def test_attacks_that_work_nowhere_are_no_evidence(tmp_path):
    write(tmp_path / "none", facts("none", "none", 0.9, {"decoder": 0.10}))
    write(tmp_path / "other", facts("other", "noise", 0.9, {"decoder": 0.04}))
    with pytest.raises(DataError, match=r"no attack beats its floor.*no evidence"):
        compare([tmp_path])


def test_without_an_undefended_split_nothing_is_claimed(tmp_path):
    sweep(tmp_path, "noise", "std", (1, 2), (0.9, 0.8), (0.6, 0.4))
    found = compare([tmp_path])
    assert [standing.result for standing in found.standings] == ["no equal"]
    assert [front.budget_macs for front in found.fronts] == [None]


# Curves


def test_curves_run_through_the_strengths_of_one_knob(table):
    curves = {(one.defense, one.variant): one for one in compare([table]).curves}
    assert curves["noise", ""].labels == ("noise-0.5", "noise-1", "noise-2")
    assert curves["siftfunnel", ""].labels == ("siftfunnel-3", "siftfunnel-6", "siftfunnel-12")
    assert curves["privynet", "random channels"].knob == "n_channels"
    assert ("adversarial", "") not in curves  # one strength is no sweep
    assert not any(defense == "none" for defense, _ in curves)


def test_a_knob_that_moves_the_cut_is_one_curve_and_two_cuts_are_two(tmp_path):
    write(tmp_path / "none", facts("none", "none", 0.9, both(0.8)))
    for m in (1, 2, 3):
        made = facts(f"m{m}", "privynet", 0.9, both(0.8 - 0.1 * m), knob="m", strength=m, cut=f"layer{m}")
        write(tmp_path / f"m{m}", made)
    assert [one.labels for one in compare([tmp_path]).curves] == [("m1", "m2", "m3")]
    for cut in ("a", "b"):
        for std in (2, 1):
            made = facts(f"{cut}{std}", "noise", 0.9, both(0.5), knob="std", strength=std, cut=cut)
            write(tmp_path / f"{cut}{std}", made)
    labels = [one.labels for one in compare([tmp_path]).curves if one.defense == "noise"]
    assert labels == [("a1", "a2"), ("b1", "b2")]


# Order by the criterion


def test_difficulty_is_correlated_with_what_leaked(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(9):
        made = facts(f"s{number}", "noise" if number else "none", 0.9, both(0.9 - 0.08 * number))
        made["information"]["entropy"]["mean"] = float(rng.uniform(100, 900))
        made["information"]["mine"] = {"mean": float(rng.uniform(1, 6)), "unit": "nats"}
        write(tmp_path / f"s{number}", made, has_units=False)
    found = ordered(compare([tmp_path]))

    def product(one):
        held = one.facts.information
        return held["mine"].mean * held["entropy"].mean * held["effective_volume"].mean

    expected = spearmanr([-product(one) for one in found.entries], [-one.leak.mean for one in found.entries])
    assert found.order.correlation == pytest.approx(expected.statistic)
    assert found.order.n_splits == 9
    assert 0.1 < found.order.correlation < 0.95
    # Of an error the sign turns, and the answer does not.
    assert ordered(compare([tmp_path], measure="mse")).order.correlation == pytest.approx(expected.statistic)


def test_features_that_are_never_0_are_counted_in_directions(tmp_path):
    for number in range(5):
        made = facts(f"s{number}", "noise" if number else "none", 0.9, both(0.9 - 0.1 * number))
        # Mutual information and entropy say nothing; volume is full, and only directions fall.
        made["information"]["mine"]["mean"] = made["information"]["mine"]["low"] = 4.0
        made["information"]["mine"]["high"] = 4.0
        made["information"]["entropy"]["mean"] = 500.0
        made["information"]["effective_volume"]["mean"] = 32 * 8 * 8
        write(tmp_path / f"s{number}", made, has_units=False)
    assert ordered(compare([tmp_path])).order.correlation == pytest.approx(1.0)


def test_a_score_that_facts_hold_is_taken(tmp_path):
    for number, score in enumerate((0.0, 3.0, 2.0, 1.0)):
        made = facts(f"s{number}", "noise", 0.9, both(0.9 - 0.1 * number))
        made["information"]["difficulty"] = score
        write(tmp_path / f"s{number}", made, has_units=False)
    found = ordered(compare([tmp_path]))
    assert found.order.correlation == pytest.approx(spearmanr([0, 3, 2, 1], [1, 2, 3, 4]).statistic)


def test_where_no_order_can_be_tested_it_says_why(tmp_path):
    pair(tmp_path)
    assert "4 splits or more" in ordered(compare([tmp_path])).order_note
    for number in range(3):
        made = facts(f"s{number}", "noise", 0.9, both(0.3 + 0.1 * number))
        del made["information"]["mine"]
        write(tmp_path / f"s{number}", made)
    found = ordered(compare([tmp_path]))
    assert found.order is None
    assert "s0 lacks mine" in found.order_note
    undefended = [tmp_path / f"s{number}" for number in range(3)]
    assert "no undefended" in ordered(compare(undefended)).order_note


# Pictures


def test_every_split_shows_the_same_images(table):
    found = compare([table])
    held = pictures(found)
    assert held.chosen_by == "none-layer1"
    assert [strip.label for strip in held.strips] == [one.label for one in found.entries]
    truth = scene(40)
    chosen = [(place - 5) // 3 for place in held.index]
    assert np.array_equal(held.truth, truth[chosen].transpose(0, 2, 3, 1))
    # From least to most leaked of the images that the entry's attack saw, whatever their places.
    scores = held.strips[0].scores
    assert list(scores) == sorted(scores)
    assert chosen != sorted(chosen)
    assert max(chosen) < N_IMAGES["decoder"]
    hybrid = next(strip for strip in held.strips if strip.label == "hybrid-2")
    expected = blurred(truth, round(40 * (1 - 0.22) ** 2))[chosen].transpose(0, 2, 3, 1)
    assert np.array_equal(hybrid.pictures, expected)


def test_images_are_those_that_every_chosen_attack_saw(table):
    held = pictures(compare([table], attack="likelihood"))
    assert max((place - 5) // 3 for place in held.index) < N_IMAGES["likelihood"]
    # Of an error the least is the most leaked.
    by_error = pictures(compare([table], measure="mse"))
    assert list(by_error.strips[0].scores) == sorted(by_error.strips[0].scores, reverse=True)


def test_a_split_whose_attack_saw_fewer_images_limits_the_choice(tmp_path):
    pair(tmp_path)
    write(tmp_path / "third", facts("third", "hybrid", 0.9, {"decoder": 0.3, "likelihood": 0.5}))
    held = pictures(compare([tmp_path]))
    assert max((place - 5) // 3 for place in held.index) < N_IMAGES["likelihood"] < N_IMAGES["decoder"]


def test_pictures_lie_where_a_run_keeps_them(tmp_path):
    pair(tmp_path, cut="features/3 relu")
    found = compare([tmp_path])
    assert len(pictures(found).strips) == 2
    (unit_folder(tmp_path / "other", "features/3 relu", "decoder") / "pictures.npz").unlink()
    with pytest.raises(DataError, match=r"pictures\.npz is missing or damaged.*run the study again"):
        pictures(found)


# As a whole


def test_the_comparison_is_json(table):
    found = ordered(compare([table]))
    told = json.loads(json.dumps(to_json(found), allow_nan=False))
    assert told["entries"][3]["leak"]["mean"] == found.entries[3].leak.mean
    assert told["fronts"][0]["labels"] == list(found.fronts[0].labels)
    assert replace(found, order=None).order is None


def test_neither_comparison_nor_page_needs_torch():
    code = (
        "import sys, louver.comparison, louver.strips, louver.report.comparison; "
        "assert not {'torch', 'safetensors', 'pydantic'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def louver(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["louver", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def test_the_command_prints_a_table_and_writes_a_page(table, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert louver(monkeypatch, "compare", str(table)) == 0
    out = capsys.readouterr().out
    assert "accuracy against ssim of strongest" in out
    assert "11 of 13" in out
    assert out.splitlines()[-1] == "page: comparison.html"
    assert "data:image/png" in Path("comparison.html").read_text()
    options = ("--json", "--leakage", "psnr", "--attack", "decoder", "--utility", "accuracy", "--out", "sub/page.html")
    assert louver(monkeypatch, "compare", str(table), *options) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["measure"], told["attack"]) == ("psnr", "decoder")
    assert Path("sub/page.html").exists()
    assert louver(monkeypatch, "compare", str(tmp_path / "none")) == 2
    assert "expected a folder of studied splits" in capsys.readouterr().err
