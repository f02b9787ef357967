"""Work of a request that would hold up all others on the event loop: a few threads of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["Aside"]

Found = TypeVar("Found")

_THREADS = 2


class Aside:
    """Threads for decompression and for long texts and messages; others wait their turn.

    Not asyncio's own: budgets are written there, and no client may keep those waiting.
    """

    def __init__(self, threads: int = _THREADS) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="louver-aside")
        self._turns = asyncio.Semaphore(threads)

    async def do(self, work: Callable[[], Found]) -> Found:
        """What `work` gives, or what it raises.

        Whoever is cancelled while waiting leaves nothing behind; work that has begun is finished for nobody, and has
        its turn until then. So of those who have left no more is in memory than there are threads.
        """
        # Not the executor's own queue: what is cancelled there stays until a thread comes by.
        await self._turns.acquire()
        try:
            done = asyncio.get_running_loop().run_in_executor(self._threads, work)
        except RuntimeError:
            self._turns.release()
            raise
        done.add_done_callback(lambda _: self._turns.release())
        try:
            return await asyncio.shield(done)
        finally:
            del done  # an error would refer to this frame, and this frame to it

    def close(self) -> None:
        """Lets the threads end; work that has begun is not waited for."""
        self._threads.shutdown(wait=False)
