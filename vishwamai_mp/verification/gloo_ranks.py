"""Processes of this machine that are the ranks of a gloo job, one job after another: a start takes seconds."""

import ctypes
import gc
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vishwamai_mp.config import UserError
from vishwamai_mp.config.errors import one_line
from vishwamai_mp.runtime.failure import die_with_parent


def release_memory() -> None:
    """Give back what nothing refers to any more: a model and its optimizer refer to each other."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # musl has none
        libc.malloc_trim(0)


class GlooRanks:
    """Runs functions as ranks. Processes start when they are first needed and end with the block, or with this process.

    Use it as a context manager.
    """

    def __init__(self) -> None:
        self._members: list[tuple[BaseProcess, Connection]] = []

    def __enter__(self) -> "GlooRanks":
        return self

    def __exit__(self, *_: Any) -> None:
        self._end()

    def __call__(self, function: Callable[..., Any], processes: int, *arguments: Any) -> list[Any]:
        """What each rank returned.

        Args:
            function: a module's.
            processes: of the job.
            arguments: of the function.

        Raises:
            UserError: as the function does.
            RuntimeError: any other error of a rank, or its end.
        """
        while len(self._members) < processes:
            self._start()
        members = self._members[:processes]
        with tempfile.TemporaryDirectory(prefix="vishwamai-ranks-") as folder:
            for rank, (_, pipe) in enumerate(members):
                pipe.send((function, arguments, str(Path(folder, "store")), rank, processes))
            answers: dict[int, Any] = {}
            waiting = {rank: pipe for rank, (_, pipe) in enumerate(members)}
            while waiting:
                ready = wait(list(waiting.values()))
                for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                    try:
                        outcome, answers[rank] = waiting.pop(rank).recv()
                    except (EOFError, ConnectionError):
                        outcome, answers[rank] = "failed", "its process ended"
                    if outcome != "returned":
                        self._end()  # the others may wait for it in vain
                        if outcome == "refused":
                            raise UserError(answers[rank])
                        raise RuntimeError(f"rank {rank} of {processes}: {answers[rank]}")
        return [answers[rank] for rank in range(processes)]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self._members.append((process, ours))

    def _end(self) -> None:
        for process, pipe in self._members:
            process.kill()
            process.join()
            pipe.close()
        self._members.clear()


def _serve(pipe: Connection) -> None:
    """Be a rank of one job after another."""
    die_with_parent()
    while True:
        try:
            function, arguments, store, rank, processes = pipe.recv()
        except EOFError:
            return
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
            pipe.send(("returned", function(*arguments)))
        except UserError as error:
            pipe.send(("refused", one_line(error)))
        except Exception as error:
            pipe.send(("failed", f"{type(error).__name__}: {one_line(error)}"))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            release_memory()
