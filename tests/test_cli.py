"""The command line as a user meets it: what it prints, what it leaves, and its exit codes."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from louver import cli, cli_cloud
from louver.config import Experiment, read_experiment

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
    (tmp_path / "mine.py").write_text("def broken():\n    raise RuntimeError('no such luck')\n")
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


def test_what_was_refused_leaves_no_run_and_an_old_verdict_does_not_outlive_its_run(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert louver(monkeypatch, "audit", "toy.toml", "--at", "stage9") == 2
    assert louver(monkeypatch, "audit", "toy.toml", "--threads", "1") == 1
    from louver import audit as module

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "judge", stop)
    assert louver(monkeypatch, "audit", "toy.toml", "--resume", "--threads", "1") == 130
    monkeypatch.undo()
    monkeypatch.chdir(here)
    capsys.readouterr()
    assert louver(monkeypatch, "report", "runs/toy") == 2
    assert "unfinished" in capsys.readouterr().err


def test_every_command_has_json() -> None:
    commands = [*cli.app.registered_commands, *cli_cloud.token.registered_commands]
    assert len(commands) > 15
    assert [one.callback for one in commands if "as_json" not in inspect.signature(one.callback).parameters] == []


def test_a_network_that_prints_does_not_spoil_json(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = "nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)"
    source = f"from torch import nn\ndef net():\n    print('HELLO')\n    return nn.Sequential({layers})\n"
    (here / "loud.py").write_text(source)
    assert louver(monkeypatch, "cuts", "loud:net", "--image", "3x8x8", "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)
    assert "HELLO" in printed.err


def test_classes_that_differ_between_roles_are_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    for role, classes in (("test", "bc"), ("auxiliary", "abc")):
        for k, name in enumerate(classes):
            (here / role / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (64, 64), (40 * i, 60 * k, 90 if role == "test" else 10)).save(
                    here / role / name / f"{i}.png"
                )
    data = {
        "label": "label",
        "test": "test",
        "auxiliary": "auxiliary",
        "train": "streets/0[:9]",
        "validation": "streets/1[:9]",
    }
    (here / "folders.toml").write_text(tomli_w.dumps(TABLE | {"data": data}))
    assert louver(monkeypatch, "audit", "folders.toml") == 2
    assert "same classes in every role" in capsys.readouterr().err


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
        (["cuts", ":f"], "package.module:function"),
        (["cuts", "mine:broken"], "RuntimeError: no such luck"),
        (["cuts", "torchvision:vit_b_16", "--image", "3x30x30"], "cannot be built"),
        (["cuts", "street_net", "--image", "3x99999999x8"], "at most 4096"),
        (["audit", "toy.toml", "--device", "meta"], "computes nothing"),
        (["audit", "toy.toml", "--out", "x" * 300], "name too long"),
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
    endless = {"steps": 100000, "tolerance": 0.0, "restarts": 100000}
    (here / "long.toml").write_text(tomli_w.dumps(TABLE | {"attacks": TABLE["attacks"] | {"likelihood": endless}}))
    command = [sys.executable, "-c", "from louver.cli import main; main()", "audit", "long.toml", "--threads", "1"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
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


def test_sigterm_ends_it_as_ctrl_c_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ended_in_order = []

    def work(**_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            ended_in_order.append(True)

    monkeypatch.setattr("louver.cli.app", work)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 130
    assert ended_in_order == [True]
    assert "--resume" in capsys.readouterr().err


def test_the_demo_ends_in_service(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "demo.toml").write_text(tomli_w.dumps({**TABLE, "name": "demo"}))
    small = read_experiment(here / "demo.toml")

    def read(path: Path, **options: Any) -> Experiment:
        return small if path.name == "demo.toml" else read_experiment(path, **options)

    monkeypatch.setattr("louver.config.read_experiment", read)
    before = here / "runs/demo/bundle/of-a-demo-before"
    before.parent.mkdir(parents=True)
    before.touch()
    (here / "runs/demo/config.toml").write_bytes((here / "demo.toml").read_bytes())
    assert louver(monkeypatch, "demo", "--threads", "1") == 0
    told = capsys.readouterr().out
    manifest = json.loads((here / "runs/demo/bundle/manifest.json").read_text())
    assert not before.exists()
    assert f"bundle demo, id {manifest['id']}" in told
    assert "in service on this machine, 20 test images, one request each:" in told
    for keep in ("other/config.toml", "other/bundle/manifest.json"):
        (here / keep).parent.mkdir(exist_ok=True, parents=True)
        (here / keep).write_text((here / "toy.toml").read_text())
    assert louver(monkeypatch, "demo", "--out", "other") == 2
    assert "something else than a demo" in capsys.readouterr().err
    assert (here / "other/bundle/manifest.json").is_file()

    export = ("export", "runs/demo", "--cut", "stage1", "--no-audit", "--threads", "1", "--out")
    (here / "file").touch()
    assert louver(monkeypatch, *export, "b", "--triton", "file") == 2
    assert "name another folder" in capsys.readouterr().err
    assert not (here / "b").exists()  # found out before the work
    assert louver(monkeypatch, *export, "b", "--triton", "models") == 0
    (model,) = (here / "models").iterdir()
    assert (model / "1/model.onnx").read_bytes() == (here / "b/cloud.onnx").read_bytes()
    (model / "1/model.onnx").unlink()
    monkeypatch.chdir(model / "1")
    assert louver(monkeypatch, "export", str(here / "runs/demo"), "--out", ".") == 2
    assert "which is where you are" in capsys.readouterr().err


def test_demo_is_an_experiment_that_can_be_read() -> None:
    found = read_experiment(ROOT / "src/louver/demo.toml")
    assert len(found.audit.cuts) == 2
    assert found.training is not None
    assert found.data.test.startswith("streets/")
