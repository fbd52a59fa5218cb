"""Steps and learning rates are those of transformers' own Trainer."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.trainer.runs import RECIPE, pretrainer
from tests.workers import WorkerPool
from vishwamai_mp.config import ConfigError, PretrainConfig, load_config, resolve
from vishwamai_mp.training.arguments import TrainingArguments
from vishwamai_mp.training.schedule import learning_rate

# name: (items, arguments of both)
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "epochs that divide": (24, {"num_train_epochs": 2}),
    "the last step of an epoch is short": (
        21,
        {"num_train_epochs": 3, "gradient_accumulation_steps": 4, "warmup_steps": 2, "lr_scheduler_type": "cosine"},
    ),
    "part of an epoch": (19, {"num_train_epochs": 1.5, "warmup_steps": 0.25}),
    "max_steps wins": (10, {"num_train_epochs": 2, "max_steps": 7, "gradient_accumulation_steps": 2}),
    "constant": (9, {"num_train_epochs": 1, "lr_scheduler_type": "constant", "warmup_steps": 3}),
    "constant with warm-up": (
        13,
        {"num_train_epochs": 2, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4},
    ),
    "a warm-up longer than the run": (8, {"num_train_epochs": 1, "warmup_steps": 1000, "lr_scheduler_type": "cosine"}),
}
_BATCH = 2


class _Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * x).square().mean()}


class _Rates(transformers.TrainerCallback):
    """The rate that each optimizer step is made with."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.rates.append(options["optimizer"].param_groups[0]["lr"])


def rates_of_transformers(folder: Path, items: int, options: dict[str, Any]) -> list[float]:
    """Train a model of one parameter with transformers' Trainer."""
    watch = _Rates()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=_BATCH,
        learning_rate=3e-3,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    data = [{"x": torch.ones(1)} for _ in range(items)]
    transformers.Trainer(model=_Linear(), args=arguments, train_dataset=data, callbacks=[watch]).train()
    return watch.rates


def rates_of_ours(items: int, options: dict[str, Any]) -> list[float]:
    arguments = TrainingArguments(per_device_train_batch_size=_BATCH, learning_rate=3e-3, **options)
    steps_per_epoch = math.ceil(items / (_BATCH * arguments.gradient_accumulation_steps))
    config = applied(arguments, steps_per_epoch)
    return [learning_rate(config, step) for step in range(config.training.max_steps)]


def applied(arguments: TrainingArguments, steps_per_epoch: int | None = 5) -> PretrainConfig:
    base = load_config(RECIPE)
    changes = arguments.settings(base, 1) | arguments.step_settings(steps_per_epoch)
    tree: dict[str, Any] = {**RECIPE}
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        if section:
            tree[section] = {**tree.get(section, {}), name: value}
        else:
            tree[name] = value
    return resolve(load_config(tree))


@pytest.mark.parametrize("name", SETTINGS)
def test_the_rate_of_each_step_is_that_of_transformers(tmp_path, name):
    items, options = SETTINGS[name]
    theirs = rates_of_transformers(tmp_path, items, options)
    ours = rates_of_ours(items, options)
    assert len(ours) == len(theirs)
    assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-18)


def test_the_settings_above_differ():
    """Or comparing them would show little."""
    curves = [rates_of_ours(*SETTINGS[name]) for name in SETTINGS]
    assert len({len(curve) for curve in curves}) >= 5
    assert any(b < a for curve in curves for a, b in pairwise(curve))


def steps_and_rates(folder: Path, items: int, options: dict[str, Any]) -> tuple[list[float], int]:
    data = [[1 + i, 2, 3, 4] for i in range(items)]
    ours = pretrainer(folder, data, learning_rate=3e-3, **options)
    output = ours.train()
    return [record["learning_rate"] for record in ours.history], output.global_step


@pytest.mark.parametrize("name", ["the last step of an epoch is short", "max_steps wins"])
def test_a_run_takes_these_steps(workers: WorkerPool, tmp_path, name):
    items, options = SETTINGS[name]
    [(rates, steps)] = workers.run(steps_and_rates, 1, tmp_path, items, options)
    assert rates == rates_of_ours(items, options)
    assert steps == len(rates)


def test_intervals_may_be_shares_of_the_run_or_epochs():
    options: dict[str, Any] = {"num_train_epochs": 4, "warmup_steps": 0.1, "logging_steps": 0.05}
    config = applied(TrainingArguments(**options, eval_strategy="epoch", save_strategy="steps", save_steps=0.5))
    assert (config.training.max_steps, config.training.evaluate_every) == (20, 5)
    assert (config.schedule.warmup_steps, config.logging.log_every, config.checkpoint.save_every) == (2, 1, 10)
    config = applied(TrainingArguments(**options, eval_strategy="steps", save_strategy="no"))
    assert (config.training.evaluate_every, config.checkpoint.save_every) == (1, None)


@pytest.mark.parametrize("options", [{}, {"max_steps": 3, "save_strategy": "epoch"}])
def test_without_a_length_steps_must_be_said(options):
    with pytest.raises(ConfigError, match="train_dataset has no length"):
        TrainingArguments(**options).step_settings(None)
