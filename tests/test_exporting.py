"""From a run to a bundle: what the graphs compute, what is refused, and that what is sent is what was audited."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tomli_w
import torch
from torch import Tensor, nn

from bundles import toy_bundle
from certificates import key_pair
from louver import exporting
from louver.bundle import CLOUD, EDGE, HEAD, check_kept, file_hash, read_bundle
from louver.cli import main
from louver.config import read_experiment
from louver.deployed import DeployedEdge, Session, deployed
from louver.errors import BundleError, ConfigError, CutError, DataError
from louver.experiment import load_run, run_experiment
from louver.exporting import ExportOptions, _scales, audit_bundle, export_run
from louver.graphs import given_noise, to_onnx
from louver.signing import SIGNATURE, Maker, sign_bundle, verify_bundle
from louver.stochastic import Noise, RandomMask, Stochastic, drawing_from, silenced
from louver.types import Audit, Images, Threat, Verdict
from toys import SHAPE, Wide

DATA = {
    "train": "streets/1[:96]",
    "validation": "streets/2[:24]",
    "test": "streets/3[:40]",
    "auxiliary": "streets/4[:60]",
}
SMALL = {
    "name": "small",
    "seed": 3,
    "model": {"name": "street_net", "n_classes": 6},
    "training": {"epochs": 1, "batch_size": 32},
    "data": DATA | {"label": "body"},
    "audit": {"cuts": ["stage1", "stage2"], "test_images": 20, "measures": ["psnr"]},
    "attacks": {
        "decoder": {"width": 64, "blocks": 1, "epochs": 1, "restarts": 1, "layout": "local"},
        "likelihood": {"steps": 3, "sweep_steps": 2, "tv": [0.01], "l2": [0.0], "starts": ["mean"], "test_images": 4},
    },
}
NOISY = {
    "data": DATA | {"label": "body"},
    "audit": SMALL["audit"] | {"cuts": ["stage2"]},
    "defense": {"kind": "noise", "std": 0.3},
    "hardening": {"epochs": 1, "batch_size": 32},
}


def made(folder: Path, table: dict) -> Path:
    path = folder.with_suffix(".toml")
    path.write_text(tomli_w.dumps(table))
    run_experiment(read_experiment(path), folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("runs") / "plain", SMALL)


def trained(run: Path, **changes: object) -> dict:
    """The experiment, its network trained already."""
    table = SMALL | {"model": SMALL["model"] | {"weights": str(run / "model.safetensors")}} | changes
    del table["training"]
    return table


@pytest.fixture(scope="module")
def noisy(run: Path) -> Path:
    return made(run.parent / "noisy", trained(run, **NOISY))


@pytest.fixture(scope="module")
def bundle(run: Path) -> Path:
    export_run(run, run.parent / "bundle", cut="stage2", options=ExportOptions(has_head=True))
    return run.parent / "bundle"


# Graphs


class Sum(nn.Module):
    """Two draws in one edge, one of them inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(Wide(channels=6), Noise(0.5, kind="laplace"))
        self.mask = RandomMask(0.25)

    def forward(self, x: Tensor) -> Tensor:
        return self.mask(self.inner(x))


def test_noise_becomes_inputs_that_mean_what_they_say() -> None:
    edge, images = Sum().eval(), torch.rand(3, *SHAPE)
    given = given_noise(edge, images)
    assert [(one.name, one.kind) for one in given.inputs] == [("noise_0", "laplace"), ("noise_1", "uniform")]
    assert {one.shape for one in given.inputs} == {(6, *SHAPE[1:])}
    laplace, uniform = torch.randn(3, 6, *SHAPE[1:]), torch.rand(3, 6, *SHAPE[1:])
    expected = (edge.inner[0](images) + 0.5 * laplace) * (uniform >= 0.25) / 0.75
    graph = to_onnx(given, {"image": images, "noise_0": laplace, "noise_1": uniform}, "feature")
    for n in (1, 3):
        inputs = {"image": images, "noise_0": laplace, "noise_1": uniform}
        got = Session(graph).run({name: value[:n].numpy() for name, value in inputs.items()})
        np.testing.assert_allclose(got, expected[:n].detach().numpy(), atol=1e-5)
    assert isinstance(edge.mask, RandomMask), "the user's edge is as it was"


