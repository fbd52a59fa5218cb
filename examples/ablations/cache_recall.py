"""Does the cache help? Recall beyond the window of attention, with the cache, the memory, both or neither.

    OMP_NUM_THREADS=1 python examples/ablations/cache_recall.py                       # 40 minutes on one core
    OMP_NUM_THREADS=1 python examples/ablations/cache_recall.py --arms cache --seeds 0

Arms are the same two-layer model (`tasks.py`), trained on the same stream of rows until they have spent the same FLOPs.
Attention sees 8 tokens, in the arm `full attention` all. All arms have the short convolution and the projections of the
memory module (see `recall.py`); the cache pools segments of 8 tokens into 4 latents.

Writes `results/cache_recall.json` and `results/cache_recall.png` beside this file. A run that the table already has is
not repeated; remove it there to run it again.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(_FOLDER))

import recall  # noqa: E402
import tasks  # noqa: E402

from vishwamai_mp.runtime import Runtime, distributed_session  # noqa: E402

CACHE = [
    "cache.enabled=true",
    "cache.layers=[1]",
    "cache.num_heads=4",
    "cache.segment_length=8",
    "cache.latents_per_segment=4",
    "cache.dropout=0.0",
]
ARMS = {
    "cache": recall.Arm([*recall.MEMORY, *CACHE], recall._without_memory, remembers=False),
    "full attention": recall.Arm(
        [*recall.MEMORY, "model.sliding_window=null"], recall._without_memory, remembers=False
    ),
    "neither": recall.Arm(recall.MEMORY, recall._without_memory, remembers=False),
    "memory": recall.Arm(recall.MEMORY),
    "both": recall.Arm([*recall.MEMORY, *CACHE]),
}
ROWS = 32
STEPS = 2400  # of the arm `cache`, whose FLOPs all arms spend


def run(name: str, seed: int, runtime: Runtime, scale: float) -> recall.Outcome:
    """Train and score one arm."""
    study, arm = recall.STUDIES["recall"], ARMS[name]
    each = recall.flops_per_step(arm, study, ROWS)
    steps = max(1, round(scale * STEPS * recall.flops_per_step(ARMS["cache"], study, ROWS) / each))
    start = time.process_time()
    with arm.change():
        model = tasks.train(tasks.configure(arm.overrides), runtime, study.task, steps, seed, ROWS)
        seconds = time.process_time() - start
        figures = {figure: score(model) for figure, score in study.figures.items()}
    return recall.Outcome("recall", name, seed, steps, steps * each / 1e9, seconds, figures)


def plot(outcomes: Sequence[recall.Outcome], path: Path) -> None:
    """Each seed's accuracy and leak, by arm."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.5, 3.6), layout="constrained")
    for key, marker in (("accuracy", "o"), ("leak", "x")):
        points = [(list(ARMS).index(outcome.arm), outcome.figures[key]) for outcome in outcomes]
        axis.scatter(*zip(*points, strict=True), marker=marker, label=key)
    axis.axhline(tasks.CHANCE, color="grey", linestyle=":", linewidth=1)
    axis.set_xticks(range(len(ARMS)), ARMS)
    axis.set_ylim(0, 1.05)
    axis.set_ylabel("right answers (dotted: chance)")
    axis.set_title("8 bindings, asked 32 tokens later; attention sees 8")
    axis.legend()
    figure.savefig(path, dpi=110)


def _known(table: Path) -> list[recall.Outcome]:
    return [recall.Outcome(**row) for row in json.loads(table.read_text())] if table.exists() else []


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the training budget (default: 1)")
    parser.add_argument("--output", type=Path, default=_FOLDER / "results", help="folder for the table and the plot")
    options = parser.parse_args(arguments)
    table = options.output / "cache_recall.json"
    with distributed_session(tasks.configure(recall.MEMORY)) as runtime:
        for seed, name in ((seed, name) for seed in options.seeds for name in options.arms):
            if any((outcome.arm, outcome.seed) == (name, seed) for outcome in _known(table)):
                continue
            outcome = run(name, seed, runtime, options.scale)
            figures = ", ".join(f"{key} {value:.3f}" for key, value in outcome.figures.items())
            print(
                f"{name:15} seed {seed}  {outcome.steps:5} steps {outcome.gflops:8.1f} GFLOP"
                f" {outcome.cpu_seconds:6.1f} s  {figures}",
                flush=True,
            )
            rows = [asdict(row) for row in [*_known(table), outcome]]  # read again: several may run side by side
            table.parent.mkdir(parents=True, exist_ok=True)
            table.write_text(json.dumps(rows, indent=1) + "\n")
    plot(_known(table), options.output / "cache_recall.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
