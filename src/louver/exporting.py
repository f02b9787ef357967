"""From a split to a bundle: graphs, scales, proof that they answer as the split does, the audit of what is sent."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import safetensors.torch
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor, nn

from louver.bundle import (
    CLOUD,
    EDGE,
    HEAD,
    Bundle,
    Encoding,
    Serving,
    bundle_id,
    check_kept,
    file_hash,
    read_bundle,
    write_manifest,
)
from louver.card import CARD, card
from louver.cut import Split
from louver.deployed import Session, deployed, drawn
from louver.errors import BundleError, ConfigError, CutError, DataError
from louver.experiment import Run, audit_run, load_run
from louver.graphs import Given, given_noise, to_onnx
from louver.mobile import executorch_program, to_executorch
from louver.probes.tail import small_tail, train_tail
from louver.quantizing import Dequantize, Quantize, fit_quantization
from louver.signing import SIGNATURE
from louver.stochastic import drawing_from
from louver.storage import refusals, write_bytes
from louver.tasks import Attributes, Classification, ReIdentification, Task
from louver.types import Audit, Images, Progress

__all__ = ["ExportOptions", "audit_bundle", "export_run"]

ORIGIN = "audit"
"""Folder of a bundle that an auditor needs, and neither device nor server: the experiment and the split in torch."""

SCALES = "scales.safetensors"
PROGRAM = "edge.pte"
_ROWS_AT_ONCE = 64
_MOST_COMPARED = 1000
_AGREEMENT = 0.995
_BITS: Mapping[Encoding, Literal[4, 8]] = {"uint8": 8, "uint4": 4}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a split becomes a bundle.

    encoding: how features are sent. edge_weights: "int8" quantizes the edge's convolutions and matrices, too.
    has_head: also train a small network that answers on the device while the cloud is away. has_executorch: also write
    the edge as an ExecuTorch program (edge.pte), for one image at a time. calibration_images: of the auxiliary ones, to
    find scales on. min_agreement: the share of test images whose highest score must be where the split in torch has it,
    in each attribute (for re-identification: the mean cosine); below it nothing is exported. seed: also of the draws of
    calibration images and of the test images that are compared, 1,000 at most.

    Raises:
        ConfigError: a value out of range.
    """

    encoding: Encoding = "uint8"
    edge_weights: Literal["float32", "int8"] = "float32"
    has_head: bool = False
    has_executorch: bool = False
    calibration_images: int = 512
    min_agreement: float = _AGREEMENT
    seed: int = 0

    def __post_init__(self) -> None:
        if self.encoding not in get_args(Encoding):
            raise ConfigError(f"expected an encoding of {', '.join(get_args(Encoding))}, got {self.encoding!r}")
        if self.edge_weights not in ("float32", "int8"):
            raise ConfigError(f"expected edge weights of float32 or int8, got {self.edge_weights!r}")
        if self.calibration_images < 2:
            raise ConfigError(f"expected 2 calibration images or more, got {self.calibration_images}")
        if not 0 < self.min_agreement <= 1:
            raise ConfigError(f"expected min_agreement above 0 and at most 1, got {self.min_agreement}")


