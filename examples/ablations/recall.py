"""Does the neural memory help? Recall beyond the window of attention, at equal FLOPs.

    OMP_NUM_THREADS=1 python examples/ablations/recall.py                 # 30 minutes on one core
    OMP_NUM_THREADS=1 python examples/ablations/recall.py --tasks overwrite --seeds 1

Three arms of the same two-layer model, each trained on the same stream of rows until it has spent the same FLOPs:

- memory: attention within a window of 8 tokens, and a memory of two levels in the second layer;
- window: the same, its memory switched off: in place of what it reads stands the value of the token itself, so the arm
  keeps all projections and the short convolution;
- full attention: as `window`, but attention sees everything.

Writes `results/recall.json` and `results/recall.png` beside this file; tasks that are not run keep theirs.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

_FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(_FOLDER))

import tasks  # noqa: E402

from vishwamai_mp.neural_memory.levels import LevelReport  # noqa: E402
from vishwamai_mp.planning import training_flops_per_token  # noqa: E402
from vishwamai_mp.planning.neural_memory_costs import rule_flops_per_token  # noqa: E402
from vishwamai_mp.runtime import Runtime, distributed_session  # noqa: E402

MEMORY = [
    "memory.enabled=true",
    "memory.memory_size=64",
    "memory.head_dim=32",
    "memory.num_memory_layers=2",
    "memory.layers=[1]",
    "memory.chunk_size=32",
    "memory.dropout=0.0",
]
PASSKEY_LENGTHS = (128, 512, 1024, 2048)  # tokens; the first is trained on


def _values_only(projected: Sequence[Any], *_: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """In place of the memory's levels: each answers a token with the token's own value."""
    nothing = projected[0].new_zeros(())
    return list(projected[2::3]), [], [LevelReport(nothing, nothing, nothing)] * (len(projected) // 3)


def _without_memory() -> AbstractContextManager:
    return mock.patch("vishwamai_mp.neural_memory.memory_module.run_levels", _values_only)


@dataclass(frozen=True)
class Arm:
    """A model: its settings, what is changed about its code, and whether the memory's own FLOPs are spent."""

    overrides: list[str]
    change: Callable[[], AbstractContextManager] = nullcontext
    remembers: bool = True


ARMS = {
    "memory": Arm(MEMORY),
    "window": Arm(MEMORY, _without_memory, remembers=False),
    "full attention": Arm([*MEMORY, "model.sliding_window=null"], _without_memory, remembers=False),
}


@dataclass(frozen=True)
class Study:
    """A task: how the memory arm trains, and what is asked of every arm, by name of the figure."""

    task: tasks.Task
    length: int  # tokens of a row
    steps: int
    figures: dict[str, Callable[[Any], float]]
    rows: int = tasks.ROWS  # of a step


def _score(task: tasks.Task, **options: Any) -> Callable[[Any], float]:
    return lambda model: tasks.accuracy(model, task, **options)


STUDIES = {
    "recall": Study(
        tasks.associative_recall(),
        length=64,
        steps=1200,
        figures={"accuracy": _score(tasks.associative_recall()), "leak": _score(tasks.leak())},
    ),
    "overwrite": Study(
        tasks.overwrite_recall(), length=56, steps=1800, figures={"accuracy": _score(tasks.overwrite_recall())}
    ),
    "passkey": Study(
        tasks.passkey(PASSKEY_LENGTHS[0]),
        length=PASSKEY_LENGTHS[0],
        steps=1000,
        figures={
            str(length): _score(tasks.passkey(length), rows=32, batch=8, whole=True) for length in PASSKEY_LENGTHS
        },
        rows=32,
    ),
}


@dataclass(frozen=True)
class Outcome:
    """One arm, trained once."""

    task: str
    arm: str
    seed: int
    steps: int
    gflops: float  # spent on training
    cpu_seconds: float
    figures: dict[str, float]


def flops_per_step(arm: Arm, study: Study, rows: int | None = None) -> float:
    """Of training on one batch of `rows` rows (None: the study's)."""
    config = tasks.configure([*arm.overrides, f"training.sequence_length={study.length}"])
    per_token = training_flops_per_token(config)
    if not arm.remembers:
        per_token -= 3 * rule_flops_per_token(config.memory)
    return (rows or study.rows) * study.length * per_token


def run(name: str, arm_name: str, seed: int, runtime: Runtime, scale: float = 1.0) -> Outcome:
    """Train and score one arm."""
    study, arm = STUDIES[name], ARMS[arm_name]
    budget = scale * study.steps * flops_per_step(ARMS["memory"], study)
    steps = max(1, round(budget / flops_per_step(arm, study)))
    start = time.process_time()
    with arm.change():
        model = tasks.train(tasks.configure(arm.overrides), runtime, study.task, steps, seed, study.rows)
        seconds = time.process_time() - start
        figures = {figure: score(model) for figure, score in study.figures.items()}
    return Outcome(name, arm_name, seed, steps, steps * flops_per_step(arm, study) / 1e9, seconds, figures)


def plot(outcomes: list[Outcome], path: Path) -> None:
    """Mean, lowest and highest of the seeds: bars for recall and overwriting, curves over length for the passkey."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, (name, study) in zip(axes, STUDIES.items(), strict=True):
        for place, arm in enumerate(ARMS):
            found = [o.figures for o in outcomes if (o.task, o.arm) == (name, arm)]
            if not found:
                continue
            keys = list(study.figures)
            columns = [[row[key] for row in found] for key in keys]
            means = [sum(column) / len(column) for column in columns]
            spread = [
                [mean - min(column) for mean, column in zip(means, columns, strict=True)],
                [max(column) - mean for mean, column in zip(means, columns, strict=True)],
            ]
            if name == "passkey":
                axis.errorbar([int(key) for key in keys], means, spread, label=arm, marker="o", capsize=3)
            else:
                axis.bar([i + 0.25 * (place - 1) for i in range(len(keys))], means, 0.24, yerr=spread, label=arm)
                axis.set_xticks(range(len(keys)), keys)
        axis.axhline(tasks.CHANCE, color="grey", linestyle=":", linewidth=1)
        axis.set_title(name)
        axis.set_ylim(0, 1.05)
    axes[2].set_xscale("log", base=2)
    axes[2].set_xlabel("tokens (trained on 128)")
    axes[2].set_ylabel("rows with all digits right")
    axes[0].set_ylabel("right answers (dotted: chance)")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--seeds", type=int, default=3, help="runs per arm and task")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the training budget")
    parser.add_argument(
        "--output", type=Path, default=_FOLDER / "results", help="folder for recall.json and recall.png"
    )
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    table = options.output / "recall.json"
    known = [Outcome(**row) for row in json.loads(table.read_text())] if table.exists() else []
    outcomes = [outcome for outcome in known if outcome.task not in options.tasks]
    with distributed_session(tasks.configure(MEMORY)) as runtime:
        for name in options.tasks:
            for seed in range(options.seeds):
                for arm in ARMS:
                    outcome = run(name, arm, seed, runtime, options.scale)
                    outcomes.append(outcome)
                    figures = ", ".join(f"{key} {value:.3f}" for key, value in outcome.figures.items())
                    print(
                        f"{name:10} {arm:15} seed {seed}  {outcome.steps:5} steps {outcome.gflops:8.1f} GFLOP"
                        f" {outcome.cpu_seconds:6.1f} s  {figures}",
                        flush=True,
                    )
                    table.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    plot(outcomes, options.output / "recall.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