def test_graphs_say_nothing_of_the_machine() -> None:
    graph = to_onnx(given_noise(Wide(channels=5), torch.rand(2, *SHAPE)), {"image": torch.rand(2, *SHAPE)}, "feature")
    assert str(Path(__file__).parents[1]).encode() not in graph
    assert b"site-packages" not in graph
    assert b".py" not in graph
    assert [one.name for one in onnx.load_from_string(graph).graph.output] == ["feature"]


def test_what_cannot_be_exported_is_refused() -> None:
    class Strange(Stochastic):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(())

    with pytest.raises(CutError, match="Noise or RandomMask"):
        given_noise(nn.Sequential(Wide(), Strange()), torch.rand(2, *SHAPE))

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(CutError, match="cannot be written as ONNX"):
        to_onnx(Branching(), {"image": torch.rand(2, *SHAPE)}, "feature")
    noise = Noise(0.5)
    with pytest.raises(CutError, match="runs twice"):
        given_noise(nn.Sequential(noise, nn.Sequential(noise), Wide()), torch.rand(2, *SHAPE))


# Bundles


def test_a_bundle_answers_as_its_split(run: Path, bundle: Path) -> None:
    found = read_bundle(bundle, needs=(EDGE, CLOUD, HEAD))
    whole = load_run(run, cut="stage2")
    images = torch.from_numpy(whole.roles.test.floats())
    with torch.no_grad():
        features = whole.halves.edge(images)
        expected = whole.halves.cloud(features)
    edge, cloud, head = (onnxruntime.InferenceSession(found.path(file)) for file in (EDGE, CLOUD, HEAD))
    (sent,) = edge.run(["feature"], {"image": images.numpy()})
    assert sent.dtype == np.uint8
    assert sent.shape[1:] == found.serving.feature_shape == tuple(features.shape[1:])
    (got,) = cloud.run(["scores"], {"feature": sent})
    assert float((torch.from_numpy(got).argmax(1) == expected.argmax(1)).float().mean()) >= 0.95
    assert head.run(["scores"], {"feature": sent})[0].shape == got.shape
    same = found.record["equivalence"]
    assert same["images"] == 40
    assert 0 < same["relative_feature_error"] < 0.02
    assert 0 < same["compressed_bytes"] <= same["largest_compressed_bytes"]
    assert found.record["utility"]["bundle"]["accuracy"] == pytest.approx(
        found.record["utility"]["split"]["accuracy"], abs=0.05
    )
    assert set(found.record["utility"]) == {"split", "bundle", "head"}
    assert len(found.serving.labels) == 6


def test_every_key_of_the_record_is_documented(bundle: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "bundles.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \| ", page.split("`record` may grow")[1].split("\n## ")[0], re.MULTILINE)
    record = read_bundle(bundle).record
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(record)
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert set(record["kept"]) == files - {"manifest.json", EDGE, CLOUD, HEAD}


def test_what_is_audited_is_what_is_sent(bundle: Path, tmp_path: Path) -> None:
    found = read_bundle(bundle)
    rows = {(row["attack"], row["measure"]): row for row in found.record["findings"]}
    assert {attack for attack, _ in rows} == {"mean_image", "decoder", "likelihood"}
    card = (bundle / "CARD.md").read_text()
    row = rows["decoder", "psnr"]
    assert f"| {row['mean']:.3g} |" in card
    assert f"| {row['floor']:.3g} |" in card
    assert not list(bundle.rglob("truth.npz")), "no test picture is in the bundle"
    again = audit_bundle(bundle, tmp_path / "again")
    by_name = {(row.attack, row.measure): row for row in again.rows}
    assert by_name["decoder", "psnr"].mean == pytest.approx(row["mean"], abs=1e-6)
    assert read_bundle(bundle).id == found.id

    whole = load_run(bundle / "audit", cut="stage2")
    halves = deployed(whole.halves, found, *_scales(found, whole.halves))
    assert isinstance(halves.edge, DeployedEdge)
    images = torch.from_numpy(whole.roles.test.floats(slice(0, 5)))
    (sent,) = onnxruntime.InferenceSession(found.path(EDGE)).run(["feature"], {"image": images.numpy()})
    assert torch.equal(halves.edge.dequantize(torch.from_numpy(sent)), halves.edge(images).detach())
    images.requires_grad_()
    smooth = halves.edge(images)
    assert bool(torch.autograd.grad(smooth.sum(), images)[0].any())
    with torch.no_grad():
        assert float((smooth - halves.edge(images)).abs().max()) <= float(halves.edge.quantize.step.max()) * 1.01


