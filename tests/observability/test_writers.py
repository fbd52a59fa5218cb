"""Metric files that survive kills, NaN and a missing package."""

import json
import math
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vishwamai_mp.config import ConfigError, LoggingConfig, PretrainConfig
from vishwamai_mp.observability.writers import JsonLines, TensorBoard, open_writers


def _write(path, steps, resume_step=0):
    writer = JsonLines(path, resume_step)
    for step in steps:
        writer.write(step, {"lm_loss": step / 2})
    writer.close()


def _steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_one_object_per_step_with_exact_numbers(tmp_path):
    writer = JsonLines(tmp_path / "metrics.jsonl", 0)
    writer.write(1, {"lm_loss": 1 / 3, "consumed_tokens": 2**40})
    # Readable at once: whoever follows the file does not wait for its end.
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "lm_loss": 1 / 3,
        "consumed_tokens": 2**40,
    }
    writer.close()


def test_numbers_that_json_lacks_are_null(tmp_path):
    writer = JsonLines(tmp_path / "metrics.jsonl", 0)
    writer.write(1, {"lm_loss": math.nan, "grad_norm": math.inf, "mfu": -math.inf, "loss": 0.0})
    writer.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert row == {"step": 1, "lm_loss": None, "grad_norm": None, "mfu": None, "loss": 0.0}


@pytest.mark.parametrize("resume_step", [0, 3, 5, 9])
def test_resuming_cuts_what_came_after(tmp_path, resume_step):
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 6))
    _write(path, range(resume_step + 1, resume_step + 3), resume_step)
    kept = list(range(1, min(resume_step, 5) + 1))
    assert _steps(path) == [*kept, resume_step + 1, resume_step + 2]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("torn", ['{"step": 3, "lm_', "{", "\n", '{"lm_loss": 1}\n', "nonsense\n"])
def test_a_torn_line_is_cut(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    _write(path, [1, 2])
    with path.open("a") as file:
        file.write(torn)
    _write(path, [3], resume_step=2)
    assert _steps(path) == [1, 2, 3]


def test_tensorboard_hides_what_a_resumed_run_repeats(tmp_path):
    for resume_step, steps in [(0, (1, 2, 3, 4)), (2, (3, 4, 5))]:
        writer = TensorBoard(tmp_path, resume_step)
        for step in steps:
            writer.write(step, {"lm_loss": resume_step + step})
        writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("lm_loss")] == [
        (1, 1),
        (2, 2),
        (3, 5),
        (4, 6),
        (5, 7),
    ]


@pytest.mark.parametrize(
    ("report_to", "kinds"),
    [([], [JsonLines]), (["tensorboard"], [JsonLines, TensorBoard])],
    ids=["none", "tensorboard"],
)
def test_report_to_chooses_the_writers(tmp_path, report_to, kinds):
    writers = open_writers(tmp_path, PretrainConfig(logging=LoggingConfig(report_to=report_to)), 0)
    assert [type(writer) for writer in writers] == kinds
    for writer in writers:
        writer.close()
    assert (tmp_path / "tensorboard").exists() == (TensorBoard in kinds)


@pytest.mark.parametrize("module", [None, types.SimpleNamespace(__file__=None)], ids=["nothing", "a folder"])
def test_wandb_that_is_not_installed_is_said(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ConfigError, match=r"logging.report_to=\[wandb\] needs wandb, .*pip install"):
        open_writers(tmp_path, PretrainConfig(logging=LoggingConfig(report_to=["wandb"])), 0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "import a_module_that_is_not_there",
            r"installed and cannot be imported \(ModuleNotFoundError: No module named",
        ),
        ("from json import nothing", r"installed and cannot be imported \(ImportError: cannot import name 'nothing'"),
        ("raise TypeError('made for\\nanother protobuf')", r"imported \(TypeError: made for another protobuf\); mend"),
        (
            "class Error(Exception): ...\ndef init(**settings): raise Error('No API key.\\nUse `wandb login`.')",
            r"cannot begin a run: No API key\. Use `wandb login`\. Set WANDB_API_KEY, set WANDB_MODE=offline",
        ),
        (
            "def init(**settings): raise ValueError('API key must be 40 characters long, yours was 3')",
            r"cannot begin a run: API key must be 40 characters long, yours was 3",
        ),
    ],
)
def test_why_wandb_fails_is_said_in_one_line(tmp_path, monkeypatch, source, message):
    (tmp_path / "wandb.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match=message) as caught:
        open_writers(tmp_path, PretrainConfig(logging=LoggingConfig(report_to=["wandb"])), 0)
    sys.modules.pop("wandb", None)
    assert "\n" not in str(caught.value)
