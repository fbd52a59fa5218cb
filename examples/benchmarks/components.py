#!/usr/bin/env python3
"""What do the neural memory and the cache cost? Training with each and with both, beside the same model without.

    python examples/benchmarks/components.py [--model tiny wide] [--rounds 6] [--threads 2]

`tiny` is the preset of four layers, of which one carries a component; `wide` is 8 layers of width 512, of which one
does. Components have their default sizes, which follow from the model's. The settings take turns, one step each, so
that a busy machine slows all alike; figures are medians over rounds.
"""

import argparse

from random_steps import random_step
from turns import alternate, say_ratio

from vishwamai_mp.config import PretrainConfig, load_config, resolve, run_program
from vishwamai_mp.runtime import distributed_session

SETTINGS = {
    "neither": [],
    "memory": ["memory.enabled=true"],
    "cache": ["cache.enabled=true"],
    "both": ["memory.enabled=true", "cache.enabled=true"],
}
WIDE = {
    "model": {
        "hidden_size": 512,
        "num_layers": 8,
        "num_attention_heads": 8,
        "vocab_size": 8192,
        "max_position_embeddings": 512,
    },
    "precision": "fp32",
    "training": {"sequence_length": 512, "micro_batch_size": 4, "global_batch_size": 4},
}
MODELS: dict[str, str | dict] = {"tiny": "tiny", "wide": WIDE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=MODELS, help="default: both")
    parser.add_argument("--rounds", type=int, default=6, help="measured steps of each setting (default: 6)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    options = parser.parse_args()
    for name in options.model:
        compare(name, options.rounds, options.threads)


def compare(name: str, rounds: int, threads: int) -> None:
    """Time the four settings of a model in turn and print tokens per second and ratios."""
    configs = {setting: configuration(name, setting, threads) for setting in SETTINGS}
    with distributed_session(configs["neither"]) as runtime:
        seconds = alternate({setting: random_step(config, runtime) for setting, config in configs.items()}, rounds)
    training = configs["neither"].training
    tokens = training.micro_batch_size * training.sequence_length
    print(f"{name}: {threads} threads, {tokens} tokens a step, median of {rounds} rounds")
    for setting, median in seconds.items():
        print(f"  {setting:8} {1e3 * median:8.1f} ms/step {tokens / median:8,.0f} tokens/s")
    for setting in list(SETTINGS)[1:]:
        say_ratio(f"tokens/s of {name}, with {setting} / without", seconds["neither"] / seconds[setting])


def configuration(name: str, setting: str, threads: int) -> PretrainConfig:
    """A model with the components of a setting; one micro-batch a step."""
    batch = ["training.micro_batch_size=4", "training.global_batch_size=4", f"training.threads={threads}"]
    return resolve(load_config(MODELS[name], [*batch, *SETTINGS[setting]]), 1)


if __name__ == "__main__":
    run_program(main)
