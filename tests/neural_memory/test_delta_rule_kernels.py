"""The memory's Triton kernels without a GPU: what they compute, and which cases they take."""

from pathlib import Path

import torch

from tests.kernel_visits import needs_triton, said_by
from vishwamai_mp.neural_memory.delta_rule_on_gpu import supports

_PROGRAM = Path(__file__).with_name("kernel_programs.py")


@needs_triton
def test_the_interpreter_finds_the_results_and_gradients_of_the_cpu():
    """fp32; widths, ragged lengths, several reads, with and without momentum, documents, carried state."""
    found = said_by(_PROGRAM, "interpret")
    assert len(found) == 5
    assert max(found.values()) < 1e-5, found


@needs_triton
def test_the_interpreter_finds_a_whole_memory_s_results_and_gradients():
    """The same with convolution, gates, mix and norm, of one to three levels."""
    found = said_by(_PROGRAM, "interpret", "memories")
    assert len(found) == 3
    assert max(found.values()) < 1e-5, found


def test_a_roofline_knows_every_kernel():
    found = said_by(_PROGRAM, "roofline")
    rule = {"prepare", "scan", "states", "scan_back", "pairs", "vectors", "finish"}
    assert set(found) == rule | {"enter", "leave", "leave_back", "enter_back", "columns"}
    assert all(kernel["milliseconds"] > 0 for kernel in found.values())


def test_which_cases_kernels_take(monkeypatch):
    x = torch.empty(4, 1, 2, 128, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr("vishwamai_mp.runtime.triton_kernels.is_accelerator", lambda tensor: True)
    assert supports([x, x], x, x)
    assert not supports([x, x, x], x, x)
    assert not supports([x.double()], x.double(), x.double())
    wide = x.new_empty(4, 1, 2, 129)
    assert not supports([wide], wide, x)
    monkeypatch.setenv("VISHWAMAI_TRITON", "0")
    assert not supports([x], x, x)


def test_cpus_go_without():
    x = torch.empty(4, 1, 2, 8)
    assert not supports([x], x, x)
