"""Compiled functions beside torch's operators: the same within rounding, forward and backward."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vishwamai_mp.config import ConfigError
from vishwamai_mp.model.gated_units import GATED_UNITS
from vishwamai_mp.model.loss import vocab_parallel_cross_entropy
from vishwamai_mp.model.norm import RMSNorm
from vishwamai_mp.runtime import fusion
from vishwamai_mp.runtime.fusion import fuses, set_fusion

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="training.compile needs a C++ compiler")
_WIDTH, _REAL = 72, 61  # not whole vectors of the CPU; ids of a padded vocabulary


def norm(x: Tensor) -> Tensor:
    config = SimpleNamespace(params_dtype=x.dtype, sequence_parallel=False, layernorm_zero_centered_gamma=False)
    return RMSNorm(config, _WIDTH)(x)


def loss(x: Tensor) -> Tensor:
    """With targets that are another shard's."""
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    targets = torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2]) % (2 * _WIDTH)
    return vocab_parallel_cross_entropy(x, targets, _REAL, group)  # type: ignore[arg-type]


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": norm,
    "loss": loss,
    **{name: unit(None) for name, unit in GATED_UNITS.items()},
}


@pytest.fixture
def compiling() -> Iterator[Callable[[bool], None]]:
    yield set_fusion
    set_fusion(False)


def both_ways(part: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(5, 7, _WIDTH, generator=random)).to(dtype).transpose(0, 1).requires_grad_()  # not contiguous
    out = part(x)
    out.backward(torch.randn(out.shape, generator=random).to(out.dtype))
    assert x.grad is not None
    return out.detach(), x.grad


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PARTS)
def test_compiled_parts_compute_the_same(compiling, name, dtype):
    # Operators round between one another in bf16, a loop only at its end: two roundings apart.
    # GELU's 1 + tanh loses digits where it is nearly nothing.
    tolerance = (1e-5 if name == "geglu" else 2e-6) if dtype == torch.float32 else 2**-6
    expected = both_ways(PARTS[name], dtype)
    compiling(True)
    for ours, theirs in zip(both_ways(PARTS[name], dtype), expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@needs_compiler
def test_they_are_compiled(compiling, monkeypatch):
    """Where asked for, and not where tensors have no values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    made: list[str] = []

    def make(function: Callable[..., Tensor], **_: bool) -> Callable[..., Tensor]:
        made.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", make)
    double = fusion.fusible(lambda x: 2 * x)
    double(torch.ones(2))
    assert made == []
    compiling(True)
    made.clear()
    with FakeTensorMode():
        assert not fuses()
        double(torch.ones(2))
    assert made == []
    double(torch.ones(2))
    double(torch.ones(3))
    assert made == ["<lambda>"]


def test_without_a_compiler_it_is_refused(compiling, monkeypatch):
    monkeypatch.setenv("CXX", "no-compiler-of-this-name")
    with pytest.raises(ConfigError, match=r"no-compiler-of-this-name is not found.*g\+\+.*leave training.compile out"):
        compiling(True)
    assert not fuses()


def test_a_compiler_that_fails_is_refused(tmp_path):
    """In one line; in a process of its own, which must not find what was compiled before."""
    program = "import vishwamai_mp.runtime.fusion as f\ntry: f.set_fusion(True)\nexcept f.ConfigError as e: print(e)"
    environment = {**os.environ, "CXX": "false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, env=environment)
    assert run.stdout.startswith("training.compile: no C++ compiler that works here"), run
    assert run.stdout.count("\n") == 1


def test_accelerators_are_refused(compiling, monkeypatch):
    monkeypatch.setattr(fusion, "is_accelerator", lambda _: True)
    with pytest.raises(ConfigError, match="fuses on CPUs alone"):
        compiling(True)


_GATE = """
import torch, vishwamai_mp.runtime
from vishwamai_mp.model.gated_units import _gated, SwiGLU
from vishwamai_mp.runtime.fusion import set_fusion

x = torch.linspace(-3, 3, 720).view(5, 144)
expected = _gated(x, SwiGLU)
set_fusion(True)
torch.testing.assert_close(_gated(x, SwiGLU), expected)
"""


@needs_compiler
def test_what_was_compiled_for_other_instructions_is_not_taken(tmp_path):
    """A cache that two kinds of CPUs share: this one, and this one held to less. An empty word holds it to nothing."""
    for capability in ("", "avx2"):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        run = subprocess.run([sys.executable, "-c", _GATE], text=True, capture_output=True, env=environment)
        assert run.returncode == 0, run.stderr
