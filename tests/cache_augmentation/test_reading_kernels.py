"""The cache's Triton kernels without a GPU: what they compute, and which cases they take."""

from pathlib import Path

import torch

from tests.kernel_visits import needs_triton, said_by
from vishwamai_mp.cache_augmentation.reading_on_gpu import supports

_PROGRAM = Path(__file__).with_name("cache_kernel_programs.py")


@needs_triton
def test_the_interpreter_finds_the_results_and_gradients_of_the_cpu():
    """fp32; segments chosen and all, ragged blocks, one latent and several, places that hold nothing, mass."""
    found = said_by(_PROGRAM, "interpret")
    assert len(found) == 3
    assert max(found.values()) < 1e-5, found


def test_three_launches():
    found = said_by(_PROGRAM, "roofline")
    assert list(found) == ["attend", "queries_back", "latents_back"]
    assert all(kernel["milliseconds"] > 0 for kernel in found.values())


def test_which_cases_kernels_take(monkeypatch):
    x = torch.empty(2, 3, 4, 512, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr("vishwamai_mp.runtime.triton_kernels.is_accelerator", lambda tensor: True)
    assert supports(x, x, x)
    assert not supports(x, x.float(), x)
    assert not supports(x.double(), x.double(), x.double())
    wide = x.new_empty(2, 3, 4, 513)
    assert not supports(wide, wide, wide)
    with monkeypatch.context() as patch:
        patch.setenv("VISHWAMAI_TRITON", "0")
        assert not supports(x, x, x)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not supports(x, x, x)


def test_cpus_go_without():
    x = torch.empty(1, 1, 4, 8)
    assert not supports(x, x, x)