def export_run(
    run_folder: Path,
    folder: Path,
    *,
    name: str | None = None,
    cut: str | None = None,
    options: ExportOptions | None = None,
    has_audit: bool = True,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Bundle:
    """The bundle made in `folder` from the split of a finished run, audited as it will be sent unless told otherwise.

    `folder` holds all of it or is not there.

    Raises:
        ConfigError: no finished run, a folder that is in use, or a task that has no head.
        CutError: a half that cannot be written as ONNX, or that answers with anything but one row of two numbers or
            more an image.
        BundleError: the graphs do not answer as the split does; the message says how far they are.
        LouverError: whatever the audit refuses.
    """
    options = options or ExportOptions()
    tell = progress or (lambda what, fraction: None)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is in use; choose another folder, or remove it first")
    if folder.resolve() == Path.cwd():
        raise ConfigError(f"expected a new folder for the bundle, got {folder}, which is where you are; name another")
    tell("reading the run", 0.0)
    run = load_run(run_folder, cut=cut)
    with _growing(folder) as made:
        bundle = _export(run, run_folder, made, name or run.experiment.name, options, tell)
        if has_audit:
            # Beside the run and not in the bundle: it holds test pictures.
            where = run_folder / "exported" / bundle.id
            found = _audited(run, bundle, where, device, lambda what, part: tell(what, 0.3 + 0.7 * part))
            bundle = _with_findings(bundle, found)
    tell("done", 1.0)
    return read_bundle(folder, needs=tuple(bundle.serving.files))


def audit_bundle(
    folder: Path, out: Path | None, *, device: torch.device | str = "cpu", progress: Progress | None = None
) -> Audit:
    """The audit of what a bundle's edge sends, by the attacks of its experiment; its figures go into the manifest.

    `out` becomes a run folder, with the pictures that were attacked and what came of them.

    Raises:
        BundleError: a bundle without the files that an audit needs, or with a changed one (a changed card is replaced).
        LouverError: whatever the audit refuses; the manifest stays as it was.
    """
    bundle = read_bundle(folder, needs=(EDGE, CLOUD))
    # Before anything is read from there: the new hashes would vouch for what somebody changed. Not the card, which is
    # made of the manifest: one that does not fit it is written anew with the findings.
    check_kept(bundle, apart_from=(CARD,))
    if not (folder / ORIGIN).is_dir():
        raise BundleError(
            f"expected a folder {ORIGIN!r} in {folder}, got none; audit the bundle as it was exported, and "
            "not a device's copy of it"
        )
    run = load_run(folder / ORIGIN, cut=bundle.serving.cut)
    found = _audited(run, bundle, out, device, progress)
    _with_findings(bundle, found)
    return found


def _audited(
    run: Run, bundle: Bundle, folder: Path | None, device: torch.device | str, progress: Progress | None
) -> Audit:
    halves = deployed(run.halves, bundle, *_scales(bundle, run.halves))
    note = f"What is attacked is what the bundle's edge sends: {bundle.serving.encoding}, rounded in its graph."
    return audit_run(run, halves, folder, name=bundle.name, notes=[note], device=device, progress=progress)


def _with_findings(bundle: Bundle, found: Audit) -> Bundle:
    record = dict(bundle.record) | {
        "threat": asdict(found.threat) | {"grants": sorted(found.threat.grants)},
        "findings": [asdict(row) for row in found.rows],
        "verdict": asdict(found.verdict),
        "environment": dict(found.environment),
    }
    (bundle.folder / SIGNATURE).unlink(missing_ok=True)  # it was of other figures
    return _sealed(bundle.folder, bundle.name, bundle.serving, record)


def _sealed(folder: Path, name: str, serving: Serving, record: dict[str, Any]) -> Bundle:
    """The bundle with its manifest and card written, and the hashes of all that no graph needs noted.

    Ended anywhere in between, it leaves a bundle that is accepted: the old one or the new one, maybe without its card.
    """
    bundle = Bundle(folder=folder, name=name, id=bundle_id(name, serving), serving=serving, record=record)
    text = card(bundle).encode()
    paths = [*folder.glob(PROGRAM), *sorted(path for path in (folder / ORIGIN).rglob("*") if path.is_file())]
    kept = {CARD: hashlib.sha256(text).hexdigest()}
    kept |= {path.relative_to(folder).as_posix(): file_hash(path) for path in paths}
    with refusals(folder / CARD):
        # A card that is missing is no change; the old one beside the new manifest would be.
        (folder / CARD).unlink(missing_ok=True)
    bundle = write_manifest(folder, name, serving, record | {"kept": kept})
    write_bytes(folder / CARD, text)
    return bundle


@contextmanager
def _growing(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that becomes it at the end, and is gone if the end is not reached."""
    with refusals(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            yield made
            umask = os.umask(0)
            os.umask(umask)
            made.chmod(0o777 & ~umask)
            made.replace(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)


# The graphs


class _Sending(nn.Module):
    """Images, and noise if the edge takes any, to what crosses the network."""

    def __init__(self, edge: Given, quantize: Quantize | None) -> None:
        super().__init__()
        self.edge = edge
        self.quantize = quantize

    def forward(self, image: Tensor, *noise: Tensor) -> Tensor:
        features: Tensor = self.edge(image, *noise)
        return features if self.quantize is None else self.quantize(features)


def _export(run: Run, run_folder: Path, made: Path, name: str, options: ExportOptions, tell: Progress) -> Bundle:
    halves, roles = run.halves.cpu(), run.roles
    calibration = _sample(roles.auxiliary, options.calibration_images, options.seed)
    example = torch.from_numpy(calibration.floats(slice(0, 2)))
    edge = given_noise(halves.edge, example)
    tell("scales", 0.02)
    with drawing_from(options.seed), torch.no_grad():
        features = torch.cat([_features(edge, part) for part in _batches(calibration)])
    if features.dtype != torch.float32:
        raise CutError(f"cut {halves.cut.name!r}: expected float32 features, got {features.dtype}; cut elsewhere")
    quantize, dequantize = None, None
    if options.encoding != "float32":
        quantize, dequantize = fit_quantization(features, _BITS[options.encoding])
    tell("edge graph", 0.05)
    noise = {one.name: torch.zeros(len(example), *one.shape) for one in edge.inputs}
    sending = _Sending(edge, quantize).eval()
    graph = to_onnx(sending, {"image": example, **noise}, "feature")
    if options.edge_weights == "int8":
        graph = _with_int8_weights(graph, edge, calibration, options.seed)
    tell("cloud graph", 0.12)
    with torch.no_grad():
        sent = sending(example, *noise.values())
        reading = halves.cloud if dequantize is None else nn.Sequential(dequantize, halves.cloud)
        answer = reading.eval()(sent)
    # Of a single number nobody could say how near is near enough.
    if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != len(example) or answer.shape[1] < 2:
        raise CutError(
            "expected a network that answers with one row of two numbers or more an image, got "
            f"{tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__}; wrap it so that it does"
        )
    graphs = {EDGE: graph, CLOUD: to_onnx(reading, {"feature": sent}, "scores")}
    if options.has_head:
        tell("head", 0.18)
        head = _head(run, edge, quantize, dequantize, options.seed)
        graphs[HEAD] = to_onnx(head, {"feature": sent}, "scores")
    for file, content in graphs.items():
        write_bytes(made / file, content)
    if options.has_executorch:
        tell("ExecuTorch program", 0.2)
        write_bytes(made / PROGRAM, to_executorch(sending, {"image": example, **noise}))
    serving = Serving(
        cut=halves.cut.name,
        image_shape=tuple(roles.test.image_shape),
        encoding=options.encoding,
        feature_shape=tuple(sent.shape[1:]),
        output_shape=tuple(answer.shape[1:]),
        files={file: file_hash(made / file) for file in graphs},
        noise=edge.inputs,
        labels=_labels(run.task, roles.test, answer.shape[1]),
    )
    tell("comparing with the split", 0.22)
    network = _Bundled(graphs, serving)
    test = _sample(roles.test, _MOST_COMPARED, options.seed)
    same = _equivalence(halves, edge, network, dequantize, test, options, run.task)
    record = _record(run, serving, options, same, network, len(calibration))
    if options.has_executorch:
        tell("comparing the ExecuTorch program", 0.24)
        programmed = _Programmed((made / PROGRAM).read_bytes(), network)
        same["executorch"] = _equivalence(halves, edge, programmed, dequantize, test, options, run.task)
    _keep_origin(run, run_folder, made / ORIGIN, quantize)
    return _sealed(made, name, serving, record)


def _sample(images: Images, most: int, seed: int) -> Images:
    """A random draw of `most` images, or all of them, in their order: the first ones of a folder are of few classes."""
    order = np.random.default_rng(seed).permutation(len(images))
    return images.take(np.sort(order[:most]))


def _batches(images: Images) -> Iterator[Tensor]:
    for start in range(0, len(images), _ROWS_AT_ONCE):
        yield torch.from_numpy(images.floats(slice(start, start + _ROWS_AT_ONCE)))


def _noise(edge: Given, n: int) -> dict[str, NDArray[np.float32]]:
    return drawn(edge.inputs, n)


def _features(edge: Given, images: Tensor) -> Tensor:
    found: Tensor = edge(images, *(torch.from_numpy(one) for one in _noise(edge, len(images)).values()))
    return found


def _with_int8_weights(graph: bytes, edge: Given, calibration: Images, seed: int) -> bytes:
    """The edge with weights and inner activations of 8 bits, their ranges found on the calibration images."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = _batches(calibration)

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            images = next(self.batches, None)
            return None if images is None else {"image": images.numpy(), **_noise(edge, len(images))}

    with tempfile.TemporaryDirectory() as there, drawing_from(seed):
        paths = [Path(there) / f"{step}.onnx" for step in ("plain", "prepared", "quantized")]
        paths[0].write_bytes(graph)
        quant_pre_process(str(paths[0]), str(paths[1]), skip_symbolic_shape=True)
        quantize_static(
            str(paths[1]),
            str(paths[2]),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        )
        return paths[2].read_bytes()


def _head(run: Run, edge: Given, quantize: Quantize | None, dequantize: Dequantize | None, seed: int) -> nn.Module:
    """A small network from what is sent to scores, trained on the training images."""
    task, images = run.task, run.roles.train
    if not isinstance(task, Classification):
        raise ConfigError("a head answers for a classification; leave --head out, or use the policies fail or queue")
    if not len(images):
        raise DataError("a head is trained on the role train, which is empty; name data.train in the experiment")
    with drawing_from(seed), torch.no_grad():
        features = torch.cat([_features(edge, part) for part in _batches(images)])
        if quantize is not None and dequantize is not None:
            features = dequantize(quantize(features))
    head = small_tail(features, n_classes=task.n_classes, seed=seed)
    train_tail(
        head,
        features,
        torch.from_numpy(images.column(task.column)),
        epochs=8,
        batch_size=64,
        learning_rate=2e-3,
        seed=seed,
        device="cpu",
        learns_statistics=True,
    )
    return head.eval() if dequantize is None else nn.Sequential(dequantize, head).eval()


def _labels(task: Task | None, images: Images, n_outputs: int) -> tuple[str, ...]:
    if not isinstance(task, Classification):
        return ()
    return tuple(images.classes.get(task.column) or map(str, range(n_outputs)))


# Proof and record


class _Bundled(nn.Module):
    """Both graphs, one after the other, as a network."""

    def __init__(self, graphs: Mapping[str, bytes], serving: Serving) -> None:
        super().__init__()
        self.edge, self.cloud = Session(graphs[EDGE]), Session(graphs[CLOUD])
        self.head = Session(graphs[HEAD]) if HEAD in graphs else None
        self.noise = serving.noise

    def sent(self, images: Tensor, noise: dict[str, NDArray[np.float32]]) -> NDArray[Any]:
        return self.edge.run({"image": images.detach().cpu().numpy(), **noise})

    def forward(self, images: Tensor) -> Tensor:
        sent = self.sent(images, drawn(self.noise, len(images)))
        return torch.from_numpy(self.cloud.run({"feature": sent}))


class _Programmed:
    """The ExecuTorch program in the place of the edge's graph; it takes one image at a time."""

    def __init__(self, program: bytes, network: _Bundled) -> None:
        self._run, self.cloud = executorch_program(program), network.cloud

    def sent(self, images: Tensor, noise: dict[str, NDArray[np.float32]]) -> NDArray[Any]:
        given = images, *map(torch.from_numpy, noise.values())
        return torch.cat([self._run([one[i : i + 1] for one in given]) for i in range(len(images))]).numpy()


class _Local(nn.Module):
    """What the device answers alone."""

    def __init__(self, network: _Bundled, head: Session) -> None:
        super().__init__()
        self._network, self._head = network, head

    def forward(self, images: Tensor) -> Tensor:
        sent = self._network.sent(images, drawn(self._network.noise, len(images)))
        return torch.from_numpy(self._head.run({"feature": sent}))


def _equivalence(
    halves: Split,
    edge: Given,
    network: _Bundled | _Programmed,
    dequantize: Dequantize | None,
    images: Images,
    options: ExportOptions,
    task: Task | None,
) -> dict[str, Any]:
    """How far the graphs (or the program and the cloud's graph) are from the split on images, under the same noise.

    Raises:
        BundleError: too far.
    """
    alike: dict[str, list[Tensor]] = {}
    off, whole, sizes = 0.0, 0.0, list[int]()
    compressor = zstandard.ZstdCompressor(level=1)
    with torch.no_grad(), drawing_from(options.seed + 1):
        for part in _batches(images):
            noise = _noise(edge, len(part))
            features = edge(part, *map(torch.from_numpy, noise.values()))
            expected = halves.cloud(features)
            sent = network.sent(part, noise)
            got = torch.from_numpy(network.cloud.run({"feature": sent}))
            arrived = torch.from_numpy(sent) if dequantize is None else dequantize(torch.from_numpy(sent))
            off += float((arrived - features).square().sum())
            whole += float(features.square().sum())
            sizes += [len(compressor.compress(row.tobytes())) for row in sent]
            for what, rows in _alike(task, expected, got).items():
                alike.setdefault(what, []).append(rows)
    agreements = {what: float(torch.cat(rows).mean()) for what, rows in alike.items()}
    worst = min(agreements, key=agreements.__getitem__)
    error = (off / whole) ** 0.5 if whole else 0.0
    if not agreements[worst] >= options.min_agreement:
        raise BundleError(
            f"the exported halves do not answer as the split does: expected {worst} of {options.min_agreement:.2%} or "
            f"more on {len(sizes)} test images, got {agreements[worst]:.2%} (features off by "
            f"{error:.2g} of their size); send more bits (--encoding uint8 or float32), keep float32 weights, "
            "or accept it by --min-agreement"
        )
    return {
        "images": len(sizes),
        "measure": worst,
        "agreement": agreements[worst],
        "agreements": agreements,
        "min_agreement": options.min_agreement,
        "relative_feature_error": error,
        "compressed_bytes": float(np.mean(sizes)),
        "largest_compressed_bytes": max(sizes),
    }


def _alike(task: Task | None, expected: Tensor, got: Tensor) -> dict[str, Tensor]:
    """What is compared, in words -> for each image how alike the two answers are, 1 at most.

    Without a task an answer counts as the scores of one classification: that two answers point the same way says next
    to nothing of which score is the highest.
    """
    if isinstance(task, ReIdentification):
        return {"mean cosine": nn.functional.cosine_similarity(expected, got)}

    def share(one: Tensor, other: Tensor) -> Tensor:
        return ((one.argmax(1) == other.argmax(1)) & other.isfinite().all(1)).float()

    if isinstance(task, Attributes):
        parts = zip(task.columns, task.parted(expected), task.parted(got), strict=True)
        return {f"equal answers for {column}": share(one, other) for column, one, other in parts}
    return {"equal answers": share(expected, got)}


def _record(
    run: Run, serving: Serving, options: ExportOptions, same: dict[str, Any], network: _Bundled, n_calibration: int
) -> dict[str, Any]:
    halves, task, test = run.halves, run.task, run.roles.test
    cost = halves.cut.cost
    utility: dict[str, Any] = {}
    if task is not None:
        with drawing_from(options.seed + 2):
            utility["split"] = dict(task.evaluate(halves, test))
        with drawing_from(options.seed + 2):
            utility["bundle"] = dict(task.evaluate(network, test))
        if network.head is not None:
            with drawing_from(options.seed + 2):
                utility["head"] = dict(task.evaluate(_Local(network, network.head), test))
    return {
        "made": {
            "versions": {name: metadata.version(name) for name in ("louver", "onnx", "onnxruntime", "torch")},
            "encoding": options.encoding,
            "edge_weights": options.edge_weights,
            "calibration_images": n_calibration,
            "seed": options.seed,
        },
        "model": run.experiment.model.name,
        "task": "none" if task is None else type(task).__name__,
        "defense": "none" if run.experiment.defense is None else type(run.experiment.defense).__name__,
        "preprocessing": "float32 in [0,1], channels first; the network normalizes inside itself",
        "feature_float32_shape": list(halves.cut.feature_shape),
        "cost": {
            "edge_macs": cost.edge.macs,
            "edge_weight_bytes": cost.edge.weight_bytes,
            "edge_peak_activation_bytes": cost.edge.peak_activation_bytes,
            "cloud_macs": cost.cloud.macs,
            "float32_feature_bytes": 4 * int(np.prod(halves.cut.feature_shape)),
            "feature_bytes": serving.feature_bytes,
        },
        "equivalence": same,
        "utility": utility,
        "experiment": dict(run.experiment.table),
        "findings": [],
    }


def _keep_origin(run: Run, run_folder: Path, folder: Path, quantize: Quantize | None) -> None:
    """What a later audit of the bundle needs, in the layout of a run folder, and the scales of the rounding."""
    folder.mkdir(parents=True)
    experiment = run.experiment
    write_bytes(folder / "config.toml", experiment.to_toml().encode())
    if experiment.defense is not None:
        for file in ("split.safetensors", "split.json"):
            shutil.copyfile(run_folder / file, folder / file)
    else:
        shutil.copyfile(run_folder / "model.safetensors", folder / "model.safetensors")
    if quantize is not None:
        write_bytes(folder / SCALES, safetensors.torch.save({"low": quantize.low, "step": quantize.step}))


def _scales(bundle: Bundle, halves: Split) -> tuple[Quantize | None, Dequantize | None]:
    """The modules that round as the bundle's graphs do."""
    if bundle.serving.encoding == "float32":
        return None, None
    path = bundle.folder / ORIGIN / SCALES
    try:
        found = safetensors.torch.load_file(path)
        low, step = found["low"], found["step"]
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise BundleError(f"{path} is missing or damaged ({error}); export the bundle again") from error
    bits = _BITS[bundle.serving.encoding]
    return Quantize(low, step, bits), Dequantize(low, step, bits, halves.cut.feature_shape)
