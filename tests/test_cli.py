"""The command line as a user meets it: what it prints, what it leaves, and its exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w
import torch

from louver import cli
from louver.config import read_experiment

ROOT = Path(__file__).parents[1]
TABLE = {
    "name": "toy",
    "thresholds": ["ssim<=0.2"],
    "model": {"name": "street_net"},
    "training": {"epochs": 1, "batch_size": 16},
    "data": {
        "label": "body",
        "train": "streets/0[:40]",
        "validation": "streets/1[:20]",
        "test": "streets/2[:20]",
        "auxiliary": "streets/3[:60]",
    },
    "audit": {"cuts": ["stage1"], "test_images": 12, "measures": ["ssim", "psnr"]},
    "attacks": {"decoder": {"width": 64, "blocks": 1, "epochs": 1, "restarts": 1}},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.toml").write_text(tomli_w.dumps(TABLE))
    return tmp_path


def louver(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["louver", *arguments])
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as exit_:
            cli.main()
    finally:
        torch.set_num_threads(threads)
    return int(exit_.value.code or 0)


def test_audit_ends_with_a_verdict_and_a_report(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert louver(monkeypatch, "audit", "toy.toml", "--threads", "1") == 1  # the threshold is broken
    out = capsys.readouterr().out
    assert "Verdict: NOT passed" in out
    assert out.splitlines()[-1] == "report: runs/toy/report.html"
    folder = here / "runs" / "toy"
    assert {p.name for p in folder.iterdir()} >= {
        "config.toml", "findings.json", "model.safetensors", "report.html", "truth.npz", "units",
    }  # fmt: skip
    assert "data:image/png" in (folder / "report.html").read_text()

    # a finished run is not written over unless asked, and asked, it is not done again
    assert louver(monkeypatch, "audit", "toy.toml") == 2
    assert "--resume" in capsys.readouterr().err
    before = (folder / "units" / "stage1" / "decoder" / "unit.json").stat().st_mtime_ns
    assert louver(monkeypatch, "audit", "toy.toml", "--resume", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (folder / "units" / "stage1" / "decoder" / "unit.json").stat().st_mtime_ns == before
    assert found["verdict"]["passed"] is False

    # the folder alone says how to run it again, with the same findings
    assert louver(monkeypatch, "audit", "runs/toy", "--out", "again", "--json", "--threads", "1") == 1
    again = json.loads(capsys.readouterr().out)
    assert [f["per_image"] for f in again["findings"]] == [f["per_image"] for f in found["findings"]]

    (folder / "report.html").unlink()
    assert louver(monkeypatch, "report", "runs/toy") == 0
    assert capsys.readouterr().out.strip() == "runs/toy/report.html"
    assert (folder / "report.html").exists()


def test_fail_above_and_at_replace_what_the_file_says(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["audit", "toy.toml", "--at", "stage2", "--fail-above", "ssim=0.99", "--json", "--threads", "1"]
    assert louver(monkeypatch, *arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert [cut["name"] for cut in found["cuts"]] == ["stage2"]
    assert [check["rule"] for check in found["verdict"]["checks"]] == ["ssim<=0.99"]
    assert read_experiment(here / "runs/toy/config.toml").audit.cuts == ("stage2",)


def test_cuts_as_a_table_and_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert louver(monkeypatch, "cuts", "street_net") == 0
    assert "stage1" in capsys.readouterr().out
    assert louver(monkeypatch, "cuts", "street_net", "--json", "--latency", "--threads", "1") == 0
    found = json.loads(capsys.readouterr().out)
    stage = next(cut for cut in found if cut["name"] == "stage1")
    assert stage["cost"]["edge"]["latency"]["median_ms"] > 0


def test_data_shows_labels_and_draws_a_sheet(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert louver(monkeypatch, "data", "streets/7[:12]", "--sheet", "sheet.png", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 12
    assert found["labels"]["place"]["classes"]
    assert (here / "sheet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cuts", "resnet81"], "nearest: resnet18"),
        (["cuts", "street_net", "--image", "64"], "3x32x32"),
        (["cut"], "No such command"),
        (["cuts", "street_net", "--nope"], "No such option"),
        (["audit", "none.toml"], "cannot read none.toml"),
        (["audit", "toy.toml", "--at", "stage9"], "stage"),
        (["audit", "toy.toml", "--attack", "decodr"], "nearest: decoder"),
        (["audit", "toy.toml", "--fail-above", "ssim"], "cannot be read"),
        (["audit", "toy.toml", "--fail-above", "sim=0.3"], "nearest: ssim"),
        (["audit", "toy.toml", "--device", "cuda:9"], "use auto, cpu"),
        (["report", "nowhere"], "give a run folder"),
        (["data", "nowhere[:4]"], "nowhere"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_two(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert louver(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_interrupted_it_says_how_to_go_on_and_goes_on(here: Path) -> None:
    """A real Ctrl-C in a real process: exit code 130, finished parts kept, the rest done on resume."""
    endless = {"steps": 100000, "tolerance": 0.0}
    (here / "long.toml").write_text(tomli_w.dumps(TABLE | {"attacks": TABLE["attacks"] | {"likelihood": endless}}))
    command = [sys.executable, "-c", "from louver.cli import main; main()", "audit", "long.toml", "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    kept = here / "runs/toy/units/stage1/decoder/unit.json"
    deadline = time.monotonic() + 120
    while not kept.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume" in err
    assert "Traceback" not in err
    assert kept.exists()
    assert not list((here / "runs").rglob(".*"))
    assert not (here / "runs/toy/findings.json").exists()


def test_demo_is_an_experiment_that_can_be_read() -> None:
    found = read_experiment(ROOT / "src/louver/demo.toml")
    assert len(found.audit.cuts) == 2
    assert found.training is not None
    assert found.data.test.startswith("streets/")
