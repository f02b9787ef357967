"""CARD.md: what a bundle does, what was measured, and what it does not protect against, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from louver.bundle import Bundle

__all__ = ["CARD", "card"]

CARD = "CARD.md"


def card(bundle: Bundle) -> str:
    """The text of the card, Markdown."""
    parts = [
        f"# {bundle.name}",
        f"Bundle `{bundle.id}`. Written by `louver export`; every figure is in `manifest.json`.",
        "## What it does",
        _does(bundle),
        "## What was measured",
        _measured(bundle),
        "## What it does not protect against",
        _open(bundle),
        "## How it was made",
        _made(bundle),
    ]
    return "\n\n".join(parts) + "\n"


def _does(bundle: Bundle) -> str:
    serving, record = bundle.serving, bundle.record
    n_outputs = serving.output_shape[0]
    answer = f"an embedding of {n_outputs}" if record.get("task") == "ReIdentification" else f"{n_outputs} scores"
    cost = record.get("cost", {})
    lines = [
        f"`edge.onnx` runs on the device: pictures of {_shape(serving.image_shape)}, float32 in [0,1], become "
        f"features of {_shape(serving.feature_shape)} ({serving.encoding}). `cloud.onnx` runs on the server: features "
        f"become {answer}. The network `{record.get('model', '?')}` is cut at `{serving.cut}`.",
    ]
    if serving.noise:
        lines.append("The edge takes noise as an input, which the device draws anew for each picture.")
    if cost:
        lines.append(
            f"The edge computes {cost['edge_macs'] / 1e6:.4g} M multiply-accumulates for a picture; "
            f"{cost['feature_bytes']:,} bytes are sent before compression, where float32 would be "
            f"{cost['float32_feature_bytes']:,}."
        )
    return " ".join(lines)


def _measured(bundle: Bundle) -> str:
    record = bundle.record
    lines = []
    same = record.get("equivalence")
    if same:
        agreements: Mapping[str, float] = same.get("agreements", {same["measure"]: same["agreement"]})
        shown = ", ".join(f"{what} {share:.2%}" for what, share in agreements.items())
        compared = "embeddings by their angle" if record.get("task") == "ReIdentification" else "the highest score"
        lines.append(
            f"- Compared with the split on {same['images']} test pictures ({compared}): {shown}; relative error "
            f"of features {same['relative_feature_error']:.2g}; {same['compressed_bytes']:,.0f} bytes a picture after "
            "zstd."
        )
    for what, figures in record.get("utility", {}).items():
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        lines.append(f"- Usefulness of the {what} on test pictures: {shown}.")
    rows = [row for row in record.get("findings", ()) if row["attack"] != "mean_image"]
    if not rows:
        lines.append("- **Leakage: not measured.** `louver audit --bundle FOLDER` measures it.")
        return "\n".join(lines)
    lines.append("- Leakage of what the edge sends, mean with 95 % interval, and the floor of who sees nothing:")
    head = ("attack", "measure", "pictures", "leaks", "interval", "worst 5 %", "floor")
    table = ["", f"| {' | '.join(head)} |", "|---|---|---:|---:|---|---:|---:|"]
    table += [
        f"| {row['attack']} | {row['measure']} ({_unit(row)}{row['leaks_when']} is worse) | {row['n_images']} | "
        f"{row['mean']:.3g} | {row['low']:.3g} to {row['high']:.3g} | {row['worst']:.3g} | {row['floor']:.3g} |"
        for row in rows
    ]
    verdict: Mapping[str, Any] = record.get("verdict", {})
    notes = [f"- {verdict['headline']}"] if verdict.get("headline") else []
    notes += [f"- {note}" for note in verdict.get("warnings", ())]
    return "\n".join([*lines, *table, "", *notes])


def _open(bundle: Bundle) -> str:
    threat = bundle.record.get("threat")
    lines = [
        "- The figures are those of the attacks that were run; a stronger attack may rebuild more.",
        "- Whoever holds the device sees its pictures. Whoever sees many features of one scene may average them.",
        "- The answers themselves tell what the pictures show; the server reads them, and so may who reads its memory.",
        "- When a picture was sent, and how often, is plain to who watches the network.",
    ]
    if threat:
        lines.insert(
            0,
            f"- The attacker of the audit ({threat['name']}) was granted: {', '.join(threat['grants'])}. Against one "
            "with more, nothing was measured.",
        )
    return "\n".join(lines)


def _made(bundle: Bundle) -> str:
    made = bundle.record.get("made")
    if not made:
        return "Unknown."
    versions = ", ".join(f"{name} {version}" for name, version in sorted(made["versions"].items()))
    return (
        f"Defense: {bundle.record.get('defense', 'none')}. Scales found on {made['calibration_images']} auxiliary "
        f"pictures (seed {made['seed']}); edge weights {made['edge_weights']}. With {versions}. The experiment is in "
        "`manifest.json`, and the folder `audit` holds what repeats the audit; neither device nor server needs it."
    )


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _unit(row: Mapping[str, Any]) -> str:
    return f"{row['unit']}, " if row["unit"] else ""
