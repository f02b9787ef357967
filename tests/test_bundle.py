from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundles import FEATURE, IMAGE, N_SCORES, toy_bundle
from louver.bundle import CLOUD, EDGE, HEAD, _serving, bundle_id, check_kept, read_bundle, write_manifest
from louver.errors import BundleError


@pytest.mark.parametrize("has_noise", [False, True])
@pytest.mark.parametrize("encoding", ["uint8", "float32"])
def test_what_is_written_is_read_and_its_halves_fit(tmp_path: Path, encoding: str, has_noise: bool) -> None:
    written = toy_bundle(tmp_path / "b", encoding=encoding, has_noise=has_noise, has_head=True)
    bundle = read_bundle(tmp_path / "b", needs=(EDGE, CLOUD, HEAD))
    assert bundle == written
    edge, cloud = (onnxruntime.InferenceSession(bundle.path(file)) for file in (EDGE, CLOUD))
    drawn = {one.name: np.zeros((2, *one.shape), np.float32) for one in bundle.serving.noise}
    (feature,) = edge.run(["feature"], {"image": np.full((2, *IMAGE), 0.5, np.float32), **drawn})
    assert feature.shape == (2, *FEATURE) == (2, *bundle.serving.feature_shape)
    assert feature[0].nbytes == bundle.serving.feature_bytes
    (scores,) = cloud.run(["scores"], {"feature": feature})
    assert scores.shape == (2, N_SCORES)


def test_the_id_is_of_what_is_served_not_of_what_was_measured(tmp_path: Path) -> None:
    first = toy_bundle(tmp_path / "a")
    again = write_manifest(tmp_path / "a", "toy", first.serving, {"findings": [{"ssim": 0.4}]})
    assert again.id == first.id
    assert read_bundle(tmp_path / "a").record["findings"] == [{"ssim": 0.4}]
    assert toy_bundle(tmp_path / "b", seed=1).id != first.id
    assert toy_bundle(tmp_path / "c", name="other").id != first.id


def test_a_device_needs_no_cloud_half(tmp_path: Path) -> None:
    toy_bundle(tmp_path)
    (tmp_path / CLOUD).unlink()
    assert read_bundle(tmp_path, needs=(EDGE,)).path(EDGE).is_file()
    with pytest.raises(BundleError, match=r"expected cloud\.onnx"):
        read_bundle(tmp_path, needs=(CLOUD,))
    with pytest.raises(BundleError, match=r"exported without head\.onnx"):
        read_bundle(tmp_path, needs=(HEAD,))


@pytest.mark.parametrize("file", [EDGE, CLOUD])
def test_a_changed_byte_is_refused(tmp_path: Path, file: str) -> None:
    toy_bundle(tmp_path)
    content = bytearray((tmp_path / file).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / file).write_bytes(content)
    with pytest.raises(BundleError, match="not the file that was exported"):
        read_bundle(tmp_path, needs=(file,))


def test_all_files_are_of_the_folder_that_a_link_led_to(tmp_path: Path) -> None:
    for seed, name in enumerate(("old", "new")):
        toy_bundle(tmp_path / name, seed=seed)
    link = tmp_path / "link"
    link.symlink_to("old")
    bundle = read_bundle(link)
    link.unlink()
    link.symlink_to("new")
    assert bundle.folder == link
    assert bundle.content(CLOUD) == (tmp_path / "old" / CLOUD).read_bytes()
    assert bundle.manifest == (tmp_path / "old" / "manifest.json").read_bytes()
    assert read_bundle(link).content(CLOUD) == (tmp_path / "new" / CLOUD).read_bytes()


def test_what_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_bundle(tmp_path / "b")
    ring = tmp_path / "ring"
    ring.symlink_to(ring)
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        read_bundle(ring)
    (tmp_path / "b" / CLOUD).unlink()
    os.mkfifo(tmp_path / "b" / CLOUD)
    with pytest.raises(BundleError, match=r"expected cloud\.onnx"):
        read_bundle(tmp_path / "b", needs=(CLOUD,))

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(BundleError, match="Permission denied; see who may read it"):
        read_bundle(tmp_path / "b")


def _set(*keys: str | int, to: object) -> object:
    def change(content: dict) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = to

    return change


