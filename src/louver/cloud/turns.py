"""Turns that clients share: one that never ends leaves the others theirs."""

from __future__ import annotations

import asyncio
from weakref import WeakValueDictionary

from louver.cloud.tokens import Client

__all__ = ["Turns"]


class Turns:
    """`count` turns in `all`, of which one client has at most `share`. Both are taken, the client's first.

    Nothing is kept of a client that neither has a turn nor waits for one.
    """

    def __init__(self, count: int, share: int) -> None:
        self.all = asyncio.Semaphore(count)
        self._share = share
        self._shares: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    def share_of(self, client: Client) -> asyncio.Semaphore:
        """What this client has of them."""
        found = self._shares.get(client.name)
        if found is None:
            found = self._shares[client.name] = asyncio.Semaphore(self._share)
        return found
