"""A pool of processes for tests of distributed code: `workers.run(fn, 4, …)` runs `fn` as the 4 ranks of a gloo job.

The processes are forked from a server that has imported the stack, kept between runs, and replaced after a failure.
Use the session fixture `workers` (`tests/conftest.py`); nothing starts before its first run.
"""

import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from tests.worker_process import Job, Reply, serve

_REPOSITORY = Path(__file__).resolve().parent.parent
_GRACE = 1.0  # seconds in which peers of a failed rank may still answer
# The server has one thread: a process with more cannot be forked safely. Workers see no GPU: they are gloo's.
_SERVER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class WorkerError(RuntimeError):
    """A rank died, or raised what cannot be sent between processes."""


class WorkerTimeoutError(WorkerError, TimeoutError):
    """Some ranks did not answer in time; the message has their Python stacks."""


class RemoteTraceback(Exception):  # noqa: N818 (the cause of an error, never raised itself)
    """Cause of an exception raised again in the test: where it was raised in the worker."""

    def __init__(self, rank: int, text: str):
        super().__init__(f"rank {rank}:\n{text}")


@dataclass
class _Worker:
    process: ForkServerProcess
    connection: Connection
    stack_file: Path  # the worker writes its stacks here on SIGUSR1

    def kill(self) -> None:
        """End the worker and the processes that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()

    def stacks(self) -> str:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid or 0, signal.SIGUSR1)
            time.sleep(0.2)
        return self.stack_file.read_text(errors="replace") or "(no stack: the process is gone or stopped)"


class WorkerPool:
    """Worker processes, started on demand and kept.

    Args:
        timeout: seconds that a run may take.
        limit: most processes at once.
    """

    def __init__(self, timeout: float = 180.0, limit: int = 8):
        self.timeout = timeout
        self.limit = limit
        self._workers: list[_Worker] = []
        self._runs = itertools.count()
        self._folder = Path(tempfile.mkdtemp(prefix="vishwamai-workers-"))
        self._store: Any = None

    def run(self, fn: Callable[..., Any], world_size: int, /, *args: Any, **kwargs: Any) -> list[Any]:
        """Call `fn(*args, **kwargs)` in `world_size` processes and return what each rank returned, by rank.

        `fn` and the arguments are pickled, so `fn` belongs at a module's top level. It finds torchrun's environment
        variables, a fresh default process group, and one thread; afterwards the process groups, megatron-core's
        globals, environment, working directory and seeds are put back.

        Raises:
            what a rank raised first, with that rank's traceback as its cause;
            WorkerError: a rank died or raised what cannot be pickled;
            WorkerTimeoutError: `timeout` passed.
        """
        return self.run_within(self.timeout, fn, world_size, *args, **kwargs)

    def run_within(
        self, seconds: float, fn: Callable[..., Any], world_size: int, /, *args: Any, **kwargs: Any
    ) -> list[Any]:
        """`run` with a time limit of its own, in seconds."""
        if not 1 <= world_size <= self.limit:
            raise ValueError(f"world_size={world_size}: this pool has 1 to {self.limit} processes")
        call = pickle.dumps((fn, args, kwargs))
        self._start(world_size)
        used = self._workers[:world_size]
        run = next(self._runs)
        try:
            for rank, worker in enumerate(used):
                job = Job(run, rank, world_size, self._store.port, seconds, list(sys.path), os.getcwd(), call)
                with contextlib.suppress(BrokenPipeError):  # it died between two runs: reported below
                    worker.connection.send_bytes(pickle.dumps(job))
            replies = self._collect(used, time.monotonic() + seconds)
        except BaseException:
            self._drop(used)
            raise
        failed = [reply for reply in replies if reply.error is not None]
        if failed:
            self._drop(used)
            _raise(min(failed, key=lambda reply: reply.when))
        return [pickle.loads(reply.value) for reply in replies]

    def close(self) -> None:
        """End all workers."""
        self._drop(list(self._workers))
        self._store = None
        for path in self._folder.iterdir():
            path.unlink()
        self._folder.rmdir()

    def _start(self, count: int) -> None:
        if self._store is None:
            from torch.distributed import TCPStore  # here, so that tests without workers do not pay for it

            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._drop([worker for worker in self._workers if not worker.process.is_alive()])
        with fork_server() as context:
            while len(self._workers) < count:
                ours, theirs = multiprocessing.Pipe()
                handle, name = tempfile.mkstemp(dir=self._folder)
                os.close(handle)
                process = context.Process(target=serve, args=(theirs, name))
                process.start()
                theirs.close()
                self._workers.append(_Worker(process, ours, Path(name)))

    def _drop(self, workers: list[_Worker]) -> None:
        for worker in workers:
            worker.kill()
            self._workers.remove(worker)

    def _collect(self, workers: list[_Worker], deadline: float) -> list[Reply]:
        """Wait for all replies; after the first failure only a moment longer."""
        replies: dict[int, Reply] = {}
        failed = False
        while len(replies) < len(workers):
            waiting = {rank: worker for rank, worker in enumerate(workers) if rank not in replies}
            events = {worker.connection: rank for rank, worker in waiting.items()}
            ends = {worker.process.sentinel: rank for rank, worker in waiting.items()}
            ready = multiprocessing.connection.wait([*events, *ends], max(0.0, deadline - time.monotonic()))
            if not ready and not failed:
                raise WorkerTimeoutError(
                    f"ranks {sorted(waiting)} of {len(workers)} did not answer in time\n"
                    + "\n".join(f"rank {rank}:\n{worker.stacks()}" for rank, worker in waiting.items())
                )
            if not ready:
                break
            for rank in {events[item] if item in events else ends[item] for item in ready}:  # type: ignore[index]
                replies[rank] = _receive(waiting[rank], rank)
            if not failed and any(reply.error is not None for reply in replies.values()):
                failed, deadline = True, time.monotonic() + _GRACE
        return [replies[rank] for rank in sorted(replies)]


def _receive(worker: _Worker, rank: int) -> Reply:
    try:
        if worker.connection.poll():
            return pickle.loads(worker.connection.recv_bytes())
    except (EOFError, OSError):
        pass
    worker.process.join()
    # Its peers noticed the lost connections before we noticed the death, which is the cause.
    text = f"the worker ended with exit code {worker.process.exitcode} (negative: killed by that signal)"
    return Reply(rank, time.monotonic() - _GRACE, error=text)


def _raise(reply: Reply) -> None:
    if reply.value:
        raise pickle.loads(reply.value) from RemoteTraceback(reply.rank, reply.error or "")
    raise WorkerError(f"rank {reply.rank}: {reply.error}")


@contextlib.contextmanager
def fork_server() -> Iterator[ForkServerContext]:
    """Starts processes from one that has imported the stack, and that itself starts with the first of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    python_path = os.pathsep.join(filter(None, [str(_REPOSITORY), os.environ.get("PYTHONPATH")]))
    before = dict(os.environ)
    os.environ.update({**_SERVER_ENVIRONMENT, "PYTHONPATH": python_path})
    try:
        yield context
    finally:
        os.environ.clear()
        os.environ.update(before)