NOISE = {"name": "noise_0", "shape": [4], "kind": "normal"}
WRONG = {
    "a newer format": (_set("format", to=2), "expected format 1"),
    "another cut": (_set("serving", "cut", to="layer9"), "id is not that of its content"),
    "a name with a path": (_set("name", to="../x"), "part of an address"),
    "an unknown encoding": (_set("serving", "encoding", to="jpeg"), "expected an encoding"),
    "an empty shape": (_set("serving", "feature_shape", to=[]), "expected feature sizes"),
    "a size of 0": (_set("serving", "image_shape", to=[3, 0, 5]), "expected image sizes"),
    "a size that is no number": (_set("serving", "output_shape", to=["7"]), "expected output sizes"),
    "a size past all memory": (_set("serving", "image_shape", to=[2**20, 2**20]), "expected image sizes"),
    "fewer labels than scores": (_set("serving", "labels", to=["one"]), "as many labels"),
    "a file outside": (_set("serving", "files", "../edge.onnx", to="0" * 64), "SHA-256"),
    "no hash": (_set("serving", "files", EDGE, to="abc"), "SHA-256"),
    "an unknown key": (_set("serving", "colour", to=1), "damaged"),
    "shapes that are no list": (_set("serving", "image_shape", to=3), "damaged"),
    "no object": (_set("serving", to=[]), "damaged"),
    "a label that is no number": (_set("serving", "labels", 0, to=float("nan")), "finite"),
    "a cut that is no number": (_set("serving", "cut", to=float("nan")), "finite"),
    "a figure past all numbers": (_set("record", "findings", to=[float("inf")]), "finite"),
    "labels that are numbers": (_set("serving", "labels", to=list(range(N_SCORES))), "expected text"),
    "a cut that is a list": (_set("serving", "cut", to=["conv"]), "expected text"),
    "half a sign": (_set("serving", "labels", 0, to="\ud800"), "expected text"),
    "noise whose name is a number": (_set("serving", "noise", to=[dict(NOISE, name=1)]), "expected text"),
    "an image hidden by noise": (
        lambda content: content["serving"].update(image_shape=[0], noise=[dict(NOISE, name="image")]),
        "expected image sizes",
    ),
    "a record that is no object": (_set("record", to=3), "damaged"),
    "kept that is a list": (_set("record", "kept", to=["CARD.md"]), "expected `kept`"),
    "kept that has no hash": (_set("record", "kept", to={"CARD.md": "0"}), "SHA-256 of a file in the bundle"),
    "kept outside": (_set("record", "kept", to={"audit/../../x": "0" * 64}), "SHA-256 of a file in the bundle"),
    "kept at the root": (_set("record", "kept", to={"/etc/passwd": "0" * 64}), "SHA-256 of a file in the bundle"),
    "kept past any disk": (_set("record", "kept", to={"x" * 400: "0" * 64}), "SHA-256 of a file in the bundle"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_manifest_is_refused_with_what_to_do(tmp_path: Path, case: str) -> None:
    toy_bundle(tmp_path)
    change, words = WRONG[case]
    content = json.loads((tmp_path / "manifest.json").read_text())
    change(content)
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=words):
        read_bundle(tmp_path)


def test_an_id_that_fits_lets_no_wrong_manifest_pass(tmp_path: Path) -> None:
    toy_bundle(tmp_path)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    content["serving"]["labels"] = list(range(N_SCORES))
    content["id"] = bundle_id(content["name"], _serving(content["serving"]))
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match="expected text"):
        read_bundle(tmp_path)


def test_a_number_past_all_numbers_is_refused_however_it_is_written(tmp_path: Path) -> None:
    toy_bundle(tmp_path)
    path = tmp_path / "manifest.json"
    for written in ("NaN", "-Infinity", "1e999"):
        path.write_text(json.dumps(dict(json.loads(path.read_text()), record={})).replace("{}", f'{{"x": {written}}}'))
        with pytest.raises(BundleError, match="expected a finite number"):
            read_bundle(tmp_path)
        toy_bundle(tmp_path)


def _places(content: object, at: tuple = ()) -> list[tuple]:
    """The way to each value of a JSON document."""
    found = [at] if at else []
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            found += _places(value, (*at, key))
    return found


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A bundle with all that a manifest can hold, and its manifest."""
    folder = tmp_path_factory.mktemp("noisy")
    made = toy_bundle(folder, has_noise=True)
    kept = {"CARD.md": "0" * 64, "audit/config.toml": "1" * 64}
    write_manifest(folder, made.name, made.serving, {"findings": [{"mean": 0.5}], "kept": kept})
    return folder, (folder / "manifest.json").read_text()


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_whatever_a_manifest_holds_it_is_a_bundle_or_refused(noisy: tuple[Path, str], data: st.DataObject) -> None:
    folder, whole = noisy
    content = json.loads(whole)
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(_places(content)))
        _set(*place, to=data.draw(ANYTHING))(content)
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        content["id"] = bundle_id(content["name"], _serving(content["serving"]))
    (folder / "manifest.json").write_text(json.dumps(content))
    try:
        bundle = read_bundle(folder)
    except BundleError as error:
        str(error).encode()
        return
    assert all(isinstance(one, str) for one in (bundle.serving.cut, *bundle.serving.labels))
    check_kept(bundle)
    assert write_manifest(folder, bundle.name, bundle.serving, bundle.record).id == bundle.id


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"format": 1}', b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match="damaged"):
        read_bundle(tmp_path)
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        read_bundle(tmp_path / "nowhere")


def test_reading_loads_no_lab() -> None:
    code = "import louver.bundle, sys; sys.exit(bool({'torch', 'onnx', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
