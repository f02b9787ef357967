"""A bad link between a client and a server of this machine: late, lossy as TCP shows loss, slow, or cut.

Under TCP a lost packet is no missing byte but a wait for its second sending, and that is what happens here: each packet
comes late by the delay, some by a retransmission timeout more, and what follows them waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Iterator

PACKET = 1460
TIMEOUT_S = 0.2
"""The least that Linux waits before it sends a packet again."""


class Link:
    """A TCP proxy in a thread of its own; its properties may be changed while it runs."""

    def __init__(self, port: int, *, delay_s: float = 0.0, loss: float = 0.0, seed: int = 0) -> None:
        self.delay_s, self.loss, self.is_cut = delay_s, loss, False
        self.n_connections = 0
        self._target = port
        self._draw = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._writers: list[asyncio.StreamWriter] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(10)

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stopped = asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = int(server.sockets[0].getsockname()[1])
        self._ready.set()
        await self._stopped.wait()
        server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.n_connections += 1
        self._writers.append(writer)
        await self._while_cut()
        try:
            back, forth = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        self._writers.append(forth)
        await asyncio.gather(self._pump(reader, forth), self._pump(back, writer))

    async def _while_cut(self) -> None:
        while self.is_cut:
            await asyncio.sleep(0.02)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """Pieces in order, each at its time: late ones hold up what follows, as in a stream."""
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def read() -> None:
            while piece := await source.read(PACKET):
                late = self.delay_s + (TIMEOUT_S if self._draw.random() < self.loss else 0.0)
                pieces.put_nowait((self._loop.time() + late, piece))
            pieces.put_nowait((self._loop.time(), b""))

        reading = asyncio.create_task(read())
        with contextlib.suppress(ConnectionError):
            while True:
                due, piece = await pieces.get()
                await asyncio.sleep(max(0.0, due - self._loop.time()))
                await self._while_cut()
                if not piece:
                    break
                sink.write(piece)
                await sink.drain()
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await reading
        sink.close()


@contextlib.contextmanager
def link(port: int, **properties: float) -> Iterator[Link]:
    """A link to `port` of this machine."""
    made = Link(port, **properties)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()
