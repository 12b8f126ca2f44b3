"""Processes that train together on the CPU, kept for all tests that need them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch


class Failure:
    """An exception on a rank."""

    def __init__(self, error: BaseException) -> None:
        self.kind = type(error).__name__
        self.message = str(error)
        self.traceback = traceback.format_exc()


class RankPool:
    """Runs functions of a module at the same time in several processes, which Lightning takes for those of torchrun."""

    def __init__(self, size: int = 2) -> None:
        self.size = size
        self._connections: list[Connection] = []
        self._processes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """What the function returns on each rank, called with the rank and the arguments; an error on any is raised."""
        results = self.outcomes(function, *args, timeout=timeout)
        for rank, result in enumerate(results):
            if isinstance(result, Failure):
                raise RuntimeError(f"rank {rank}: {result.traceback}")
        return results

    def outcomes(self, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """The same, with a :class:`Failure` where a rank raised an error."""
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, args))
        results = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(timeout):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer within {timeout} s; so far: {results}")
            results.append(connection.recv())
        if any(isinstance(result, Failure) for result in results):
            # Collectives may be pending.
            self.close()
        return results

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.size, port), daemon=True)
            process.start()
            self._connections.append(ours)
            self._processes.append(process)

    def close(self) -> None:
        """End the processes; the next call starts new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        self._connections, self._processes = [], []


def _serve(connection: Connection, rank: int, size: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
    }
    torch.set_num_threads(1)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            result = function(rank, *args)
        except BaseException as error:
            result = Failure(error)
        connection.send(result)