@pytest.mark.parametrize("file", ["config.toml", "scales.safetensors"])
def test_an_audit_of_what_was_changed_since_is_refused_and_vouches_for_nothing(
    bundle: Path, tmp_path: Path, file: str
) -> None:
    shutil.copytree(bundle, folder := tmp_path / "bundle")
    (folder / SIGNATURE).write_text("signed")
    path = folder / "audit" / file
    content = path.read_bytes()
    path.write_bytes(
        content.replace(b"\nseed = 3\n", b"\nseed = 4\n") if file == "config.toml" else content[:-1] + b"@"
    )
    assert path.read_bytes() != content
    manifest = (folder / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match=f"{file} was changed since it was exported"):
        audit_bundle(folder, tmp_path / "out")
    assert (folder / "manifest.json").read_bytes() == manifest
    assert (folder / SIGNATURE).read_text() == "signed"
    assert not (tmp_path / "out").exists()


class Killed(BaseException):
    """Nothing that follows happens."""


def attacked_by(name: str) -> Audit:
    verdict = Verdict(passed=True, headline="", checks=(), warnings=())
    threat = replace(Threat(), name=name)
    return Audit(
        name="toy", threat=threat, cuts=(), findings=(), rows=(), verdict=verdict, utility={}, config={},
        environment={}, seconds=1.0,
    )  # fmt: skip


@pytest.mark.parametrize("n_done", range(4))
def test_an_audit_killed_at_any_write_leaves_a_bundle_that_is_accepted_and_audited_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_done: int
) -> None:
    private, public = key_pair(tmp_path, "maker")
    attackers = iter(["the first", "the second", "the third"])
    monkeypatch.setattr("louver.exporting.load_run", lambda *_, **__: None)
    monkeypatch.setattr("louver.exporting._audited", lambda *_: attacked_by(next(attackers)))
    toy = toy_bundle(folder := tmp_path / "bundle")
    (folder / "audit").mkdir()
    (folder / "audit" / "config.toml").write_text("seed = 3")
    exporting._sealed(folder, toy.name, toy.serving, {"findings": []})
    calls: list[str] = []

    def counted(call: str, most: int) -> Callable[..., None]:
        genuine = getattr(os, call)

        def made(path: object, *more: object, **options: object) -> None:
            calls.append(call)
            if len(calls) > most:
                raise Killed
            genuine(path, *more, **options)

        return made

    def audited(most: int) -> None:
        calls.clear()
        with monkeypatch.context() as patch:
            for call in ("replace", "unlink"):
                patch.setattr(os, call, counted(call, most))
            audit_bundle(folder, None)

    audited(4)
    assert calls == ["unlink", "unlink", "replace", "replace"], "signature, card, manifest, card"
    sign_bundle(folder, key=private)
    with pytest.raises(Killed):
        audited(n_done)
    assert (folder / SIGNATURE).exists() == (n_done == 0)
    if n_done > 0:
        sign_bundle(folder, key=private)
    verify_bundle(folder, Maker(key=public))
    audited(4)
    assert "audit (the third)" in (folder / "CARD.md").read_text()
    sign_bundle(folder, key=private)
    verify_bundle(folder, Maker(key=public))


