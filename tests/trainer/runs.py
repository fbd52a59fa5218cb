"""Small runs through the façade and through the core, in one process: the subject of the tests of this folder."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from tests.training.layouts import SMALL
from vishwamai_mp.config import load_config, resolve
from vishwamai_mp.data.datasets import build_datasets
from vishwamai_mp.runtime import standing_session
from vishwamai_mp.runtime.distributed import world_size
from vishwamai_mp.trainer import TrainingArguments, VishwamAIPretrainer, load_model
from vishwamai_mp.training.callbacks import usual_callbacks
from vishwamai_mp.training.loop import Trainer

VOCAB = SMALL["model"]["vocab_size"]
RECIPE: dict[str, Any] = {
    **SMALL,
    "model": {**SMALL["model"], "num_layers": 2},
    "logging": {"report_to": [], "hardware_peak_tflops": 1, "progress_bar": False},
    "data": {"split": "80,20,0"},
}


def pretrainer(
    folder: Path, train_dataset: Any, *, overrides: tuple[str, ...] = (), **options: Any
) -> VishwamAIPretrainer:
    """A façade over a small model; `options` of `TrainingArguments`, or of the pretrainer by their names."""
    own = {key: options.pop(key) for key in tuple(options) if key.endswith("_module") or key == "callbacks"}
    own |= {key: options.pop(key) for key in ("model", "eval_dataset") if key in options}
    model = own.pop("model", None) or load_model(RECIPE, overrides)
    arguments = TrainingArguments(
        output_dir=str(folder), **{"logging_steps": 1, "per_device_train_batch_size": 2, **options}
    )
    return VishwamAIPretrainer(model=model, args=arguments, train_dataset=train_dataset, **own)


def core_losses(folder: Path, overrides: list[str]) -> list[float]:
    """The losses of the core's own run, from its metrics."""
    config = resolve(load_config(RECIPE, [f"training.output_dir={folder}", *overrides]), world_size())
    runtime = standing_session(config)
    with contextlib.redirect_stderr(io.StringIO()):
        Trainer(config, runtime, build_datasets(config, None, runtime), usual_callbacks(config)).train()
    return [row["lm_loss"] for row in rows(folder)]


def rows(folder: Path) -> list[dict[str, Any]]:
    """What was logged."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
