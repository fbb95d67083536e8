"""`run_distributed(function, world_size, *args)`: runs a function on gloo ranks, in worker processes that stay up between calls.

The workers of the largest world so far serve every later call of at most that many ranks. They are forked from a process that has imported what
costs seconds to import.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_workers: list = []  # (process, connection)
# Ports below those that Linux gives to whoever asks for any: none is taken before it is used. Tests that run side by side have shares of them.
_PORTS = range(10000, 20000)
_next_port = itertools.count(os.getpid())


def run_distributed(function: Callable[..., Any], world_size: int, *args, timeout: float = 300) -> list[Any]:
    """What `function(*args)` returns on each rank. An exception of a rank is raised here with its traceback; the workers then start afresh.

    `function` is a module-level function; inside it, `megapref.mcore.setup.start()` finds RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
    """
    _ensure_workers(world_size)
    task = pickle.dumps((sys.path, function, args, world_size, free_port()))
    for _, connection in _workers[:world_size]:
        connection.send_bytes(task)
    results: list[Any] = [None] * world_size
    waiting = {connection: rank for rank, (_, connection) in enumerate(_workers[:world_size])}
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), timeout)
        if not ready:
            _stop_workers()
            raise TimeoutError(f"{function.__name__}: ranks {sorted(waiting.values())} of {world_size} gave no answer in {timeout} s")
        for connection in ready:
            rank = waiting.pop(connection)
            try:
                failed, value = connection.recv()
            except EOFError:
                failed, value = True, "the process died"
            if failed:
                _stop_workers()
                raise RuntimeError(f"rank {rank} of {world_size} in {function.__name__}:\n{value}")
            results[rank] = value
    return results


def free_port() -> int:
    """A port for ranks to meet at, that nobody else is given."""
    number, share = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]), len(_PORTS) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    while True:
        port = _PORTS[number * share + next(_next_port) % share]
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def signals_of(function: Callable[..., Any], world_size: int, *args, timeout: float = 300) -> list[int]:
    """The signal that each rank of `ends_of` died of, 0 where it ended by itself."""
    return [max(0, -code) for code, _ in ends_of(function, world_size, *args, timeout=timeout)]


def ends_of(function: Callable[..., Any], world_size: int, *args, timeout: float = 300, grace: float = 30) -> list[tuple[int, str]]:
    """Runs `function(*args)` on ranks in processes of their own, which may be stopped or killed: exit code and stderr of each.

    As by a launcher, those that are left `grace` seconds after the first has ended with an error are killed.
    """
    context = _forking()
    with tempfile.TemporaryDirectory() as folder:
        port, errors = free_port(), [Path(folder) / str(rank) for rank in range(world_size)]
        tasks = [(sys.path, rank, world_size, port, str(errors[rank]), function, args) for rank in range(world_size)]
        ranks = [context.Process(target=_run_rank, args=task) for task in tasks]
        for process in ranks:
            process.start()
        left = {process.sentinel: process for process in ranks}
        while left:
            ended = multiprocessing.connection.wait(list(left), timeout)
            codes = [left.pop(sentinel).exitcode for sentinel in ended]
            timeout = min(timeout, grace) if any(codes) else timeout
            if not ended:
                for process in left.values():
                    process.kill()
        for process in ranks:
            process.join()
        return [(process.exitcode, path.read_text()) for process, path in zip(ranks, errors, strict=True)]


def _run_rank(path: list[str], rank: int, world_size: int, port: int, error: str, function: Callable[..., Any], args: tuple) -> None:
    sys.path[:] = path
    descriptor = os.open(error, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    gc.freeze()  # see _serve
    torch.set_num_threads(1)
    function(*args)


def _forking() -> multiprocessing.context.BaseContext:
    """Forks processes from one that has imported what is slow to import, and has done nothing else; on a GPU not even that.

    Core's import asks whether there is a GPU, and a process that has asked cannot be forked to use it.
    """
    context = multiprocessing.get_context("forkserver")
    if not torch.cuda.is_available():
        context.set_forkserver_preload(["megapref.train", "numpy.ma", "pandas", "megatron.core.models.mimo"])
    return context


def _ensure_workers(count: int) -> None:
    context = _forking()
    while len(_workers) < count:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, len(_workers)), daemon=True)
        process.start()
        theirs.close()
        _workers.append((process, ours))


@atexit.register
def _stop_workers() -> None:
    for process, connection in _workers:
        connection.close()
        process.kill()
        process.join()
    _workers.clear()


def _serve(connection, rank: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    gc.freeze()  # what is imported is never garbage: Core, which collects at every save, would copy its memory
    torch.set_num_threads(1)
    while True:
        try:
            sys.path[:], function, args, world_size, port = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        os.environ.update(WORLD_SIZE=str(world_size), MASTER_PORT=str(port))
        try:
            connection.send((False, function(*args)))
        except BaseException:
            connection.send((True, traceback.format_exc()))
        finally:
            _leave_groups()


def _leave_groups() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        from megapref.mcore import setup

        setup.stop()
