"""A hardened split from a file to its facts, as `louver harden` makes them."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import tomli_w
import torch

from louver.attacks import Decoder
from louver.audit import Settings
from louver.bench import _run_together, run_bench
from louver.cli import main
from louver.config import read_experiment
from louver.cut import split
from louver.data import data_root, streets
from louver.defenses import Hybrid, NoDefense
from louver.errors import ConfigError, LouverError
from louver.experiment import run_experiment
from louver.facts import load_facts
from louver.hardening import Origin, load_split
from louver.models import load_model
from louver.study import Judging, _better, _rebuilt, _set_apart, study, utility
from louver.tables import BENCHES, Cell
from louver.tasks import Attributes, Classification, ReIdentification
from louver.training import Training
from louver.types import Images, Roles
from toys import Wide, pictures, view_of

ROOT = Path(__file__).parents[1]
ROLES = ("train", "validation", "test")
SMALL = {
    "data": {
        "train": "streets/1[:800]",
        "validation": "streets/2[:64]",
        "test": "streets/3[:64]",
        "auxiliary": "streets/4[:100]",
    },
    "attacks": {"decoder": {"width": 64, "blocks": 1, "epochs": 2, "restarts": 1, "test_images": 32}},
}


def example(**sections):
    """The example file, small enough for a test."""
    table = tomllib.loads((ROOT / "examples/streets-siftfunnel.toml").read_text())
    table |= SMALL | {"thresholds": []} | sections
    table["audit"] = table["audit"] | {"test_images": 40}
    for section in ("training", "hardening"):
        if table.get(section):
            table[section] = table[section] | {"epochs": 2, "batch_size": 32}
    return {name: value for name, value in table.items() if value is not None}


def written(path, table):
    path.write_text(tomli_w.dumps(table))
    return path


@pytest.fixture
def short_critics(monkeypatch):
    """Critics of mutual information take a third of a study's time, and are tested where they are."""
    monkeypatch.setattr("louver.experiment.Judging", partial(Judging, mine_steps=40))


@pytest.mark.usefixtures("short_critics")
def test_the_example_runs_whole(tmp_path):
    experiment = read_experiment(written(tmp_path / "run.toml", example()))
    told = []
    audit = run_experiment(
        experiment, tmp_path / "run", progress=lambda *a: told.append(a), log=lambda epoch, f: told.append((epoch, f))
    )
    facts = json.loads((tmp_path / "run/facts.json").read_text())
    assert audit.cuts[0].feature_shape == (8, 16, 16) == tuple(facts["feature_shape"])
    assert {row.defense for row in audit.findings} == {"siftfunnel"}
    assert facts["task_title"] == "re-identification by 'identity'"
    assert set(facts["utility"]) == {"mAP", "rank1", "rank5"}
    for figure in (*facts["utility"].values(), *facts["leakage"]):
        assert figure["low"] <= figure["mean"] <= figure["high"]
    assert {(row["column"], row["on"].split()[0]) for row in facts["probes"]} == {
        (column, on) for column in ("place", "pedestrian") for on in ("features", "reconstructions")
    }
    assert all(0 <= row["chance"] <= 1 and row["low"] <= row["accuracy"] <= row["high"] for row in facts["probes"])
    assert all(math.isfinite(entry["mean"]) for entry in facts["information"].values())
    assert {"mine", "entropy", "effective_volume", "distance_correlation"} <= set(facts["information"])
    fractions = [entry[1] for entry in told if isinstance(entry[0], str)]
    assert fractions == sorted(fractions)
    metrics = [entry[1] for entry in told if isinstance(entry[0], int)]
    assert {"task", "distance correlation", "channel correlation", "sparsity"} <= set(metrics[0])
    hard = load_split(tmp_path / "run")
    assert hard.cut.feature_shape == (8, 16, 16)
    # Again in the same folder: nothing is trained or attacked again, and the facts are the same.
    told.clear()
    run_experiment(experiment, tmp_path / "run", log=lambda epoch, f: told.append((epoch, f)))
    again = json.loads((tmp_path / "run/facts.json").read_text())
    assert told == []
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in facts.items() if k != "seconds"}


