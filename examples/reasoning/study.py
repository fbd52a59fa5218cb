#!/usr/bin/env python3
"""Does the tree help? Countdown with a small model trained from nothing: search strategies at equal generated tokens.

    python examples/reasoning/study.py --output examples/reasoning/results [--numbers 3 --seeds 3 --train-steps 1500]

Per seed: pretrains on random puzzles with solutions, searches some at random, verifies what was found and fits the
value head on the verdicts, then solves puzzles that training never saw. Strategies that choose one of several texts
get as many as cost the tree's tokens. Writes `results.json` and `results.svg`. One seed takes ten minutes on one core.
"""

import argparse
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from chart import bar_chart
from countdown import END, STEP, VOCABULARY, Puzzle, game_of_24, random_puzzle, text, verify

from vishwamai_mp.config import PretrainConfig, TreeConfig, load_config, resolve
from vishwamai_mp.data.batches import BatchStream, DocumentRules
from vishwamai_mp.inference import BeamOptions, Engine, Generator, SamplingOptions, beam_search
from vishwamai_mp.model import build_model
from vishwamai_mp.runtime import Runtime, distributed_session
from vishwamai_mp.training.optimizer import build_optimizer, wrap_data_parallel
from vishwamai_mp.training.schedule import learning_rate
from vishwamai_mp.training.step import TrainStep
from vishwamai_mp.tree_of_thoughts import SearchResult, Thought, TreeOfThoughts
from vishwamai_mp.tree_of_thoughts.value_training import Rollout, fit_value_head

_PUZZLES_AT_ONCE = 25
Choice = tuple[bool, bool, int]  # the chosen text is right, any of the texts is, tokens generated


