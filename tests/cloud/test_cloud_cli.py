"""`louver serve` and `louver token` as a user meets them, and what `docs/serving.md` says of them."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import typer

from bundles import toy_bundle
from louver.cli import app, main
from louver.cloud import Batching, Limits, Listening
from louver.cloud.metrics import Metrics
from louver.errors import ConfigError
from servers import asking, features, infer_path, running

DOCUMENT = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs `louver` with some words; gives exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    # `serve` sets up the log of its process, which here goes on to other tests.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    def louver(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["louver", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return ended.value.code, told.out, told.err

    return louver


def test_tokens_are_added_listed_and_removed(run):
    code, token, _ = run("token", "add", "a", "--file", "t.json", "--images-per-day", "7")
    assert code == 0
    assert len(token.strip()) >= 43
    code, told, _ = run("token", "add", "b", "--file", "t.json", "--json")
    assert json.loads(told)["name"] == "b"
    code, told, _ = run("token", "list", "--file", "t.json", "--json")
    assert [(one["name"], one["images_per_day"]) for one in json.loads(told)] == [("a", 7), ("b", None)]
    code, told, _ = run("token", "list", "--file", "t.json")
    assert "a" in told
    assert token.strip() not in told
    code, told, _ = run("token", "remove", "a", "--file", "t.json", "--json")
    assert (code, json.loads(told)) == (0, {"name": "a", "removed": True})
    code, _, error = run("token", "remove", "a", "--file", "t.json")
    assert (code, "no client a; known: b" in error) == (2, True)


def test_a_token_is_rotated_and_the_list_says_until_when_the_old_one_goes_on(run, monkeypatch):
    _, first, _ = run("token", "add", "a", "--file", "t.json", "--images-per-day", "7")
    code, second, error = run("token", "rotate", "a", "--file", "t.json", "--overlap", "90s")
    assert (code, error) == (0, "")
    assert len(second.strip()) >= 43
    assert second != first
    _, told, _ = run("token", "list", "--file", "t.json", "--json")
    (one,) = json.loads(told)
    assert one["images_per_day"] == 7
    left = datetime.fromisoformat(one["old_until"]) - datetime.now(UTC)
    assert 80 < left.total_seconds() <= 91
    assert one["old_until"] in run("token", "list", "--file", "t.json")[1]
    now = time.time()
    with monkeypatch.context() as patch:
        patch.setattr("time.time", lambda: now + 91)
        _, told, _ = run("token", "list", "--file", "t.json", "--json")
        assert json.loads(told)[0]["old_until"] is None
    code, told, _ = run("token", "rotate", "a", "--file", "t.json", "--overlap", "0", "--json")
    assert (code, list(json.loads(told))) == (0, ["name", "token"])
    assert json.loads(run("token", "list", "--file", "t.json", "--json")[1])[0]["old_until"] is None
    before = Path("t.json").read_bytes()
    for words, told in (
        (("b",), "no client b; known: a"),
        (("a", "--overlap", "1"), "expected 0, or a whole number with s, m, h or d"),
        (("a", "--overlap", "-1h"), "got '-1h'"),
        (("a", "--overlap", "1.5h"), "got '1.5h'"),
        (("a", "--overlap", ""), "got ''"),
        (("a", "--overlap", "366d"), "expected an overlap of 0 to 365 days"),
    ):
        code, _, error = run("token", "rotate", *words, "--file", "t.json")
        assert (code, told in error) == (2, True), (words, error)
    assert Path("t.json").read_bytes() == before


def test_a_day_is_the_overlap_unless_another_is_named(run):
    run("token", "add", "a", "--file", "t.json")
    run("token", "rotate", "a", "--file", "t.json")
    (one,) = json.loads(run("token", "list", "--file", "t.json", "--json")[1])
    left = datetime.fromisoformat(one["old_until"]) - datetime.now(UTC)
    assert 86390 < left.total_seconds() <= 86401


@pytest.mark.parametrize("folder", [".", "/", "", "..", "folder"])
def test_a_folder_where_a_file_belongs_is_said(run, tmp_path, folder):
    toy_bundle(tmp_path / "b")
    (tmp_path / "folder").mkdir()
    run("token", "add", "a", "--file", "t.json")
    before = sorted(tmp_path.rglob("*"))
    for words in (
        ("token", "add", "a", "--file", folder),
        ("token", "rotate", "a", "--file", folder),
        ("token", "remove", "a", "--file", folder),
        ("token", "list", "--file", folder),
        ("serve", "b", "--tokens", folder),
        ("serve", "b", "--tokens", "t.json", "--budgets", folder),
    ):
        code, _, error = run(*words)
        assert (code, "expected the name of a file, got the folder" in error) == (2, True), (words, error)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_served_is_said_before_anything_listens(run, tmp_path):
    toy_bundle(tmp_path / "b")
    for words, told in (
        (("nowhere",), "expected a bundle or a folder of bundles"),
        (("b", "--host", "0.0.0.0"), "--tls-cert and --tls-key and --tokens too"),
        (("b", "--host", "0.0.0.0", "--tokens", "t"), "--tls-cert and --tls-key too"),
        (("b", "--host", "example.test"), "can be reached from other machines"),
        (("b", "--tls-cert", "x"), "both a certificate and its key"),
        (("b", "--client-ca", "x"), "need TLS"),
        (("b", "--tokens", "none.json"), "louver token add"),
        (("b", "--budgets", "b.json"), "tokens too"),
        (("b", "--max-batch", "0"), "--max-batch: expected NUMBER or NAME=NUMBER, whole numbers from 1 to 1,000,000"),
        (("b", "--max-batch", "toy="), "got 'toy='"),
        (("b", "--max-batch", "=3"), "got '=3'"),
        (("b", "--max-batch", "toy=b"), "got 'toy=b'"),
        (("b", "--max-batch", "toy=2.5"), "got 'toy=2.5'"),
        (("b", "--max-batch", "8", "--max-batch", "9"), "one value for all models, got '9' too"),
        (("b", "--max-batch", "toy=8", "--max-batch", "toy=8"), "one value for toy, got 'toy=8' too"),
        (("b", "--max-batch", "tow=8"), "no such model is served; served: toy"),
        (
            ("b", "--max-delay-ms", "-1"),
            "--max-delay-ms: expected NUMBER or NAME=NUMBER, numbers from 0 to 10,000, got '-1'",
        ),
        (("b", "--max-delay-ms", "toy=nan"), "got 'toy=nan'"),
        (("b", "--max-delay-ms", "tow=8"), "no such model is served; served: toy"),
        (("b", "--engine", "moon"), "local"),
        (("b", "--engine", "ray", "--min-replicas", "5"), "--min-replicas <= --max-replicas"),
        (("b", "--engine", "ray", "--traces"), "for the local engine"),
    ):
        code, _, error = run("serve", *words)
        assert (code, told in error) == (2, True), (words, error)


def test_batches_of_all_models_and_of_one(run, tmp_path, monkeypatch):
    toy_bundle(tmp_path / "b")
    made = []

    def refused(paths, *, batching, **options):
        made.append(batching)
        raise ConfigError("far enough")

    monkeypatch.setattr("louver.cloud.Repository", refused)
    rows = ("--max-batch", "toy=8", "--max-batch", "16")
    delays = ("--max-delay-ms", "toy=2.5", "--max-delay-ms", "tow=0")
    for options in ((), (*rows, *delays, "--threads", "3")):
        assert run("serve", "b", *options)[0] == 2
    assert made == [
        Batching(),
        Batching(max_rows=16, threads=3, max_rows_of={"toy": 8}, max_delay_s_of={"toy": 0.0025, "tow": 0}),
    ]


def test_traces_without_their_package_are_said_before_anything_listens(run, tmp_path, monkeypatch):
    toy_bundle(tmp_path / "b")
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    for name in [name for name in sys.modules if name.startswith("opentelemetry.")]:
        monkeypatch.delitem(sys.modules, name)
    code, _, error = run("serve", "b", "--traces")
    assert (code, "pip install 'louver[traces]'" in error) == (2, True), error


@pytest.mark.parametrize(
    ("options", "is_fine"),
    [
        ({"host": "127.0.0.1"}, True),
        ({"host": "localhost"}, True),
        ({"host": "::1"}, True),
        ({"host": "127.9.9.9"}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "::"}, False),
        ({"host": "10.0.0.1"}, False),
        ({"host": "localhost.example.test"}, False),
        ({"host": "0.0.0.0", "is_insecure_public": True}, True),
    ],
)
def test_only_loopback_is_open_to_all(options, is_fine):
    listening = Listening(**options)
    if is_fine:
        listening.check(has_tokens=False)
    else:
        with pytest.raises(ConfigError, match="insecure-public"):
            listening.check(has_tokens=False)
        with pytest.raises(ConfigError, match="tls-cert"):
            listening.check(has_tokens=True)
        Listening(**options, tls_cert=Path("c"), tls_key=Path("k")).check(has_tokens=True)
        with pytest.raises(ConfigError, match="tokens"):
            Listening(**options, tls_cert=Path("c"), tls_key=Path("k")).check(has_tokens=False)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--max-body-mb", "inf", "--max-body-mb"),
        ("--max-body-mb", "nan", "--max-body-mb"),
        ("--max-body-mb", "2048", "body_bytes"),  # more than gRPC takes
        ("--max-decoded-mb", "inf", "--max-decoded-mb"),
        ("--max-held-mb", "inf", "--max-held-mb"),
        ("--body-s", "inf", "body_s"),
        ("--answer-s", "nan", "--answer-s"),
        ("--head-s", "inf", "head_s"),
        ("--drain-s", "nan", "--drain-s"),
        ("--max-connections", "3000000000", "connections"),
        ("--host", "a..b", "cannot listen on a..b"),
    ],
)
def test_options_past_all_bounds_are_refused(tmp_path, run, option, value, words):
    toy_bundle(tmp_path / "b")
    code, _, error = run("serve", "b", "--port", "0", "--insecure-public", option, value)
    assert (code, words in error) == (2, True), error


def test_a_port_that_is_taken_is_said(tmp_path):
    toy_bundle(tmp_path / "b")
    with running(tmp_path / "log", tmp_path / "b", options=("--drain-s", "0")) as server:
        for option, port in (("--port", server.port), ("--grpc-port", server.told["grpc"].rpartition(":")[2])):
            ports = {"--port": "0", "--grpc-port": "0", "--metrics-port": "-1", option: str(port)}
            words = [word for pair in ports.items() for word in pair]
            done = subprocess.run(
                [sys.executable, "-m", "louver", "serve", str(tmp_path / "b"), *words],
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
            assert done.returncode == 2, done.stderr
            assert "cannot listen on 127.0.0.1" in done.stderr


def test_a_person_is_told_where_and_what_and_how_safe(tmp_path):
    bundle = toy_bundle(tmp_path / "b")
    command = [sys.executable, "-m", "louver", "serve", str(tmp_path / "b"), "--port", "0", "--grpc-port", "-1"]
    with subprocess.Popen(
        [*command, "--metrics-port", "-1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = []
        while not lines or "warning" not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        process.send_signal(2)
        process.communicate(timeout=30)
        assert process.returncode == 0
    told = "".join(lines)
    assert re.search(r"REST +http://127\.0\.0\.1:\d+", told)
    assert f"toy, version {bundle.id}: UINT8 4×4×5" in told
    assert "--tokens FILE asks who they are" in told


def test_one_model_of_one_version_needs_no_version(tmp_path):
    bundle = toy_bundle(tmp_path / "b")
    with running(tmp_path / "log", tmp_path / "b", options=("--drain-s", "0", "--max-rows", "3")) as server:
        body, headers = asking(features(3))
        assert (
            server.ask("/v2/models/toy/infer", body, headers).body == server.ask(infer_path(bundle), body, headers).body
        )
        assert server.ask("/v2/models/toy/infer", *asking(features(4))).status == 400


def test_a_missing_extra_is_said():
    code = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in {"grpc", "uvicorn", "uvloop", "prometheus_client", "torch"}:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)

sys.meta_path.insert(0, Blocked())
from louver.cli import main
sys.argv = ["louver", "serve", "b"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "pip install 'louver[cloud]'" in done.stderr


def test_ray_is_asked_for_where_it_is_missing(run, tmp_path, monkeypatch):
    toy_bundle(tmp_path / "b")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, error = run("serve", "b", "--engine", "ray")
    assert (code, "pip install 'louver[cloud,ray]'" in error) == (2, True), error


def test_the_server_needs_no_lab():
    code = (
        "import louver.cloud, louver.cli, sys; sys.exit(bool({'torch', 'onnx', 'pydantic', 'PIL'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The document


def rows_below(heading: str) -> dict[str, str]:
    text = DOCUMENT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {row[0]: row[1] for row in rows}


def test_every_option_is_documented_with_its_default():
    rows = rows_below("Options")
    command = typer.main.get_command(app).commands["serve"]
    told = {}
    for names, defaults in rows.items():
        options = re.findall(r"`(--[\w-]+)`", names)
        parts = [part.strip("` ") for part in defaults.split(",")]
        told |= dict(zip(options, parts if len(parts) == len(options) else parts * len(options), strict=True))
    known = {one.opts[0]: one.default for one in command.params if one.opts[0].startswith("--")}
    helps = {one.opts[0]: one.help for one in command.params if one.opts[0].startswith("--")}
    assert sorted(told) == sorted(known)
    for option, default in known.items():
        if default is None or default is False:
            assert told[option] in ("none", "no") or f"{told[option]} by default" in helps[option], option
        else:
            assert told[option] == (f"{default:g}" if isinstance(default, (int, float)) else str(default)), option


def test_the_defaults_of_the_command_are_those_of_the_library():
    command = typer.main.get_command(app).commands["serve"]
    known = {one.name: one.default for one in command.params}
    limits, batching, listening = Limits(), Batching(), Listening()
    assert known["max_body_mb"] * 2**20 == limits.body_bytes
    assert known["max_decoded_mb"] * 2**20 == limits.decoded_bytes
    assert known["max_held_mb"] * 2**20 == limits.held_bytes
    assert (known["max_rows"], known["body_s"], known["answer_s"]) == (limits.rows, limits.body_s, limits.answer_s)
    assert (known["queue"], known["workers"]) == (batching.queue, batching.workers)
    helps = {one.name: one.help for one in command.params}
    assert f"{batching.max_rows} by default" in helps["max_batch"]
    assert f"{1000 * batching.max_delay_s:g} by default" in helps["max_delay_ms"]
    for name in ("host", "port", "grpc_port", "metrics_port", "drain_s", "head_s"):
        assert known[name] == getattr(listening, name), name
    assert known["max_connections"] == listening.connections


def test_every_metric_is_documented():
    metrics = Metrics()
    names = {family.name + ("_total" if family.type == "counter" else "") for family in metrics._registry.collect()}
    text = DOCUMENT.split("\n## Metrics and logs\n")[1]
    assert names == set(re.findall(r"`(louver_\w+)`", text))
