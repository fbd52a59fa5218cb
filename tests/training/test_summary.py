"""Texts that a run begins and ends with."""

import importlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vishwamai_mp.config import load_config, resolve
from vishwamai_mp.observability.goodput_ledger import Attempt, Ledger
from vishwamai_mp.training.summary import (
    building_line,
    closing_lines,
    duration,
    loss_text,
    losses_of,
    opening_lines,
    planned_text,
)


def test_losses_are_those_that_were_trained():
    assert losses_of({"lm_loss": 2.0, "loss": 2.0, "grad_norm": 1.0}) == {"loss": 2.0}
    assert losses_of({"lm_loss": 0.0}) == {"loss": 0.0}
    both = {"lm_loss": 2.0, "memory_mix_loss": 0.1, "validation_loss": 3.0}
    assert losses_of(both) == {"loss": 2.0, "memory mix loss": 0.1, "validation loss": 3.0}
    # Rows of verdicts have no token that the language model learns from.
    assert losses_of({"lm_loss": 0.0, "value_loss": 0.7, "value_auc": 0.5}) == {"value loss": 0.7}


def test_a_model_that_takes_long_to_make_is_told_of_before():
    runtime: Any = SimpleNamespace(world_size=1, device=torch.device("cpu"))
    small, large = (building_line(resolve(load_config(name), 1), runtime) for name in ("tiny", "125m"))
    assert small == ""
    assert large.startswith("making a model of 134 M parameters: 2.2 GiB per process")


def test_a_small_loss_keeps_its_digits():
    assert [loss_text(x) for x in (3.14159, 0.1, 0.000523, 0.0, float("nan"))] == [
        *("3.1416", "0.1000", "0.000523", "0.0000", "nan")
    ]


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 61, 7325)] == ["0:00:00", "0:01:01", "2:02:05"]


def test_the_end_names_the_checkpoint_and_what_to_do_next(tmp_path):
    run = tmp_path / "my run"
    (run / "checkpoints/step_00000004").mkdir(parents=True)
    overrides = [f"training.output_dir={run}", "training.max_steps=4", "data.tokenizer=t.model"]
    config = resolve(load_config("tiny", overrides))
    attempt = Attempt(100.0, 104.0, {"useful": 3.0, "saving": 0.25, "starting": 0.75}, 4)
    ledger = Ledger([attempt, replace(attempt, began=106.0, ended=110.0)])
    text = closing_lines(config, 4, 3.0, {"lm_loss": 2.0}, (2, 1.5), ledger)
    lines = text.splitlines()
    assert lines[0] == "done        step 4 of 4 in 0:00:03: loss 2.0000  lowest validation loss, at step 2, 1.5000"
    assert lines[1] == (
        "goodput     60.0% of 0:00:10, 2 attempts in useful steps; down 20.0%, starting 15.0%, saving 5.0%"
    )
    assert lines[2] == f"checkpoint  {run}/checkpoints/step_00000004"
    assert lines[3] == f"next        python tools/generate.py --load '{run}' --prompt \"Once upon a time\""
    assert lines[-1].endswith(f"--load '{run}' --output '{run}-hf'")
    stopped = closing_lines(config, 3, 3.0, {"lm_loss": 2.0}, None, Ledger([]))
    assert stopped == "done  step 3 of 4 in 0:00:03: loss 2.0000"


def test_a_run_that_stops_between_logged_steps_has_nothing_to_compare():
    runtime: Any = SimpleNamespace(device=torch.device("cpu"), world_size=1)
    config = resolve(load_config("tiny"), 1)
    record = {"lm_loss": 2.0, "tokens_per_second": 5.0}
    assert planned_text(config, runtime, record) == ""
    assert planned_text(config, runtime, record | {"memory_gib": 0.5}).endswith(
        "measured 512.0 MiB with the program's libraries"
    )


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("Abacus 3", [], "its peak is not known, so there is no MFU: set logging.hardware_peak_tflops"),
        ("Abacus 3", ["logging.hardware_peak_tflops=5"], None),
        ("NVIDIA B200", [], None),
    ],
)
def test_a_gpu_of_unknown_peak_says_so_at_the_start(monkeypatch, name, settings, said):
    where = torch.device("cuda", 0)
    runtime: Any = SimpleNamespace(device=where, world_size=1, data_parallel_size=1, rank=0)
    monkeypatch.setattr(importlib.import_module("vishwamai_mp.runtime.device"), "device", lambda: where)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=2**36))
    text = opening_lines(resolve(load_config("tiny", settings), 1), runtime, 0)
    assert f" on {name}" in text
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in text
    runtime.world_size = 2
    tensor = resolve(load_config("tiny", [*settings, "parallel.tensor_model_parallel_size=2"]), 2)
    assert "queues     CUDA_DEVICE_MAX_CONNECTIONS is " in opening_lines(tensor, runtime, 0)
    assert (said in text) if said else "MFU" not in text
    assert "TF32" not in text
    monkeypatch.setattr("vishwamai_mp.training.summary.use_transformer_engine", lambda _: True)
    assert "in TF32" in opening_lines(resolve(load_config("tiny", settings), 1), runtime, 0)
    assert "TF32" not in opening_lines(resolve(load_config("tiny", [*settings, "precision=bf16"]), 1), runtime, 0)
