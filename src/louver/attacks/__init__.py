"""The attacks: each turns features back into pictures. `mean_image` is the floor that every other must beat.

A new attack is three files: its module here, one line in this file, one line in the table of `tests/cases.py`.
"""

from louver.attacks.base import Attack, Auxiliary, Inverter, View
from louver.attacks.decoder import Decoder
from louver.attacks.likelihood import Likelihood
from louver.attacks.mean_image import MeanImage
from louver.attacks.shadow import Shadow

__all__ = [
    "Attack",
    "Auxiliary",
    "Decoder",
    "Inverter",
    "Likelihood",
    "MeanImage",
    "Shadow",
    "View",
]
