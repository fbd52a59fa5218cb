#!/usr/bin/env python3
"""Generates text from a checkpoint.

    python tools/generate.py --load runs/tiny --prompt "def main(" --max-new-tokens 40
    python tools/generate.py --load runs/tiny --prompt "3 4 5 = 17" --strategy tree --html tree.html tree.max_depth=4
    torchrun --nproc-per-node 2 tools/generate.py --load runs/tiny --prompt "import" --strategy sample \\
        parallel.tensor_model_parallel_size=2

Lengths are in tokens, times in seconds. An option that the strategy has no use for is refused.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vishwamai_mp.config import ParallelConfig, PretrainConfig, UserError, load_config, resolve, to_dict

# Options that only some strategies know, with these strategies.
_OWN_OPTIONS = {
    "temperature": ("sample", "tree"),
    "top_k": ("sample",),
    "top_p": ("sample",),
    "min_p": ("sample",),
    "repetition_penalty": ("greedy", "sample"),
    "seed": ("sample", "tree"),
    "num_beams": ("beam",),
    "length_penalty": ("beam",),
    "early_stopping": ("beam",),
    "html": ("tree",),
    "max_tokens": ("tree",),
    "max_seconds": ("tree",),
    "max_new_tokens": ("greedy", "sample", "beam"),
    "stop": ("greedy", "sample"),
}


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
    from vishwamai_mp.model import build_model
    from vishwamai_mp.runtime import distributed_session

    tokenizer = Tokenizer(find_tokenizer(checkpoint, config))
    if tokenizer.vocab_size != config.model.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens, the model {config.model.vocab_size};"
            " give the one that the model was trained with"
        )
    with distributed_session(config) as runtime:
        if runtime.reports:
            for reason in found.skipped:
                print(f"{reason}; taking {checkpoint.name}", file=sys.stderr)
        (model,) = build_model(config, runtime, initialize=False)
        CheckpointManager(checkpoint.parent, config, runtime).load(checkpoint, [model])
        strategy = {"beam": beam, "tree": tree}.get(options.strategy, sample)
        for answer in strategy(options, config, runtime, model, tokenizer):
            if runtime.reports:
                print(json.dumps(answer) if options.json else answer["text"], flush=True)
    return 0


def sample(
    options: argparse.Namespace, config: PretrainConfig, runtime: Any, model: Any, tokenizer: Any
) -> Iterator[dict[str, Any]]:
    """Greedy or sampled continuations, prompt by prompt."""
    from vishwamai_mp.inference import Generator, SamplingOptions

    chosen = given(options, "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_new_tokens")
    chosen["temperature"] = 0.0 if options.strategy == "greedy" else options.temperature or 1.0
    sampling = SamplingOptions(
        **chosen, stop_tokens=(tokenizer.eod_id,), stop_strings=tuple(options.stop or ()), log_probs=options.json
    )
    generator = Generator(config, runtime, model, decode=tokenizer.decode)
    for prompt in options.prompt:
        tokens = tokenizer.encode(prompt)
        (done,) = generator.generate([tokens], sampling)
        text = prompt + generator.text(done) if done.stop else tokenizer.decode(tokens + done.tokens)
        yield {
            "prompt": prompt,
            "text": text,
            "new_tokens": done.tokens,
            "log_probs": [round(number, 4) for number in done.log_probs],
            "finish": done.finish,
        }


def beam(
    options: argparse.Namespace, config: PretrainConfig, runtime: Any, model: Any, tokenizer: Any
) -> Iterator[dict[str, Any]]:
    """The best text of a beam search, prompt by prompt."""
    from vishwamai_mp.inference import BeamOptions, Engine, beam_search

    chosen = given(options, "num_beams", "length_penalty", "max_new_tokens")
    if options.early_stopping:
        chosen["early_stopping"] = {"true": True, "false": False}.get(options.early_stopping, "never")
    settings = BeamOptions(**chosen, stop_tokens=(tokenizer.eod_id,))
    engine = Engine(config, runtime, model)
    for prompt in options.prompt:
        tokens = tokenizer.encode(prompt)
        ((best, *others),) = beam_search(engine, [tokens], settings)
        yield {
            "prompt": prompt,
            "text": tokenizer.decode(tokens + best.tokens),
            "new_tokens": best.tokens,
            "score": round(best.score, 4),
            "others": [{"new_tokens": other.tokens, "score": round(other.score, 4)} for other in others],
        }


def tree(
    options: argparse.Namespace, config: PretrainConfig, runtime: Any, model: Any, tokenizer: Any
) -> Iterator[dict[str, Any]]:
    """The chosen path of a search over thoughts, with the whole tree; `--html` gets a picture."""
    from vishwamai_mp.inference import Engine
    from vishwamai_mp.observability.page import write_page
    from vishwamai_mp.observability.tree_page import to_html
    from vishwamai_mp.tree_of_thoughts import TreeOfThoughts, ending_of_thoughts

    settings = replace(config.tree, **given(options, "temperature", "seed"))
    if not config.tree.enabled and settings.value_weight and not settings.logprob_weight:
        if runtime.reports:
            print("the model has no value head; nodes are compared by their probability", file=sys.stderr)
        settings = replace(settings, value_weight=0.0, logprob_weight=1.0)
    search = TreeOfThoughts(
        Engine(config, runtime, model),
        settings,
        **ending_of_thoughts(tokenizer, settings.stop),
        decode=tokenizer.decode,
    )
    results = search.search(
        [tokenizer.encode(prompt) for prompt in options.prompt], **given(options, "max_tokens", "max_seconds")
    )
    if options.html and runtime.reports:
        title = options.prompt[0] if len(results) == 1 else "Tree of thoughts"
        write_page(Path(options.html), to_html(results, title), "--html")
    for prompt, result in zip(options.prompt, results, strict=True):
        text = tokenizer.decode(result.nodes[0].tokens + result.answer)
        yield {"prompt": prompt, "text": text, "new_tokens": result.answer, "tree": result.to_dict()}


def given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the options that the command line names."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--load", required=True, metavar="PATH", help="a run folder, its checkpoints folder, or one checkpoint"
    )
    parser.add_argument(
        "--prompt", required=True, action="append", metavar="TEXT", help="text to continue; may be given repeatedly"
    )
    parser.add_argument(
        "--strategy",
        choices=["greedy", "sample", "beam", "tree"],
        default="greedy",
        help="greedy (default): the likeliest token each time; sample: by chance; beam: the likeliest of several texts;"
        " tree: a search over thoughts",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="tokens to add at most (default: 64); of all but `tree`"
    )
    parser.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="of `greedy` and `sample`: end before this text; may be given repeatedly",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="of `greedy` and `sample`: above 1, avoid tokens that are there already",
    )
    parser.add_argument(
        "--temperature", type=float, metavar="X", help="of `sample` and `tree`, above 0 (default: 1.0; tree: 0.7)"
    )
    parser.add_argument("--top-k", type=int, metavar="N", help="of `sample`: choose among this many likeliest tokens")
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="SHARE",
        help="of `sample`: among the likeliest with this probability together, in (0, 1]",
    )
    parser.add_argument(
        "--min-p", type=float, metavar="SHARE", help="of `sample`: among those this fraction as likely as the likeliest"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of `sample` and `tree` (default: 0)")
    parser.add_argument("--num-beams", type=int, metavar="N", help="of `beam`: texts kept at a time (default: 4)")
    parser.add_argument(
        "--length-penalty", type=float, metavar="X", help="of `beam`: above 0 favours longer texts (default: 1)"
    )
    parser.add_argument(
        "--early-stopping",
        choices=["true", "false", "never"],
        help="of `beam`: whether to stop at --num-beams complete texts; as Hugging Face has it (default: false)",
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="of `tree`: tokens generated per prompt at most, over all branches"
    )
    parser.add_argument(
        "--max-seconds", type=float, metavar="S", help="of `tree`: the whole search takes at most this long, seconds"
    )
    parser.add_argument(
        "--html", metavar="FILE", help="of `tree`: write a picture of the search, a page that needs no network"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt; with `tree`, the whole tree")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings: the layout (parallel.*), the search (tree.*)",
    )
    options = parser.parse_intermixed_args()
    for name, strategies in _OWN_OPTIONS.items():
        if getattr(options, name) is not None and options.strategy not in strategies:
            raise UserError(
                f"--{name.replace('_', '-')} has no effect on --strategy {options.strategy}; it is for"
                f" {' and '.join(strategies)}"
            )
    if options.temperature is not None and not options.temperature > 0:
        raise UserError(f"--temperature {options.temperature}: use a number above 0, or --strategy greedy")
    return options


def generation_config(checkpoint: Path, overrides: list[str]) -> PretrainConfig:
    """The run's configuration on one process, or on the layout that the overrides name."""
    recipe = checkpoint.parent.parent / "config.yaml"
    if not recipe.is_file():
        raise UserError(f"{recipe} is missing; --load takes a run folder as training wrote it")
    trained, plain = load_config(recipe), load_config({})
    # What only concerns training would be checked against the rest of it. Components are checked against the length.
    training = {
        "sequence_length": trained.training.sequence_length,
        "output_dir": str(checkpoint.parent.parent),
    }
    trained = replace(
        trained, parallel=ParallelConfig(), training=plain.training, checkpoint=plain.checkpoint, logging=plain.logging
    )
    config = load_config({**to_dict(trained), "training": training}, overrides)
    parallel = config.parallel
    for name, neutral in (
        ("context_parallel_size", 1),
        ("sequence_parallel", False),
        ("virtual_pipeline_model_parallel_size", None),
        ("fully_sharded", False),
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


if __name__ == "__main__":
    from vishwamai_mp.runtime.failure import run_distributed_program

    run_distributed_program(main)
