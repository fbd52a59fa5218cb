"""The cache's Triton kernels without a GPU: what they compute, and which cases they take."""

from pathlib import Path

import torch

from tests.kernel_visits import needs_triton, said_by
from vishwamai_mp.cache_augmentation import cache_on_gpu
from vishwamai_mp.cache_augmentation.cache_on_gpu import Parameters
from vishwamai_mp.cache_augmentation.reading_on_gpu import supports

_PROGRAM = Path(__file__).with_name("cache_kernel_programs.py")


@needs_triton
def test_the_interpreter_finds_the_results_and_gradients_of_the_cpu():
    """fp32; segments chosen and all, ragged blocks, one latent and several, places that hold nothing, mass."""
    found = said_by(_PROGRAM, "interpret")
    assert len(found) == 3
    assert max(found.values()) < 1e-5, found


@needs_triton
def test_the_interpreter_finds_what_the_module_does_between_its_projections():
    """fp32, training and evaluation; documents or none, segments chosen or all, ragged rows and segments, measures."""
    found = said_by(_PROGRAM, "interpret", "whole")
    assert len(found) == 5
    assert max(found.values()) < 1e-5, found


def test_nine_launches():
    found = said_by(_PROGRAM, "roofline")
    names = ["lay_out", "pool", "compare", "pick", "attend", "queries_back", "latents_back", "pool_back", "columns"]
    assert list(found) == names
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


def test_which_whole_caches_kernels_take(monkeypatch):
    monkeypatch.setattr("vishwamai_mp.runtime.triton_kernels.is_accelerator", lambda tensor: True)

    def takes(width: int, latents: int, length: int, tokens: int) -> bool:
        def tensor(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, device="meta")

        own = Parameters(tensor(2, latents, length), tensor(2, 8), tensor(2), tensor(2, width))
        return cache_on_gpu.supports(tensor(tokens, 1, 2, 3 * width + 8 + latents), own)

    assert takes(512, 16, 64, 4096)
    assert not takes(513, 16, 64, 4096)
    assert not takes(64, 17, 64, 4096)
    assert not takes(64, 16, 65, 4096)
    assert not takes(64, 16, 1, 2**13)


def test_cpus_go_without():
    x = torch.empty(1, 1, 4, 8)
    assert not supports(x, x, x)
