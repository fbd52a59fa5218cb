"""`tools/verify_family.py`: a folder that holds, what is wrong is found, and mistakes are one line."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conversion import models
from tests.conversion.test_third_party import change_config, write_folder
from tests.workers import WorkerPool
from vishwamai_mp.config import run_program
from vishwamai_mp.planning.parameters import parameter_count
from vishwamai_mp.verification import family_checks
from vishwamai_mp.verification.family_checks import RunRanks
from vishwamai_mp.verification.findings import FAILS, HOLDS, LEFT_OUT
from vishwamai_mp.verification.short_training import train

TOOL = Path(__file__).resolve().parents[2] / "tools/verify_family.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OLMo 3 of 3 layers, the second without a window. Not to be changed."""
    path = tmp_path_factory.mktemp("verified") / "olmo"
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    write_folder(path, "Olmo3", num_key_value_heads=2, layer_types=kinds, sliding_window=9)
    return path


@pytest.fixture
def run_ranks(workers: WorkerPool) -> RunRanks:
    return lambda function, processes, *arguments: workers.run(function, processes, *arguments)


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Callable[..., SystemExit]:
    """How the tool ends with these arguments, run in this process: a program's start takes seconds."""
    spec = importlib.util.spec_from_file_location("verify_family", TOOL)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool.signal, "signal", lambda *_: None)

    def ends(*arguments: object) -> SystemExit:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            run_program(tool.main)
        return caught.value

    return ends


def test_everything_holds_of_the_first_layers(
    folder: Path,
    tmp_path: Path,
    run_ranks: RunRanks,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ending: Callable[..., SystemExit],
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    verify = family_checks.verify

    def with_workers(folder: Path, place: Path, _: RunRanks, **options: Any) -> Any:
        return verify(folder, place, run_ranks, **options)

    monkeypatch.setattr(family_checks, "verify", with_workers)
    ended = ending(folder, "--layers", 2, "--tokens", 8, "--work-dir", tmp_path, "--json")
    found = json.loads(capsys.readouterr().out)
    assert ended.code == 0, found
    assert found["holds"]
    assert (found["layers"], found["all_layers"]) == (2, 3)
    status = {finding["check"]: finding["status"] for finding in found["findings"]}
    checks = ("import", "logits", "greedy tokens", "export: tensors", "export: config")
    assert status == dict.fromkeys((*checks, "training: TP2", "decoding", "LoRA"), HOLDS)
    assert list(tmp_path.iterdir()) == []
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_what_does_not_hold_is_told(folder: Path, tmp_path: Path, run_ranks: RunRanks) -> None:
    """The imported model's norm of the last layers is another's."""
    write_folder(tmp_path / "other", "Olmo3", num_key_value_heads=2, sliding_window=9)
    opened, place = family_checks.open_folder(folder), tmp_path / "place"
    work = family_checks._Work(opened, family_checks.family_of({"architectures": ["Olmo3ForCausalLM"]}, folder), place)
    models.import_(tmp_path / "other", work.run)
    found = {finding.check: finding for finding in [*family_checks._compare(work, 4), *family_checks._export(work)]}
    assert found["logits"].status == FAILS
    assert "worst: layer" in found["logits"].seen
    assert found["export: tensors"].status == HOLDS  # the same seed
    assert found["export: config"].status == FAILS
    assert "layer_types" in found["export: config"].seen
    shutil.rmtree(work.run)
    twisted = iter([[5.0, 4.0], [5.0, 4.1]])
    models.import_(folder, work.run)
    (finding,) = family_checks._train(work, None, lambda *_: [next(twisted)])
    assert (finding.check, finding.status) == ("training: TP2", FAILS)
    (finding,) = family_checks._made("decoding", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert finding.seen == "ZeroDivisionError: division by zero"


def test_layouts_that_heads_do_not_allow_are_left_out(tmp_path: Path, run_ranks: RunRanks) -> None:
    write_folder(tmp_path / "hf", num_attention_heads=3, num_key_value_heads=3, num_hidden_layers=2)
    models.import_(tmp_path / "hf", tmp_path / "run")
    family = family_checks.family_of({"architectures": ["LlamaForCausalLM"]}, tmp_path)
    work = family_checks._Work(family_checks.open_folder(tmp_path / "hf"), family, tmp_path)
    found = family_checks._train(work, None, run_ranks)
    assert [(finding.check, finding.status) for finding in found] == [
        ("training: TP2", LEFT_OUT),
        ("training: TP2 SP", LEFT_OUT),
        ("training: PP2", HOLDS),
    ]
    assert "num_attention_heads=3" in found[0].seen


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, [], "MambaForCausalLM, cannot be converted"),
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, [], "computed by Python code of its own"),
        ({}, ["--layers", 3], "--layers 3: the model has 3; name fewer, from 1, or leave it out for all"),
        ({}, ["--tokens", 0], "--tokens 0: use 1 or more"),
        ({}, ["--work-dir", "nowhere"], "--work-dir nowhere is no folder"),
    ],
)
def test_a_mistake_is_one_line(
    folder: Path,
    tmp_path: Path,
    ending: Callable[..., SystemExit],
    change: dict[str, Any],
    arguments: list[Any],
    message: str,
) -> None:
    hf = tmp_path / "hf"
    shutil.copytree(folder, hf)
    change_config(hf, change)
    code = str(ending(hf, *arguments).code)
    assert message in code
    assert len(code.splitlines()) == 1


def test_missing_folders_packages_and_memory_are_told(
    folder: Path, tmp_path: Path, ending: Callable[..., SystemExit], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "nowhere is no folder" in str(ending(tmp_path / "nowhere").code)
    assert "no Hugging Face folder (config.json is missing)" in str(ending(tmp_path).code)
    model = replace(family_checks.open_folder(folder).config.model, num_layers=2)
    monkeypatch.setattr(family_checks, "_free_memory", lambda: (2 << 30) + 18 * parameter_count(model))
    assert str(ending(folder).code).endswith("verify the first layers alone, with --layers 2")
    monkeypatch.setattr(family_checks, "_free_memory", lambda: 2 << 30)
    assert str(ending(folder).code).endswith("not even one layer fits")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "verifying needs transformers, which is not installed: pip install" in str(ending(folder).code)


def test_training_starts_from_the_checkpoint(folder: Path, tmp_path: Path, workers: WorkerPool) -> None:
    models.import_(folder, tmp_path / "run")
    (losses,) = workers.run(train, 1, tmp_path / "run", [], 1, 0.0, tmp_path / "trained")
    models.assert_equal(*(models.tensors_of(tmp_path / name, 301) for name in ("run", "trained")))
    assert len(losses) == 1
