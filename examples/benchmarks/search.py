#!/usr/bin/env python3
"""What sharing beginnings saves: a tree search, and the first token of a request that begins as an earlier one did.

    python examples/benchmarks/search.py [--prompt-tokens 1024 --thought-tokens 16 --beginning-tokens 900]

The search is compared with passes that compute the same nodes, those of one depth as one batch, but every node reads
its prompt and path anew and then its own tokens one by one, with a cache of its own. The request, 30 tokens behind its
beginning, is compared with itself where nothing is kept, in turn: without components, and with memory and cache. Takes
about a minute.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from turns import alternate, say_ratio

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from vishwamai_mp.config import load_config, resolve
from vishwamai_mp.inference import Engine, Generator, SamplingOptions
from vishwamai_mp.inference.blocks import KvSequence
from vishwamai_mp.model import build_model
from vishwamai_mp.runtime import Runtime, distributed_session
from vishwamai_mp.tree_of_thoughts import SearchResult, TreeOfThoughts


def main() -> None:
    options = parse_arguments()
    settings: dict[str, Any] = {
        "precision": "fp32",
        "model": {"hidden_size": options.hidden, "num_layers": 6, "num_attention_heads": 4, "vocab_size": 8192},
        # No stop token: every thought is as long as it may be, so the tree has the full shape.
        "tree": {"enabled": True, "max_thought_tokens": options.thought_tokens, "pruning_threshold": 0.0},
    }
    config = resolve(load_config(settings), 1)
    random = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 8192, (options.prompt_tokens,), generator=random).tolist()
    with distributed_session(config) as runtime:
        (model,) = build_model(config, runtime)
        engine = Engine(config, runtime, model)
        trees = TreeOfThoughts(engine, config.tree)
        trees.search([prompt])  # warms up
        engine.computed_tokens = 0
        start = time.perf_counter()
        (result,) = trees.search([prompt])
        seconds = time.perf_counter() - start
        distinct = sum(len(node.tokens) for node in result.nodes)
        computed = engine.computed_tokens
        from_prompt = seconds_from_prompt(engine, result)
        parts = {name: {"enabled": True} for name in ("memory", "cache")}
        first_token = {
            "plain": first_tokens({**settings, "tree": {}}, runtime, options),
            "memory and cache": first_tokens({**settings, **parts, "tree": {}}, runtime, options),
        }
    print(
        json.dumps(
            {
                "nodes": len(result.nodes) - 1,
                "distinct_tokens": distinct,
                "computed_over_distinct": computed / distinct,
                "seconds": round(seconds, 2),
                "seconds_from_prompt": round(from_prompt, 2),
                "times_faster": round(from_prompt / seconds, 1),
                "blocks_left": engine.pool.used_blocks,
                "first_token_seconds": first_token,
            }
        )
    )
    say_ratio("speed of a tree search, shared prefixes / from the prompt", from_prompt / seconds)


def first_tokens(settings: dict[str, Any], runtime: Runtime, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds from a request to its first token, its beginning read by an earlier request, and read anew."""
    config = resolve(load_config(settings), 1)
    (model,) = build_model(config, runtime)
    random = torch.Generator().manual_seed(1)
    beginning = torch.randint(0, 8192, (options.beginning_tokens,), generator=random).tolist()
    endings = (torch.randint(0, 8192, (30,), generator=random).tolist() for _ in itertools.count())
    arms = {}
    for name, tokens in (("kept", None), ("anew", 0)):
        generator = Generator(config, runtime, model, reuse_tokens=tokens)
        generator.generate([beginning + next(endings)], SamplingOptions(1))  # the earlier request
        arms[name] = partial(answer, generator, beginning, endings)
    seconds = alternate(arms, options.rounds)
    what = " with memory and cache" if config.memory.enabled else ""
    say_ratio(
        f"speed to the first token{what}, {len(beginning)} of {len(beginning) + 30} tokens kept / read anew",
        seconds["anew"] / seconds["kept"],
    )
    return {name: round(each, 4) for name, each in seconds.items()}


def answer(generator: Generator, beginning: list[int], endings: Iterator[list[int]]) -> None:
    """A request's first token; each request ends in its own way."""
    generator.generate([beginning + next(endings)], SamplingOptions(1))


def seconds_from_prompt(engine: Engine, result: SearchResult) -> float:
    """Time of the same nodes without shared memory."""
    prompt = result.nodes[0].tokens
    start = time.perf_counter()
    for depth in sorted({node.depth for node in result.nodes[1:]}):
        nodes = [node for node in result.nodes if node.depth == depth]
        sequences = [KvSequence() for _ in nodes]
        above = [prompt + result.answer_to(node.parent or 0) for node in nodes]
        engine.run(list(zip(sequences, above, strict=True)))
        for i in range(len(nodes[0].tokens)):
            engine.run([(s, node.tokens[i : i + 1]) for s, node in zip(sequences, nodes, strict=True)])
        for sequence in sequences:
            engine.release(sequence)
    return time.perf_counter() - start


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--thought-tokens", type=int, default=16)
    parser.add_argument("--beginning-tokens", type=int, default=900, help="that two requests share (default: 900)")
    parser.add_argument("--hidden", type=int, default=256, help="width (default: 256)")
    parser.add_argument("--rounds", type=int, default=7, help="timed requests of each kind")
    return parser.parse_args()


if __name__ == "__main__":
    main()
