"""The `[a:b]` at the end of a source."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from louver.errors import DataError

__all__ = ["Window", "split_window"]

_WINDOW = re.compile(r"(?P<body>.*)\[(?P<start>-?\d+)?:(?P<stop>-?\d+)?\]", re.DOTALL)


@dataclass(frozen=True)
class Window:
    """Which pictures of an ordered source to take, as a Python slice does."""

    start: int | None = None
    stop: int | None = None

    def range(self, count: int, source: str) -> range:
        """The numbers that the window picks out of 0..count-1.

        Raises:
            DataError: it picks none.
        """
        picked = range(*slice(self.start, self.stop).indices(count))
        if not len(picked):
            text = f"[{'' if self.start is None else self.start}:{'' if self.stop is None else self.stop}]"
            raise DataError(
                f"{source}: expected at least one image in {text}, got none of {count}; widen it or leave it out"
            )
        return picked

    def pick(self, index: NDArray[np.int64], source: str) -> NDArray[np.int64]:
        """The part of `index` that the window picks.

        Raises:
            DataError: none is picked.
        """
        picked = self.range(len(index), source)
        return index[picked.start : picked.stop]


def split_window(source: str) -> tuple[str, Window]:
    """A source without its window, and the window.

    >>> split_window("cifar10/train[-100:]")
    ('cifar10/train', Window(start=-100, stop=None))
    """
    match = _WINDOW.fullmatch(source)
    if match is None:
        return source, Window()
    start, stop = (None if match[side] is None else int(match[side]) for side in ("start", "stop"))
    return match["body"], Window(start, stop)
