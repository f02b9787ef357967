"""A bundle: both halves of a split as ONNX graphs, and one manifest that says what they are.

    BUNDLE/
    ├── manifest.json   `serving`: what both halves must agree on; `record`: how it was made and what was measured
    ├── edge.onnx       image float32 in [0,1] (and noise, if the edge draws any) -> feature
    ├── cloud.onnx      feature -> scores
    ├── head.onnx       (optional) feature -> scores, small enough for the device when the cloud is away
    └── CARD.md         the record for people

The bundle's id is a hash of `serving`, which holds the hashes of the graphs: halves that do not belong together have
different ids, and findings that are added later leave it as it is. A device needs no `cloud.onnx`, a server no
`edge.onnx`. Reading needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from louver.errors import BundleError
from louver.storage import write_json

__all__ = [
    "CLOUD",
    "EDGE",
    "HEAD",
    "Bundle",
    "Encoding",
    "Noise",
    "Serving",
    "check_kept",
    "file_hash",
    "read_bundle",
    "write_manifest",
]

EDGE, CLOUD, HEAD, MANIFEST = "edge.onnx", "cloud.onnx", "head.onnx", "manifest.json"
FORMAT = 1
_MOST_MANIFEST_BYTES = 2**24
_MOST_ELEMENTS = 2**28
_MOST_NAME_BYTES = 255
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HASH = re.compile(r"[0-9a-f]{64}")

Encoding = Literal["uint8", "uint4", "float32"]
"""How a feature is sent: a byte or half a byte an element (two to a byte, the first in the low half), or as it is."""

NoiseKind = Literal["normal", "laplace", "uniform"]
"""Standard normal; Laplace of deviation 1; uniform in [0,1). The device draws it anew for each request."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """An input of the edge that the device draws: its name, its shape for one image, its distribution."""

    name: str
    shape: tuple[int, ...]
    kind: NoiseKind


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What both halves must agree on. Shapes are of one image; each tensor has a batch dimension before them.

    `feature_shape` is that of the tensor on the wire: with "uint4" the last dimension of the feature is flattened with
    the others and halved. `labels` are the names of the scores of a classification, empty for any other answer.
    """

    cut: str
    image_shape: tuple[int, ...]
    encoding: Encoding
    feature_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    files: Mapping[str, str]
    noise: tuple[Noise, ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def wire_dtype(self) -> Literal["UINT8", "FP32"]:
        """The feature's type as the Open Inference Protocol names it."""
        return "FP32" if self.encoding == "float32" else "UINT8"

    @property
    def feature_bytes(self) -> int:
        """Bytes of one image's feature before compression."""
        return math.prod(self.feature_shape) * (4 if self.encoding == "float32" else 1)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle whose files are those of its manifest."""

    folder: Path
    name: str
    id: str
    serving: Serving
    record: Mapping[str, Any] = field(default_factory=dict)
    manifest: bytes = field(default=b"", repr=False, compare=False)
    """What it was read from, byte for byte; empty for one that was written here."""
    place: Path | None = field(default=None, repr=False, compare=False)
    """`folder` without symbolic links when it was read: all files are of this one, also where a link is moved."""

    def path(self, file: str) -> Path:
        """Where one of its graphs is.

        Raises:
            BundleError: the bundle has no such graph.
        """
        if file not in self.serving.files:
            raise BundleError(f"{self.folder}: this bundle was exported without {file}; export it again with it")
        return self.beside(file)

    def beside(self, file: str) -> Path:
        """Where any file of the bundle is, or would be."""
        return (self.place or self.folder) / file

    def content(self, file: str) -> bytes:
        """One of its graphs, read once and found to be the one that was exported: what is checked is what is used.

        Raises:
            BundleError: the bundle has no such graph, or a changed byte in it.
        """
        path = self.path(file)
        content = bytes_of(path)
        if content is None:
            raise BundleError(f"expected {file} in {self.folder}, got none; copy the whole bundle")
        wanted, found = self.serving.files[file], hashlib.sha256(content).hexdigest()
        if found != wanted:
            raise BundleError(
                f"{path} is not the file that was exported: expected sha256 {wanted}, got {found}; "
                "copy or export the bundle again"
            )
        return content


def read_bundle(
    folder: Path | str, *, needs: Sequence[str] = (), vouch: Callable[[Path, bytes], None] | None = None
) -> Bundle:
    """The bundle in `folder`; of its graphs, those in `needs` must be there and be the ones that were exported.

    vouch: is given where the manifest is and its bytes, before anything is taken from them, and raises if they are not
    to be used.

    Raises:
        BundleError: no bundle there, of a newer format, damaged, or a changed byte in what it needs.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    place = _without_links(folder)
    manifest = None if place is None else bytes_of(place / MANIFEST, most=_MOST_MANIFEST_BYTES)
    if place is None or manifest is None:
        raise BundleError(
            f"expected a bundle in {folder}, got no {MANIFEST}; make one with `louver export RUN -o {folder}`"
        )
    if vouch is not None:
        vouch(place, manifest)
    try:
        content = json.loads(manifest, parse_constant=_finite, parse_float=_finite)
        if content["format"] != FORMAT:
            raise BundleError(
                f"{path}: expected format {FORMAT}, got {content['format']!r}; use the Louver that wrote it"
            )
        serving = _serving(content["serving"])
        bundle = Bundle(
            folder=folder,
            name=content["name"],
            id=content["id"],
            serving=serving,
            record=dict(content["record"]),
            manifest=manifest,
            place=place,
        )
        _check(bundle)
        wanted = bundle_id(bundle.name, serving)
    except BundleError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(
            f"{path} is damaged ({type(error).__name__}: {error}); copy or export the bundle again"
        ) from error
    if bundle.id != wanted:
        raise BundleError(f"{path}: the id is not that of its content; copy or export the bundle again")
    for file in needs:
        bundle.content(file)
    return bundle


def write_manifest(folder: Path, name: str, serving: Serving, record: Mapping[str, Any]) -> Bundle:
    """Writes the manifest of graphs that are in `folder` already, and says what bundle it is.

    Raises:
        BundleError: a name or shape that a bundle cannot have.
        StorageError: the disk refused.
    """
    bundle = Bundle(folder=folder, name=name, id=bundle_id(name, serving), serving=serving, record=record)
    _check(bundle)
    content = {"format": FORMAT, "id": bundle.id, "name": name, "serving": asdict(serving), "record": dict(record)}
    write_json(folder / MANIFEST, content)
    return bundle


def bundle_id(name: str, serving: Serving) -> str:
    """32 hexadecimal digits that change with any change of what is served."""
    content = {"format": FORMAT, "name": name, "serving": asdict(serving)}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def check_kept(bundle: Bundle, *, apart_from: Sequence[str] = ()) -> None:
    """Checks the files that no graph needs, as far as they are here: the card and what repeats the audit.

    Raises:
        BundleError: one was changed since the manifest was written.
    """
    kept: Mapping[str, str] = bundle.record.get("kept", {})
    for file, digest in kept.items():
        path = bundle.beside(file)
        try:
            is_changed = file not in apart_from and path.is_file() and file_hash(path) != digest
        except OSError as error:
            raise BundleError(f"{path}: {error.strerror}; see who may read it") from error
        if is_changed:
            raise BundleError(f"{path} was changed since it was exported; export the bundle again")


def file_hash(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_of(path: Path, *, most: int | None = None) -> bytes | None:
    """A file's bytes, read once; None if there is no file.

    Raises:
        BundleError: it may not be read, or holds more than `most`.
    """
    try:
        # Nothing but a file is opened: a pipe would be waited for.
        if not path.is_file():
            return None
        with path.open("rb") as file:
            content = file.read(-1 if most is None else most + 1)
    except FileNotFoundError:
        return None  # gone since: somebody is replacing the bundle
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}; see who may read it") from error
    if most is not None and len(content) > most:
        raise BundleError(f"{path}: expected at most {most} bytes, got more")
    return content


def _without_links(folder: Path) -> Path | None:
    """The folder itself, if links lead to one."""
    try:
        return folder.resolve()
    except (RuntimeError, ValueError):  # links in a ring; a name that no file system holds
        return None


def _finite(text: str) -> float:
    """A number of JSON; Python would also read NaN and 1e999, which nothing that writes a manifest writes."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {text[:20]}")
    return number


def _serving(found: Any) -> Serving:  # noqa: ANN401 - JSON
    known = dict(found)
    for key in ("image_shape", "feature_shape", "output_shape", "labels"):
        known[key] = tuple(known[key])
    known["noise"] = tuple(Noise(**{**one, "shape": tuple(one["shape"])}) for one in known["noise"])
    return Serving(**known)


def _check(bundle: Bundle) -> None:
    serving = bundle.serving
    where = bundle.folder / MANIFEST
    if not isinstance(bundle.name, str) or not _NAME.fullmatch(bundle.name):
        raise BundleError(
            f"{where}: expected a name of letters, digits, '.', '_' and '-' (it is part of an address), "
            f"got {bundle.name!r}"
        )
    if serving.encoding not in get_args(Encoding):
        raise BundleError(f"{where}: expected an encoding of {', '.join(get_args(Encoding))}, got {serving.encoding!r}")
    if not all(map(_is_text, (serving.cut, *serving.labels, *(one.name for one in serving.noise)))):
        raise BundleError(f"{where}: expected text for the cut, the labels and the names of noise; export it again")
    shapes = [("image", serving.image_shape), ("feature", serving.feature_shape), ("output", serving.output_shape)]
    for what, shape in (*shapes, *((one.name, one.shape) for one in serving.noise)):
        is_whole = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in shape)
        if not shape or not is_whole or math.prod(shape) > _MOST_ELEMENTS:
            raise BundleError(f"{where}: expected {what} sizes of 1 or more, got {shape}")
    if any(one.kind not in get_args(NoiseKind) for one in serving.noise):
        raise BundleError(f"{where}: expected noise of {', '.join(get_args(NoiseKind))}")
    if serving.labels and (len(serving.labels),) != serving.output_shape:
        raise BundleError(
            f"{where}: expected as many labels as scores, got {len(serving.labels)} for {serving.output_shape}"
        )
    for file, digest in serving.files.items():
        if file not in (EDGE, CLOUD, HEAD) or not _is_hash(digest):
            raise BundleError(f"{where}: expected the SHA-256 of {EDGE}, {CLOUD} or {HEAD}, got {file!r}: {digest!r}")
    kept = bundle.record.get("kept", {})
    if not isinstance(kept, Mapping):
        raise BundleError(f"{where}: expected `kept` to be files with their SHA-256, got {type(kept).__name__}")
    for file, digest in kept.items():
        if not _is_inside(file) or not _is_hash(digest):
            raise BundleError(
                f"{where}: expected the SHA-256 of a file in the bundle, got {str(file)[:100]!r}: {str(digest)[:100]!r}"
            )


def _is_text(found: object) -> bool:
    # Half of a surrogate pair, which JSON can hold, breaks whoever prints or sends it.
    return isinstance(found, str) and not any("\ud800" <= sign <= "\udfff" for sign in found)


def _is_hash(found: object) -> bool:
    return isinstance(found, str) and _HASH.fullmatch(found) is not None


def _is_inside(file: object) -> bool:
    """Whether it is a path that stays in the bundle's folder, and that a file system can hold."""
    if not isinstance(file, str) or not _is_text(file) or "\0" in file:
        return False
    return all(part not in ("", ".", "..") and len(part.encode()) <= _MOST_NAME_BYTES for part in file.split("/"))
