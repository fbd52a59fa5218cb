#!/usr/bin/env python3
"""What the step journal costs: a training step with it and without it, in turns, and each of its entries alone.

Two gloo processes train a small model. Steps with and without the journal alternate, so that both see the same machine,
in turns either first; differences of neighbours are compared, by their median, in seconds on the clock and in those of
this process's processors, which other programs disturb less. What phases and collectives cost alone, measured in a
loop, times their number in a step is a second answer, which noise of the machine does not reach.

example: python examples/benchmarks/journal.py --steps 100
"""

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from turns import say_ratio

from vishwamai_mp.config import load_config, resolve, run_program
from vishwamai_mp.data.batches import DocumentRules, make_batch
from vishwamai_mp.diagnosis.shared import Kind, Operation, Phase, Word, events
from vishwamai_mp.model import build_model
from vishwamai_mp.runtime import initialize
from vishwamai_mp.runtime.step_journal import Journal, journal_open, phase, step
from vishwamai_mp.training.optimizer import build_optimizer, wrap_data_parallel
from vishwamai_mp.training.step import TrainStep

_SETTINGS = ["parallel.tensor_model_parallel_size=2", "training.threads=1", "precision=fp32"]


def main() -> None:
    """Parse the command line, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of each kind (%(default)s)")
    parser.add_argument("--config", default="tiny", help="preset or recipe (%(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(join_and_measure, (f"{folder}/store", options.config, options.steps), nprocs=2)


def join_and_measure(rank: int, store: str, name: str, steps: int) -> None:
    """Be one of the two ranks."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    text, share = measure(name, steps)
    if rank == 0:
        print(text)
        say_ratio("time of the journal / a step", share)


def measure(name: str | dict, steps: int, overrides: Sequence[str] = ()) -> tuple[str, float]:
    """On each of two ranks that have met: what was found in words, and the journal's share of a step."""
    config = resolve(load_config(name, [*_SETTINGS, *overrides]), 2)
    runtime = initialize(config)
    chunks = wrap_data_parallel(config, runtime, build_model(config, runtime))
    train = TrainStep(config, runtime, chunks, build_optimizer(config, runtime, chunks))
    training = config.training
    text = torch.randint(1, config.model.vocab_size, (training.micro_batch_size, training.sequence_length + 1))
    batches = [make_batch(text, DocumentRules())] * (training.global_batch_size // training.micro_batch_size)

    def one(number: int) -> tuple[float, float]:
        start, busy = time.perf_counter(), time.process_time()
        with step(number):
            with phase(Phase.BATCH):
                pass
            train.train(batches, number, 1e-4, float("inf"))
        return time.perf_counter() - start, time.process_time() - busy

    one(0)
    journal, pairs = Journal(), []
    for number in range(steps):
        seconds = {}
        for noted in (False, True) if number % 2 else (True, False):  # what comes second may find warmer caches
            # To open one, which a run does once, takes milliseconds and leaves caches colder: before either step.
            with journal_open(journal):
                if noted:
                    seconds[True] = one(number)
            if not noted:
                seconds[False] = one(number)
            journal.words[Word.ENDING] = 0
        pairs.append((seconds[False], seconds[True]))
    kinds = Counter(event.kind for event in events(journal.words) if event.step == steps - 1)
    return report(pairs, kinds[Kind.PHASE], kinds[Kind.BEGINS])


def report(pairs: Sequence[Sequence[Sequence[float]]], phases: int, collectives: int) -> tuple[str, float]:
    """Both answers in words, and the second; of each pair of steps, without and with, clock and processors."""
    (median, on_clock), (_, busy) = (_difference([(a[i], b[i]) for a, b in pairs]) for i in (0, 1))
    of_phase, of_collective = seconds_alone()
    whole = phases * of_phase + collectives * of_collective
    text = (
        f"a step without the journal: {1e3 * median:.1f} ms (median of {len(pairs)})\n"
        f"with it: {on_clock} on the clock, {busy} of processors' time"
        " (median difference of neighbours, standard error)\n"
        f"{phases} phases × {1e6 * of_phase:.1f} µs + {collectives} collectives × {1e6 * of_collective:.1f} µs"
        f" = {1e3 * whole:.2f} ms, {whole / median:.3%} of a step"
    )
    return text, whole / median


def _difference(pairs: list[tuple[float, float]]) -> tuple[float, str]:
    """The median of the first, and how much more the second are, in words."""
    median, differences = statistics.median(a for a, _ in pairs), [b - a for a, b in pairs]
    middle = statistics.median(differences)
    # Of a median, from the median distance to it, as if differences were normally distributed.
    error = 1.253 * 1.483 * statistics.median(abs(one - middle) for one in differences) / len(differences) ** 0.5
    return median, f"{middle / median:+.2%} ± {error / median:.2%}"


def seconds_alone(count: int = 20_000) -> tuple[float, float]:
    """Of a phase, and of a collective: begun, handed over and waited for."""
    with journal_open(Journal()) as journal:
        start = time.perf_counter()
        for _ in range(count // 2):
            with phase(Phase.SAVE):
                pass
        middle = time.perf_counter()
        for _ in range(count):
            event = journal.begin(0, Operation.all_reduce, 8, -1)
            journal.waiting(event, int)
            journal.waiting(event, int)
        return (middle - start) / count, (time.perf_counter() - middle) / count


if __name__ == "__main__":
    run_program(main)
