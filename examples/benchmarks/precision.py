#!/usr/bin/env python3
"""What do FP8 and NVFP4 cost where they are emulated? The time of a training step of each recipe beside bf16's.

    python examples/benchmarks/precision.py [--layers 4] [--rounds 6] [--threads 2]

A model 512 wide on random tokens. The settings take turns, one step each, so that a busy machine slows all alike;
figures are medians over rounds. On a CPU they are slower than bf16, always: they show what rounding does to training,
not how fast a GPU would be. Fails if a recipe's step takes more than `--most` times bf16's.
"""

import argparse
from typing import get_args

import torch
from random_steps import random_step
from turns import alternate, say_ratio

from vishwamai_mp.config import PretrainConfig, load_config, resolve
from vishwamai_mp.config.errors import UserError, run_program
from vishwamai_mp.config.resolve_fp8 import rounds_operands
from vishwamai_mp.config.schema import Precision
from vishwamai_mp.runtime import distributed_session, multiplies_natively

BATCH, LENGTH, VOCABULARY = 4, 512, 8192
_SETTINGS = ["bf16", *(precision for precision in get_args(Precision) if rounds_operands(precision))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="default: 4")
    parser.add_argument("--rounds", type=int, default=6, help="measured steps of each setting (default: 6)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--most", type=float, default=2.0, help="highest ratio to bf16 (default: 2)")
    options = parser.parse_args()
    with distributed_session(configuration("bf16", options.layers, options.threads)) as runtime:
        arms = {name: random_step(configuration(name, options.layers, options.threads), runtime) for name in _SETTINGS}
        seconds = alternate(arms, options.rounds)
    how = "in bf16" if multiplies_natively(torch.bfloat16) else "in fp32: this CPU has no bf16 matrix product"
    print(
        f"{options.layers} layers of width 512, {BATCH} sequences of {LENGTH} tokens, {options.threads} threads,"
        f" median of {options.rounds} rounds; matrices are multiplied {how}"
    )
    for name in _SETTINGS:
        print(f"  {name:14} {1e3 * seconds[name]:8.1f} ms/step   {seconds[name] / seconds['bf16']:.2f} × bf16")
    for name in _SETTINGS[1:]:
        say_ratio(f"time of a step, {name} / bf16", seconds[name] / seconds["bf16"])
    worst = max(_SETTINGS, key=seconds.__getitem__)
    if seconds[worst] > options.most * seconds["bf16"]:
        raise UserError(f"{worst} takes {seconds[worst] / seconds['bf16']:.2f} times bf16's, more than {options.most}")


def configuration(precision: str, layers: int, threads: int) -> PretrainConfig:
    """One process, no evaluation, no files."""
    recipe = {
        "model": {
            "hidden_size": 512,
            "num_layers": layers,
            "num_attention_heads": 8,
            "intermediate_size": 1536,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": LENGTH,
        },
        "precision": precision,
        "training": {
            "sequence_length": LENGTH,
            "micro_batch_size": BATCH,
            "global_batch_size": BATCH,
            "threads": threads,
        },
    }
    return resolve(load_config(recipe), 1)


if __name__ == "__main__":
    run_program(main)
