"""What runs inside a worker of `tests/workers.py`: serve jobs until the test process closes the connection or ends."""

import contextlib
import datetime
import faulthandler
import gc
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection


@dataclass(frozen=True)
class Job:
    """One rank's part of a run."""

    run: int
    rank: int
    world_size: int
    port: int  # of the store where ranks meet
    timeout: float  # seconds, for collectives
    path: list[str]  # sys.path of the test process
    folder: str  # its working directory
    call: bytes  # pickled (function, args, kwargs)


@dataclass(frozen=True)
class Reply:
    """What came of it: the pickled value or exception, and on failure the traceback's text in `error`."""

    rank: int
    when: float  # time.monotonic(), one clock for all processes of a machine
    value: bytes = b""
    error: str | None = None


def serve(connection: Connection, stack_file: str) -> None:
    """Answer jobs until the connection closes."""
    os.setpgid(0, 0)  # one signal reaches this worker with whatever it starts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the test process's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(stack_file, "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        while True:
            try:
                job: Job = pickle.loads(connection.recv_bytes())
            except (EOFError, OSError):
                return
            with _clean_state(job):
                # The reply goes out before the process group ends: ending it makes the peers fail as well.
                connection.send_bytes(pickle.dumps(_answer(job)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(os.getpid(), signal.SIGKILL)


def _answer(job: Job) -> Reply:
    try:
        _join(job)
        fn, args, kwargs = pickle.loads(job.call)
        return Reply(job.rank, time.monotonic(), pickle.dumps(fn(*args, **kwargs)))
    except BaseException as error:  # SystemExit too: a program that exits must not end the worker
        when, text = time.monotonic(), traceback.format_exc()
        try:
            value = pickle.dumps(error)
            pickle.loads(value)
        except Exception:  # its class cannot be pickled, or not be built again from its arguments
            value = b""
        return Reply(job.rank, when, value, text)


def _join(job: Job) -> None:
    import torch.distributed as dist

    from vishwamai_mp.runtime.gloo import groups_on_one_device

    if os.path.exists("/sys/class/net/lo"):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's own name need not resolve
    os.environ.update(
        RANK=str(job.rank),
        LOCAL_RANK=str(job.rank),
        WORLD_SIZE=str(job.world_size),
        # Raised to the number of cores, so that whoever shares the cores among local processes gets one thread.
        LOCAL_WORLD_SIZE=str(max(job.world_size, os.cpu_count() or 1)),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(job.port),
        # A program that ends the process group may join once more, as under torchrun: through the launcher's store.
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT=str(job.run),
    )
    timeout = datetime.timedelta(seconds=job.timeout)
    store = dist.TCPStore("127.0.0.1", job.port, is_master=False, timeout=timeout)
    with groups_on_one_device():
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(f"run{job.run}", store),
            rank=job.rank,
            world_size=job.world_size,
            timeout=timeout,
        )


@contextlib.contextmanager
def _clean_state(job: Job) -> Iterator[None]:
    """Give a job known seeds and one thread; take away what it leaves behind."""
    import numpy
    import torch

    from vishwamai_mp.runtime import choices

    environment = dict(os.environ)
    sys.path[:] = job.path
    os.chdir(job.folder)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    numpy.random.seed(0)  # noqa: NPY002 (libraries draw from the old generator)
    random.seed(0)
    yield
    _forget_megatron()
    choices.forget()
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    os.environ.clear()
    os.environ.update(environment)
    gc.collect()
    gc.freeze()  # what a library keeps is no garbage of later jobs


def _forget_megatron() -> None:
    """End the process groups and megatron-core's globals."""
    import torch.distributed as dist

    from vishwamai_mp import runtime

    if "megatron.core.parallel_state" in sys.modules:
        from megatron.core import num_microbatches_calculator, rerun_state_machine
        from megatron.core.tensor_parallel import random as tensor_parallel_random

        tensor_parallel_random.get_cuda_rng_tracker().reset()
        num_microbatches_calculator.unset_num_microbatches_calculator()
        rerun_state_machine.destroy_rerun_state_machine()
        runtime.shutdown(keep_world=True)
    if dist.is_initialized():
        dist.destroy_process_group()
