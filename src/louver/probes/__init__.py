"""Secondary inference: how well labels that the task does not need are recovered from features or reconstructions."""

from __future__ import annotations

from louver.probes.base import Probe, ProbeResult, probe
from louver.probes.completion import Completion, completion
from louver.probes.identity import MetricProbe, Reidentification, learned_metric, reidentify
from louver.probes.linear import LinearProbe
from louver.probes.neighbor import NeighborProbe
from louver.probes.tail import TailProbe

__all__ = [
    "Completion",
    "LinearProbe",
    "MetricProbe",
    "NeighborProbe",
    "Probe",
    "ProbeResult",
    "Reidentification",
    "TailProbe",
    "completion",
    "learned_metric",
    "probe",
    "reidentify",
]
