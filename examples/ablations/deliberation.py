"""Does a frozen model think better with latents than with pause tokens, at equal FLOPs?

    OMP_NUM_THREADS=1 python examples/ablations/deliberation.py          # 12 minutes on one core

The base is a two-layer model whose attention sees 8 tokens. It learns to recall bindings that lie within its window,
and is then frozen. Asked for bindings 32 tokens back, it is at chance. Two arms put slots after each question and train
only what fills them: latents made from the frozen model's own hidden states of the row, or pause tokens, which are
learned vectors. Pause tokens get as many slots more as the making of latents costs.

Writes `results/deliberation.json` and `results/deliberation.png` beside this file.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(_FOLDER))

import tasks  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from deliberator import Deliberator, PauseTokens, deliberate  # noqa: E402
from torch import nn  # noqa: E402

from vishwamai_mp.model import VishwamAIModel  # noqa: E402
from vishwamai_mp.planning.flops import forward_flops_per_token  # noqa: E402
from vishwamai_mp.runtime import distributed_session  # noqa: E402

PAIRS, GAP, LATENTS, SAMPLED = 8, 32, 2, 4
CONTEXT = 2 * PAIRS + GAP
LENGTH = CONTEXT + 2 * PAIRS
WINDOW, WIDTH = tasks.SMALL["model"]["sliding_window"], tasks.SMALL["model"]["hidden_size"]


def deliberator_flops() -> float:
    """Of making latents after `SAMPLED` positions of one row: matrix products, a multiply-add counted as two."""
    keys_and_values = 2 * LENGTH * (2 * WIDTH) ** 2
    queries = 2 * SAMPLED * WIDTH**2
    reading = 4 * SAMPLED * LATENTS * LENGTH * WIDTH
    return keys_and_values + queries + reading + 2 * SAMPLED * LATENTS * 4 * WIDTH**2


def pause_slots() -> int:
    """Slots after each position that cost the base what latents cost with their making, rounded up."""
    model = tasks.configure().model
    return LATENTS + math.ceil(deliberator_flops() / SAMPLED / forward_flops_per_token(model, LENGTH))


def train_thinker(base: VishwamAIModel, thinker: nn.Module, steps: int, seed: int) -> None:
    """AdamW on the answers after some of the questions."""
    task = tasks.associative_recall(PAIRS, GAP)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(thinker.parameters(), 3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min((step + 1) / 50, 1 - step / steps)
        examples = task(32, generator)
        positions = CONTEXT + 2 * torch.randperm(PAIRS, generator=generator)[:SAMPLED]
        logits = deliberate(base, thinker, examples.tokens, positions, ahead=1, window=WINDOW)[:, 0]
        loss = F.cross_entropy(logits.flatten(0, 1), examples.tokens[:, positions + 1].t().flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(thinker.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def thinking_accuracy(base: VishwamAIModel, thinker: nn.Module) -> float:
    """The share of right answers on 256 rows that training does not see."""
    examples = tasks.associative_recall(PAIRS, GAP)(256, torch.Generator().manual_seed(987_654_321))
    positions = CONTEXT + 2 * torch.arange(PAIRS)
    logits = deliberate(base, thinker, examples.tokens, positions, ahead=1, window=WINDOW)[:, 0]
    return (logits.argmax(-1) == examples.tokens[:, positions + 1].t()).double().mean().item()


def run(seed: int, runtime, steps: int) -> list[dict]:
    """Train a base, freeze it, train both arms."""
    near = tasks.associative_recall(pairs=2, gap=0)
    base = tasks.train(tasks.configure(), runtime, near, steps, seed).eval().requires_grad_(False)
    far = tasks.accuracy(base, tasks.associative_recall(PAIRS, GAP))
    rows: list[dict] = [{"arm": "base alone", "seed": seed, "near": tasks.accuracy(base, near), "accuracy": far}]
    torch.manual_seed(seed)
    arms = {"latents": Deliberator(WIDTH, LATENTS), "pause tokens": PauseTokens(WIDTH, pause_slots())}
    for name, thinker in arms.items():
        start = time.process_time()
        train_thinker(base, thinker, steps, seed)
        seconds = time.process_time() - start
        accuracy = thinking_accuracy(base, thinker)
        rows.append({"arm": name, "seed": seed, "accuracy": accuracy, "cpu_seconds": seconds})
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Each seed's accuracy, by arm."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    arms = list(dict.fromkeys(row["arm"] for row in rows))
    figure, axis = pyplot.subplots(figsize=(4.5, 3.4), layout="constrained")
    axis.scatter([arms.index(row["arm"]) for row in rows], [row["accuracy"] for row in rows])
    axis.axhline(tasks.CHANCE, color="grey", linestyle=":", linewidth=1)
    axis.set_xticks(range(len(arms)), arms)
    axis.set_ylim(0, 1.05)
    axis.set_ylabel("right answers (dotted: chance)")
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000, help="of the base and of each arm (default: 2000)")
    parser.add_argument("--output", type=Path, default=_FOLDER / "results")
    options = parser.parse_args(arguments)
    rows: list[dict] = []
    print(f"{LATENTS} latents or {pause_slots()} pause tokens after each question")
    with distributed_session(tasks.configure()) as runtime:
        for seed in range(options.seeds):
            rows += run(seed, runtime, options.steps)
            for row in rows[-3:]:
                print("  " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "deliberation.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, options.output / "deliberation.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
