"""Bundles read, read again, and refused."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from bundles import FEATURE, toy_bundle
from louver.bundle import CLOUD, EDGE, file_hash, write_manifest
from louver.cloud import Batching, Repository
from louver.cloud.models import load_model
from louver.cloud.refusals import Refusal
from louver.errors import BundleError, ConfigError
from servers import features, truth


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def opened():
    """Makes repositories, and closes them."""
    made = []

    def open_(*paths, max_rows_of=None, **options):
        batching = Batching(workers=1, threads=1, max_rows_of=max_rows_of or {})
        made.append(Repository(paths, batching=batching, **options))
        return made[-1]

    yield open_
    for one in made:
        one.close()


def ids(repository: Repository) -> list[tuple[str, str]]:
    return [(one.model.name, one.model.version) for one in repository.current]


@pytest.mark.parametrize(("encoding", "dtype"), [("uint8", np.uint8), ("float32", np.float32)])
def test_a_model_gives_what_onnxruntime_gives(tmp_path, encoding, dtype):
    bundle = toy_bundle(tmp_path, encoding=encoding)
    model = load_model(tmp_path, threads=1)
    feature = features(5, dtype=dtype)
    np.testing.assert_allclose(model.run(feature), truth(bundle, feature), rtol=1e-5, atol=1e-5)
    assert model.feature_bytes == bundle.serving.feature_bytes == feature[0].nbytes


def test_a_server_needs_no_edge_half(tmp_path):
    toy_bundle(tmp_path)
    (tmp_path / EDGE).unlink()
    assert load_model(tmp_path, threads=1).feature_shape == FEATURE


def test_a_folder_of_bundles_and_names_and_versions(tmp_path, opened):
    a = toy_bundle(tmp_path / "all" / "a")
    b = toy_bundle(tmp_path / "all" / "b", seed=1)
    c = toy_bundle(tmp_path / "c", name="other")
    shutil.copytree(tmp_path / "all" / "a", tmp_path / "again")
    (tmp_path / "all" / "notes").mkdir()
    repository = opened(tmp_path / "all", tmp_path / "c", tmp_path / "again")
    assert ids(repository) == sorted([("toy", a.id), ("toy", b.id), ("other", c.id)])
    assert repository.find("toy", b.id).model.version == b.id
    assert repository.find("other", None).model.version == c.id
    for name, version, status, words in (
        ("toy", None, 400, [a.id, b.id]),
        ("toy", c.id, 404, [a.id, b.id, "device"]),
        ("tox", None, 404, ["other, toy"]),
        ("tox", a.id, 404, ["other, toy"]),
        ("other", a.id, 404, [c.id]),
        ("other\x1b[2J" + "x" * 200, None, 404, ["..."]),
    ):
        with pytest.raises(Refusal) as refused:
            repository.find(name, version)
        assert refused.value.status == status
        assert all(word in refused.value.reason for word in words)
        assert refused.value.reason.isprintable()
        assert len(refused.value.reason) < 300


def _graph(
    path: Path,
    *,
    name="feature",
    kind=TensorProto.UINT8,
    shape=("n", *FEATURE),
    output="scores",
    width=7,
    is_width_drawn=False,
) -> None:
    nodes = [
        helper.make_node("Cast", [name], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["float"], ["flat"]),
    ]
    if is_width_drawn:  # six, and the sum of the feature: no shape says so
        nodes += [
            helper.make_node("ReduceSum", ["flat"], ["sum"], keepdims=0),
            helper.make_node("Cast", ["sum"], ["whole"], to=TensorProto.INT64),
            helper.make_node("Reshape", ["whole", "one"], ["extra"]),
            helper.make_node("Add", ["extra", "six"], ["end"]),
        ]
    nodes.append(helper.make_node("Slice", ["flat", "zero", "end" if is_width_drawn else "width", "one"], [output]))
    constants = [
        helper.make_tensor(key, TensorProto.INT64, [1], [value])
        for key, value in (("zero", 0), ("width", width), ("one", 1), ("six", 6))
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", "m"])],
        constants,
    )
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )


ODD = {
    "another input": ({"name": "x"}, "expected one input feature"),
    "another type": ({"kind": TensorProto.FLOAT}, r"expected one input feature tensor\(uint8\)"),
    "another shape": ({"shape": ("n", 4, 5, 4)}, "expected one input feature"),
    "a fixed batch": ({"shape": (1, *FEATURE)}, "expected one input feature"),
    "fewer dimensions": ({"shape": ("n", 80)}, "expected one input feature"),
    "another output": ({"output": "y"}, "expected one output scores"),
    "other scores": ({"width": 6}, "expected one output scores"),
    "scores of any width": ({"is_width_drawn": True}, r"expected scores of \(2, 7\) for two images .*, got \(2, 6\)"),
}


@pytest.mark.parametrize("case", ODD)
def test_a_graph_that_is_not_as_its_manifest_says_is_refused(tmp_path, case):
    changes, words = ODD[case]
    bundle = toy_bundle(tmp_path)
    _graph(tmp_path / CLOUD, **changes)
    files = {**bundle.serving.files, CLOUD: file_hash(tmp_path / CLOUD)}
    write_manifest(tmp_path, "toy", type(bundle.serving)(**{**vars(bundle.serving), "files": files}), {})
    with pytest.raises(BundleError, match=words):
        load_model(tmp_path, threads=1)


def test_the_graph_of_that_test_is_served_when_it_fits(tmp_path):
    bundle = toy_bundle(tmp_path)
    _graph(tmp_path / CLOUD)
    files = {**bundle.serving.files, CLOUD: file_hash(tmp_path / CLOUD)}
    write_manifest(tmp_path, "toy", type(bundle.serving)(**{**vars(bundle.serving), "files": files}), {})
    assert load_model(tmp_path, threads=1).run(features(3)).shape == (3, 7)


def test_what_onnxruntime_cannot_read_is_refused(tmp_path):
    bundle = toy_bundle(tmp_path)
    for content in (b"", b"no graph", onnx.ModelProto().SerializeToString()):
        (tmp_path / CLOUD).write_bytes(content)
        files = {**bundle.serving.files, CLOUD: file_hash(tmp_path / CLOUD)}
        write_manifest(tmp_path, "toy", type(bundle.serving)(**{**vars(bundle.serving), "files": files}), {})
        with pytest.raises(BundleError, match="onnxruntime cannot run it"):
            load_model(tmp_path, threads=1)


def test_weights_outside_the_graph_are_refused(tmp_path, monkeypatch):
    """Their bytes would be under no hash, and be looked for in whatever folder the server was started in."""
    bundle = toy_bundle(tmp_path)
    model = onnx.load(tmp_path / CLOUD)
    onnx.save(model, tmp_path / CLOUD, save_as_external_data=True, location="weights.bin", size_threshold=0)
    files = {**bundle.serving.files, CLOUD: file_hash(tmp_path / CLOUD)}
    write_manifest(tmp_path, "toy", type(bundle.serving)(**{**vars(bundle.serving), "files": files}), {})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match="onnxruntime cannot run it"):
        load_model(tmp_path, threads=1)


def test_a_changed_or_missing_graph_is_refused(tmp_path, opened):
    toy_bundle(tmp_path)
    content = bytearray((tmp_path / CLOUD).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / CLOUD).write_bytes(content)
    with pytest.raises(BundleError, match="not the file that was exported"):
        opened(tmp_path)
    (tmp_path / CLOUD).unlink()
    with pytest.raises(BundleError, match=r"expected cloud\.onnx"):
        opened(tmp_path)


def test_paths_without_bundles_are_refused(tmp_path, opened):
    with pytest.raises(BundleError, match="got neither"):
        opened(tmp_path)
    with pytest.raises(BundleError, match="No such file"):
        opened(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="at least one bundle"):
        opened()


def test_a_replaced_version_is_kept_for_its_time_and_then_let_go(tmp_path, opened):
    clock = Clock()
    old = toy_bundle(tmp_path / "b")
    repository = opened(tmp_path / "b", keep_s=30, clock=clock)
    first = repository.find("toy", None)
    new = toy_bundle(tmp_path / "b", seed=1)
    assert repository.find("toy", None) is first  # nothing is read before it is asked for
    assert repository.reload() == []
    assert ids(repository) == [("toy", new.id)]
    assert repository.find("toy", None).model.version == new.id
    assert repository.find("toy", old.id) is first
    with pytest.raises(Refusal):
        repository.find("other", old.id)
    clock.now += 29
    repository.reload()
    repository.sweep()
    assert [one.model.version for one in repository.leaving] == [old.id]
    clock.now += 1
    with pytest.raises(Refusal) as refused:
        repository.find("toy", old.id)
    assert refused.value.status == 404
    assert new.id in refused.value.reason
    repository.sweep()
    assert repository.leaving == []
    assert not repository._state.leaving  # and its memory


def test_what_comes_back_goes_on_with_its_queue(tmp_path, opened):
    old = toy_bundle(tmp_path / "b")
    repository = opened(tmp_path / "b")
    first = repository.find("toy", old.id)
    assert repository.reload() == []
    assert repository.find("toy", old.id) is first
    toy_bundle(tmp_path / "b", seed=1)
    repository.reload()
    toy_bundle(tmp_path / "b")
    repository.reload()
    assert repository.find("toy", None).model.version == old.id
    assert len(repository.leaving) == 1


def test_a_bundle_that_does_not_load_leaves_what_was_there(tmp_path, opened):
    a, b = (toy_bundle(tmp_path / "all" / name, seed=seed) for seed, name in enumerate("ab"))
    repository = opened(tmp_path / "all")
    first = ids(repository)
    manifest = tmp_path / "all" / "a" / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole[:100])
    (failure,) = repository.reload()
    assert "damaged" in failure
    assert ids(repository) == first
    assert repository.leaving == []
    manifest.write_text(whole)
    content = json.loads(whole)
    content["serving"]["cut"] = "another"
    manifest.write_text(json.dumps(content))
    assert "id is not that" in repository.reload()[0]
    assert ids(repository) == first
    shutil.rmtree(tmp_path / "all" / "a")  # taken away on purpose: it leaves
    assert repository.reload() == []
    assert ids(repository) == [("toy", b.id)]
    assert [one.model.version for one in repository.leaving] == [a.id]
    shutil.rmtree(tmp_path / "all")  # the whole place is gone: a disk that is away, not a decision
    assert "No such file" in repository.reload()[0]
    assert ids(repository) == [("toy", b.id)]


def test_a_manifest_that_holds_no_number_leaves_the_others_to_be_read(tmp_path, opened):
    a, _ = (toy_bundle(tmp_path / "all" / name, seed=seed, name=name) for seed, name in enumerate("ab"))
    repository = opened(tmp_path / "all")
    manifest = tmp_path / "all" / "a" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["serving"]["labels"][0] = float("nan")
    manifest.write_text(json.dumps(content))
    new = toy_bundle(tmp_path / "all" / "b", seed=2, name="b")
    (failure,) = repository.reload()
    assert "finite" in failure
    assert ids(repository) == [("a", a.id), ("b", new.id)]


async def batches(repository: Repository, name: str, *, requests: int) -> list[int]:
    """The rows of each run, when as many requests of one image come at once."""
    served, told = repository.find(name, None), []
    served.told.append(told.append)
    await asyncio.gather(*(served.batcher.submit(features(1)) for _ in range(requests)))
    served.told.clear()
    return told


def test_a_model_has_its_own_largest_batch_whatever_its_version(tmp_path, opened):
    old, _ = (toy_bundle(tmp_path / name, name=name) for name in ("small", "other"))
    repository = opened(tmp_path, max_rows_of={"small": 3})

    async def work():
        assert await batches(repository, "small", requests=7) == [3, 3, 1]
        assert await batches(repository, "other", requests=7) == [7]
        toy_bundle(tmp_path / "small", name="small", seed=1)
        await asyncio.to_thread(repository.reload)
        assert repository.find("small", None).model.version != old.id
        assert await batches(repository, "small", requests=7) == [3, 3, 1]

    asyncio.run(work())


def test_a_name_with_its_own_batch_is_served_at_the_start_and_may_go_and_come_back(tmp_path, opened):
    for name in ("a", "b"):
        toy_bundle(tmp_path / name, name=name)
    with pytest.raises(ConfigError, match="batching of 'c': no such model is served; served: a, b"):
        opened(tmp_path, max_rows_of={"a": 2, "c": 3})
    assert len(opened(tmp_path, max_rows_of={"c": 3}, may_lack_names=True).current) == 2
    repository = opened(tmp_path, max_rows_of={"b": 2}, keep_s=0)
    (tmp_path / "b").rename(tmp_path.parent / "away")
    assert repository.reload() == []
    assert [name for name, _ in ids(repository)] == ["a"]
    toy_bundle(tmp_path / "b", name="b", seed=1)
    assert repository.reload() == []
    assert asyncio.run(batches(repository, "b", requests=5)) == [2, 2, 1]


def test_what_is_in_flight_is_finished_by_the_version_it_was_sent_to(tmp_path, opened):
    old = toy_bundle(tmp_path / "b")
    repository = opened(tmp_path / "b", keep_s=0)
    feature = features(3)
    before = truth(old, feature)

    async def work():
        futures = [repository.find("toy", old.id).batcher.submit(feature) for _ in range(9)]
        toy_bundle(tmp_path / "b", seed=1)
        await asyncio.to_thread(repository.reload)
        repository.sweep()
        with pytest.raises(Refusal):
            repository.find("toy", old.id)
        return await asyncio.gather(*futures)

    for found in asyncio.run(work()):
        np.testing.assert_allclose(found, before, rtol=1e-5, atol=1e-5)
