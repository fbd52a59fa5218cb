"""The training job that `hangs.py` starts: `vishwamai_mp.pretrain` in which one rank goes wrong in a chosen way.

usage (under a launcher): hanging_job.py KIND RANK STEP MARK <arguments of vishwamai_mp.pretrain>

KIND is one of `KINDS`, or "nothing".
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from vishwamai_mp.checkpoint import writer
from vishwamai_mp.pretrain import parse_arguments
from vishwamai_mp.runtime import distributed_session, run_distributed_program
from vishwamai_mp.training.callbacks import Callback, usual_callbacks
from vishwamai_mp.training.loop import Trainer

_lock = threading.Lock()
_lock.acquire()


class Fault(Callback):
    """Does something wrong before or within a step, on one rank.

    Args:
        kind: of `KINDS`.
        step: finished steps before.
        mark: a file that is made at the moment when it goes wrong.
    """

    def __init__(self, kind: str, step: int, mark: Path) -> None:
        self.kind, self.step, self.mark = kind, step, mark

    def on_step_begin(self, trainer: Trainer) -> None:
        if trainer.state.step == self.step:
            KINDS[self.kind](self, trainer)

    def at(self, target: Any, name: str, instead: Callable[..., Any]) -> None:
        """From now on a call of `name` comes to `instead`."""
        mock.patch.object(target, name, instead).start()


def stops(fault: Fault, trainer: Trainer) -> None:
    fault.mark.touch()
    os.kill(os.getpid(), signal.SIGSTOP)


def dies(fault: Fault, trainer: Trainer) -> None:
    fault.mark.touch()
    os.kill(os.getpid(), signal.SIGKILL)


def leaves_out_a_collective(fault: Fault, trainer: Trainer) -> None:
    """The first all-reduce of the step."""
    real = dist.all_reduce
    left_out: list[bool] = []

    def all_reduce(*args: Any, **options: Any) -> Any:
        if left_out:
            return real(*args, **options)
        left_out.append(True)
        fault.mark.touch()
        return None

    fault.at(dist, "all_reduce", all_reduce)


def brings_another_shape(fault: Fault, trainer: Trainer) -> None:
    fault.mark.touch()
    dist.all_reduce(torch.zeros(3))


def reads_slowly(fault: Fault, trainer: Trainer) -> None:
    def read_slowly(*_: Any) -> Any:
        fault.mark.touch()
        time.sleep(3600)

    fault.at(type(trainer.datasets.train), "__getitem__", read_slowly)


def saves_behind_a_lock(fault: Fault, trainer: Trainer) -> None:
    def write_behind_a_lock(*_: Any) -> Any:
        fault.mark.touch()
        with _lock:
            pass

    fault.at(writer, "_write_files", write_behind_a_lock)


def loops(fault: Fault, trainer: Trainer) -> None:
    """In the forward pass of a layer."""

    def loop_forever(*_: Any) -> None:
        fault.mark.touch()
        while True:
            pass

    next(trainer.chunks[0].modules()).register_forward_pre_hook(loop_forever)


def evaluates_for_ever(fault: Fault, trainer: Trainer) -> None:
    def evaluate_for_ever(*_: Any) -> Any:
        fault.mark.touch()
        time.sleep(3600)

    fault.at(trainer.steps, "evaluate", evaluate_for_ever)


def writes_to_nobody(fault: Fault, trainer: Trainer) -> None:
    """Into a pipe that is full and that nobody reads."""
    fault.mark.touch()
    _, end = os.pipe()
    while True:
        os.write(end, bytes(65536))


def holds_the_interpreter(fault: Fault, trainer: Trainer) -> None:
    """Native code that keeps the interpreter's lock: no thread of the process can run Python."""
    fault.mark.touch()
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    for _ in range(2):  # the second waits for the first
        library.pthread_mutex_lock(mutex)


def meets_in_a_collective(fault: Fault, trainer: Trainer) -> None:
    """What the others do where one brings another shape."""
    dist.all_reduce(torch.zeros(2))


KINDS: dict[str, Callable[[Fault, Trainer], None]] = {
    function.__name__: function
    for function in (
        *(stops, dies, leaves_out_a_collective, brings_another_shape, reads_slowly, saves_behind_a_lock, loops),
        *(evaluates_for_ever, writes_to_nobody, holds_the_interpreter, meets_in_a_collective),
    )
}


def main() -> int:
    """Train, with a fault on one rank."""
    kind, rank, step, mark, *arguments = sys.argv[1:]
    from vishwamai_mp.data.datasets import build_datasets

    config = parse_arguments(arguments).config
    with distributed_session(config) as runtime:
        datasets = build_datasets(config, None, runtime)
        own = kind if runtime.rank == int(rank) else "meets_in_a_collective" if kind == "brings_another_shape" else ""
        faults = [Fault(own, int(step), Path(mark))] if own in KINDS else []
        Trainer(config, runtime, datasets, usual_callbacks(config, more=faults)).train()
    return 0


if __name__ == "__main__":
    run_distributed_program(main)
