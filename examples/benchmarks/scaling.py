#!/usr/bin/env python3
"""What do two processes of one thread each make of two cores, beside one process of two threads?

    python examples/benchmarks/scaling.py [--rounds 3] [--steps 6]

Every layout trains the same model (8 layers × 512, sequence 512) on global batches of 8 sequences. The layouts take
turns, in fresh processes, so that a busy machine slows all alike; figures are medians over rounds of the median step.
A pipeline of 2 stages and 8 micro-batches idles 1 part in 9, so 0.89 is all it can reach.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from turns import say_ratio

LENGTH, SEQUENCES = 512, 8
# name: (processes, settings)
LAYOUTS = {
    "one process": (1, ["training.micro_batch_size=4", "training.threads=2"]),
    "DP2": (2, ["training.micro_batch_size=4"]),
    "PP2": (2, ["training.micro_batch_size=1", "parallel.pipeline_model_parallel_size=2"]),
    "TP2 SP": (
        2,
        ["training.micro_batch_size=4", "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each layout (default: 3)")
    parser.add_argument("--steps", type=int, default=6, help="measured steps per turn (default: 6)")
    parser.add_argument("--child", choices=LAYOUTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.steps)
        return
    seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for _ in range(options.rounds):
        for name in LAYOUTS:
            seconds[name].append(measure(name, options.steps))
    base = statistics.median(seconds["one process"])
    for name, values in seconds.items():
        median = statistics.median(values)
        speed = SEQUENCES * LENGTH / median
        print(f"{name:12} {1e3 * median:8.0f} ms/step {speed:7,.0f} tokens/s")
    for name in list(seconds)[1:]:
        say_ratio(f"speed of {name} / one process", base / statistics.median(seconds[name]))


def measure(name: str, steps: int) -> float:
    """Median seconds of a step of one layout, in processes of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(LAYOUTS[name][0])]
    command += [str(Path(__file__).resolve()), "--child", name, "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def child(name: str, steps: int) -> None:
    """Train on this rank; rank 0 prints the median step's seconds."""
    import torch
    from training_step import SIZE

    from vishwamai_mp.config import load_config, resolve
    from vishwamai_mp.data.batches import BatchStream
    from vishwamai_mp.model import build_model
    from vishwamai_mp.runtime import distributed_session
    from vishwamai_mp.training.optimizer import build_optimizer, wrap_data_parallel
    from vishwamai_mp.training.step import TrainStep

    processes, settings = LAYOUTS[name]
    training = {"sequence_length": LENGTH, "global_batch_size": SEQUENCES, "output_dir": tempfile.gettempdir()}
    config = resolve(load_config({"model": SIZE, "precision": "fp32", "training": training}, settings), processes)
    with distributed_session(config) as runtime:
        chunks = wrap_data_parallel(config, runtime, build_model(config, runtime))
        step = TrainStep(config, runtime, chunks, build_optimizer(config, runtime, chunks))
        text = torch.randint(0, SIZE["vocab_size"], (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(0))
        seconds = []
        for number in range(steps + 2):
            stream = BatchStream(
                text,
                micro_batch_size=config.training.micro_batch_size,
                global_batch_size=SEQUENCES,
                data_rank=runtime.data_rank,
                data_parallel_size=runtime.data_parallel_size,
                stop_samples=SEQUENCES,
            )
            start = time.perf_counter()
            step.train(list(stream), number, 1e-4, float("inf"))
            seconds.append(time.perf_counter() - start)
        if runtime.reports:
            print(json.dumps(statistics.median(seconds[2:])))


if __name__ == "__main__":
    main()
