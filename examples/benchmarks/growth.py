#!/usr/bin/env python3
"""How does the cost of training grow? Tokens per second over the sequence, the width and the batch, as a plot.

    python examples/benchmarks/growth.py [--axis sequence width batch] [--rounds 2] [--output FOLDER]

From a base of 4 layers, width 256, 4 sequences of 512 tokens one size is varied at a time: the sequence at 16,384
tokens a step, the width at 2,048 tokens a step. Ratios are beside the smallest size of an axis.
"""

import argparse
from pathlib import Path

from random_steps import random_step
from turns import alternate, say_ratio

from vishwamai_mp.config import PretrainConfig, load_config, resolve, run_program
from vishwamai_mp.runtime import distributed_session

AXES = {
    "sequence": (512, 1024, 2048, 4096, 8192, 16384),
    "width": (256, 512, 1024, 2048),
    "batch": (1, 2, 4, 8, 16),
}
_RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", nargs="+", default=list(AXES), choices=AXES, help="default: all")
    parser.add_argument("--most", type=int, help="largest size of any axis (default: all of them)")
    parser.add_argument("--rounds", type=int, default=2, help="measured steps of each size (default: 2)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--output", type=Path, default=_RESULTS, help="folder for growth.png (default: results)")
    options = parser.parse_args()
    speeds = {}
    for axis in options.axis:
        sizes = [size for size in AXES[axis] if size <= (options.most or size)]
        speeds[axis] = {size: speed(axis, size, options.rounds, options.threads) for size in sizes}
        for size in sizes[1:]:
            say_ratio(f"tokens/s at {axis} {size} / {sizes[0]}", speeds[axis][size] / speeds[axis][sizes[0]])
    options.output.mkdir(parents=True, exist_ok=True)
    plot(speeds, options.output / "growth.png")


def speed(axis: str, size: int, rounds: int, threads: int) -> float:
    """Tokens per second of a training step."""
    config = configuration(axis, size, threads)
    with distributed_session(config) as runtime:
        seconds = alternate({"step": random_step(config, runtime)}, rounds)["step"]
    tokens = config.training.micro_batch_size * config.training.sequence_length
    print(f"{axis:8} {size:6} {1e3 * seconds:10.1f} ms/step {tokens / seconds:8,.0f} tokens/s", flush=True)
    return tokens / seconds


def configuration(axis: str, size: int, threads: int) -> PretrainConfig:
    """The base with one size changed."""
    length = size if axis == "sequence" else 512
    width = size if axis == "width" else 256
    batch = {"sequence": 16384 // length, "width": 4, "batch": size}[axis]
    recipe = {
        "model": {
            "hidden_size": width,
            "num_layers": 4,
            "num_attention_heads": width // 64,
            "vocab_size": 8192,
            "max_position_embeddings": length,
        },
        "precision": "fp32",
        "training": {
            "sequence_length": length,
            "micro_batch_size": batch,
            "global_batch_size": batch,
            "threads": threads,
        },
    }
    return resolve(load_config(recipe), 1)


def plot(speeds: dict[str, dict[int, float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(speeds), figsize=(4 * len(speeds), 3.4), layout="constrained", squeeze=False)
    for axis, (name, values) in zip(axes[0], speeds.items(), strict=True):
        axis.loglog(list(values), list(values.values()), "o-", base=2)
        axis.set_xlabel(name)
        axis.set_ylabel("tokens/s")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_program(main)
