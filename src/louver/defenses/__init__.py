"""Defenses: one file for each, all with the same three moments (see `base`)."""

from collections.abc import Mapping

from louver.defenses.base import Batch, Defense, Pressure
from louver.defenses.baselines import AddedNoise, AdversarialTraining, Bottleneck, FeatureDropout, NoDefense, NoPeek
from louver.defenses.hybrid import Hybrid
from louver.defenses.patrol import PATROL
from louver.defenses.privynet import PrivyNet
from louver.defenses.siftfunnel import SiftFunnel

__all__ = [
    "DEFENSES",
    "PATROL",
    "AddedNoise",
    "AdversarialTraining",
    "Batch",
    "Bottleneck",
    "Defense",
    "FeatureDropout",
    "Hybrid",
    "NoDefense",
    "NoPeek",
    "Pressure",
    "PrivyNet",
    "SiftFunnel",
]

DEFENSES: Mapping[str, type[Defense]] = {
    "adversarial": AdversarialTraining,
    "bottleneck": Bottleneck,
    "dropout": FeatureDropout,
    "hybrid": Hybrid,
    "noise": AddedNoise,
    "none": NoDefense,
    "nopeek": NoPeek,
    "patrol": PATROL,
    "privynet": PrivyNet,
    "siftfunnel": SiftFunnel,
}
"""Defenses by the name that `kind` in a [defense] table uses."""
