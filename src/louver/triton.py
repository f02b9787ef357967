"""The cloud half as a model repository of Triton: served there as it is, by the same protocol to the same client."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from louver.bundle import CLOUD, Bundle
from louver.errors import ConfigError
from louver.storage import refusals, write_bytes

__all__ = ["triton_name", "write_triton"]

_LABELS = "labels.txt"
_CONFIG = """\
# Written by `louver export --triton`; the name ends in the id of the bundle, which Triton's own versions cannot hold.
name: {name}
backend: "onnxruntime"
max_batch_size: {max_batch}
input [ {{ name: "feature" data_type: TYPE_{dtype} dims: [ {feature} ] }} ]
output [ {{ name: "scores" data_type: TYPE_FP32 dims: [ {output} ]{labels} }} ]
dynamic_batching {{ max_queue_delay_microseconds: {delay} }}
instance_group [ {{ count: 2 kind: KIND_CPU }} ]
parameters [ {{ key: "louver_bundle_id" value: {{ string_value: "{id}" }} }} ]
"""


def triton_name(bundle: Bundle) -> str:
    """The name of the bundle's cloud half in a model repository: halves that do not belong together never meet."""
    return f"{bundle.name}-{bundle.id}"


def write_triton(bundle: Bundle, folder: Path, *, max_batch: int = 32, max_delay_us: int = 500) -> Path:
    """Adds the cloud half of `bundle` to the model repository `folder`; returns the model's own folder there.

    Raises:
        ConfigError: that model is there already, or a batch or delay out of range.
        BundleError: the bundle has no cloud half, or a changed byte in it.
        StorageError: the disk refused.
    """
    if max_batch < 1 or max_delay_us < 0:
        raise ConfigError(f"expected a batch of 1 or more and a delay of 0 or more, got {max_batch}, {max_delay_us}")
    name, serving = triton_name(bundle), bundle.serving
    model = folder / name
    if model.exists():
        raise ConfigError(f"{model} is there already; remove it, or choose another folder")
    content = bundle.content(CLOUD)
    config = _CONFIG.format(
        name=json.dumps(name),
        max_batch=max_batch,
        dtype=serving.wire_dtype,
        feature=", ".join(map(str, serving.feature_shape)),
        output=", ".join(map(str, serving.output_shape)),
        labels=f' label_filename: "{_LABELS}"' if serving.labels else "",
        delay=max_delay_us,
        id=bundle.id,
    )
    with refusals(model, then="free space, or name another folder; the bundle itself is whole"):
        try:
            write_bytes(model / "1" / "model.onnx", content)
            if serving.labels:
                lines = [" ".join(label.splitlines()) for label in serving.labels]
                write_bytes(model / _LABELS, "\n".join(lines).encode())
            # Last: without it Triton sees no model.
            write_bytes(model / "config.pbtxt", config.encode())
        except BaseException:
            shutil.rmtree(model, ignore_errors=True)
            raise
    return model
