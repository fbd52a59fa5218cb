"""Run folders are read as far as they can be."""

import json
import math

import numpy as np
import pytest

from tests.observability.run_folders import make_run
from vishwamai_mp.config import UserError
from vishwamai_mp.observability.run_folder import read_curves, read_run


def curves(tmp_path, text: str, notes: list[str] | None = None):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    return read_curves(path, [] if notes is None else notes)


def test_columns_of_what_was_logged(tmp_path):
    found = curves(tmp_path, '{"step": 5, "a": 1}\n{"step": 10, "a": null, "b": 2.5}\n{"step": 15, "a": 3}\n')
    assert found["a"].steps.tolist() == [5, 10, 15]
    assert [None if math.isnan(value) else value for value in found["a"].values.tolist()] == [1, None, 3]
    assert found["a"].finite.tolist() == [1, 3]
    assert (found["b"].steps.tolist(), found["b"].values.tolist()) == ([10], [2.5])


@pytest.mark.parametrize(
    "line",
    ['{"step": 9, "a": 1', "[1]", "null", '{"a": 1}', '{"step": "9", "a": 1}', '{"step": -1, "a": 1}', "[" * 9000, ""],
    ids=["torn", "list", "null", "no step", "text", "negative", "deep", "empty line"],
)
def test_what_is_no_record_is_left_out_and_counted(tmp_path, line):
    notes: list[str] = []
    found = curves(tmp_path, f'{{"step": 1, "a": 1}}\n{line}\n{{"step": 2, "a": 2}}\n', notes)
    assert found["a"].steps.tolist() == [1, 2]
    assert notes == ["metrics.jsonl: left out 1 of its lines, which are no JSON objects with a step"]


def test_odd_values(tmp_path):
    found = curves(tmp_path, '{"step": 1, "a": NaN, "b": 1e999, "c": "text", "d": true, "e": 7}\n')
    assert np.isnan(found["a"].values).all()
    assert np.isnan(found["b"].values).all()
    assert found.keys() == {"a", "b", "e"}
    notes: list[str] = []
    assert not curves(tmp_path, f'{{"step": 1, "a": 1{"0" * 400}}}\n', notes)
    assert notes


def test_of_a_repeated_step_the_later_counts(tmp_path):
    rows = [(1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0), (3, 30.0), (4, 40.0)]
    found = curves(tmp_path, "".join(json.dumps({"step": step, "a": value}) + "\n" for step, value in rows))
    assert found["a"].steps.tolist() == [1, 2, 3, 4]
    assert found["a"].values.tolist() == [1, 20, 30, 40]


def test_a_folder_of_text_files_that_are_broken(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "config.yaml").write_text("a: [")
    (folder / "environment.json").unlink()
    (folder / "checkpoints/step_00000010").mkdir(parents=True)
    run = read_run(folder)
    assert run.config == run.environment == {}
    assert run.notes == [
        "config.yaml: cannot be understood",
        "environment.json: cannot be read (No such file or directory)",
    ]
    (checkpoint,) = run.checkpoints
    assert checkpoint.step == 10
    assert "manifest.json" in checkpoint.problem


def test_dotted_keys(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    assert run.config["training.max_steps"] == 100
    assert run.config["data.train"] == [0.5, "a", 0.5, "b"]
    assert run.environment["packages.torch"] == "2.13.0"


def test_what_is_no_run_folder_is_told(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no metrics\.jsonl; give the folder that training wrote"):
        read_run(tmp_path)
    make_run(tmp_path / "first")
    with pytest.raises(UserError, match=r"it holds runs, name some of them: first$"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="give the run's folder"):
        read_run(tmp_path / "first/metrics.jsonl")
    (tmp_path / "first/metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no step is logged in it"):
        read_run(tmp_path / "first")
