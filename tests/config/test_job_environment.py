"""A launcher's environment is read as a whole or refused."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from vishwamai_mp.config import ConfigError
from vishwamai_mp.config.job_environment import check_own_gpu, hardware_queues, job_size, set_hardware_queues
from vishwamai_mp.config.schema import ParallelConfig

_WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def read(monkeypatch: pytest.MonkeyPatch, **said: str | None) -> int | None:
    for name in (*_WHOLE, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    return job_size()


def test_a_whole_environment_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch) is None
    assert read(monkeypatch, MASTER_ADDR="localhost", LOCAL_RANK="0") is None  # no one's job
    assert read(monkeypatch, **_WHOLE) == 2
    assert read(monkeypatch, **_WHOLE, LOCAL_RANK="1", LOCAL_WORLD_SIZE="2") == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"RANK": None}, "^WORLD_SIZE is in the environment, as a launcher's, but not RANK"),
        ({"WORLD_SIZE": None}, "^RANK is in .*, but not WORLD_SIZE"),
        ({"RANK": "", "WORLD_SIZE": ""}, "but not RANK and WORLD_SIZE"),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "but not MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "x"}, "^RANK=x in the environment: not a whole number from 0 on"),
        ({"RANK": "-1"}, "^RANK=-1 "),
        ({"RANK": "2"}, "^RANK=2 in the environment: not below WORLD_SIZE=2"),
        ({"WORLD_SIZE": "0"}, "^WORLD_SIZE=0 in the environment: not a whole number from 1 on"),
        ({"WORLD_SIZE": "²"}, "^WORLD_SIZE=² "),
        ({"MASTER_PORT": "abc"}, "^MASTER_PORT=abc "),
        ({"MASTER_PORT": "99999"}, "^MASTER_PORT=99999 in the environment: not a port"),
        ({"LOCAL_RANK": "two"}, "^LOCAL_RANK=two "),
        (
            {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"},
            "^LOCAL_RANK=2 .* not below LOCAL_WORLD_SIZE=2",
        ),
    ],
)
def test_half_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch, change: dict[str, str | None], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        read(monkeypatch, **{**_WHOLE, **change})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "gpus", "said"),
    [
        (_WHOLE, 8, "LOCAL_RANK is not in the environment: .* first of its 8 GPUs"),
        ({**_WHOLE, "LOCAL_RANK": "2"}, 2, "LOCAL_RANK=2 in the environment: this process sees 2 GPUs"),
        ({"LOCAL_RANK": "1"}, 1, "LOCAL_RANK=1 in the environment: this process sees 1 GPU;"),
        ({**_WHOLE, "LOCAL_RANK": "1"}, 2, None),
        (_WHOLE, 1, None),
        ({}, 8, None),
    ],
)
def test_each_process_has_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], gpus: int, said: str | None
) -> None:
    read(monkeypatch, **given)
    with pytest.raises(ConfigError, match=said) if said else nullcontext():
        check_own_gpu(gpus)


@pytest.mark.parametrize(
    ("layout", "given", "queues", "said"),
    [
        ({"tensor_model_parallel_size": 2}, None, "1", "^CUDA_DEVICE_MAX_CONNECTIONS is 1: .* only in one$"),
        ({"context_parallel_size": 2}, None, "1", "only in one$"),
        (
            {"context_parallel_size": 2},
            "8",
            "8",
            "is 8: .* only in one; set .*=1 before the program starts$",
        ),
        ({"fully_sharded": True}, None, "8", "is 8: .* only in more than one$"),
        ({"fully_sharded": True}, "32", "32", "is 32: .* only in more than one$"),
        (
            {"fully_sharded": True},
            "1",
            "1",
            "is 1: .* in more than one; set .*=8 before the program starts$",
        ),
        ({"pipeline_model_parallel_size": 2}, None, None, None),
        ({}, "4", "4", None),
    ],
)
def test_a_gpu_has_the_queues_that_the_layout_needs(
    monkeypatch: pytest.MonkeyPatch, layout: dict, given: str | None, queues: str | None, said: str | None
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if given:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", given)
    set_hardware_queues(ParallelConfig(**layout))
    line = hardware_queues(ParallelConfig(**layout))
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == queues
    assert re.search(said, line or "") if said else line is None
    os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)


def test_queues_that_nobody_set_in_time_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    line = hardware_queues(ParallelConfig(tensor_model_parallel_size=2))
    assert re.search("is not set, so 8: .*=1 before the program starts$", line or "")


_AS_TORCH_IS_IMPORTED = """
import os, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            print("queues", os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder())
os.environ |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
from vishwamai_mp.pretrain import main
main(["--config", "tiny", "data.train=corpus", "training.output_dir=run", *sys.argv[1:]])
"""


@pytest.mark.parametrize(
    ("setting", "queues"), [("parallel.tensor_model_parallel_size=2", "1"), ("parallel.fully_sharded=true", "8")]
)
def test_training_sets_them_before_torch_is_imported(setting: str, queues: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_DEVICE_MAX_CONNECTIONS"}
    command = [sys.executable, "-c", _AS_TORCH_IS_IMPORTED, setting]
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.stdout == f"queues {queues}\n", run.stderr
