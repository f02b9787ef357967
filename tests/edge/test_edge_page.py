"""docs/edge.md says what is so: its example runs, its tables agree with the code."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from bundles import IMAGE, toy_bundle
from clouds import Cloud
from louver import errors
from louver.edge import Answer, Edge, Settings

PAGE = (Path(__file__).parents[2] / "docs" / "edge.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```text\n(import numpy.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    bundle = toy_bundle(tmp_path / "bundle")
    with Cloud(bundle) as cloud:
        small = code.replace("3, 224, 224", ", ".join(map(str, IMAGE)))
        exec(compile(small.replace("https://cloud.example:8443", cloud.address), "edge.md", "exec"), {})
        assert len(cloud.seen) == 3
    assert capsys.readouterr().out.count("class ") == 4


def test_every_setting_is_told_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE.split("## Settings")[1].split("\n## ")[0], re.MULTILINE))
    assert rows == {
        field.name: "none" if field.default is None else f"`{json.dumps(field.default)}`"
        for field in dataclasses.fields(Settings)
    }


def test_every_name_on_the_page_exists() -> None:
    for name in re.findall(r"`(\w+Error)`", PAGE):
        assert issubclass(getattr(errors, name), errors.LouverError)
    for name in re.findall(r"edge\.(\w+)\(", PAGE):
        assert callable(getattr(Edge, name)), name
    for name in [field.name for field in dataclasses.fields(Answer)] + ["is_degraded"]:
        assert f"`{name}`" in PAGE, name
