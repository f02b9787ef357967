"""Louver: cut a vision network between device and cloud, and measure what the features give away.

Importing this package is cheap: a name is loaded when it is first touched, and only then does what it stands on (torch
for most of them) have to be installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from louver.attacks import Decoder, Likelihood, MeanImage, Shadow
    from louver.audit import Settings
    from louver.audit import audit as run_audit
    from louver.config import read_experiment
    from louver.cost import measure_latency
    from louver.cut import Split, cuts, split
    from louver.data import assign_roles, contact_sheet, drop_overlap, load_images, streets
    from louver.defenses import PATROL, AddedNoise, Defense, Hybrid, NoDefense, NoPeek, PrivyNet, SiftFunnel
    from louver.errors import LouverError
    from louver.experiment import run_experiment
    from louver.hardening import Origin, harden, load_split, save_split
    from louver.measures import MEASURES, mse, psnr, ssim
    from louver.models import load_model, save_weights
    from louver.report import write_report
    from louver.runs import load_audit, panels
    from louver.tasks import Attributes, Classification, ReIdentification
    from louver.thresholds import judge, parse_rule
    from louver.training import Training, fit
    from louver.types import Audit, Cost, Cut, Finding, Images, Panel, Roles, Row, Threat, Verdict

    __version__: str

__all__ = [
    "MEASURES",
    "PATROL",
    "AddedNoise",
    "Attributes",
    "Audit",
    "Classification",
    "Cost",
    "Cut",
    "Decoder",
    "Defense",
    "Finding",
    "Hybrid",
    "Images",
    "Likelihood",
    "LouverError",
    "MeanImage",
    "NoDefense",
    "NoPeek",
    "Origin",
    "Panel",
    "PrivyNet",
    "ReIdentification",
    "Roles",
    "Row",
    "Settings",
    "Shadow",
    "SiftFunnel",
    "Split",
    "Threat",
    "Training",
    "Verdict",
    "assign_roles",
    "contact_sheet",
    "cuts",
    "drop_overlap",
    "fit",
    "harden",
    "judge",
    "load_audit",
    "load_images",
    "load_model",
    "load_split",
    "measure_latency",
    "mse",
    "panels",
    "parse_rule",
    "psnr",
    "read_experiment",
    "run_audit",
    "run_experiment",
    "save_split",
    "save_weights",
    "split",
    "ssim",
    "streets",
    "write_report",
]

_HOMES = {
    "attacks": "Decoder Likelihood MeanImage Shadow",
    "audit": "Settings",
    "config": "read_experiment",
    "cost": "measure_latency",
    "cut": "Split cuts split",
    "data": "assign_roles contact_sheet drop_overlap load_images streets",
    "defenses": "PATROL AddedNoise Defense Hybrid NoDefense NoPeek PrivyNet SiftFunnel",
    "errors": "LouverError",
    "experiment": "run_experiment",
    "hardening": "Origin harden load_split save_split",
    "measures": "MEASURES mse psnr ssim",
    "models": "load_model save_weights",
    "report": "write_report",
    "runs": "load_audit panels",
    "tasks": "Attributes Classification ReIdentification",
    "thresholds": "judge parse_rule",
    "training": "Training fit",
    "types": "Audit Cost Cut Finding Images Panel Roles Row Threat Verdict",
}
_WHERE = {name: (home, name) for home, names in _HOMES.items() for name in names.split()}
# Under its own name the function would hide its module, or be hidden by it, whichever was loaded last.
_WHERE["run_audit"] = ("audit", "audit")


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("louver")
    if name not in _WHERE:
        raise AttributeError(f"module 'louver' has no attribute {name!r}")
    home, attribute = _WHERE[name]
    try:
        value = getattr(import_module(f"louver.{home}"), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "louver":
            raise
        from louver.errors import MissingExtraError

        raise MissingExtraError(f"louver.{name} needs {error.name}: pip install 'louver[lab]'") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
