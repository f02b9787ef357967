"""The project as a whole: import rules, versions, and what must never be in a tracked file."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ACCELERATOR = ("cuda-", "nvidia-")
"""What torch pins itself, other for every build of it: pinned here, it would only keep some builds out."""

needs_git = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(),
    reason="not a git checkout: nothing says what is tracked",
)


def constraints() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def is_of_the_accelerator(name: str) -> bool:
    return name == "triton" or name.startswith(ACCELERATOR)


def requirements(*extras: str) -> list[Requirement]:
    project = PROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def tracked_files() -> list[Path]:
    told = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in told.split("\0") if name and (ROOT / name).is_file()]


def texts() -> Iterator[tuple[Path, str]]:
    for path in tracked_files():
        try:
            yield path.relative_to(ROOT), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


# Versions


def test_constraints_are_exact_versions_and_nothing_else():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    for line in pins:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line), f"{line}: expected NAME==VERSION, no suffix"
    assert len(constraints()) == len(pins), "a name is pinned twice"


def test_torch_and_torchvision_are_a_matching_pair():
    pins = constraints()
    # They are released together: torch 2.N with torchvision 0.(N+15).
    assert pins["torchvision"].minor == pins["torch"].minor + 15
    assert pins["torchvision"].micro == pins["torch"].micro


def test_constraints_satisfy_every_range():
    pins = constraints()
    for requirement in requirements("cloud", "lab", "dev"):
        assert requirement.specifier, f"{requirement.name}: pyproject.toml gives no range"
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not pinned"
        assert pins[name] in requirement.specifier, f"{name}=={pins[name]} is not in {requirement.specifier}"


def test_constraints_cover_what_the_dependencies_need():
    pins = constraints()
    seen: set[tuple[str, str]] = set()
    wanted = [(r, "") for r in requirements("cloud", "lab", "dev")]
    while wanted:
        requirement, _ = wanted.pop()
        name = canonicalize_name(requirement.name)
        if is_of_the_accelerator(name):
            continue
        assert name in pins, f"{name} is needed and not pinned"
        assert pins[name] in requirement.specifier, f"{name}=={pins[name]} is not in {requirement}, which is needed"
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            further = [Requirement(line) for line in metadata.requires(requirement.name) or []]
            wanted += [(r, extra) for r in further if r.marker is None or r.marker.evaluate({"extra": extra})]
    assert set(pins) == {name for name, _ in seen}, "pinned, and needed by nothing"


# Rules


def test_imports_point_one_way():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_nothing_is_unpickled():
    """`torch.load` with weights_only=True, `numpy.load` with allow_pickle=False, and no module that unpickles."""
    unsafe = {"cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for path in sorted((ROOT / "src").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if not re.search(r"pickle|dill|joblib|marshal|shelve|load\(", text):
            continue
        for node in ast.walk(ast.parse(text)):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                assert not unsafe & {alias.name.partition(".")[0] for alias in node.names}, where
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in {"pickle", *unsafe}, where
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
                assert node.attr.endswith("Error"), where  # what a refused file raises may be caught
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                owner = ast.unparse(node.func.value)
                told = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert owner != "torch" or told.get("weights_only") == "True", where
                assert owner not in ("np", "numpy") or told.get("allow_pickle") == "False", where


@needs_git
def test_no_address_of_a_registry_and_no_path_of_a_machine():
    slash = re.escape("/")
    registry = re.compile(
        r"https?://[\w.-]*(?:pypi|pythonhosted|pytorch\.org/whl|artifactory|nexus|mirror)", re.IGNORECASE
    )
    option = re.compile(r"--(?:extra-)?index-url|--find-links|--trusted-host")
    machine = re.compile(rf"(?<![\w.\"'`<-]){slash}(?:root|work|home|Users|opt|mnt|srv)(?:{slash}|\b)[\w.-]*")
    for path, text in texts():
        if path == Path("tests/test_project.py"):
            continue
        for number, line in enumerate(text.splitlines(), 1):
            for pattern in (registry, option, machine):
                found = pattern.search(line)
                assert found is None, f"{path}:{number}: {found[0]}"


@needs_git
def test_no_large_and_no_generated_file_is_tracked():
    for path in tracked_files():
        assert path.stat().st_size < 2**20, f"{path}: 1 MiB or more"
        assert path.suffix not in {".pt", ".pth", ".safetensors", ".npz", ".onnx", ".pyc"}, path


# Setting up


def test_what_a_fresh_machine_runs_is_executable_and_shell():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert "export CI=true" in text
    assert "make test" in text


def test_make_installs_again_only_when_what_is_installed_changes():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^\.venv/installed: pyproject\.toml constraints\.txt$", makefile, re.MULTILINE)
    assert "-c constraints.txt -e '.[cloud,lab,dev]'" in makefile
    for target in ("demo", "lint", "bench"):
        assert re.search(rf"^{target}: \.venv/installed$", makefile, re.MULTILINE), target
    assert re.search(r"^test: lint$", makefile, re.MULTILINE)


def test_an_old_python_is_refused_with_what_to_do(tmp_path):
    # The rule of the stamp, with an interpreter that claims to be old.
    old = tmp_path / "python"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 9); $(printf %s "$2")"\n')
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    done = subprocess.run(["make", f"PYTHON={old}", "demo"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Louver needs Python 3.11 or newer; this is 3.9" in done.stdout + done.stderr
    assert not (tmp_path / ".venv").exists()
