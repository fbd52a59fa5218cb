#!/usr/bin/env python3
"""Do FP8 and NVFP4 train as well as bf16? Loss curves of every precision on one small model.

    python examples/precision/recipes.py                  300 steps each, some minutes
    python examples/precision/recipes.py --steps 40 --settings bf16 fp8_mx --output /tmp/short

All start from the same weights and read the same batches of a text that is made up (three times of four, a token is
followed by a certain other). One more arm, `unscaled`, rounds all to E4M3 without scales, gradients as if the loss were
a mean over tokens (it is a sum, divided after the gradients are added up): what the recipes are there to prevent. A
final loss is the mean of the last 20 steps.

Prints a table and writes `recipes.json` and `recipes.png`. Fails if a recipe's final loss is off bf16's by more than
`--within`, or if the arm without scales is not above it by that much.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from vishwamai_mp.config import PretrainConfig, load_config, resolve
from vishwamai_mp.config.errors import UserError, run_program
from vishwamai_mp.config.resolve_fp8 import rounds_operands
from vishwamai_mp.config.schema import Precision
from vishwamai_mp.runtime import Runtime, distributed_session

# isort: split
from vishwamai_mp.data.batches import BatchStream, DocumentRules
from vishwamai_mp.model import VishwamAIModel, build_model
from vishwamai_mp.precision.formats import E4M3
from vishwamai_mp.precision.fp8_linear import Scaling
from vishwamai_mp.precision.scaling import Operand, scaled_operand
from vishwamai_mp.precision.statistics import named_fp8_linears
from vishwamai_mp.training.optimizer import build_optimizer, wrap_data_parallel
from vishwamai_mp.training.schedule import learning_rate
from vishwamai_mp.training.step import TrainStep

_HERE = Path(__file__).resolve().parent
_RECIPES = [name for name in get_args(Precision) if rounds_operands(name)]
_UNSCALED = "unscaled"
_LAST = 20  # steps that a final loss is the mean of
VOCABULARY, LENGTH, BATCH = 256, 64, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [*get_args(Precision), _UNSCALED]
    parser.add_argument("--settings", nargs="+", choices=choices, default=choices, help="default: all")
    parser.add_argument("--steps", type=int, default=300, help="default: 300")
    parser.add_argument("--within", type=float, default=0.01, help="relative to bf16's final loss (default: 0.01)")
    parser.add_argument("--output", type=Path, default=_HERE, help="folder for the results (default: beside this)")
    options = parser.parse_args()
    curves = {}
    with distributed_session(configuration("fp32", options.steps)) as runtime:
        for setting in options.settings:
            curves[setting] = train(setting, options.steps, runtime)
            print(f"{setting:14} final loss {final(curves[setting]):.4f}", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "recipes.json").write_text(json.dumps(curves), encoding="utf-8")
    plot(curves, options.output / "recipes.png")
    check(curves, options.within)


def configuration(precision: str, steps: int) -> PretrainConfig:
    return resolve(
        load_config(
            {
                "model": {
                    "hidden_size": 128,
                    "num_layers": 2,
                    "num_attention_heads": 4,
                    "intermediate_size": 256,
                    "vocab_size": VOCABULARY,
                    "max_position_embeddings": LENGTH,
                },
                "precision": precision,
                "optimizer": {"learning_rate": 3e-3},
                "schedule": {"warmup_steps": min(20, steps // 4)},
                "training": {
                    "sequence_length": LENGTH,
                    "micro_batch_size": BATCH,
                    "global_batch_size": BATCH,
                    "max_steps": steps,
                    "threads": 1,  # a model so small loses by more
                },
            }
        ),
        1,
    )


class _Chains:
    """Endless samples, a function of their number: in three of four places the successor of the token before."""

    def __init__(self) -> None:
        self.successor = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1)).tolist()

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, VOCABULARY, (LENGTH + 1,), generator=generator).tolist()
        follows = (torch.rand(LENGTH + 1, generator=generator) < 0.75).tolist()
        for i in range(1, LENGTH + 1):
            if follows[i]:
                tokens[i] = self.successor[tokens[i - 1]]
        return torch.tensor(tokens)


class _Unscaled(Scaling):
    """Rounds numbers as they are; gradients as a mean over tokens would make them."""

    one_scale = True

    def quantize(self, x_MN: Tensor, role: str, along: int) -> Operand:
        scale = torch.tensor(1 / (BATCH * LENGTH) if role == "gradient" else 1.0)
        return scaled_operand(x_MN, E4M3, scale)


def train(setting: str, steps: int, runtime: Runtime) -> list[float]:
    """The loss of each step, nats per token."""
    config = configuration("fp8_current" if setting == _UNSCALED else setting, steps)
    models: list[VishwamAIModel] = build_model(config, runtime)
    if setting == _UNSCALED:
        for _, linear in named_fp8_linears(models):
            linear.fp8_scaling = _Unscaled()
    chunks = wrap_data_parallel(config, runtime, models)
    step = TrainStep(config, runtime, chunks, build_optimizer(config, runtime, chunks))
    rules = DocumentRules(-1, False, False, False)
    stream = BatchStream(
        _Chains(),
        micro_batch_size=BATCH,
        global_batch_size=BATCH,
        data_rank=0,
        data_parallel_size=1,
        rules=rules,
    )
    losses = []
    for number in range(steps):
        batches = list(itertools.islice(stream, stream.micro_batches_per_step))
        losses.append(step.train(batches, number, learning_rate(config, number), float("inf")).lm_loss)
    return losses


def final(curve: list[float]) -> float:
    return statistics.mean(curve[-_LAST:])


def check(curves: dict[str, list[float]], within: float) -> None:
    """What the study claims."""
    losses = {name: final(curve) for name, curve in curves.items()}
    recipes = {name: loss for name, loss in losses.items() if name in _RECIPES}
    for name, loss in recipes.items():
        off = abs(loss / losses["bf16"] - 1) if "bf16" in losses else 0.0
        if not off <= within:
            raise UserError(f"{name}: final loss {loss:.4f} is {off:.2%} off bf16's {losses['bf16']:.4f}")
    worse = losses.get(_UNSCALED)
    if worse is not None and "bf16" in losses and worse <= losses["bf16"] * (1 + within):  # never so for NaN
        raise UserError(f"{_UNSCALED}: final loss {worse:.4f} is not worse than bf16's {losses['bf16']:.4f}")


def plot(curves: dict[str, list[float]], path: Path) -> None:
    """Losses, and how far each is off bf16's, as means over 20 steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    for name, curve in curves.items():
        style: dict[str, Any] = {"label": name, "linestyle": "--" if name == _UNSCALED else "-", "linewidth": 1}
        left.plot(_smooth(curve), **style)
        if "bf16" in curves and name != "bf16":
            off = [a - b for a, b in zip(curve, curves["bf16"], strict=True)]
            right.plot(_smooth(off), **style)
    left.set(xlabel="step", ylabel="loss, nats per token", title="loss")
    right.set(xlabel="step", ylabel="nats per token", title="loss above bf16's")
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _smooth(curve: list[float]) -> list[float]:
    return [statistics.mean(curve[max(0, i - _LAST + 1) : i + 1]) for i in range(len(curve))]


if __name__ == "__main__":
    run_program(main)
