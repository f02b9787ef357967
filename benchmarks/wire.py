"""Bytes on the wire against usefulness: encodings of the feature, and the picture as JPEG, on the same test images.

python benchmarks/wire.py

Both halves run as exported graphs. Bytes are of one image a request: the feature after zstd, and as the client sends
it with head and padding; the picture as JPEG of several qualities and as PNG. The smallest picture as useful is the
file of fewest bytes with which the network is as useful as behind the feature.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import tomli_w
from PIL import Image

from common import record
from louver.bundle import EDGE, Bundle, Encoding
from louver.cut import Split
from louver.edge import Settings
from louver.edge.wire import request_of
from louver.experiment import Run, load_run
from louver.exporting import ExportOptions, export_run
from louver.models import load_model, save_weights
from louver.study import utility
from louver.tables import BENCHES
from louver.types import Images

QUALITIES = (10, 30, 50, 70, 80, 90, 95, 98, 100)
# From here on colors keep their resolution, as everyone who asks for such a quality wants.
WHOLE_COLORS = 98
ENCODINGS: tuple[Encoding, ...] = ("float32", "uint8", "uint4")
ATTACKS = {"decoder": {"epochs": 1}}  # none is run; an experiment names one


def coded(pixels: np.ndarray, quality: int | None) -> tuple[np.ndarray, int]:
    """What the cloud would see of (3, h, w) uint8 as JPEG, or as PNG without a quality, and how many bytes it took."""
    file, image = io.BytesIO(), Image.fromarray(pixels.transpose(1, 2, 0))
    if quality is None:
        image.save(file, "PNG", optimize=True)
    elif quality < WHOLE_COLORS:
        image.save(file, "JPEG", quality=quality)
    else:
        image.save(file, "JPEG", quality=quality, subsampling=0)
    with Image.open(io.BytesIO(file.getvalue())) as seen:
        return np.asarray(seen).transpose(2, 0, 1), file.tell()


def as_coded(images: Images, quality: int | None) -> tuple[Images, float]:
    found = [coded(one, quality) for one in images.pixels]
    pixels = np.stack([seen for seen, _ in found])
    return Images(pixels=pixels, labels=images.labels, name=images.name), float(np.mean([size for _, size in found]))


def sent(bundle: Bundle, images: Images) -> float:
    """Mean bytes of the body that the client sends for one image."""
    edge = onnxruntime.InferenceSession(bundle.path(EDGE))
    settings, sizes = Settings(), []
    for i in range(len(images)):
        (feature,) = edge.run(["feature"], {"image": images.floats(slice(i, i + 1))})
        sizes.append(len(request_of(bundle, feature, settings).body))
    return float(np.mean(sizes))


def useful(run: Run, halves: Split, images: Images) -> dict[str, float]:
    assert run.task is not None
    first = next(iter(utility(run.task, halves, images, seed=0).items()))
    return {"measure": first[0], **{key: round(first[1][key], 5) for key in ("mean", "low", "high")}}  # type: ignore[dict-item]


def cifar10(folder: Path) -> dict[str, Any]:
    return {
        "name": "wire-cifar10",
        "model": {"name": "cifar_resnet20", "weights": "resnet20_cifar10"},
        "data": {"label": "label", "test": "cifar10/test[:8000]", "auxiliary": "cifar10/test[8000:]"},
        "audit": {"cuts": ["layer2"]},
        "attacks": ATTACKS,
    }


def vehicles(folder: Path) -> dict[str, Any]:
    bench = BENCHES["vehicles"]("laptop", 0)
    model = bench.victim(folder, lambda what, fraction: None)
    save_weights(model, folder / "vehicles.safetensors")
    return {
        "name": "wire-vehicles",
        "model": {"name": "street_net", "n_classes": 64, "weights": str(folder / "vehicles.safetensors")},
        "task": {"kind": "reidentification", "per_identity": 2},
        "data": {"test": "vehicle_reid/test", "auxiliary": "vehicle_reid/train[600:]", "size": 64},
        "audit": {"cuts": ["stage3"]},
        "attacks": ATTACKS,
    }


def measured(name: str, make: Callable[[Path], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Each encoding beside the split in torch, and the picture as a file beside the picture."""
    home = folder / name
    home.mkdir()
    table = make(folder)
    (home / "config.toml").write_text(tomli_w.dumps(table))
    save_weights(
        load_model(
            table["model"]["name"], n_classes=table["model"].get("n_classes"), weights=table["model"]["weights"]
        ),
        home / "model.safetensors",
    )
    run = load_run(home)
    test = run.roles.test
    whole = useful(run, run.halves, test)
    figures: dict[str, Any] = {"n_images": len(test), "whole": whole, "encodings": {}, "pictures": {}}
    for encoding in ENCODINGS:
        options = ExportOptions(encoding=encoding, min_agreement=0.5)
        bundle = export_run(home, folder / f"{name}-{encoding}", options=options, has_audit=False)
        same, cost = bundle.record["equivalence"], bundle.record["cost"]
        after = next(iter(bundle.record["utility"]["bundle"].values()))
        figures["encodings"][encoding] = {
            "utility": round(after, 5),
            "points lost": round(100 * (whole["mean"] - after), 3),
            "agreement": round(same["agreement"], 5),
            "relative feature error": round(same["relative_feature_error"], 5),
            "raw bytes": cost["feature_bytes"],
            "compressed bytes": round(same["compressed_bytes"], 1),
            "sent bytes": round(sent(bundle, test.take(slice(0, 200))), 1),
            "of float32": round(same["compressed_bytes"] / cost["float32_feature_bytes"], 4),
        }
        print(name, encoding, figures["encodings"][encoding], flush=True)
    for quality in (*QUALITIES, None):
        seen, size = as_coded(test, quality)
        name_of = "PNG" if quality is None else f"JPEG {quality}"
        figures["pictures"][name_of] = {**useful(run, run.halves, seen), "bytes": round(size, 1)}
    for one in figures["encodings"].values():
        enough = [(file["bytes"], kind) for kind, file in figures["pictures"].items() if file["mean"] >= one["utility"]]
        one["smallest picture as useful"] = min(enough, default=None)
    return figures


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as there:
        figures = {
            name: measured(name, make, Path(there)) for name, make in (("cifar10", cifar10), ("vehicles", vehicles))
        }
    print(record("wire", figures, seed=0, seconds=time.monotonic() - started))


if __name__ == "__main__":
    main()
