"""One piece of work in several processes, a device each: started here, listened to, and ended together."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from louver.errors import LouverError, WorkerError

__all__ = ["Tell", "messages_of"]

Tell = Callable[[object], None]
"""Called in a process of the work; what it is given comes out of `messages_of`."""


def messages_of(work: Callable[[Tell], None], n: int) -> Iterator[object]:
    """Runs `work(tell)` in each of `n` new processes of this machine and yields what they tell, until all have ended.

    Each has its rank in the environment, as torch.distributed and Fabric look for it. `work` and what it is told cross
    by multiprocessing, so they must be importable from a fresh interpreter. Where one process fails, or the caller
    stops listening, all of them are ended: what waits for a lost neighbor would wait forever.

    Raises:
        LouverError: what `work` raised.
        WorkerError: a process was killed or broke, or `work` cannot be sent to one.
    """
    context = multiprocessing.get_context("spawn")
    address = _free_port()
    pipes: dict[Connection, BaseProcess] = {}
    try:
        for rank in range(n):
            here, there = context.Pipe(duplex=False)
            process: BaseProcess = context.Process(target=_begin, args=(work, rank, n, address, there), daemon=True)
            try:
                process.start()
            except Exception as error:
                raise WorkerError(
                    f"the work cannot be sent to a process of its own ({error}); networks that several devices train "
                    "must be of classes that can be imported, without lambdas"
                ) from error
            there.close()
            pipes[here] = process
        listening = dict(pipes)
        while listening:
            for pipe in wait(list(listening)):
                assert isinstance(pipe, Connection)
                try:
                    told = pipe.recv()
                except EOFError:
                    _check_ended_well(listening.pop(pipe), n)
                    continue
                if isinstance(told, LouverError):
                    raise told
                yield told
    finally:
        for pipe, process in pipes.items():
            process.terminate()
            process.join()
            pipe.close()


def _check_ended_well(process: BaseProcess, n: int) -> None:
    process.join()
    if process.exitcode:
        how = f"was killed by signal {-process.exitcode}" if process.exitcode < 0 else "broke, as is said above"
        raise WorkerError(
            f"one of {n} processes {how}; if memory ran out, take a smaller batch or fewer devices; "
            "the last checkpoint is kept"
        )


def _begin(work: Callable[[Tell], None], rank: int, n: int, port: int, pipe: Connection) -> None:
    # Who interrupts the program interrupts its first process, and that one ends this.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # standard output belongs to results
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(max(1, torch.get_num_threads() // n))
    try:
        work(pipe.send)
    except LouverError as error:
        pipe.send(error)


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
