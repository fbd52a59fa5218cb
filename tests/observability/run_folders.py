"""Run folders made up for tests of the report."""

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

CONFIG = {
    "model": {"hidden_size": 64},
    "training": {"max_steps": 100, "seed": 1},
    "data": {"train": [0.5, "a", 0.5, "b"]},
}


def record(step: int, noise: random.Random) -> dict[str, Any]:
    """One logged step of a run with all components."""
    loss = 2 + 5 * math.exp(-step / 20) + noise.gauss(0, 0.05)
    row = {"step": step, "consumed_tokens": 512 * step, "lm_loss": loss, "loss": loss + 0.01, "grad_norm": 1 / loss}
    row |= {"learning_rate": 1e-3 / step, "tokens_per_second": 9e3, "mfu": 0.25, "memory_gib": 1.5, "skipped_steps": 0}
    for level in (1, 2, 3):
        row |= {f"memory_{name}_{level}": level / (10 + step) for name in ("surprise", "retention", "write")}
    row |= {"memory_read": 0.5, "memory_mix_loss": 0.01, "cache_entropy": 1.0, "cache_null_share": 0.5}
    row |= {"cache_importance": 0.5, "cache_importance_square": 0.29, "cache_fill": 0.1, "cache_evictions": 0.0}
    row |= {"value_loss": 0.02, "value_cross_entropy": 0.6, "value_calibration": -0.1, "value_auc": 0.7}
    return row | ({"validation_loss": loss + 0.1} if step % 10 == 0 else {})


def make_run(folder: Path, steps: int = 60, *, every: int = 1, config: dict[str, Any] | None = None) -> Path:
    """A run folder as training leaves it, without its weights."""
    folder.mkdir(parents=True)
    noise = random.Random(folder.name)
    rows = [record(step, noise) for step in range(every, steps + 1, every)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG if config is None else config))
    environment = {"python": "3.11", "packages": {"torch": "2.13.0"}, "command": ["pretrain.py", "--config", "a b"]}
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder
