"""A run folder: what an audit was made from and what it found, complete enough to draw its report again.

    config.toml, environment of the run     written by the command line
    truth.npz                               the test images that were scored, and which they were
    units/CUT/ATTACK/unit.json              scores and seconds, under a key of all that they depend on
    units/CUT/ATTACK/pictures.npz           reconstructions, 8 bits
    units/CUT/ATTACK/state.safetensors      the attack, so that it need not be fitted again
    findings.json                           the audit, whole
    report.html

A unit counts as finished when its unit.json is there: it is written last, and every file is written whole or not at
all. A unit whose key differs belongs to another experiment and is run again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from numpy.typing import NDArray
from torch import Tensor

from louver.errors import ConfigError, InputError
from louver.storage import DAMAGED, read_npz, unit_folder, write_bytes, write_json, write_npz
from louver.types import Audit, Check, Cost, Cut, Finding, HalfCost, Images, Latency, Panel, Row, Threat, Verdict

__all__ = ["RunFolder", "Unit", "load_audit", "panels", "to_json"]

_COLUMNS = 6
"""Pictures in a strip: as many as a page shows at twice their size."""

_DAMAGED = (*DAMAGED, safetensors.SafetensorError)


@dataclass(frozen=True)
class Unit:
    """What one attack made of one cut: per-image values by measure, pictures (n, c, h, w) uint8, the fitted attack."""

    values: Mapping[str, NDArray[np.float64]]
    pictures: NDArray[np.uint8]
    state: Mapping[str, Tensor]
    seconds: float


class RunFolder:
    """Reads and writes the files of a run; without a folder it keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def save_truth(self, pixels: NDArray[Any], chosen: NDArray[np.int64]) -> None:
        """The test images that attacks are scored on, and their places in the test role."""
        if self._folder is None:
            return
        as_bytes = Images(pixels=pixels).floats() * 255
        write_npz(self._folder / "truth.npz", {"images": as_bytes.round().astype(np.uint8), "index": chosen})

    def truth_index(self) -> NDArray[np.int64]:
        """Places in the test role of the images that attacks were scored on.

        Raises:
            ConfigError: the folder holds none.
        """
        return self._kept("truth.npz", "index")

    def pictures(self, cut: str, attack: str) -> NDArray[np.uint8]:
        """What an attack rebuilt, (n, c, h, w) in 0..255, in the order of `truth_index`.

        Raises:
            ConfigError: the folder holds none.
        """
        folder = self._folder or Path()
        return self._kept(str(unit_folder(folder, cut, attack).relative_to(folder) / "pictures.npz"), "images")

    def state(self, cut: str, attack: str) -> dict[str, Tensor]:
        """What `Attack.restore` makes the inverter of a finished unit from.

        Raises:
            ConfigError: the folder holds none.
        """
        path = unit_folder(self._folder or Path(), cut, attack) / "state.safetensors"
        try:
            return safetensors.torch.load_file(path)
        except _DAMAGED as error:
            raise ConfigError(f"{path} is missing or damaged ({error}); run the audit again") from error

    def _kept(self, name: str, what: str) -> NDArray[Any]:
        path = (self._folder or Path()) / name
        try:
            return read_npz(path)[what]
        except _DAMAGED as error:
            raise ConfigError(f"{path} is missing or damaged ({error}); run the audit again") from error

    def load_unit(self, cut: str, attack: str, key: str) -> Unit | None:
        """A finished unit with this key; None if there is none, or what is there is damaged or of another run."""
        if self._folder is None:
            return None
        folder = unit_folder(self._folder, cut, attack)
        try:
            record = json.loads((folder / "unit.json").read_text())
            if record["key"] != key:
                return None
            pictures = read_npz(folder / "pictures.npz")["images"]
            return Unit(
                values={name: np.array(values, np.float64) for name, values in record["values"].items()},
                pictures=pictures,
                state=safetensors.torch.load_file(folder / "state.safetensors"),
                seconds=record["seconds"],
            )
        except _DAMAGED:
            # Damaged is as good as absent: the unit is run again, which costs time and never a wrong number.
            return None

    def save_unit(self, cut: str, attack: str, key: str, unit: Unit) -> None:
        """Keeps a finished unit; its scores are written last."""
        if self._folder is None:
            return
        folder = unit_folder(self._folder, cut, attack)
        # Stopped half way, new pictures must not stand beside the scores of an older run.
        (folder / "unit.json").unlink(missing_ok=True)
        write_npz(folder / "pictures.npz", {"images": unit.pictures})
        write_bytes(folder / "state.safetensors", safetensors.torch.save(dict(unit.state)))
        record = {"key": key, "seconds": unit.seconds, "values": {k: v.tolist() for k, v in unit.values.items()}}
        write_json(folder / "unit.json", record)

    def forget_audit(self) -> None:
        """Takes away findings and report of an earlier run: they must not be read as those of the one that begins."""
        if self._folder is not None:
            for name in ("findings.json", "report.html"):
                (self._folder / name).unlink(missing_ok=True)

    def save_audit(self, audit: Audit) -> None:
        """Keeps the whole audit."""
        if self._folder is not None:
            write_json(self._folder / "findings.json", to_json(audit))


