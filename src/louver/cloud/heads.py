"""What was found in the heads of requests, kept so that a client that asks the same each time is read once.

A head is all of a request but its id and its tensor. The key is the head itself, byte for byte, so what is found is
what reading it again would find. It holds neither a token nor a feature, which are not in it.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["MOST_HEAD_BYTES", "Heads"]

MOST_HEAD_BYTES = 1024
"""Longer heads are read each time: with the number of them, this bounds what clients can make the server keep."""

_MOST_HEADS = 64

Key = TypeVar("Key", bound=Hashable)
Found = TypeVar("Found")


class Heads(Generic[Key, Found]):
    """A few heads of requests that were right, and what they ask for. When there are too many, it starts anew."""

    def __init__(self) -> None:
        self._known: dict[Key, Found] = {}
        self.find = self._known.get

    def __len__(self) -> int:
        return len(self._known)

    def keep(self, key: Key, found: Found) -> None:
        """Remembers what a head asks for."""
        if len(self._known) >= _MOST_HEADS:
            self._known.clear()
        self._known[key] = found
