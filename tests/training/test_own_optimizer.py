"""Runs whose every part is the user's own (examples/extensions): at any layout, saved, resumed, moved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import Outcome, train
from tests.workers import WorkerPool
from vishwamai_mp.config import UserError
from vishwamai_mp.runtime import shutdown

_HERE = "examples.extensions"
PARTS = [
    f"model.attention={_HERE}.cosine_attention:CosineAttention",
    f"data.source={_HERE}.counting:counting",
    f"optimizer.name={_HERE}.lion:Lion",
    "optimizer.options={betas: [0.9, 0.98]}",
    f"schedule.decay={_HERE}.inverse_square_root:rate",
    f"training.loss={_HERE}.focal_loss:focal_loss",
    f"training.callbacks=[{_HERE}.stop_at_loss:StopAtLoss]",
]
_STEPS = ["training.max_steps=6", "checkpoint.save_every=3", "schedule.warmup_steps=2", "training.evaluate_every=3"]
_LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "TP2 SP": (2, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
    "PP2": (2, ["parallel.pipeline_model_parallel_size=2"]),
    "bf16 DP2": (2, ["precision=bf16"]),
}


@pytest.fixture(scope="module")
def alone(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, workers.run(train, 1, folder, "unused", [*PARTS, *_STEPS])[0]


def of(outcome: Outcome, key: str) -> torch.Tensor:
    return torch.tensor([record[key] for record in outcome.records if key in record])


def test_each_part_is_the_users(workers: WorkerPool, alone: tuple[Path, Outcome], tmp_path: Path) -> None:
    folder, outcome = alone
    rates = [1e-3 * share for share in (0.5, 1, (2 / 3) ** 0.5, (2 / 4) ** 0.5, (2 / 5) ** 0.5, (2 / 6) ** 0.5)]
    torch.testing.assert_close(of(outcome, "learning_rate"), torch.tensor(rates))
    assert of(outcome, "low_steps").tolist() == [0] * 6
    hardly = ["training.max_steps=1", "training.evaluate_every=1", "optimizer.learning_rate=1e-12"]

    def first(folder: str, left_out: str) -> dict[str, float]:
        kept = [part for part in PARTS if not part.startswith(left_out)]
        return workers.run(train, 1, tmp_path / folder, "unused", [*kept, *hardly])[0].records[0]

    every, attention, loss = first("a", "none"), first("b", "model.attention"), first("c", "training.loss")
    assert abs(attention["lm_loss"] - every["lm_loss"]) > 1e-3
    assert 0.9 * loss["lm_loss"] < every["lm_loss"] < 0.999 * loss["lm_loss"]  # by 1 - p, which is nearly 1
    assert loss["validation_loss"] == pytest.approx(every["validation_loss"], rel=1e-6)  # cross-entropy, both
    saved = json.loads((folder / "checkpoints/step_00000006/trainer.json").read_text())
    assert saved["extensions"] == [*PARTS[:3], *PARTS[4:6], PARTS[6].replace("[", "").replace("]", "")]
    names = json.loads((folder / "checkpoints/step_00000006/manifest.json").read_text())["tensors"]
    assert {name.split(".")[2] for name in names if name.startswith("optimizer.state.")} == {"momentum"}
    assert "decoder.layers.1.self_attention.scale" in names


@pytest.mark.parametrize("name", _LAYOUTS)
def test_same_at_every_layout_and_bitwise_when_resumed(
    workers: WorkerPool, alone: tuple[Path, Outcome], tmp_path: Path, name: str
) -> None:
    processes, layout = _LAYOUTS[name]
    settings = [*PARTS, *_STEPS, *layout]
    whole = workers.run(train, processes, tmp_path / "whole", "unused", settings)
    # The sign of a momentum near zero may be the other one, so that parameters differ that matter little.
    tolerance = 2e-2 if "bf16" in name else 1e-4
    torch.testing.assert_close(of(whole[0], "lm_loss"), of(alone[1], "lm_loss"), rtol=tolerance, atol=0)
    workers.run(train, processes, tmp_path / "cut", "unused", settings, crash_after=4)
    again = workers.run(train, processes, tmp_path / "cut", "unused", settings)
    for expected, resumed in zip(whole, again, strict=True):
        assert resumed.losses == expected.losses[3:]
        assert resumed.tensors == expected.tensors


def test_moves_from_one_layout_to_another(workers: WorkerPool, alone: tuple[Path, Outcome], tmp_path: Path) -> None:
    load = f"checkpoint.load={alone[0]}/checkpoints/step_00000003"
    processes, layout = _LAYOUTS["TP2 SP"]
    moved = workers.run(train, processes, tmp_path, "unused", [*PARTS, *_STEPS, *layout, load])[0]
    torch.testing.assert_close(of(moved, "lm_loss"), of(alone[1], "lm_loss")[3:], rtol=1e-4, atol=0)


_REFUSED = {
    "optimizer.name=torch.optim:Adafactor": "its state 'row_var' is a tensor of shape",
    "optimizer.name=torch.optim:SGD": "unexpected keyword argument 'betas'",
    "optimizer.name=torch.optim:Nothing": "torch.optim has no Nothing",
    "data.source=examples.extensions.stop_at_loss:StopAtLoss": "use a function that takes 2 arguments",
    "training.callbacks=[torch.nn:Linear]": "derive it from vishwamai_mp.training.callbacks.base.Callback",
    "schedule.decay=math:sqrt": "use a function that takes 2 arguments",
}


def refusals(resumed: Path, folder: Path) -> list[str]:
    """Runs in a worker: what is said to each setting of `_REFUSED`, and to a resumed run without its optimizer."""
    without = [part for part in PARTS if not part.startswith("optimizer.")]
    runs = [(resumed, [*without, *_STEPS, "training.max_steps=7"])]
    for setting in _REFUSED:
        options = ["optimizer.options={}"] if "Adafactor" in setting else []
        runs.append((folder, [*PARTS, *_STEPS, setting, *options]))
    said = []
    for where, settings in runs:
        try:
            train(where, "unused", settings)
        except UserError as error:
            said.append(str(error))
        shutdown(keep_world=True)
    return said


def test_what_does_not_do_is_refused(workers: WorkerPool, alone: tuple[Path, Outcome], tmp_path: Path) -> None:
    said = workers.run(refusals, 1, alone[0], tmp_path)[0]
    expected = ["was saved by a run with optimizer.name=examples.extensions.lion:Lion; name it again"]
    for message, part in zip(said, [*expected, *_REFUSED.values()], strict=True):
        assert part in message


def test_any_optimizer_of_torch_resumes(workers: WorkerPool, tmp_path: Path) -> None:
    """One that counts its steps for each parameter, and one that keeps nothing at all."""
    for name, options in (("RAdam", "{decoupled_weight_decay: true}"), ("SGD", "{}")):
        own = [f"optimizer.name=torch.optim:{name}", f"optimizer.options={options}", PARTS[1], *_STEPS]
        whole: Any = workers.run(train, 1, tmp_path / name / "whole", "unused", own)[0]
        workers.run(train, 1, tmp_path / name / "cut", "unused", own, crash_after=4)
        again = workers.run(train, 1, tmp_path / name / "cut", "unused", own)[0]
        assert (again.losses, again.tensors) == (whole.losses[3:], whole.tensors)
