"""The launchers: clean by shellcheck, clear about bad input, and what they would start."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

_REPOSITORY = Path(__file__).resolve().parents[2]
_SINGLE = "launch/torchrun_single_node.sh"
_MULTI = "launch/torchrun_multi_node.sh"
_HANDED_ON = ("PATH", "HOME", "LANG", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")
_TWO_NODES = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
_ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="processes are counted by GPUs where there are any")


def _run(script, *arguments, **environment):
    known = {name: os.environ[name] for name in _HANDED_ON if name in os.environ}
    return subprocess.run(
        ["bash", str(_REPOSITORY / script), *arguments],
        env={**known, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _error(script, *arguments, **environment):
    result = _run(script, *arguments, **environment)
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    "script", sorted(str(path.relative_to(_REPOSITORY)) for path in (_REPOSITORY / "launch").glob("*.sh"))
)
def test_shellcheck_is_content(script):
    checker = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert checker, "pip install -c constraints.txt -e '.[dev]'"
    result = subprocess.run([checker, "-x", script], cwd=_REPOSITORY, capture_output=True, text=True, check=False)
    assert (result.stdout, result.returncode) == ("", 0)


@pytest.mark.parametrize("script", [_SINGLE, _MULTI])
def test_help(script):
    result = _run(script, "--help")
    assert result.returncode == 0
    assert result.stderr == ""
    for word in ("usage:", "--config", "--dry-run", "NPROC", "MAX_RESTARTS", "LOG_DIR", "example:"):
        assert word in result.stdout


@_ON_CPU
def test_the_single_node_command(tmp_path):
    result = _run(
        _SINGLE,
        "--config",
        "tiny",
        "--dry-run",
        "training.output_dir=a b",
        "parallel.tensor_model_parallel_size=2",
        NPROC="2",
        LOG_DIR=str(tmp_path / "logs"),
    )
    assert (result.returncode, result.stderr) == (0, "")
    words = shlex.split(result.stdout)
    assert words[:3] == [sys.executable, "-m", "vishwamai_mp.launch"]
    assert words[words.index("--nproc-per-node") + 1] == "2"
    assert words[words.index("--max-restarts") + 1] == "0"
    assert words[words.index("--tee") + 1] == "3"
    program = words[words.index("vishwamai_mp.pretrain") - 1 :]
    assert program == [
        "-m",
        "vishwamai_mp.pretrain",
        "--config",
        "tiny",
        "training.output_dir=a b",
        "parallel.tensor_model_parallel_size=2",
    ]
    assert not (tmp_path / "logs").exists()


@_ON_CPU
def test_one_process_is_the_default_without_gpus():
    words = shlex.split(_run(_SINGLE, "--config=tiny", "--dry-run").stdout)
    assert words[words.index("--nproc-per-node") + 1] == "1"


@_ON_CPU
def test_the_multi_node_command():
    result = _run(_MULTI, "--config", "tiny", "--dry-run", **_TWO_NODES, MASTER_PORT="29517", LOG_DIR="l")
    assert result.returncode == 0
    words = shlex.split(result.stdout)
    assert words[words.index("--nnodes") + 1] == "2"
    assert words[words.index("--rdzv-backend") + 1] == "c10d"
    assert words[words.index("--rdzv-endpoint") + 1] == "127.0.0.1:29517"
    assert words[words.index("--rdzv-conf") + 1] == "is_host=0,join_timeout=900"
    assert words[words.index("--max-restarts") + 1] == "3"
    assert words[words.index("--log-dir") + 1] == "l/node_1"


@_ON_CPU
def test_slurm_fills_in_what_is_not_set(tmp_path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "node[1-3]" ] && printf "localhost\\nnode2\\nnode3\\n"\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_NNODES": "3", "SLURM_NODEID": "2", "SLURM_JOB_NODELIST": "node[1-3]", "SLURM_JOB_ID": "77"}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = _run(_MULTI, "--config", "tiny", "--dry-run", "training.global_batch_size=24", **slurm, PATH=path)
    words = shlex.split(result.stdout)
    assert words[words.index("--nnodes") + 1] == "3"
    assert words[words.index("--rdzv-endpoint") + 1] == "localhost:29500"
    assert words[words.index("--rdzv-id") + 1] == "77"


@_ON_CPU
@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "--config is missing"),
        (["--config"], {}, "--config needs a recipe"),
        (["--config", "none.yaml"], {}, "--config none.yaml: cannot be read (No such file or directory)"),
        (["--config", "tiny", "--fast"], {}, "unknown option --fast; see --help"),
        (["--config", "tiny", "steps"], {}, "unexpected 'steps'; overrides are written section.key=value"),
        (["--config", "tiny", "model.width=3"], {}, "unknown key 'model.width'"),
        (["--config", "7b"], {"NPROC": "3"}, "3 processes cannot hold tensor 2"),
        (["--config", "tiny"], {"NPROC": "0"}, "NPROC=0: use a number from 1 to 1024"),
        (["--config", "tiny"], {"NPROC": "two"}, "NPROC=two: use a number"),
        (["--config", "tiny"], {"GPUS_PER_NODE": "8"}, "8 GPUs requested, 0 visible"),
        (["--config", "tiny"], {"SLURM_GPUS_ON_NODE": "4"}, "4 GPUs requested, 0 visible"),
        (["--config", "tiny"], {"MAX_RESTARTS": "-1"}, "MAX_RESTARTS=-1: use a number"),
        (["--config", "tiny"], {"PYTHON": "/no/python"}, "PYTHON=/no/python: no such program"),
    ],
)
def test_bad_input_on_one_node(arguments, environment, message):
    assert message in _error(_SINGLE, *arguments, **environment)


@_ON_CPU
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NNODES": ""}, "NNODES is not set"),
        ({"NODE_RANK": ""}, "NODE_RANK is not set"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"NNODES": "0"}, "NNODES=0: use a number from 1"),
        ({"NODE_RANK": "2"}, "NODE_RANK=2: use a number from 0 to 1"),
        ({"MASTER_PORT": "80"}, "MASTER_PORT=80: use a number from 1024 to 65535"),
        ({"MASTER_ADDR": "no.such.machine.invalid"}, "MASTER_ADDR=no.such.machine.invalid does not resolve"),
    ],
)
def test_bad_input_on_several_nodes(environment, message):
    assert message in _error(_MULTI, "--config", "tiny", **{**_TWO_NODES, **environment})


@_ON_CPU
def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment = {**_TWO_NODES, "NODE_RANK": "0", "MASTER_PORT": port}
        assert f"port {port} is taken" in _error(_MULTI, "--config", "tiny", **environment)


def test_an_environment_without_the_package_is_named(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')  # sees no installed package
    bare.chmod(0o755)
    assert "cannot import torch; run: pip install" in _error(_SINGLE, "--config", "tiny", PYTHON=str(bare))


def test_the_quickstart_deletes_nothing_unasked(tmp_path):
    kept = tmp_path / "run/checkpoints/step_00000001"
    kept.mkdir(parents=True)
    line = _error("launch/quickstart.sh", "--work-dir", str(tmp_path))
    assert (
        line
        == f"error: {tmp_path}/run exists, from an earlier quickstart; --overwrite deletes it, --work-dir names"
        + (" another place")
    )
    assert kept.exists()


@pytest.mark.parametrize(
    ("environment", "installs", "said"),
    [
        ({}, False, "INSTALL_BROWSER=1 installs chromium first"),
        ({"CI": "true"}, True, "installing chromium and chromium-driver with apt-get"),
        ({"INSTALL_BROWSER": "1"}, True, "installing chromium and chromium-driver with apt-get"),
    ],
)
def test_ci_installs_system_packages_only_when_told(tmp_path, environment, installs, said):
    """With an apt-get that only notes its call, as root, on a machine without a browser."""
    for folder in ("bin", ".ci", "tests"):
        (tmp_path / folder).mkdir()
    shutil.copy(_REPOSITORY / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "tests/run.sh").write_text("echo tests run\n")
    for name in ("bash", "dirname", "timeout"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    for name, does in {"apt-get": f"echo called >>{tmp_path}/called", "id": "echo 0"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    result = subprocess.run(
        ["bash", str(tmp_path / ".ci/run")],
        env={"PATH": str(tmp_path / "bin"), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert (result.stdout, (tmp_path / "called").exists()) == ("tests run\n", installs)
