#!/usr/bin/env python3
"""Does the tree help? Countdown with a small model trained from nothing: search strategies at equal generated tokens.

    python examples/reasoning/study.py --output examples/reasoning/results [--game24 game24.csv]

Per seed: pretrains on random puzzles with solutions, searches other puzzles, judges what was found, trains value head
and layers on the verdicts (beside texts as before), then solves puzzles that no training saw. Strategies that choose
one of several texts get as many as cost the tree's tokens, and choose by probability unless they say by value. Writes
`results.json` and `results.png`; trained models stay in `--weights`, and a second run only asks them. The three seeds
side by side take 45 minutes on two cores.

What the committed results show, and what not: with values the tree solves far more than greedy decoding, beams, best of
N by probability and the same tree with shuffled values. Best of N by the same values is as good: at this size it is the
values that help. Best-first search comes close with a third fewer tokens; pruning saves a twentieth.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from countdown import STEP, VOCABULARY, game_of_24
from rows import LENGTH, Texts, WithRollouts, explore, puzzles
from strategies import examine

from vishwamai_mp.config import PretrainConfig, UserError, load_config, resolve, run_program
from vishwamai_mp.config.files import written_whole
from vishwamai_mp.data.batches import BatchStream, DocumentRules, Samples
from vishwamai_mp.inference import Generator
from vishwamai_mp.model import build_model
from vishwamai_mp.runtime import Runtime, distributed_session
from vishwamai_mp.training.optimizer import build_optimizer, wrap_data_parallel
from vishwamai_mp.training.schedule import learning_rate
from vishwamai_mp.training.step import TrainStep
from vishwamai_mp.tree_of_thoughts.value_training import fit_value_head

_OF_TRAINING = ("numbers", "train_steps", "value_steps", "hidden", "layers", "rollouts")
_HELD_OUT = 0.1  # of the rollouts: the values' report is of them


def main() -> None:
    options = parse_arguments()
    if options.game24 and not options.game24.is_file():
        raise UserError(f"--game24 {options.game24}: there is no such file")
    for folder in (options.output, options.weights):
        folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        seeds = list(pool.map(partial(one_seed, options), range(options.seeds)))
    names = [name for name in seeds[0] if name in ("countdown", "game_of_24")]
    exams = {name: summarise([seed[name] for seed in seeds]) for name in names}
    settings = {key: value for key, value in vars(options).items() if not isinstance(value, Path)}
    document = {"settings": settings, "summary": exams, "seeds": seeds}
    (options.output / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    plot(exams, options.output / "results.png")
    for exam, strategies in exams.items():
        for name, row in strategies.items():
            print(
                f"{exam:11} {name:24} chosen {row['chosen']:.3f} ({row['lowest']:.3f} to {row['highest']:.3f})"
                f"  any {row['any']:.3f}  tokens {row['tokens']:.0f}"
            )


def study_config(options: argparse.Namespace, seed: int) -> PretrainConfig:
    """A model of a million parameters, with a value head."""
    settings: dict[str, Any] = {
        "model": {
            "hidden_size": options.hidden,
            "num_layers": options.layers,
            "num_attention_heads": 4,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": LENGTH,
        },
        "precision": "bf16",
        "data": {"prepared_rows": True},
        "optimizer": {"learning_rate": 2e-3, "weight_decay": 0.1},
        "schedule": {"warmup_steps": options.train_steps // 20},
        "training": {
            "sequence_length": LENGTH,
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
            "temperature": 0.5,
            "seed": seed,
            "value_signal": "verdicts",
            "value_gradient": True,
            "value_loss_weight": 15.0,
        },
        "parallel": {"use_distributed_optimizer": False},
    }
    return resolve(load_config(settings), 1)


def one_seed(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train, learn values, solve with every strategy. A seed whose weights are kept is trained already."""
    config = study_config(options, seed)
    numbers, weights = options.numbers, options.weights / f"seed_{seed}.safetensors"
    trained_by = json.dumps({name: getattr(options, name) for name in _OF_TRAINING})
    with distributed_session(config) as runtime:
        chunks = wrap_data_parallel(config, runtime, build_model(config, runtime))
        model = chunks[0].module
        model = getattr(model, "module", model)
        generator = Generator(config, runtime, model, max_batch=256)
        if not weights.exists():
            report = train_all(config, runtime, chunks, generator, options)
            kept = {"report": json.dumps(report), "settings": trained_by}
            with written_whole(weights) as aside:
                save_file(dict(model.named_parameters()), aside, kept)
        with safe_open(weights, "pt") as file:
            kept = file.metadata()
        if kept["settings"] != trained_by:
            raise UserError(f"{weights} was trained with {kept['settings']}; give another --weights")
        report = {"seed": seed, **json.loads(kept["report"])}
        model.load_state_dict(load_file(weights), strict=False)  # the rest is no weights
        asked = dict.fromkeys(puzzle for puzzle, _ in itertools.islice(puzzles("exam", numbers, seed), options.puzzles))
        report["countdown"] = examine(generator, config.tree, list(asked), seed)
        if options.game24 and numbers == 4:
            report["game_of_24"] = examine(generator, config.tree, game_of_24(options.game24), seed)
    print(json.dumps(report), flush=True)
    return report


