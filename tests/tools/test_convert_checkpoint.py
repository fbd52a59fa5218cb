"""`tools/convert_checkpoint.py` as a user runs it."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conversion import models
from tests.programs import run_forked
from tests.workers import WorkerPool
from vishwamai_mp.checkpoint import read_manifest
from vishwamai_mp.config import run_program
from vishwamai_mp.data.tokenizer_training import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools/convert_checkpoint.py"
VOCAB = 400


@pytest.fixture(scope="module")
def run(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a tokenizer and a log, not to be changed."""
    run = tmp_path_factory.mktemp("trained") / "novelist"
    workers.run(models.save_run, 2, run, [f"model.vocab_size={VOCAB}", "parallel.tensor_model_parallel_size=2"])
    train_tokenizer([TOOL.read_text()] * 3, VOCAB, run / "tokenizer")
    (run / "metrics.jsonl").write_text('{"step": 0, "consumed_tokens": 4096, "lm_loss": 1.25}\n{"step": 9}\n')
    return run


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_forked([TOOL, *arguments])


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Callable[..., SystemExit]:
    """How the tool ends with these arguments, run in this process: a program's start takes seconds."""
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def ends(*arguments: str) -> SystemExit:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
        with pytest.raises(SystemExit) as caught:
            run_program(tool.main)
        return caught.value

    return ends


def test_there_verified_and_back(run: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages[0].content }}")
    options = [
        "--max-shard-size",
        "50KB",
        "--chat-template",
        template,
        "--verify",
        "--prompt",
        "import",
        "--tokens",
        20,
    ]
    done = convert("to-hf", "--load", run, "--output", tmp_path / "hf", *options)
    assert done.returncode == 0, done.stderr
    assert "equal: logits differ by" in done.stdout
    assert "0 of 20 greedy tokens differ" in done.stdout
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"config.json", "generation_config.json", "README.md", "tokenizer.json", "tokenizer.model"} <= names
    assert "model.safetensors.index.json" in names
    assert not [name for name in names if "conversion" in name or "partial" in name]
    card = (tmp_path / "hf/README.md").read_text()
    assert "# novelist" in card
    assert "| Trained for | 0 steps, 4,096 tokens |" in card
    assert "1.2500 nats per token" in card
    ids = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert (ids["bos_token_id"], ids["eos_token_id"], ids["pad_token_id"]) == (1, 2, 3)

    done = convert("from-hf", "--load", tmp_path / "hf", "--output", tmp_path / "back", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    assert f"train on with --config {tmp_path}/back/config.yaml checkpoint.load={tmp_path}/back/" in done.stdout
    assert f"checkpoint.load_optimizer=false data.tokenizer={tmp_path}/back/tokenizer." in done.stdout
    manifest = read_manifest(models.step_zero(tmp_path / "back"))
    assert (manifest.precision, manifest.step, manifest.has_optimizer) == ("bf16", 0, False)
    before, after = models.tensors_of(run, VOCAB), models.tensors_of(tmp_path / "back", VOCAB)
    models.assert_equal({name: tensor.to(torch.bfloat16) for name, tensor in before.items()}, after)
    assert (tmp_path / "back/tokenizer.model").read_bytes() == (run / "tokenizer.model").read_bytes()

    done = convert("verify", "--load", tmp_path / "back", "--output", tmp_path / "hf", "--tokens", 4)
    assert done.returncode == 1
    assert "is not the model of" in done.stderr
    assert "worst: " in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_components_are_added(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    done = convert("to-hf", "--load", tmp_path / "run", "--output", tmp_path / "hf", "--tokenizer", "none")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "hf/tokenizer.json").exists()
    additions = ["cache.enabled=true", "cache.segment_length=16", "cache.num_heads=4"]
    done = convert("from-hf", "--load", tmp_path / "hf", "--output", tmp_path / "more", *additions)
    assert done.returncode == 0, done.stderr
    assert "it has no tokenizer" in done.stderr
    done = convert("to-hf", "--load", tmp_path / "more", "--output", tmp_path / "own", "--verify", "--tokens", 40)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "own/modeling_vishwamai.py").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["to-hf", "--load", "nowhere", "--output", "out"], "neither a checkpoint nor a folder that has one"),
        (["from-hf", "--load", "nowhere", "--output", "out"], "config.json is missing"),
        (["to-hf", "--load", "RUN", "--output", "RUN"], "is not empty"),
        (["to-hf", "--load", "RUN", "--output", "FILE"], "is a file; name a new folder"),
        (["to-hf", "--load", "RUN", "--output=~/mine"], "--output ~/mine: ~ is taken to the letter here; write"),
        (["to-hf", "--load", "RUN", "--output", "out", "--tokenizer", "no.model"], "no tokenizer file no.model"),
        (["to-hf", "--load", "RUN", "--output", "out", "--chat-template", "no.jinja"], "no.jinja cannot be read"),
        (["verify", "--load", "RUN", "--output", "RUN"], "config.json is missing"),
        (["verify", "--load", "RUN", "--output", "x", "--tokens", "0"], "--tokens 0: use 1 or more"),
    ],
)
def test_mistakes_are_one_line(
    ending: Callable[..., SystemExit],
    capsys: pytest.CaptureFixture[str],
    run: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    places = {"RUN": str(run), "FILE": str(run / "config.yaml"), "out": str(tmp_path / "out")}
    line = str(ending(*(places.get(argument, argument) for argument in arguments)).code)
    assert line.startswith("error: ")
    assert message in line
    assert len(line.splitlines()) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens 0: use 1 or more"),
        (["--tokens", "99999"], "exceed the model's context"),
        (["--prompt", "a", "--tokenizer", "none"], "has no tokenizer for --prompt"),
        (["--without-transformers"], "verifying needs transformers, which is not installed: pip install"),
    ],
)
def test_what_cannot_be_verified_is_not_exported(
    ending: Callable[..., SystemExit],
    monkeypatch: pytest.MonkeyPatch,
    run: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    """An export may take hours, and its folder could not be written to again."""
    if arguments == ["--without-transformers"]:
        monkeypatch.setitem(sys.modules, "transformers", None)
        arguments = []
    output = tmp_path / "hf"
    assert message in str(ending("to-hf", "--load", str(run), "--output", str(output), "--verify", *arguments).code)
    assert not output.exists()


@pytest.mark.parametrize("size", ["5 apples", "0", "GB", "-1GB"])
def test_a_size_that_is_none(ending: Callable[..., SystemExit], capsys: pytest.CaptureFixture[str], size: str) -> None:
    assert ending("to-hf", "--load", "a", "--output", "b", f"--max-shard-size={size}").code == 2
    assert "is no size; write 5GB or 500MB" in capsys.readouterr().err


def test_a_plain_export_needs_neither_transformers_nor_megatron(run: Path, tmp_path: Path) -> None:
    script = "\n".join(
        [
            "import sys, runpy",
            f"sys.argv = ['', 'to-hf', '--load', {str(run)!r}, '--output', {str(tmp_path / 'hf')!r}]",
            f"try: runpy.run_path({str(TOOL)!r}, run_name='__main__')",
            "except SystemExit as end: assert end.code == 0, end",
            "sys.exit(bool({'transformers', 'megatron.core'} & set(sys.modules)))",
        ]
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
