"""The documents say what is so: commands run, files are read, tables agree with the code, links lead somewhere."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import typer
from PIL import Image
from typer.exceptions import TyperException

import louver
from louver.attacks import MeanImage
from louver.audit import FLOOR
from louver.cli import app, main
from louver.config import (
    ATTACKS,
    TASKS,
    AuditOptions,
    DataOptions,
    Experiment,
    ModelOptions,
    ProbeOptions,
    read_experiment,
)
from louver.defenses import DEFENSES
from louver.measures import MEASURES, resolve_measures
from louver.training import Training
from louver.types import GRANTS, Threat

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


class Block(NamedTuple):
    document: Path
    language: str
    text: str
    line: int


def blocks_of(document: Path) -> Iterator[Block]:
    text = document.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(document, match[1], match[2], 1 + text.count("\n", 0, match.start()))


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]


def named(*languages: str) -> list:
    chosen = [block for block in BLOCKS if block.language in languages]
    return [pytest.param(block, id=f"{block.document.name}:{block.line}") for block in chosen]


def commands_of(block: Block) -> list[str]:
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def tables_in(document: Path, heading: str | None = None) -> list[list[str]]:
    """Rows of the tables below a heading, or of all tables, as cells."""
    text = document.read_text(encoding="utf-8")
    if heading is not None:
        assert f"\n{heading}\n" in text, f"{document.name} has no {heading!r}"
        text = re.split(r"^## ", text.split(f"\n{heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip(" |") for cell in row] for row in rows if not set("".join(row)) <= set("-| ")]


def parse(command: str) -> None:
    """Reads a command line as `louver` would, down to the last option, and runs nothing."""
    _, name, *words = shlex.split(command)
    commands = typer.main.get_command(app).commands
    assert name in commands, f"no such command: {command}"
    commands[name].make_context(name, words)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs `louver` with some words in an empty folder, and gives what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def louver_with(*words: str, ok: tuple[int, ...] = (0,)) -> str:
        monkeypatch.setattr("sys.argv", ["louver", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        assert ended.value.code in ok, told.err
        return told.out

    return louver_with


def whole(text: str, tmp_path: Path) -> Path:
    """The file in a block, or an example with the sections of the block put in."""
    table = tomllib.loads(text)
    if {"model", "audit"} <= set(table):
        content = text
    else:
        import tomli_w

        base = tomllib.loads((ROOT / "src/louver/demo.toml").read_text(encoding="utf-8"))
        if "model" in table:
            del base["training"]  # a trained network is not trained again
        content = tomli_w.dumps({**base, **table})
    path = tmp_path / "experiment.toml"
    path.write_text(content, encoding="utf-8")
    return path


# Commands and files


def test_there_is_something_to_check():
    assert {"README.md", "CONTRIBUTING.md", "threat-model.md", "experiments.md"} <= {d.name for d in DOCUMENTS}
    assert {block.language for block in BLOCKS} <= {"sh", "console", "toml", "python", "text"}


@pytest.mark.parametrize("block", named("sh", "console"))
def test_commands_exist_with_these_arguments(block):
    """Those that take minutes are read and not run."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for command in commands_of(block):
        program, *words = shlex.split(command)
        if program == "make":
            assert set(words) <= set(targets), command
            subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=True, capture_output=True)
        else:
            assert program == "louver", command
            parse(command)
        for word in words:
            if word.endswith(".toml"):
                told = f"`{word}`" in block.document.read_text(encoding="utf-8")
                assert told, f"{word} is no file that {block.document.name} speaks of"
                assert (ROOT / word).is_file() or "/" not in word, f"{word} does not exist"


def test_reading_a_command_refuses_what_is_wrong():
    with pytest.raises(TyperException, match="No such option"):
        parse("louver audit file.toml --no-such-option 3")
    with pytest.raises(AssertionError, match="no such command"):
        parse("louver pray file.toml")


@pytest.mark.parametrize("block", named("console"))
def test_output_is_what_is_shown(block, run):
    lines = iter(block.text.splitlines())
    (command,) = commands_of(block)
    expected = [line for line in lines if not line.startswith("$ ")]
    assert run(*shlex.split(command)[1:]).splitlines() == expected


@pytest.mark.parametrize(
    "command", ["louver cuts torchvision:resnet18 --image 3x64x64", "louver cuts cifar_resnet20 --json"]
)
def test_quick_commands_run(command, run):
    assert any(command in commands_of(block) for block in BLOCKS if block.language == "sh")
    assert "layer1" in run(*shlex.split(command)[1:])


