#!/usr/bin/env python3
"""Decoding with guesses of a small draft model, and of the text's own repetitions, beside decoding without guesses.

    python examples/benchmarks/drafts.py [--hidden 256 --layers 6 --draft-hidden 64 --speculate 4]

Both models read bytes and are trained here on the Python installation's own sources; prompts are from sources that
they were not trained on. Tells the share of guesses that stand, and tokens per second beside plain decoding, in turn.
Takes some minutes.
"""

import argparse
import json
from functools import partial
from typing import Any

import torch
from packed_weights import described, sources, train
from turns import alternate, say_ratio

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from vishwamai_mp.inference import Completion, Engine, Generator, SamplingOptions
from vishwamai_mp.model import build_model
from vishwamai_mp.runtime import distributed_session


def main() -> None:
    options = parse_arguments()
    config = described(options.hidden, options.layers, 256, "fp32")
    small = described(options.draft_hidden, options.draft_layers, 256, "fp32")
    with distributed_session(config) as runtime:
        trained, held_out = sources()
        (model,), (draft,) = build_model(config, runtime), build_model(small, runtime)
        for each in (model, draft):
            train(each, trained, options.steps)
        engine = Engine(small, runtime, draft)
        ways = {
            "plain": Generator(config, runtime, model),
            "repetitions": Generator(config, runtime, model, speculate=options.speculate),
            "draft": Generator(config, runtime, model, speculate=options.speculate, draft=engine),
        }
        prompts = [text[1000:1256].tolist() for text in held_out if len(text) >= 1256]
        sizes = {name: sum(p.numel() for p in each.parameters()) for name, each in (("model", model), ("draft", draft))}
        print(json.dumps({"parameters": sizes, "threads": torch.get_num_threads()}), flush=True)
        for temperature in (0.0, 0.8):
            for batch in options.batch:
                compare(ways, prompts[:batch], SamplingOptions(options.new_tokens, temperature), options.rounds)


def compare(ways: dict[str, Generator], prompts: list[list[int]], sampling: SamplingOptions, rounds: int) -> None:
    def run(way: str) -> list[Completion]:
        return ways[way].generate(prompts, sampling)

    texts = {way: run(way) for way in ways}
    seconds = alternate({way: partial(run, way) for way in ways}, rounds)
    how = "greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature}"
    found: dict[str, Any] = {"batch": len(prompts), "temperature": sampling.temperature}
    for way in list(ways)[1:]:
        guessed, accepted, passes = (
            sum(getattr(text, name) for text in texts[way]) for name in ("guessed", "accepted", "passes")
        )
        found[way] = {
            "accepted_share": round(accepted / max(guessed, 1), 3),
            "tokens_per_pass": round(sum(len(text.tokens) for text in texts[way]) / passes, 2),
            "speed_ratio": round(seconds["plain"] / seconds[way], 2),
            "same_tokens": [text.tokens for text in texts[way]] == [text.tokens for text in texts["plain"]],
        }
        say_ratio(f"tokens/s of decoding, {how}, batch {len(prompts)}, {way} / plain", seconds["plain"] / seconds[way])
    print(json.dumps(found), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, help="width, a multiple of 64 (default: 256)")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--draft-hidden", type=int, default=64, help="of the draft model (default: 64)")
    parser.add_argument("--draft-layers", type=int, default=1)
    parser.add_argument("--speculate", type=int, default=4, help="guesses at a time, at most (default: 4)")
    parser.add_argument("--steps", type=int, default=200, help="of training, for each model")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="prompts at once (default: 1 8)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
