"""A launcher's environment is read as a whole or refused."""

from contextlib import nullcontext

import pytest

from vishwamai_mp.config import ConfigError
from vishwamai_mp.config.job_environment import check_own_gpu, job_size

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
