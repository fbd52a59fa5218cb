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
from typing import TYPE_CHECKING, Any

from vishwamai_mp.config import UserError, run_program
from vishwamai_mp.config.wording import counted
from vishwamai_mp.opening import find_run

if TYPE_CHECKING:
    from vishwamai_mp.opening import LaidOutModel

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
    "speculate": ("greedy", "sample"),
    "draft_model": ("greedy", "sample"),
}


def main() -> int:
    options = parse_arguments()
    run = find_run(options.load)
    run.answering(options.overrides)  # torch and megatron-core take seconds to import; a mistake should not
    from vishwamai_mp.opening import laid_out

    draft = None if options.draft_model is None else find_run(options.draft_model)
    with laid_out(run, options.overrides, options.bos, options.weights, draft) as model:
        strategy = {"beam": beam, "tree": tree}.get(options.strategy, sample)
        for answer in strategy(options, model):
            if model.runtime.reports:
                print(json.dumps(answer) if options.json else answer["text"], flush=True)
    return 0


def sample(options: argparse.Namespace, model: "LaidOutModel") -> Iterator[dict[str, Any]]:
    """Greedy or sampled continuations, prompt by prompt."""
    from vishwamai_mp.inference import SamplingOptions

    chosen = given(options, "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_new_tokens")
    chosen["temperature"] = 0.0 if options.strategy == "greedy" else options.temperature or 1.0
    sampling = SamplingOptions(
        **chosen,
        stop_tokens=model.tokenizer.ends(options.stop or ()),
        stop_strings=tuple(options.stop or ()),
        log_probs=options.json,
    )
    generator = model.generator(speculate=options.speculate or 0)
    for prompt in options.prompt:
        (done,) = generator.generate([model.tokenizer.encode(prompt)], sampling)
        answer = {
            "prompt": prompt,
            "text": prompt + generator.text(done),
            "new_tokens": done.tokens,
            "log_probs": [round(number, 4) for number in done.log_probs],
            "finish": done.finish,
        }
        if options.speculate:
            answer |= {"passes": done.passes, "guessed": done.guessed, "accepted": done.accepted}
            if model.runtime.reports and not options.json:
                print(
                    f"{counted(done.passes, 'pass')} wrote {counted(len(done.tokens), 'token')}; of"
                    f" {counted(done.guessed, 'guessed token')}"
                    f" {done.accepted} were right",
                    file=sys.stderr,
                )
        yield answer


def beam(options: argparse.Namespace, model: "LaidOutModel") -> Iterator[dict[str, Any]]:
    """The best text of a beam search, prompt by prompt."""
    from vishwamai_mp.inference import BeamOptions, beam_search
    from vishwamai_mp.inference.added_text import added_text

    chosen = given(options, "num_beams", "length_penalty", "max_new_tokens")
    if options.early_stopping:
        chosen["early_stopping"] = {"true": True, "false": False}.get(options.early_stopping, "never")
    settings = BeamOptions(**chosen, stop_tokens=model.tokenizer.end_tokens)
    engine = model.engine()
    for prompt in options.prompt:
        tokens = model.tokenizer.encode(prompt)
        ((best, *others),) = beam_search(engine, [tokens], settings)
        yield {
            "prompt": prompt,
            "text": prompt + added_text(model.tokenizer.decode, tokens, best.tokens),
            "new_tokens": best.tokens,
            "score": round(best.score, 4),
            "others": [{"new_tokens": other.tokens, "score": round(other.score, 4)} for other in others],
        }


def tree(options: argparse.Namespace, model: "LaidOutModel") -> Iterator[dict[str, Any]]:
    """The chosen path of a search over thoughts, with the whole tree; `--html` gets a picture."""
    from vishwamai_mp.observability.page import write_page
    from vishwamai_mp.observability.tree_page import to_html
    from vishwamai_mp.tree_of_thoughts import TreeOfThoughts, ending_of_thoughts

    settings = replace(model.tree_settings(), **given(options, "temperature", "seed"))
    if settings.value_weight != model.config.tree.value_weight and model.runtime.reports:
        print("the model has no value head; nodes are compared by their probability", file=sys.stderr)
    tokenizer = model.tokenizer
    search = TreeOfThoughts(
        model.engine(),
        settings,
        **ending_of_thoughts(tokenizer.tokenizer, settings.stop),
        decode=tokenizer.decode,
    )
    results = search.search(
        [tokenizer.encode(prompt) for prompt in options.prompt], **given(options, "max_tokens", "max_seconds")
    )
    if options.html and model.runtime.reports:
        title = options.prompt[0] if len(results) == 1 else "Tree of thoughts"
        write_page(Path(options.html), to_html(results, title), "--html")
    for prompt, result in zip(options.prompt, results, strict=True):
        text = prompt + result.answer_text
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
    parser.add_argument(
        "--speculate",
        type=int,
        metavar="N",
        help="of `greedy` and `sample`: guess up to N tokens ahead, as the text went on where it was alike before; the"
        " model judges them in one pass, so the text is the same",
    )
    parser.add_argument(
        "--draft-model",
        metavar="PATH",
        help="of `greedy` and `sample`, with --speculate: a run folder or checkpoint of a smaller model with the same"
        " tokenizer, which guesses instead; the text is the same",
    )
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
    parser.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="begin prompts with the tokenizer's BOS (default: as tokenizer.json, else tokenizer_config.json, has it)",
    )
    parser.add_argument(
        "--weights",
        choices=["int8", "int4"],
        help="round the weights of linear layers: on CPUs, one or a few texts are written faster that way; for models"
        " in bf16 (precision=bf16 makes one of any), with half as much memory again",
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
    search = [override for override in options.overrides if override.startswith("tree.")]
    if search and options.strategy != "tree":
        raise UserError(f"{search[0]} has no effect on --strategy {options.strategy}; it is for tree")
    if options.draft_model is not None and not options.speculate:
        raise UserError("--draft-model guesses up to --speculate N tokens at a time; add it, --speculate 4 for a start")
    if options.temperature is not None and not options.temperature > 0:
        raise UserError(f"--temperature {options.temperature}: use a number above 0, or --strategy greedy")
    return options


if __name__ == "__main__":
    if "RANK" not in os.environ:  # no launcher waits for an exit status
        run_program(main)  # imports torch only when the command line is sound
    from vishwamai_mp.runtime.failure import run_distributed_program

    run_distributed_program(main)
