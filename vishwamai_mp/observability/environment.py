"""What a run was made with: versions, machine and source revision."""

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import vishwamai_mp
from vishwamai_mp.config import PretrainConfig, to_yaml
from vishwamai_mp.config.files import write_whole
from vishwamai_mp.config.wording import counted
from vishwamai_mp.data.tokenizer import kept_files
from vishwamai_mp.runtime import Runtime
from vishwamai_mp.runtime.choices import ways_in_force

_PACKAGES = ("megatron-core", "transformer-engine", "numpy", "sentencepiece")


def describe_environment(runtime: Runtime) -> dict[str, Any]:
    """Versions, hardware and the git revision of the sources, as plain JSON values. No environment variables."""
    gpu = torch.cuda.get_device_name() if runtime.device.type == "cuda" else None
    return {
        "vishwamai_mp": vishwamai_mp.__version__,
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        # torch's own word names the CUDA that it was built for.
        "packages": {"torch": str(torch.__version__), **{name: _version(name) for name in _PACKAGES}},
        "world_size": runtime.world_size,
        "device": gpu or f"{platform.processor() or platform.machine()}, {counted(os.cpu_count() or 1, 'core')}",
        "threads": torch.get_num_threads(),
        "ways": ways_in_force(),
        "command": sys.argv,
    }


def write_run_description(folder: Path, config: PretrainConfig, runtime: Runtime) -> None:
    """`config.yaml` (resolved), `environment.json` and the tokenizer into a run folder, each whole or not at all."""
    write_whole(folder / "config.yaml", to_yaml(config).encode())
    write_whole(folder / "environment.json", json.dumps(describe_environment(runtime), indent=2).encode() + b"\n")
    if config.data.tokenizer:
        for name, file in kept_files(config.data.tokenizer).items():
            write_whole(folder / name, file.read_bytes())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The revision of the checkout this package runs from, `-dirty` with local changes; None outside a checkout."""
    file = Path(__file__)
    # A virtual environment may lie within some other repository, which does not track this file.
    tracked = _git(file.parent, "ls-files", "--error-unmatch", file.name)
    return _git(file.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") if tracked else None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
