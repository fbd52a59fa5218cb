"""Callbacks, resuming, what is kept and what is refused, through the façade."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.runs import RECIPE, VOCAB, pretrainer, rows
from tests.workers import WorkerPool
from vishwamai_mp.config import UserError
from vishwamai_mp.trainer import load_model
from vishwamai_mp.training.callbacks import Callback
from vishwamai_mp.training.loop import Trainer


def items(count: int = 24) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, VOCAB, (count, 33), generator=generator).tolist()


class Doubling(Callback):
    """Sees the validation loss, and adds to the record."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        record["doubled"] = 2 * record["lm_loss"]
        self.seen += [record["validation_loss"]] if "validation_loss" in record else []


def whole(folder: Path) -> dict[str, Any]:
    """A run with everything; then one from its best model, and one that goes on from its last checkpoint."""
    watch = Doubling()
    first = pretrainer(
        folder / "first",
        items(),
        eval_dataset=items(4),
        callbacks=[watch],
        max_steps=6,
        learning_rate=5e-3,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
    )
    output = first.train()
    best = first.evaluate()
    first.save_model()
    again = pretrainer(folder / "again", items(), model=load_model(folder / "first/model"), eval_dataset=items(4))
    on = pretrainer(
        folder / "on",
        items(),
        max_steps=8,
        eval_dataset=items(4),
        resume_from_checkpoint=str(folder / "first/checkpoints/step_00000006"),
    )
    further = on.train()
    return {
        "seen": watch.seen,
        "best": (best["eval_loss"], again.evaluate()["eval_loss"]),
        "output": output,
        "further": (further.global_step, [record["step"] for record in on.history]),
    }


def test_a_run_from_its_start_to_what_is_made_of_it(workers: WorkerPool, tmp_path):
    [found] = workers.run(whole, 1, tmp_path)
    logged = rows(tmp_path / "first")
    assert [row["doubled"] for row in logged] == [2 * row["lm_loss"] for row in logged]
    assert found["seen"] == [row["validation_loss"] for row in logged if "validation_loss" in row]
    assert len(found["seen"]) == 3
    assert found["best"] == (min(found["seen"]), min(found["seen"]))
    assert found["output"].global_step == 6
    assert found["output"].training_loss == pytest.approx(sum(row["lm_loss"] for row in logged) / 6)
    best = 2 * (1 + found["seen"].index(min(found["seen"])))
    kept = sorted(path.name for path in (tmp_path / "first/checkpoints").glob("step_*"))
    assert kept == sorted({f"step_{best:08d}", "step_00000006"})
    assert found["further"] == (8, [7, 8])


def said(folder: Path, options: dict[str, Any]) -> str:
    try:
        ours = pretrainer(folder, items(), max_steps=2, **options)
        ours.train()
        if options.get("seed") == 1:
            ours.save_model(folder)
    except UserError as error:
        return str(error)
    return ""


def refusals(folder: Path) -> list[str]:
    first = said(folder, {})
    (folder.parent / "other").mkdir()
    return [
        first,
        said(folder, {"resume_from_checkpoint": False}),
        said(folder, {"resume_from_checkpoint": str(folder.parent / "other")}),
        said(folder, {"callbacks": [print]}),
        said(folder, {"seed": 1}),
    ]


def test_what_is_refused(workers: WorkerPool, tmp_path):
    [messages] = workers.run(refusals, 1, tmp_path / "run")
    assert messages[0] == ""
    parts = [
        "resume_from_checkpoint=False but",
        "neither a checkpoint nor a folder that has one",
        "callbacks: builtin_function_or_method is no vishwamai_mp.training.callbacks.Callback",
        "save_model:",
    ]
    for message, part in zip(messages[1:], parts, strict=True):
        assert part in message
        assert "\n" not in message


def test_load_model_takes_presets_files_and_runs(tmp_path):
    assert load_model("tiny").config.model.num_layers == 4
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"model_config": {"dim": 64, "num_hidden_layers": 3}}))
    assert load_model(recipe, ["model.num_attention_heads=2"]).config.model.num_attention_heads == 2
    assert load_model(str(recipe)).config.model.hidden_size == 64
    assert load_model(RECIPE).weights is None
    for wrong in ("huge", str(tmp_path)):
        with pytest.raises(UserError) as error:
            load_model(wrong)
        assert "\n" not in str(error.value)
