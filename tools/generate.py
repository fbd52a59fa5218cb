#!/usr/bin/env python3
"""Generates text from a checkpoint.

    python tools/generate.py --load runs/tiny --prompt "def main(" --strategy greedy
    torchrun --nproc-per-node 2 tools/generate.py --load runs/tiny --prompt "import" --strategy sample \\
        parallel.tensor_model_parallel_size=2
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from vishwamai_mp.config import ParallelConfig, PretrainConfig, UserError, load_config, resolve, to_dict

_BUILT_LATER = ("beam", "tree")


def main() -> int:
    options = parse_arguments()
    from vishwamai_mp.checkpoint.store import locate

    found = locate(Path(options.load).resolve())  # absolute, for the run folder's own files are two levels up
    checkpoint = found.path
    assert checkpoint is not None
    config = generation_config(checkpoint, options.overrides)
    # torch and megatron-core take seconds to import; a mistake in the command line should not.
    from vishwamai_mp.checkpoint import CheckpointManager
    from vishwamai_mp.data.tokenizer import Tokenizer
    from vishwamai_mp.inference.generation import Generator, SamplingOptions
    from vishwamai_mp.model import build_model
    from vishwamai_mp.runtime import distributed_session

    tokenizer = Tokenizer(find_tokenizer(checkpoint, config))
    if tokenizer.vocab_size != config.model.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens, the model {config.model.vocab_size};"
            " give the one that the model was trained with"
        )
    sampling = SamplingOptions(options.max_new_tokens, options.temperature, options.top_k, options.seed)
    with distributed_session(config) as runtime:
        if runtime.reports:
            for reason in found.skipped:
                print(f"{reason}; taking {checkpoint.name}", file=sys.stderr)
        (model,) = build_model(config, runtime, initialize=False)
        CheckpointManager(checkpoint.parent, config, runtime).load(checkpoint, [model])
        generator = Generator(config, runtime, model)
        for prompt in options.prompt:
            tokens = tokenizer.encode(prompt)
            (new,) = generator.generate([tokens], sampling, tokenizer.eod_id)
            if runtime.reports:
                show(prompt, tokenizer.decode(tokens + new), new, options.json)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, help="a run folder, its checkpoints folder, or one checkpoint")
    parser.add_argument("--prompt", required=True, action="append", help="text to continue; may be given repeatedly")
    parser.add_argument(
        "--strategy",
        choices=["greedy", "sample", *_BUILT_LATER],
        default="greedy",
        help=f"default: greedy; not built yet: {', '.join(_BUILT_LATER)}",
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens to add at most (default: 64)")
    parser.add_argument("--temperature", type=float, help="of `sample`, above 0 (default: 1.0)")
    parser.add_argument("--top-k", type=int, help="of `sample`: choose among this many likeliest tokens")
    parser.add_argument("--seed", type=int, default=0, help="of `sample` (default: 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, such as the layout")
    options = parser.parse_args()
    if options.strategy in _BUILT_LATER:
        raise UserError(f"--strategy {options.strategy} is not built yet; use greedy or sample")
    if options.strategy == "sample":
        options.temperature = 1.0 if options.temperature is None else options.temperature
        if options.temperature <= 0:
            raise UserError(f"--temperature {options.temperature}: use a number above 0, or --strategy greedy")
    else:
        for name in ("temperature", "top_k"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} has no effect on --strategy greedy; add --strategy sample")
        options.temperature = 0.0
    return options


def generation_config(checkpoint: Path, overrides: list[str]) -> PretrainConfig:
    """The run's configuration on one process, or on the layout that the overrides name."""
    recipe = checkpoint.parent.parent / "config.yaml"
    if not recipe.is_file():
        raise UserError(f"{recipe} is missing; --load takes a run folder as training wrote it")
    trained = replace(load_config(recipe), parallel=ParallelConfig(), training=load_config({}).training)
    training = {"sequence_length": 2, "output_dir": str(checkpoint.parent.parent)}
    config = load_config({**to_dict(trained), "training": training}, overrides)
    parallel = config.parallel
    for name, neutral in (
        ("context_parallel_size", 1),
        ("sequence_parallel", False),
        ("virtual_pipeline_model_parallel_size", None),
    ):
        if getattr(parallel, name) != neutral:
            raise UserError(f"parallel.{name} has no use in generation; leave it out")
    world = int(os.environ.get("WORLD_SIZE", 1))
    config = replace(config, training=replace(config.training, micro_batch_size=1, global_batch_size=world))
    return resolve(config, world)


def find_tokenizer(checkpoint: Path, config: PretrainConfig) -> str:
    """The tokenizer beside the run, or where the configuration says."""
    beside = checkpoint.parent.parent / "tokenizer.model"
    if beside.is_file():
        return str(beside)
    if config.data.tokenizer is None:
        raise UserError("the run was trained without a tokenizer; set data.tokenizer=PATH.model")
    return config.data.tokenizer


def show(prompt: str, text: str, new: list[int], as_json: bool) -> None:
    print(json.dumps({"prompt": prompt, "text": text, "new_tokens": new}) if as_json else text, flush=True)


if __name__ == "__main__":
    from vishwamai_mp.runtime.failure import run_distributed_program

    run_distributed_program(main)
