"""What is said to a GPU's libraries so that a repeated run has the same bits."""

import os

import pytest
import torch

from vishwamai_mp.config import ConfigError
from vishwamai_mp.runtime import determinism
from vishwamai_mp.runtime.determinism import set_determinism

_NAMES = ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(determinism, "is_accelerator", lambda _: True)
    for name in _NAMES:
        monkeypatch.delenv(name, raising=False)
    yield
    set_determinism(False)


def test_it_is_set_and_taken_back(monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    set_determinism(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert [os.environ[name] for name in _NAMES] == ["0", ":4096:8", "Ring"]
    set_determinism(True)
    set_determinism(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert [os.environ.get(name) for name in _NAMES] == [None, None, "Ring"]


def test_what_the_user_has_asked_of_torch_stays():
    torch.use_deterministic_algorithms(True)
    try:
        set_determinism(True)
        set_determinism(False)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_environment_that_says_the_opposite_is_refused(monkeypatch):
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    with pytest.raises(ConfigError, match=r"with NVTE_ALLOW_NONDETERMINISTIC_ALGO=1 in the environment.*unset it"):
        set_determinism(True)