@pytest.mark.usefixtures("short_critics")
def test_hardening_may_start_from_nothing_and_its_metrics_are_kept(tmp_path, monkeypatch, capsys):
    table = example(
        training=None, task=None, probes=None, defense={"kind": "hybrid", "components": 6, "noise_scale": "relative"}
    )
    table["data"] = table["data"] | {"label": "body"}
    table["model"] = {"name": "street_net"}
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "run.toml", table)
    monkeypatch.setattr("sys.argv", ["louver", "harden", "run.toml", "--json", "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, 1)
    assert json.loads(capsys.readouterr().out)["name"] == "streets-siftfunnel"
    folder = tmp_path / "runs/streets-siftfunnel"
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["rank_privacy"]["chance"] == pytest.approx(39 / 80)
    assert 0 <= facts["rank_privacy"]["low"] <= facts["rank_privacy"]["privacy"] <= facts["rank_privacy"]["high"] <= 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert (folder / "report.html").is_file()


def killed_at(file, folder, condition, *options, log):
    """Runs `louver harden` in a process of its own until there is what `condition` waits for, then kills it."""
    command = [sys.executable, "-m", "louver", "harden", str(file), "--out", str(folder), "--device", "cpu", *options]
    # Equal bits need equal numbers of threads.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        process = subprocess.Popen([*command, "--threads", "1"], stdout=output, stderr=output, env=environment)
    try:
        ends = time.monotonic() + 120
        while not condition(folder):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < ends, log.read_text()
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL


def test_a_process_killed_amid_an_epoch_goes_on_to_the_same_weights(tmp_path):
    table = example(training=None, task=None, probes=None, defense={"kind": "siftfunnel", "channels": 5})
    table["data"] = table["data"] | {"label": "body"}
    table["model"] = {"name": "street_net"}
    table["data"]["train"] = "streets/1[:320]"
    table["hardening"] = table["hardening"] | {"epochs": 3}
    file, log = written(tmp_path / "run.toml", table), tmp_path / "log"

    def is_amid(folder):
        if not (folder / "training-1.safetensors").exists():
            return False
        time.sleep(0.1)  # into the second epoch, which takes half a second
        return True

    def is_hardened(folder):
        return (folder / "split.json").exists()

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed_at(file, killed, is_amid, log=log)
    with safetensors.safe_open(killed / "training-1.safetensors", framework="pt") as checkpoint:
        assert json.loads(checkpoint.metadata()["louver"])["epoch"] < 3
    assert not (killed / "split.json").exists()
    killed_at(file, killed, is_hardened, "--resume", log=log)
    killed_at(file, whole, is_hardened, log=log)
    epochs = [
        [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (killed, whole)
    ]
    # None was trained twice; the first may have been killed between its checkpoint and its line.
    assert epochs[0] in ([1, 2, 3], [2, 3])
    assert epochs[1] == [1, 2, 3]
    assert (killed / "split.safetensors").read_bytes() == (whole / "split.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"defense": {"kind": "prayer"}}, "unknown|expected a kind, got 'prayer'"),
        ({"defense": {"kind": "siftfunnel", "channel": 3}}, "unknown key 'channel'; nearest: channels"),
        ({"hardening": None}, r"\[defense\] and \[hardening\] together"),
        (
            {"audit": {"cuts": ["stage1", "stage2"], "measures": ["psnr", "ssim"]}},
            "one cut in audit.cuts to harden, got 2",
        ),
        (
            {"defense": {"kind": "siftfunnel"}, "audit": {"cuts": ["flatten"], "measures": ["psnr", "ssim"]}},
            "no channel dimension for a funnel",
        ),
        ({"defense": {"kind": "patrol", "target_macs": 5}}, "MAC"),
        ({"probes": {"completion": [5]}}, "model completion is of classifications, got ReIdentification"),
        ({"probes": {"reconstructions": True}}, "columns to probe reconstructions for, got none"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit_is_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        run_experiment(read_experiment(written(tmp_path / "run.toml", example(**change))), tmp_path / "run")
    assert not (tmp_path / "run/facts.json").exists()


def test_a_file_without_a_defense_cannot_be_hardened(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["louver", "harden", str(ROOT / "examples/cifar10-resnet20.toml")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "[defense]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "outputs"),
    [
        (Classification("body", 6), 6),
        (ReIdentification(), 16),
        (ReIdentification(distractor=0), 16),
        (Attributes(columns={"body": 6, "color": 8}), 14),
    ],
    ids=lambda value: type(value).__name__,
)
def test_utility_is_what_the_task_evaluates(task, outputs):
    images = streets(60, seed=9)
    images = replace(images, labels={**images.labels, "identity": images.column("identity") % 8})
    model = load_model("street_net", n_classes=outputs, image_shape=(3, 64, 64), seed=1)
    found, expected = utility(task, model, images, seed=0), task.evaluate(model, images)
    for name, figure in found.items():
        assert figure["mean"] == pytest.approx(expected[name])
        assert figure["low"] <= figure["mean"] <= figure["high"]
    assert set(found) == {name for name in expected if not name.startswith("n")}


def test_a_bench_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no bench 'cifar'; nearest: cifar10"):
        run_bench("cifar", scale="laptop", folder=tmp_path)
    with pytest.raises(ConfigError, match="no scale 'huge'"):
        run_bench("streets", scale="huge", folder=tmp_path)


def test_cells_run_in_processes_and_a_failing_one_stops_the_others(tmp_path, monkeypatch):
    program = tmp_path / "louver.sh"
    program.write_text(
        "#!/bin/sh\n"
        'echo "$@" threads=$OMP_NUM_THREADS\n'
        'case "$*" in *broken*) echo "expected more light"; exit 2;; *slow*) exec sleep 60;; esac\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr("louver.bench.sys.executable", str(program))
    told = []

    def run(*names):
        cells = [Cell(name=name, defense=NoDefense(), cut="c") for name in names]
        _run_together(cells, ["bench", "t"], tmp_path, "cpu", 2, lambda *what: told.append(what))

    run("first", "second", "third")
    assert {what for what, _ in told} == {"first: done", "second: done", "third: done"}
    assert told[-1][1] == 1.0
    said = (tmp_path / "second/bench.log").read_text()
    assert "-m louver bench t --only second --out" in said
    assert "threads=" in said
    with pytest.raises(LouverError, match=r"cell broken failed: .*expected more light"):
        run("slow", "broken")


@pytest.mark.parametrize("name", sorted(BENCHES))
@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_every_bench_names_each_cell_once_and_its_cells_can_be_cut(name, scale):
    root = data_root()
    if name != "streets" and (root is None or not (root / "cifar10.npz").is_file()):
        pytest.skip("needs the shared images")
    if scale == "paper" and name == "streets":
        pytest.skip("draws 20,000 pictures")
    bench = BENCHES[name](scale, 0)
    names = [cell.name for cell in bench.cells]
    assert len(set(names)) == len(names)
    assert {"NoDefense", "SiftFunnel"} <= {type(cell.defense).__name__ for cell in bench.cells}
    assert np.all([len(images) > 1 for images in (bench.roles.train, bench.roles.test, bench.roles.auxiliary)])


def test_identities_and_labels_that_some_images_lack_are_judged(tmp_path):
    """Log-rank privacy needs people who are known; explained variance needs components, -1 no label, 7 unseen."""
    rng = np.random.default_rng(0)
    people = rng.integers(0, 256, (28, 3, 16, 16))

    def album(count, seed, shown):
        draw = np.random.default_rng(seed)
        turn = np.arange(count)
        who = np.asarray(shown)[turn % len(shown)]
        pixels = (people[who] + draw.integers(-40, 40, (count, 3, 16, 16))).clip(0, 255).astype(np.uint8)
        labels = {"who": who, "place": np.where(turn % 5 == 0, -1, turn % 2), "kind": turn % 2}
        return Images(pixels=pixels, labels=labels, name=f"album {seed}")

    known, strangers = range(12), range(12, 28)
    test = album(40, 3, known)
    test.labels["place"][1:4] = 7  # where the attacker has never been
    roles = Roles(
        train=album(48, 1, known),
        validation=album(16, 2, known),
        test=test,
        auxiliary=album(96, 4, strangers),
    )
    model = load_model("street_net", n_classes=2, image_shape=(3, 16, 16), seed=0)
    example = torch.from_numpy(roles.test.floats(slice(0, 2)))
    defense = Hybrid(embedding="noisy", components=4, noise_std=0.5, noise_scale="relative")
    origin = Origin(model="street_net", n_classes=2, image_shape=(3, 16, 16), cut="stage2", defense=defense)
    judging = Judging(
        attacks={"decoder": Decoder(width=64, blocks=1, epochs=1, restarts=1)},
        settings=Settings(measures=("psnr",), test_images=40),
        private=("place",),
        identity="who",
        on_reconstructions=True,
        information_images=60,
        mine_steps=5,
    )
    facts = study(
        split(model, "stage2", example),
        origin,
        roles,
        Classification("kind", 2),
        judging,
        config=Training(epochs=2, batch_size=16),
        folder=tmp_path / "run",
        name="noisy",
    )
    assert 0 < facts["explained_variance"] <= 1
    hidden = facts["log_rank_privacy"]
    assert 0 <= hidden["low"] <= hidden["privacy"] <= hidden["high"] <= 1
    assert hidden["n"] == 40
    rows = {(row["column"], row["on"].split()[0], row["probe"]): row for row in facts["probes"]}
    assert {how for column, on, how in rows if (column, on) == ("who", "features")} == {
        "nearest image",
        "learned metric",
    }
    assert {how for _, on, how in rows if on == "features,"} == {"neighbor", "metric", "tail"}
    assert rows["who", "features,", "metric"]["accuracy"] > rows["who", "features,", "metric"]["chance"]
    assert rows["place", "reconstructions", "tail"]["learned_on"] in ("true pictures", "rebuilt pictures")
    assert rows["place", "features", "linear"]["n"] == rows["place", "reconstructions", "tail"]["n"] == 29
    shown = load_facts(tmp_path / "run").information
    assert shown["log_rank_privacy"].mean == hidden["privacy"]
    assert shown["explained_variance"].mean == facts["explained_variance"]


def test_probes_choose_on_other_vehicles_than_they_learn_from():
    pairs, alone = np.repeat(np.arange(20), 2), np.full(20, -1)
    who = np.random.default_rng(0).permutation(np.concatenate([pairs, alone]))
    images = replace(pictures(60, seed=0), labels={"identity": who})
    apart = _set_apart(images, "identity", 3)
    assert len(apart) in (6, 7)
    rest = np.setdiff1d(np.arange(60), apart)
    assert not np.intersect1d(who[apart], who[rest][who[rest] >= 0]).size
    assert {int(count) for count in np.unique(who[apart][who[apart] >= 0], return_counts=True)[1]} == {2}
    # Without identities, or with two people only, pictures are kept apart as they come.
    assert len(_set_apart(images, "nobody", 3)) == 6
    assert len(_set_apart(replace(images, labels={"identity": np.arange(60) % 2}), "identity", 3)) == 6


def test_a_probe_that_learned_on_rebuilt_pictures_counts_where_it_recovers_more(tmp_path):
    """An edge sends negatives, and the attack was fitted to show them as they come: true pictures teach the wrong."""
    rng = np.random.default_rng(0)

    def album(count):
        side = np.arange(count) % 2
        pixels = rng.normal(110, 12, (count, 3, 8, 10))
        pixels[side == 1, :, :, 5:] += 60
        pixels[side == 0, :, :, :5] += 60
        return Images(pixels=pixels.clip(0, 255).astype(np.uint8), labels={"side": side}, name="album")

    own, other, test = album(80), album(24), album(40)
    labels = {role: images.column("side") for role, images in zip(ROLES, (own, other, test), strict=True)}
    true = {role: torch.from_numpy(images.floats()) for role, images in zip(ROLES, (own, other, test), strict=True)}
    rebuilt = {role: 1 - pictures for role, pictures in true.items()}
    shown = {
        "true": ({**true, "test": rebuilt["test"]}, labels),
        "rebuilt": (rebuilt, labels),
    }
    (alone, weaker), (which, stronger) = _better({"true": shown["true"]}, 0, "cpu"), _better(shown, 0, "cpu")
    assert (alone, which) == ("true", "rebuilt")
    assert weaker.accuracy < 0.5 < 0.9 < stronger.accuracy
    # Rebuilt pictures that show nothing do not count.
    faint = {role: torch.full_like(pictures, 0.5) + 0.01 * pictures.flip(0) for role, pictures in true.items()}
    assert (
        _better({"true": (true, labels), "rebuilt": ({**faint, "test": true["test"]}, labels)}, 0, "cpu")[0] == "true"
    )


def test_a_decoder_of_an_audit_rebuilds_the_pictures_of_its_owner():
    view = view_of(Wide(), n=120)
    attack = Decoder(width=64, blocks=1, epochs=3, restarts=1)
    inverter = attack.prepare(view, seed=0)
    own = {"train": pictures(60, seed=8), "validation": pictures(11, seed=9)}
    with torch.no_grad():
        features = {role: Wide()(torch.from_numpy(images.floats())) for role, images in own.items()}
    hard = SimpleNamespace(cut=SimpleNamespace(feature_shape=view.feature_shape), cloud=view.cloud)
    sent = SimpleNamespace(test=own["train"], features=features)
    found = _rebuilt(attack, inverter.state(), hard, sent, torch.device("cpu"))
    for role, images in own.items():
        assert (found[role] - inverter(features[role])).abs().max() < 0.6 / 255
        true = torch.from_numpy(images.floats())
        assert (found[role] - true).square().mean() < 0.1 * true.var(0).mean()