@pytest.mark.parametrize("block", named("toml"))
def test_experiment_files_are_read(block, tmp_path):
    read_experiment(whole(block.text, tmp_path))


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_examples_are_read(path):
    assert read_experiment(path).name == path.stem


@pytest.mark.parametrize("block", named("python"))
def test_python_runs(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, f"{block.document.name}:{block.line}", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_your_own_network_as_the_readme_tells_it(tmp_path, run):
    """Its file, its folders, its commands; only with fewer epochs and small pictures."""
    (block,) = [b for b in BLOCKS if b.document.name == "README.md" and b.language == "toml"]
    for seed, (role, count) in enumerate({"train": 7, "test": 13, "elsewhere": 24}.items()):
        images = louver.streets(count, seed=seed)
        for i, pixels in enumerate(images.pixels):
            folder = tmp_path / "photos" / role / ("even" if i % 2 else "odd")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(folder / f"{i}.png")
    louver.save_weights(
        louver.load_model("torchvision:resnet18", n_classes=2, image_shape=(3, 48, 48)),
        tmp_path / "street-cameras.safetensors",
    )
    text = block.text.replace("size = 64", "size = 48")
    text = text.replace("[attacks.decoder]\n", "[attacks.decoder]\nepochs = 2\nrestarts = 1\n")
    small = "test_images = 3\nsteps = 5\nsweep_steps = 3\ntv = [0.01]\nl2 = [0.0]\n"
    text, count = re.subn(r"test_images = \d+.*\n", small, text)
    assert count == 1, "the example's last table has changed: bring this test along"
    assert "epochs = 2" in text
    assert "steps = 5" in text
    (tmp_path / "street-cameras.toml").write_text(text, encoding="utf-8")
    said = run("audit", "street-cameras.toml", ok=(0, 1))
    assert "worst5(ssim)<=0.5" in said
    assert (tmp_path / "runs/street-cameras/report.html").is_file()
    assert "report" in run("report", "runs/street-cameras")


# Tables


def keys_in(heading: str) -> dict[str, str]:
    rows = tables_in(ROOT / "docs/experiments.md", heading)
    return {row[0].strip("`"): row[1] for row in rows if row[0].startswith("`") and len(row) == 3}


def agrees(cell: str, field: dataclasses.Field) -> bool:
    """Whether a cell of the column "Default" says what the dataclass does."""
    has_factory = field.default_factory is not dataclasses.MISSING
    default = field.default_factory() if has_factory else field.default
    if default is dataclasses.MISSING or cell == "required":
        return cell == "required" and default is dataclasses.MISSING
    if default is None or cell == "none":
        return cell == "none" and default is None
    told = tomllib.loads(f"told = {cell.strip('`')}")["told"]
    if dataclasses.is_dataclass(default):
        return type(default)(**told) == default
    if isinstance(default, frozenset):
        return told == sorted(default)
    if isinstance(default, tuple):
        return told == list(default)
    return told == default and type(told) is type(default)


SECTIONS = {
    "## The file": Experiment,
    "## `[model]`": ModelOptions,
    "## `[data]`": DataOptions,
    "## `[training]`": Training,
    "## `[threat]`": Threat,
    "## `[audit]`": AuditOptions,
    **{f"## `[attacks.{name}]`": kind for name, kind in ATTACKS.items()},
}


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_key_of_an_experiment_file_is_documented_with_its_default(heading):
    told = keys_in(heading)
    fields = {field.name: field for field in dataclasses.fields(SECTIONS[heading])}
    if SECTIONS[heading] is Experiment:
        del fields["table"]  # the file as read, and no key of it
    if SECTIONS[heading] in ATTACKS.values():
        assert told.pop("test_images") == "none"
    assert sorted(told) == sorted(fields)
    assert [name for name, cell in told.items() if not agrees(cell, fields[name])] == []


KINDS = {
    "## `[probes]`": ProbeOptions,
    **{f"## Task `{name}`": kind for name, kind in TASKS.items()},
    **{f"## Defense `{name}`": kind for name, kind in DEFENSES.items()},
}


@pytest.mark.parametrize("heading", KINDS)
def test_every_knob_of_hardening_is_documented_with_its_default(heading):
    rows = tables_in(ROOT / "docs/hardening.md", heading)
    told = {row[0].strip("`"): row[1] for row in rows if row[0].startswith("`") and len(row) == 3}
    fields = {field.name: field for field in dataclasses.fields(KINDS[heading])}
    assert sorted(told) == sorted(fields)
    assert [name for name, cell in told.items() if not agrees(cell, fields[name])] == []


def test_no_section_is_left_out():
    text = (ROOT / "docs/experiments.md").read_text(encoding="utf-8")
    assert {f"## `{name}`" for name in re.findall(r"^## `(\[.*\])`$", text, re.MULTILINE)} | {"## The file"} == set(
        SECTIONS
    )


def test_every_measure_is_documented_with_range_and_direction():
    rows = {row[0].strip("`"): row[1:] for row in tables_in(ROOT / "docs/attacks-and-measures.md", "## Measures")[1:]}
    assert sorted(rows) == sorted(MEASURES)
    text = (ROOT / "docs/attacks-and-measures.md").read_text(encoding="utf-8")
    default = {m.name for m in resolve_measures(None, (3, 200, 200))} | {"recognized", "squeezenet_distance"}
    for name, (bounds, direction, by_default, *needs) in rows.items():
        low, high = ("∞" if math.isinf(bound) else f"{bound:g}" for bound in MEASURES[name].bounds)
        unit = " dB" if MEASURES[name].unit == "dB" else ""
        assert (bounds, direction) == (f"{low} to {high}{unit}", MEASURES[name].leaks_when), name
        assert by_default == ("yes" if name in default else "no"), name
        if MEASURES[name].min_side > 1:
            assert f"{MEASURES[name].min_side} pixels a side" in " ".join(needs), name
        assert f"**`{name}`**" in text, name


def test_every_attack_is_documented_with_what_it_needs():
    text = (ROOT / "docs/attacks-and-measures.md").read_text(encoding="utf-8")
    for name, kind in {**ATTACKS, FLOOR: MeanImage}.items():
        assert f"\n## `{name}`: " in text, name
        told = text.split(f"\n## `{name}`: ")[1].split("\n## ")[0].replace("\n", " ")
        for grant in GRANTS:
            is_needed = grant in kind().needs
            sentence = re.search(r"Needs (.*?)\.", told)
            assert sentence is not None, name
            assert (f"`{grant}`" in sentence[1]) >= is_needed, (name, grant)


def test_every_command_and_option_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Commands")[1].split("\n## ")[0]
    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        assert f"`louver {name}" in text, name
        for parameter in command.params:
            options = [option for option in parameter.opts if option.startswith("--") and option != "--help"]
            assert all(option in text for option in options), (name, options)


# Links


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert "://" not in target, f"{document.name}: {target} leads outside, where it may vanish"
        path, _, anchor = target.partition("#")
        assert not anchor, f"{document.name}: link to the file, as {target} cannot be checked"
        assert (document.parent / path).exists(), f"{document.name}: {target}"


def test_files_that_the_documents_name_exist():
    for document in DOCUMENTS:
        for name in re.findall(
            r"`((?:src|docs|tests|examples|benchmarks)/[\w./-]+)`", document.read_text(encoding="utf-8")
        ):
            assert (ROOT / name).exists() or "NAME" in name, f"{document.name}: {name}"


def test_tables_of_defenses_are_those_that_were_recorded():
    shown = (ROOT / "docs/measured-defenses.md").read_text(encoding="utf-8")
    for path in (ROOT / "benchmarks/results").glob("defenses-*-laptop.json"):
        name = path.stem.removeprefix("defenses-").removesuffix("-laptop")
        command = [sys.executable, str(ROOT / "benchmarks/table.py"), name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert printed in shown, (
            f"docs/measured-defenses.md does not show the table that `{' '.join(command[1:])}` prints"
        )


def test_bytes_beside_the_pictures_were_recorded():
    shown = (ROOT / "docs/bundles.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "benchmarks/results/wire.json").read_text(encoding="utf-8"))
    for name, label in (("cifar10", "CIFAR-10"), ("vehicles", "Vehicles")):
        for kind, one in found[name]["encodings"].items():
            sizes = f"{one['compressed bytes']:,.0f} ({one['sent bytes']:,.0f})"
            assert f"| {label} | feature, {kind} | {sizes} | {one['utility']:.3f} |" in shown
        for kind, one in found[name]["pictures"].items():
            assert f"| {label} | {kind} | {one['bytes']:,.0f} | {one['mean']:.3f} |" in shown


def test_shares_of_float32_were_recorded():
    """Of uncompressed float32, and of float32 after zstd: the second is the like-for-like one."""
    found = json.loads((ROOT / "benchmarks/results/wire.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = " ".join((ROOT / "docs/bundles.md").read_text(encoding="utf-8").split())
    shares = {"raw bytes": dict[str, list[str]](), "compressed bytes": dict[str, list[str]]()}
    for name, row in (("cifar10", "CIFAR-10 at layer2"), ("vehicles", "Vehicles at stage3")):
        told = readme.split(f"{row}: ")[1].split(". ")[0]
        for kind in ("uint8", "uint4"):
            encodings = found[name]["encodings"]
            for size, shown in shares.items():
                share = encodings[kind]["compressed bytes"] / encodings["float32"][size]
                shown.setdefault(kind, []).append(f"{share:.1%}".replace("%", " %"))
            whole, alike = (shown[kind][-1] for shown in shares.values())
            assert f"{kind} {whole} ({alike})" in told
    whole, alike = ({kind: " and ".join(pair) for kind, pair in shown.items()} for shown in shares.values())
    assert f"that is {whole['uint8']} for uint8, {whole['uint4']} for uint4" in page
    assert f"after zstd it is {alike['uint8']}, {alike['uint4']}." in page


def test_what_is_told_of_claims_was_recorded():
    shown = " ".join((ROOT / "docs/measured-defenses.md").read_text(encoding="utf-8").split())
    claims = json.loads((ROOT / "benchmarks/results/claims-laptop.json").read_text(encoding="utf-8"))["claims"]
    for claim in ("order of difficulty, CIFAR-10", "order of difficulty, CIFAR-10, equal cut and size"):
        found, low, high = claims[claim]["Spearman"]
        assert f"{found:.3f} ({low:.3f} to {high:.3f})" in shown, claim
    for row in claims["SiftFunnel, CIFAR-10"]:
        low, lost, high = row["points lost to none-layer2-tuned"]
        assert f"| {lost:.1f} ({low:.1f} to {high:.1f}) | {row['best baseline']} |" in shown, row["cell"]
    for row in claims["Fisher against random channels, CIFAR-10"]:
        points = ", ".join(f"{one:+.1f}" for one in row["points"])
        decibels = ", ".join(f"{one:.2f}" for one in row["dB"])
        assert f"{row['strength']:.0f} channels: {points} points and {decibels} dB" in shown, row["strength"]


def test_what_is_told_of_privynets_choice_was_recorded():
    shown = " ".join((ROOT / "docs/measured-defenses.md").read_text(encoding="utf-8").split())
    found = json.loads((ROOT / "benchmarks/results/privynet.json").read_text(encoding="utf-8"))
    undefended, chosen = found["cells"]
    assert f"expects {found['chosen']['psnr']:.1f} dB" in shown
    most = max((row for row in chosen["leakage"] if row["measure"] == "psnr"), key=lambda row: row["mean"])
    assert f"find {most['mean']:.1f} ({most['low']:.1f} to {most['high']:.1f})" in shown
    for cell in (undefended, chosen):
        few, some, many = (f"{row['accuracy']:.3f}" for row in cell["completion"])
        assert f"{few}, {some} and {many} on" in shown


def test_what_the_main_example_finds_was_recorded():
    found = json.loads((ROOT / "benchmarks/results/main_job.json").read_text(encoding="utf-8"))
    ssim = {(row["cut"], row["attack"]): row for row in found["rows"] if row["measure"] == "ssim"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{found['minutes']:.1f} minutes" in readme
    for cut in ("relu", "layer1", "layer2", "layer3"):
        cells = [ssim[cut, attack] for attack in ("decoder", "likelihood")]
        shown = [f"{one['mean']:.3f} [{one['interval'][0]:.3f}, {one['interval'][1]:.3f}]" for one in cells]
        assert f"| {cut} | {shown[0]} | {shown[1]} |" in readme


def test_what_is_told_of_speed_was_recorded():
    """Ratios of the server, in the order in which they stand there."""
    found = json.loads((ROOT / "benchmarks/results/serving.json").read_text(encoding="utf-8"))
    small, large = found["overhead"]["64 KiB"], found["overhead"]["1 MiB"]
    shown = []
    for name, protocol in (("rest", "REST"), ("grpc", "gRPC")):
        low, middle, high = small[f"{name} ratio of p50"]
        shown.append(f"{protocol} {middle:.2f} [{low:.2f}, {high:.2f}]")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert ", ".join(shown) in readme
    middle = [large[f"{name} ratio of p50"][1] for name in ("rest", "grpc")]
    assert f"at 1 MiB {middle[0]:.2f} and {middle[1]:.2f}" in readme


def test_the_request_of_the_protocol_is_as_long_as_it_says():
    (text,) = (block.text for block in BLOCKS if block.text.startswith("POST /v2"))
    fields, _, body = text.partition("\n\n")
    content = body.replace("\n", "")
    assert int(re.search(r"Content-Length: (\d+)", fields)[1]) == len(content)
    assert json.loads(content)["outputs"][0]["name"] == "scores"