def to_json(audit: Audit) -> dict[str, Any]:
    """The audit as plain JSON values; `load_audit` reads them back."""

    def plain(value: Any) -> Any:  # noqa: ANN401 - any value of a dataclass field
        if isinstance(value, np.ndarray):
            return value.tolist()
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, frozenset | set):
            return sorted(value)
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return value if isinstance(value, str | int | float | bool | None) else str(value)

    out: dict[str, Any] = plain(asdict(audit))
    return out


def load_audit(folder: Path) -> Audit:
    """The audit kept in a run folder.

    Raises:
        ConfigError: there is none, it is unfinished, or its file is damaged.
    """
    path = folder / "findings.json"
    if not path.is_file():
        started = (folder / "units").is_dir()
        raise ConfigError(
            f"expected findings in {folder}, got "
            + (
                "an unfinished run; finish it with `louver audit FILE --resume`"
                if started
                else "none; give a run folder"
            )
        )
    try:
        record = json.loads(path.read_text())
        return Audit(
            name=record["name"],
            threat=Threat(**{**record["threat"], "grants": frozenset(record["threat"]["grants"])}),
            cuts=tuple(_cut(c) for c in record["cuts"]),
            findings=tuple(
                Finding(**{**f, "per_image": np.array(f["per_image"]), "floor": np.array(f["floor"])})
                for f in record["findings"]
            ),
            rows=tuple(Row(**r) for r in record["rows"]),
            verdict=Verdict(
                passed=record["verdict"]["passed"],
                headline=record["verdict"]["headline"],
                checks=tuple(Check(**c) for c in record["verdict"]["checks"]),
                warnings=tuple(record["verdict"]["warnings"]),
            ),
            utility=record["utility"],
            config=record["config"],
            environment=record["environment"],
            seconds=record["seconds"],
        )
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); run the audit again with --resume to rebuild it") from error


def _cut(record: Mapping[str, Any]) -> Cut:
    def half(cost: Mapping[str, Any]) -> HalfCost:
        latency = cost["latency"]
        return HalfCost(**{**cost, "latency": None if latency is None else Latency(**latency)})

    cost = record["cost"]
    return Cut(
        name=record["name"],
        feature_shape=tuple(record["feature_shape"]),
        dtype=record["dtype"],
        cost=Cost(edge=half(cost["edge"]), cloud=half(cost["cloud"]), feature_bytes=cost["feature_bytes"]),
        aliases=tuple(record["aliases"]),
    )


def panels(folder: Path, audit: Audit) -> list[Panel]:
    """Strips of pictures for each cut: images spread evenly from the least to the most leaked, and the most leaked.

    Images are ordered by the first of SSIM, PSNR or the measure that comes first, of the attack that leaks most by its
    mean; only images that every attack was run on are shown.

    Raises:
        ConfigError: the run folder lacks its pictures.
    """
    try:
        arrays = read_npz(folder / "truth.npz")
        truth, index = arrays["images"], arrays["index"]
        strips = [strip for cut in audit.cuts for strip in _strips(folder, audit, cut.name, truth, index)]
    except _DAMAGED as error:
        raise ConfigError(f"{folder} lacks pictures of its run ({error}); run the audit again with --resume") from error
    return strips


def _strips(
    folder: Path, audit: Audit, cut: str, truth: NDArray[np.uint8], index: NDArray[np.int64]
) -> Sequence[Panel]:
    found = [f for f in audit.findings if f.cut == cut]
    names = list(dict.fromkeys(f.measure for f in found))
    measure = next((name for name in ("ssim", "psnr") if name in names), names[0])
    scored = [f for f in found if f.measure == measure]
    sign = 1.0 if scored[0].leaks_when == "high" else -1.0
    count = min(len(f.per_image) for f in scored)
    strongest = max(scored, key=lambda f: float(sign * f.per_image[:count].mean()))
    order = np.argsort(-sign * strongest.per_image[:count], kind="stable")
    pictures = {}
    for finding in scored:
        pictures[finding.attack] = read_npz(unit_folder(folder, cut, finding.attack) / "pictures.npz")["images"]
    columns = min(_COLUMNS, count)
    worst = order[:columns]
    spread = order[np.linspace(0, count - 1, columns).round().astype(int)][::-1]
    label = measure.upper() if measure in ("ssim", "psnr", "mse") else measure
    return [
        Panel(
            cut=cut,
            title=title,
            truth=truth[chosen].transpose(0, 2, 3, 1),
            attacks={name: images[chosen].transpose(0, 2, 3, 1) for name, images in pictures.items()},
            captions=tuple(
                f"test image {index[i]}, {label} {strongest.per_image[i]:.2f} ({strongest.attack})" for i in chosen
            ),
        )
        for title, chosen in (("From least to most leaked", spread), ("Leaked most", worst))
    ]