def test_a_card_that_does_not_fit_is_written_anew_by_an_audit_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill left it when the card was written before its hash."""
    monkeypatch.setattr("louver.exporting.load_run", lambda *_, **__: None)
    monkeypatch.setattr("louver.exporting._audited", lambda *_: attacked_by("whom we fear"))
    toy = toy_bundle(folder := tmp_path / "bundle")
    (folder / "audit").mkdir()
    exporting._sealed(folder, toy.name, toy.serving, {"findings": []})
    (folder / "CARD.md").write_text("of other findings")
    with pytest.raises(BundleError, match=r"CARD\.md was changed"):
        sign_bundle(folder, key=key_pair(tmp_path, "maker")[0])
    audit_bundle(folder, None)
    check_kept(read_bundle(folder))
    assert "whom we fear" in (folder / "CARD.md").read_text()


def test_an_edge_with_noise_takes_it_from_outside_and_is_audited_with_it(noisy: Path, tmp_path: Path) -> None:
    found = export_run(noisy, tmp_path / "b")
    assert [(one.name, one.kind) for one in found.serving.noise] == [("noise_0", "normal")]
    assert len(found.record["findings"]) == 3
    whole = load_run(tmp_path / "b" / "audit")
    halves = deployed(whole.halves, found, *_scales(found, whole.halves))
    images = torch.from_numpy(whole.roles.test.floats(slice(0, 4)))
    with torch.no_grad():
        with drawing_from(1):
            first = halves.edge(images)
        with drawing_from(1):
            again = halves.edge(images)
        other = halves.edge(images)
        quiet = silenced(halves.edge)
        clean = quiet(images)
        assert torch.equal(clean, quiet(images))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    noise = next(layer for layer in whole.halves.edge.modules() if isinstance(layer, Noise))
    assert float((first - clean).std()) == pytest.approx(float(noise.std), rel=0.15)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (ExportOptions(encoding="float32"), 4.0),
        (ExportOptions(encoding="uint4", min_agreement=0.5), 0.5),
        (ExportOptions(edge_weights="int8", min_agreement=0.5), 1.0),
    ],
    ids=["float32", "uint4", "int8 weights"],
)
def test_encodings(run: Path, tmp_path: Path, options: ExportOptions, size: float) -> None:
    found = export_run(run, tmp_path / "b", cut="stage1", options=options, has_audit=False)
    count = int(np.prod(found.record["feature_float32_shape"]))
    assert found.serving.feature_bytes == size * count
    whole = load_run(tmp_path / "b" / "audit", cut="stage1")
    halves = deployed(whole.halves, found, *_scales(found, whole.halves))
    images = torch.from_numpy(whole.roles.test.floats(slice(0, 7)))
    with torch.no_grad():
        expected, got = whole.halves.edge(images), halves.edge(images)
    error = float((got - expected).norm() / expected.norm())
    assert (error < 1e-4) if size == 4 else (1e-4 < error < 0.2)
    assert "not measured" in (tmp_path / "b" / "CARD.md").read_text()


def test_halves_that_answer_otherwise_are_refused_and_leave_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = Session.run
    monkeypatch.setattr(Session, "run", lambda self, inputs: np.roll(genuine(self, inputs), 1, axis=1))
    with pytest.raises(BundleError, match=r"do not answer as the split does.*99\.50%"):
        export_run(run, tmp_path / "b", cut="stage2", has_audit=False)
    assert list(tmp_path.iterdir()) == []


def test_the_proof_draws_its_images_from_all_of_them(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sorted by label, as a folder is: the first ones would show few labels."""
    whole = load_run(run, cut="stage2")
    test = whole.roles.test
    test = test.take(np.argsort(test.column("body"), kind="stable"))
    sorted_run = replace(whole, roles=replace(whole.roles, test=test))
    monkeypatch.setattr("louver.exporting.load_run", lambda *_, **__: sorted_run)
    monkeypatch.setattr("louver.exporting._MOST_COMPARED", 17)
    genuine, compared = exporting._equivalence, list[Images]()

    def noted(*arguments: Any) -> dict[str, Any]:
        compared.extend(one for one in arguments if isinstance(one, Images))
        return genuine(*arguments)

    monkeypatch.setattr("louver.exporting._equivalence", noted)
    found = export_run(run, tmp_path / "b", options=ExportOptions(min_agreement=0.5, seed=5), has_audit=False)
    assert found.record["equivalence"]["images"] == 17
    (drawn,) = (one.column("body") for one in compared)
    assert drawn.max() == test.column("body").max()
    assert len(np.unique(drawn)) > len(np.unique(test.column("body")[:17]))
    assert (np.diff(drawn) >= 0).all(), "in order"
    assert len(np.unique(compared[0].pixels.reshape(17, -1), axis=0)) == 17

    def places(most: int, seed: int) -> list[int]:
        numbered = Images(pixels=test.pixels, labels={"place": np.arange(len(test))}, classes={}, name="numbered")
        return exporting._sample(numbered, most, seed).column("place").tolist()

    assert places(17, 5) == places(17, 5) != places(17, 6)
    assert places(41, 5) == list(range(40))


