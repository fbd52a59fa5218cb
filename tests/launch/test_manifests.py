"""Manifests for Kubernetes and SkyPilot, and the Dockerfile: fields by their schemas, commands by the launchers."""

import copy
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

_REPOSITORY = Path(__file__).resolve().parents[2]
_LAUNCH = _REPOSITORY / "launch"
_SCALARS: dict[str, Any] = {"string": str, "integer": int, "boolean": bool, "quantity": (str, int)}


def _faults(value: Any, schema: Any, where: str = "") -> list[str]:
    """What in `value` its schema does not allow; the form of a schema is told in kubernetes_schemas.yaml."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{where}: a mapping is wanted"]
        fields = {name.rstrip("!"): kind for name, kind in schema.items()}
        missing = [name[:-1] for name in schema if name.endswith("!") and name[:-1] not in value]
        faults = [f"{where}.{name}: missing" for name in missing]
        faults += [f"{where}.{name}: unknown" for name in value if name not in fields]
        return faults + [f for n in value if n in fields for f in _faults(value[n], fields[n], f"{where}.{n}")]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{where}: a list is wanted"]
        return [f for i, item in enumerate(value) for f in _faults(item, schema[0], f"{where}[{i}]")]
    if schema.startswith("map "):
        return [f for name, item in value.items() for f in _faults(item, schema[4:], f"{where}.{name}")]
    if schema not in _SCALARS:
        return [] if value == schema else [f"{where}: {schema} is wanted"]
    wrong_kind = not isinstance(value, _SCALARS[schema]) or (isinstance(value, bool) != (schema == "boolean"))
    return [f"{where}: {schema} is wanted"] if wrong_kind else []


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    return yaml.safe_load((Path(__file__).parent / "kubernetes_schemas.yaml").read_text())


def _jobs() -> dict[str, Any]:
    return {job["kind"]: job for job in yaml.safe_load_all((_LAUNCH / "kubernetes.yaml").read_text())}


@pytest.mark.parametrize("kind", ["TrainJob", "PyTorchJob"])
def test_fields_are_the_operators(schemas, kind):
    job = _jobs()[kind]
    assert _faults(job, schemas[kind], kind) == []
    broken = copy.deepcopy(job)
    broken["spec"]["nodes"] = 2
    broken["metadata"] = {"labels": {}}
    broken["apiVersion"] = "v2"
    assert len(_faults(broken, schemas[kind], kind)) == 4


def _commands() -> dict[str, tuple[str, dict[str, str]]]:
    """The shell command of each job, and what its operator and its manifest set."""
    train, pytorch = _jobs()["TrainJob"]["spec"]["trainer"], _jobs()["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]
    assert pytorch["Master"]["template"] == pytorch["Worker"]["template"]
    container = pytorch["Master"]["template"]["spec"]["containers"][0]
    operators = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": "29511"}
    first = {**operators, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "RANK": "1", "WORLD_SIZE": "16"}
    sky = yaml.safe_load((_LAUNCH / "skypilot.yaml").read_text())
    clouds = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2"}
    clouds |= {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_TASK_ID": "sky-1_a", **sky["envs"]}
    trains = sky["run"][sky["run"].index("exec bash") :]
    settings = "\n".join(line for line in sky["run"].splitlines() if line.startswith("export"))
    return {
        "TrainJob": (train["args"][0], operators | {entry["name"]: entry["value"] for entry in train["env"]}),
        "PyTorchJob": (container["args"][0], first | {entry["name"]: entry["value"] for entry in container["env"]}),
        "SkyPilot": (f"{settings}\n{trains}", clouds),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="processes are counted by GPUs where there are any")
@pytest.mark.parametrize("kind", ["TrainJob", "PyTorchJob", "SkyPilot"])
def test_commands_start_machine_one_of_two(kind):
    command, settings = _commands()[kind]
    settings |= {"NPROC": "8", "PYTHON": sys.executable, "PATH": os.environ["PATH"]}
    result = subprocess.run(
        ["bash", "-c", command.rstrip() + " --dry-run"],
        cwd=_REPOSITORY,
        env=settings,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout)
    assert words[words.index("--nnodes") + 1] == "2"
    assert words[words.index("--nproc-per-node") + 1] == "8"
    assert words[words.index("--rdzv-endpoint") + 1].startswith("127.0.0.1:29")
    assert words[words.index("--rdzv-conf") + 1].startswith("is_host=0,")
    assert words[words.index("--config") + 1] == "7b"
    assert any(word.endswith("runs/7b") for word in words)


def test_the_image_has_what_the_package_needs():
    lines = (_LAUNCH / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert {step for step, _ in steps} <= {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "CMD"}
    assert re.fullmatch(r"BASE=\S+:\d\S+", dict(steps)["ARG"])  # a version, not "latest"
    assert steps[-1][0] == "CMD"
    assert dict(steps)["USER"] != "root"
    installed = {extra for _, what in steps for group in re.findall(r"\.\[(.*?)\]", what) for extra in group.split(",")}
    assert installed
    assert installed <= set(re.findall(r'^        "(\w+)": ', (_REPOSITORY / "setup.py").read_text(), re.MULTILINE))
    for _, script in (step for step in steps if step[0] == "RUN"):
        assert subprocess.run(["bash", "-n", "-c", script], check=False).returncode == 0
