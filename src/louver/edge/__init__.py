"""What runs on the device: the edge half, the way to the cloud, and what to do while the cloud is away.

It stands on numpy, onnxruntime, urllib3 and zstandard; a queue on disk needs `cryptography` as well. Never on torch.
"""

from __future__ import annotations

from louver.edge.client import Answer, Delivery, Edge, Flushed
from louver.edge.settings import Policy, Settings

__all__ = ["Answer", "Delivery", "Edge", "Flushed", "Policy", "Settings"]