def test_refusals_say_what_to_do(run: Path, noisy: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 cuts; name one: stage1, stage2"):
        export_run(run, tmp_path / "b")
    with pytest.raises(ConfigError, match=r"got no config\.toml"):
        export_run(tmp_path, tmp_path / "b")
    with pytest.raises(ConfigError, match="is in use"):
        export_run(run, bundle, cut="stage2")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.toml").write_bytes((run / "config.toml").read_bytes())
    with pytest.raises(ConfigError, match="has not ended"):
        export_run(unfinished, tmp_path / "b", cut="stage2")
    for wrong in ({"encoding": "jpeg"}, {"edge_weights": "int4"}, {"calibration_images": 1}, {"min_agreement": 0}):
        with pytest.raises(ConfigError, match="expected"):
            ExportOptions(**wrong)
    (copy := tmp_path / "copy").mkdir()
    for file in ("manifest.json", EDGE, CLOUD):
        (copy / file).write_bytes((bundle / file).read_bytes())
    with pytest.raises(BundleError, match="not a device's copy"):
        audit_bundle(copy, None)
    content = bytearray((copy / EDGE).read_bytes())
    content[-9] ^= 1
    (copy / EDGE).write_bytes(content)
    with pytest.raises(BundleError, match="not the file that was exported"):
        audit_bundle(copy, None)


def test_an_embedding_is_compared_by_angle_and_has_no_head(run: Path, tmp_path: Path) -> None:
    table = trained(
        run,
        task={"kind": "reidentification"},
        data=DATA,
        audit=SMALL["audit"] | {"cuts": ["stage2"]},
        attacks={"decoder": SMALL["attacks"]["decoder"]},
    )
    folder = made(tmp_path / "run", table)
    found = export_run(folder, tmp_path / "b", has_audit=False)
    assert found.record["equivalence"]["measure"] == "mean cosine"
    assert found.record["equivalence"]["agreement"] > 0.999
    assert found.serving.labels == ()
    with pytest.raises(ConfigError, match="leave --head out"):
        export_run(folder, tmp_path / "c", options=ExportOptions(has_head=True))
    assert not (tmp_path / "c").exists()


def swapped(rows: np.ndarray) -> np.ndarray:
    """Scores of which the two highest of every twelfth image have changed places, from the fifth on."""
    best, second = np.argsort(rows[4::12], axis=1)[:, :-3:-1].T
    at = np.arange(4, len(rows), 12)
    rows = rows.copy()
    rows[at, best], rows[at, second] = rows[at, second], rows[at, best]
    return rows


@pytest.mark.parametrize(
    ("model", "changes", "part", "what"),
    [
        (
            {"n_classes": 14},
            {"task": {"kind": "attributes", "columns": {"body": 6, "color": 8}}},
            slice(6, 14),
            "equal answers for color",
        ),
        ({}, {}, slice(None), "equal answers"),
    ],
    ids=["attributes", "no label"],
)
def test_answers_that_only_point_the_same_way_are_not_equal(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict, changes: dict, part: slice, what: str
) -> None:
    table = trained(run, data=DATA, audit=SMALL["audit"] | {"cuts": ["stage2"]}, **changes)
    if model:
        table |= {"model": SMALL["model"] | model, "training": SMALL["training"]}
    table["attacks"] = {"decoder": SMALL["attacks"]["decoder"]}
    folder = made(tmp_path / "run", table)
    found = export_run(folder, tmp_path / "b", has_audit=False)
    assert what in found.record["equivalence"]["agreements"]
    card = (tmp_path / "b" / "CARD.md").read_text()
    assert f"{what} 100.00%" in card
    assert f"become {model.get('n_classes', 6)} scores" in card

    genuine = Session.run

    def slightly_off(self: Session, inputs: dict) -> np.ndarray:
        rows = genuine(self, inputs)
        if rows.ndim == 2:
            rows = rows.copy()
            rows[:, part] = swapped(rows[:, part])
        return rows

    monkeypatch.setattr(Session, "run", slightly_off)
    with pytest.raises(BundleError, match=rf"expected {what} of 99\.50% .* on 40 test images, got 92\.50%"):
        export_run(folder, tmp_path / "c", has_audit=False)
    if model:
        options = ExportOptions(min_agreement=0.9)
        same = export_run(folder, tmp_path / "c", options=options, has_audit=False).record["equivalence"]
        assert (same["measure"], same["agreement"]) == (what, pytest.approx(0.925))
        assert same["agreements"]["equal answers for body"] == 1


def test_a_network_that_answers_with_one_number_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_run(run, cut="stage2")
    whole.halves.cloud = nn.Sequential(whole.halves.cloud, nn.Linear(6, 1)).eval()
    monkeypatch.setattr("louver.exporting.load_run", lambda *_, **__: whole)
    with pytest.raises(CutError, match=r"two numbers or more an image, got \(2, 1\)"):
        export_run(run, tmp_path / "b", has_audit=False)


@pytest.mark.filterwarnings("ignore")  # of executorch's own imports
def test_the_executorch_program_sends_what_the_split_sends(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("executorch.runtime", reason="executorch is not installed: louver[executorch]")
    from executorch.runtime import Runtime

    options = ExportOptions(has_executorch=True)
    found = export_run(run, tmp_path / "b", cut="stage2", options=options, has_audit=False)
    assert found.record["kept"]["edge.pte"] == file_hash(found.folder / "edge.pte")
    same = found.record["equivalence"]["executorch"]
    assert same["images"] == found.record["equivalence"]["images"]
    assert same["agreement"] >= 0.995
    assert same["relative_feature_error"] == pytest.approx(
        found.record["equivalence"]["relative_feature_error"], rel=0.05
    )
    program = Runtime.get().load_program(found.folder / "edge.pte").load_method("forward")
    whole = load_run(run, cut="stage2")
    quantize, _ = _scales(found, whole.halves)
    assert quantize is not None
    for i in range(5):
        image = torch.from_numpy(whole.roles.test.floats(slice(i, i + 1)))
        (got,) = program.execute([image])
        with torch.no_grad():
            expected = quantize(whole.halves.edge(image))
        assert (got.dtype, got.shape) == (torch.uint8, (1, *found.serving.feature_shape))
        off = (got.int() - expected.int()).abs()
        # Where float32 falls on the border between two steps, either is right.
        assert int(off.max()) <= 1
        assert float((off > 0).float().mean()) < 0.01


def test_an_executorch_program_that_sends_something_else_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever makes and runs such programs: here one that sends every picture's feature upside down."""
    whole = load_run(run, cut="stage2")
    monkeypatch.setattr("louver.exporting.to_executorch", lambda *_: b"a program")

    def program(content: bytes) -> Callable[[Sequence[Tensor]], Tensor]:
        assert content == b"a program"
        return lambda inputs: whole.halves.edge(inputs[0]).flip(1)

    monkeypatch.setattr("louver.exporting.executorch_program", program)
    options = ExportOptions(has_executorch=True, encoding="float32")
    with pytest.raises(BundleError, match="do not answer as the split does"):
        export_run(run, tmp_path / "b", cut="stage2", options=options, has_audit=False)
    assert not list(tmp_path.iterdir())


def test_without_executorch_nothing_is_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    monkeypatch.setitem(sys.modules, "executorch.backends.xnnpack.partition.xnnpack_partitioner", None)
    words = ("export", run, "-o", tmp_path / "b", "--cut", "stage2", "--no-audit", "--executorch")
    monkeypatch.setattr("sys.argv", ["louver", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "pip install 'louver[executorch]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_head_needs_pictures_to_learn_from(run: Path, tmp_path: Path) -> None:
    data = {role: DATA[role] for role in ("test", "auxiliary")} | {"label": "body"}
    folder = made(tmp_path / "run", trained(run, data=data, audit=SMALL["audit"] | {"cuts": ["stage2"]}))
    with pytest.raises(DataError, match="role train"):
        export_run(folder, tmp_path / "b", options=ExportOptions(has_head=True))


def test_the_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[object, str, str]:
        monkeypatch.setattr("sys.argv", ["louver", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    code, out, _ = call("export", run, "-o", "b", "--cut", "stage1", "--no-audit", "--encoding", "float32")
    assert code == 0
    assert "not audited: louver audit --bundle b" in out
    code, out, _ = call("audit", "--bundle", "b", "--json")
    assert code == 0
    assert {row["attack"] for row in json.loads(out)["rows"]} == {"mean_image", "decoder", "likelihood"}
    assert (tmp_path / "runs" / "small-bundle" / "report.html").is_file()
    assert read_bundle(tmp_path / "b").record["findings"]
    code, _, err = call("audit", "--bundle", "b")
    assert code == 2
    assert "--resume" in err
    code, _, err = call("audit", "x.toml", "--bundle", "b")
    assert code == 2
    assert "leave out FILE" in err
    code, _, err = call("audit")
    assert code == 2
    assert "experiment file or --bundle" in err
    code, out, _ = call("export", run, "-o", "c", "--cut", "stage2", "--no-audit", "--json")
    assert code == 0
    assert json.loads(out)["id"] == read_bundle(tmp_path / "c").id