def main() -> None:
    options = parse_arguments()
    seeds = []
    for seed in range(options.seeds):
        config = study_config(options, seed)
        with distributed_session(config) as runtime:
            seeds.append(one_seed(config, runtime, options, seed))
        print(json.dumps(seeds[-1]), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    summary = summarise(seeds)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    document = {"settings": settings, "summary": summary, "seeds": seeds}
    (options.output / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    bars = {name: (row["chosen"], row["chosen_spread"]) for name, row in summary.items()}
    title = f"Countdown, {options.numbers} numbers: solved at equal generated tokens"
    (options.output / "results.svg").write_text(bar_chart(bars, title), encoding="utf-8")
    for name, row in summary.items():
        print(
            f"{name:24} chosen {row['chosen']:.3f} ± {row['chosen_spread']:.3f}  any {row['any']:.3f}"
            f"  tokens {row['tokens']:.0f}"
        )


def study_config(options: argparse.Namespace, seed: int) -> PretrainConfig:
    """A model of a million parameters, with a value head."""
    settings: dict[str, Any] = {
        "model": {
            "hidden_size": options.hidden,
            "num_layers": options.layers,
            "num_attention_heads": 4,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 128,
        },
        "precision": "fp32",
        "data": {"reset_attention_mask": True, "reset_position_ids": True},
        "optimizer": {"learning_rate": 2e-3, "weight_decay": 0.1},
        "schedule": {"warmup_steps": options.train_steps // 20},
        "training": {
            "sequence_length": 128,
            "micro_batch_size": 32,
            "global_batch_size": 32,
            "max_steps": options.train_steps,
            "seed": seed,
            "threads": options.threads,
        },
        "tree": {
            "enabled": True,
            "step_token": STEP,
            "max_depth": options.numbers - 1,
            "max_thought_tokens": 16,
            "temperature": 1.0,
            "seed": seed,
        },
        "parallel": {"use_distributed_optimizer": False},
    }
    return resolve(load_config(settings), 1)


class Texts:
    """Endless training samples: solved puzzles end to end. Those that are examined do not occur."""

    def __init__(self, length: int, numbers: int, seed: int, examined: set[Puzzle]) -> None:
        self.length, self.numbers, self.seed, self.examined = length, numbers, seed, examined

    def __getitem__(self, index: int) -> torch.Tensor:
        rng = random.Random(self.seed * 1_000_003 + index)
        tokens: list[int] = []
        while len(tokens) <= self.length:
            puzzle, solution = random_puzzle(rng, self.numbers)
            if puzzle not in self.examined:
                tokens += text(puzzle, solution)
        return torch.tensor(tokens[: self.length + 1])


def one_seed(config: PretrainConfig, runtime: Runtime, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train, fit the value head, solve with every strategy."""
    rng = random.Random(10_000 + seed)
    exam = list({random_puzzle(rng, options.numbers)[0] for _ in range(options.puzzles)})
    chunks = wrap_data_parallel(config, runtime, build_model(config, runtime))
    start = time.perf_counter()
    loss = pretrain(config, runtime, chunks, Texts(128, options.numbers, seed, set(exam)))
    model = chunks[0].module
    model = getattr(model, "module", model)
    seconds = time.perf_counter() - start
    generator = Generator(config, runtime, model, max_batch=256)
    value = fit_on_rollouts(generator, config.tree, options, set(exam))
    report: dict[str, Any] = {"seed": seed, "loss": loss, "train_seconds": round(seconds), "value": vars(value)}
    report["strategies"] = examine(generator, config.tree, exam, options, seed)
    if options.game24 and options.numbers == 4:
        puzzles = [puzzle for puzzle in game_of_24(options.game24) if max(puzzle.numbers) <= 13]
        report["game_of_24"] = examine(generator, config.tree, puzzles, options, seed)
    return report


def pretrain(config: PretrainConfig, runtime: Runtime, chunks: list, texts: Texts) -> float:
    """The mean loss of the last tenth of the steps, nats per token."""
    step = TrainStep(config, runtime, chunks, build_optimizer(config, runtime, chunks))
    stream = BatchStream(
        texts,
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=config.training.global_batch_size,
        data_rank=0,
        data_parallel_size=1,
        rules=DocumentRules(END, reset_attention_mask=True, reset_position_ids=True),
    )
    losses = []
    for number in range(config.training.max_steps):
        batches = list(itertools.islice(stream, stream.micro_batches_per_step))
        losses.append(step.train(batches, number, learning_rate(config, number), math.inf).lm_loss)
    return statistics.mean(losses[-max(1, len(losses) // 10) :])


def fit_on_rollouts(generator: Generator, tree: TreeConfig, options: argparse.Namespace, examined: set[Puzzle]) -> Any:
    """Search other puzzles without a value, and teach the value head which thoughts a right solution followed.

    A search tries thoughts that the model itself would hardly write, since siblings begin differently; on texts that it
    samples, the head would never learn that those are worthless.
    """
    rng = random.Random(20_000 + tree.seed)
    puzzles = [random_puzzle(rng, options.numbers)[0] for _ in range(options.rollouts)]
    puzzles = [puzzle for puzzle in puzzles if puzzle not in examined]
    explore = replace(tree, pruning_threshold=0.0)
    search = TreeOfThoughts(
        generator.engine, explore, stop_tokens=(STEP,), end_token=END, scorer=lambda _: rng.random()
    )
    rollouts = []
    for start in range(0, len(puzzles), _PUZZLES_AT_ONCE):
        batch = puzzles[start : start + _PUZZLES_AT_ONCE]
        for puzzle, result in zip(batch, search.search([p.prompt for p in batch]), strict=True):
            rollouts += judged(puzzle, result, tree.max_depth)
    return fit_value_head(generator.engine, rollouts)


def judged(puzzle: Puzzle, result: SearchResult, max_depth: int) -> list[Rollout]:
    """Each thought that was followed up, or is the last of a text, and whether a right solution goes through it."""
    right = {
        above for node in result.nodes if verify(puzzle, result.answer_to(node.id)) for above in result.path_to(node.id)
    }
    return [
        Rollout(tokens := puzzle.prompt + result.answer_to(node.id), [len(tokens) - 1], node.id in right)
        for node in result.nodes[1:]
        if node.status in ("expanded", "complete") or node.depth == max_depth
    ]


def examine(
    generator: Generator, tree: TreeConfig, puzzles: list[Puzzle], options: argparse.Namespace, seed: int
) -> dict[str, dict[str, float]]:
    """Every strategy on all puzzles. The tree with values goes first: its cost is the others' budget."""
    found = {"tree, values": of_trees(generator.engine, tree, puzzles)}
    greedy = of_greedy(generator, puzzles)
    # A model that has learnt little may end at once; a solution has at least 8 tokens.
    length = max(8.0, statistics.mean(tokens for _, _, tokens in greedy))
    count = max(1, round(statistics.mean(tokens for _, _, tokens in found["tree, values"]) / length))
    noise = random.Random(30_000 + seed)
    found["tree, random scores"] = of_trees(generator.engine, tree, puzzles, lambda _: noise.random())
    unpruned = replace(tree, pruning_threshold=0.0)
    found["tree, values, unpruned"] = of_trees(generator.engine, unpruned, puzzles)
    both = replace(tree, value_weight=1.0, logprob_weight=1.0)
    found["tree, values and log-probability"] = of_trees(generator.engine, both, puzzles)
    likely = replace(tree, value_weight=0.0, logprob_weight=1.0)
    found["tree, log-probability"] = of_trees(generator.engine, likely, puzzles)
    found["greedy"] = greedy
    found["beam"] = of_beams(generator.engine, puzzles, count)
    found["best of N"] = of_samples(generator, puzzles, count, seed)
    return {
        name: {
            "chosen": statistics.mean(chosen for chosen, _, _ in rows),
            "any": statistics.mean(some for _, some, _ in rows),
            "tokens": statistics.mean(tokens for _, _, tokens in rows),
        }
        for name, rows in found.items()
    }


def of_trees(
    engine: Engine, tree: TreeConfig, puzzles: list[Puzzle], scorer: Callable[[Thought], float] | None = None
) -> list[Choice]:
    search = TreeOfThoughts(engine, tree, stop_tokens=(STEP,), end_token=END, scorer=scorer)
    rows = []
    for start in range(0, len(puzzles), _PUZZLES_AT_ONCE):
        batch = puzzles[start : start + _PUZZLES_AT_ONCE]
        for puzzle, result in zip(batch, search.search([p.prompt for p in batch]), strict=True):
            rows.append((verify(puzzle, result.answer), any_solved(puzzle, result), result.generated_tokens))
    return rows


def any_solved(puzzle: Puzzle, result: SearchResult) -> bool:
    """Whether any complete path of the last beam is right."""
    ends = [node.id for node in result.nodes if node.status == "complete"]
    return any(verify(puzzle, result.answer_to(node_id)) for node_id in ends)


def of_greedy(generator: Generator, puzzles: list[Puzzle]) -> list[Choice]:
    completions = generator.generate([p.prompt for p in puzzles], SamplingOptions(48, stop_tokens=(END,)))
    rows = []
    for puzzle, completion in zip(puzzles, completions, strict=True):
        right = verify(puzzle, completion.tokens)
        rows.append((right, right, len(completion.tokens)))
    return rows


def of_beams(engine: Engine, puzzles: list[Puzzle], count: int) -> list[Choice]:
    """The likeliest of `count` beams."""
    rows = []
    for start in range(0, len(puzzles), _PUZZLES_AT_ONCE):
        batch = puzzles[start : start + _PUZZLES_AT_ONCE]
        options = BeamOptions(count, 48, stop_tokens=(END,))
        for puzzle, texts in zip(batch, beam_search(engine, [p.prompt for p in batch], options), strict=True):
            right = [verify(puzzle, each.tokens) for each in texts]
            rows.append((right[0], any(right), sum(len(each.tokens) for each in texts)))
    return rows


def of_samples(generator: Generator, puzzles: list[Puzzle], count: int, seed: int) -> list[Choice]:
    """Of `count` samples the one with the highest probability per token."""
    prompts = [p.prompt for p in puzzles]
    drawn = []
    for number in range(count):
        options = SamplingOptions(48, 1.0, seed=seed, sample=number, stop_tokens=(END,), log_probs=True)
        drawn.append(generator.generate(prompts, options))
    rows = []
    for puzzle, completions in zip(puzzles, zip(*drawn, strict=True), strict=True):
        best = max(completions, key=lambda c: sum(c.log_probs) / max(len(c.tokens), 1))
        right = any(verify(puzzle, completion.tokens) for completion in completions)
        rows.append((verify(puzzle, best.tokens), right, sum(len(c.tokens) for c in completions)))
    return rows


def summarise(seeds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over seeds, and half of the range between the best and the worst of them."""
    summary = {}
    for name in seeds[0]["strategies"]:
        rows = [seed["strategies"][name] for seed in seeds]
        chosen = [row["chosen"] for row in rows]
        summary[name] = {
            "chosen": statistics.mean(chosen),
            "chosen_spread": (max(chosen) - min(chosen)) / 2,
            "any": statistics.mean(row["any"] for row in rows),
            "tokens": statistics.mean(row["tokens"] for row in rows),
        }
    return summary


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for results")
    parser.add_argument("--numbers", type=int, choices=[3, 4], default=3, help="of a puzzle (default: 3)")
    parser.add_argument("--seeds", type=int, default=3, help="models, each trained from nothing (default: 3)")
    parser.add_argument("--train-steps", type=int, default=1500, help="of 4,096 tokens (default: 1500)")
    parser.add_argument("--hidden", type=int, default=128, help="width (default: 128)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads: with one, seeds can run side by side")
    parser.add_argument("--rollouts", type=int, default=600, help="puzzles for the value head (default: 600)")
    parser.add_argument("--puzzles", type=int, default=200, help="to solve (default: 200)")
    parser.add_argument("--game24", type=Path, help="CSV of the Game of 24's puzzles; needs --numbers 4")
    return parser.parse_args()


if __name__ == "__main__":
    main()