def train_all(
    config: PretrainConfig, runtime: Runtime, chunks: list, generator: Generator, options: argparse.Namespace
) -> dict[str, Any]:
    """Pretraining, exploration, values; what each came to."""
    seed, numbers = config.training.seed, options.numbers
    texts = Texts(numbers, seed)
    report: dict[str, Any] = {"pretraining": train(config, runtime, chunks, texts, f"seed {seed}: texts")}
    rollouts = explore(generator.engine, config.tree, numbers, options.rollouts)
    learnt = round(len(rollouts) * (1 - _HELD_OUT))
    tuning = WithRollouts(texts, rollouts[:learnt], seed)
    report["values"] = train(value_config(config, options), runtime, chunks, tuning, f"seed {seed}: values")
    held_out = rollouts[learnt:]
    verdicts = [solved for rollout in rollouts for solved in rollout.verdicts.values()]
    report["verdicts"], report["solved"] = len(verdicts), statistics.mean(verdicts)
    if len({solved for rollout in held_out for solved in rollout.verdicts.values()}) > 1:
        report["value_head"] = vars(fit_value_head(generator.engine, held_out, held_out=0.5))
    return report


def value_config(config: PretrainConfig, options: argparse.Namespace) -> PretrainConfig:
    """The second training: shorter, at half the learning rate."""
    steps, rate = options.value_steps, config.optimizer.learning_rate / 2
    return replace(
        config,
        optimizer=replace(config.optimizer, learning_rate=rate, min_learning_rate=rate / 10),
        schedule=replace(config.schedule, warmup_steps=steps // 20, decay_steps=steps),
        training=replace(config.training, max_steps=steps),
    )


def train(config: PretrainConfig, runtime: Runtime, chunks: list, samples: Samples, name: str) -> dict[str, float]:
    """Means over the last tenth of the steps: `loss` of texts in nats per token, and what the value head measured."""
    step = TrainStep(config, runtime, chunks, build_optimizer(config, runtime, chunks))
    training = config.training
    stream = BatchStream(
        samples,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        rules=DocumentRules(marked=True, reset_attention_mask=True),
    )
    rows = []
    start = time.perf_counter()
    for number in range(training.max_steps):
        batches = list(itertools.islice(stream, stream.micro_batches_per_step))
        result = step.train(batches, number, learning_rate(config, number), math.inf)
        rows.append({"loss": result.lm_loss, **result.measures})
        if (number + 1) % 100 == 0:
            means = " ".join(f"{key} {mean:.4f}" for key, mean in mean_of(rows[-100:]).items())
            seconds = time.perf_counter() - start
            print(f"{name} {number + 1}/{training.max_steps} {seconds:.0f} s {means}", flush=True)
    return mean_of(rows[-max(1, len(rows) // 10) :])


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each key over the rows that have it: a step without solved rollouts has no AUC."""
    keys = sorted({key for row in rows for key in row})
    return {key: statistics.mean(row[key] for row in rows if key in row) for key in keys}


def summarise(seeds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each strategy the means over seeds, and the lowest and the highest share solved."""
    summary = {}
    for name in seeds[0]:
        rows = [seed[name] for seed in seeds]
        chosen = [row["chosen"] for row in rows]
        summary[name] = {**mean_of(rows), "lowest": min(chosen), "highest": max(chosen)}
    return summary


def plot(exams: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path) -> None:
    """Bars: the chosen text is right (the whiskers: lowest and highest seed); pale: any of the texts is."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(exams), figsize=(6 * len(exams), 3.6), layout="constrained", squeeze=False)
    for axis, (exam, strategies) in zip(axes[0], exams.items(), strict=True):
        names = list(strategies)[::-1]
        rows = [strategies[name] for name in names]
        chosen = [row["chosen"] for row in rows]
        spread = [
            [row["chosen"] - row["lowest"] for row in rows],
            [row["highest"] - row["chosen"] for row in rows],
        ]
        labels = [f"{name} ({row['tokens']:.0f} tokens)" for name, row in zip(names, rows, strict=True)]
        axis.barh(labels, [row["any"] for row in rows], color="#d7e3f1", label="any text right")
        axis.barh(labels, chosen, xerr=spread, color="#0b6aa2", capsize=3, label="chosen text right")
        axis.set_xlim(0, 1)
        axis.set_title(exam.replace("_", " "))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for results")
    parser.add_argument(
        "--weights",
        type=Path,
        default=Path("runs/reasoning"),
        help="folder where trained models stay (default: %(default)s)",
    )
    parser.add_argument("--numbers", type=int, choices=[3, 4], default=4, help="of a puzzle (default: 4)")
    parser.add_argument("--seeds", type=int, default=3, help="models, each trained from nothing (default: 3)")
    parser.add_argument("--jobs", type=int, default=3, help="seeds at a time, a process each (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process (default: 1)")
    parser.add_argument("--train-steps", type=int, default=1500, help="of 4,096 tokens (default: 1500)")
    parser.add_argument("--value-steps", type=int, default=1200, help="of 4,096 tokens (default: 1200)")
    parser.add_argument("--hidden", type=int, default=128, help="width (default: 128)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rollouts", type=int, default=2000, help="puzzles for values to learn from (default: 2000)")
    parser.add_argument("--puzzles", type=int, default=400, help="to solve (default: 400)")
    parser.add_argument("--game24", type=Path, help="CSV of the Game of 24's puzzles; needs --numbers 4")
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
