"""What a network is for: the loss that trains it, the batches it learns from, and the figures that judge it."""

from __future__ import annotations

from louver.tasks.attributes import Attributes
from louver.tasks.base import Criterion, Task, answers, even_batches
from louver.tasks.classification import Classification
from louver.tasks.ranking import Retrieval, retrieval
from louver.tasks.reidentification import ReIdentification

__all__ = [
    "Attributes",
    "Classification",
    "Criterion",
    "ReIdentification",
    "Retrieval",
    "Task",
    "answers",
    "even_batches",
    "retrieval",
]
