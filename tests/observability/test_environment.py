"""The record of what a run was made with: enough to repeat it, nothing private."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vishwamai_mp.config import DataConfig, PretrainConfig, load_config, resolve
from vishwamai_mp.observability import environment
from vishwamai_mp.observability.environment import describe_environment, write_run_description

RUNTIME: Any = SimpleNamespace(device=torch.device("cpu"), world_size=2)


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git repository that the package seems to run from; the file is not committed yet."""
    monkeypatch.delenv("GIT_DIR", raising=False)
    folder = tmp_path / "checkout/package"
    folder.mkdir(parents=True)
    (folder / "environment.py").write_text("content")
    (folder.parent / "other").write_text("content")
    git(folder.parent, "init")
    git(folder.parent, "add", "other")
    git(folder.parent, "commit", "-m", "first")
    monkeypatch.setattr(environment, "__file__", str(folder / "environment.py"))
    return folder


def test_it_has_versions_and_the_command():
    facts = json.loads(json.dumps(describe_environment(RUNTIME)))
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["packages"]["megatron-core"]
    assert facts["packages"]["transformer-engine"] is None or facts["packages"]["transformer-engine"][0].isdigit()
    assert facts["world_size"] == 2
    assert facts["command"] == sys.argv
    assert facts["threads"] == torch.get_num_threads()


def test_it_has_no_environment_variables(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "5ecret-5ecret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "5ecret-too")
    text = json.dumps(describe_environment(RUNTIME))
    assert "5ecret" not in text
    assert "WANDB" not in text


def test_git_revision_of_a_checkout(checkout):
    git(checkout, "add", "environment.py")
    git(checkout, "commit", "-m", "second")
    revision = git(checkout, "rev-parse", "HEAD")
    assert describe_environment(RUNTIME)["git_revision"] == revision
    (checkout / "environment.py").write_text("changed")
    assert describe_environment(RUNTIME)["git_revision"] == f"{revision}-dirty"


def test_a_package_installed_within_another_repository_has_no_revision(checkout):
    """A virtual environment inside the user's own repository: that repository's revision says nothing about us."""
    assert describe_environment(RUNTIME)["git_revision"] is None


def test_no_revision_outside_a_checkout_or_without_git(checkout, tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    outside.mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(environment, "__file__", str(outside / "environment.py"))
    assert describe_environment(RUNTIME)["git_revision"] is None
    monkeypatch.setenv("PATH", str(outside))
    assert describe_environment(RUNTIME)["git_revision"] is None


def test_a_run_folder_describes_itself(tmp_path):
    tokenizer = tmp_path / "spm.model"
    tokenizer.write_bytes(b"\x00pieces\xff")
    beside = {"tokenizer_config.json": b"{}", "chat_template.jinja": b"x"}
    for name, content in beside.items():
        (tmp_path / name).write_bytes(content)
    folder = tmp_path / "run"
    folder.mkdir()
    config = resolve(replace(PretrainConfig(), data=DataConfig(train="corpus", tokenizer=str(tokenizer))))
    for _ in range(2):  # a resumed run writes it again
        write_run_description(folder, config, RUNTIME)
    written = {path.name for path in folder.iterdir()}
    assert written == {"config.yaml", "environment.json", "tokenizer.model", *beside}
    assert all((folder / name).read_bytes() == content for name, content in beside.items())
    assert load_config(folder / "config.yaml") == config
    assert (folder / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    assert json.loads((folder / "environment.json").read_text())["world_size"] == 2
