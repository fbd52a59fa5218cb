"""Which device, how fast, how much memory."""

import importlib
import os
import platform
import resource

import pytest
import torch

from vishwamai_mp.planning.hardware import known_gpu

# Not `from vishwamai_mp.runtime import device`: the room exports the function of that name.
room = importlib.import_module("vishwamai_mp.runtime.device")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_local_rank_comes_from_torchrun(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert room.local_rank() == 0
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert room.local_rank() == 3


def pages_cleared() -> int:
    """By the kernel, for 16 tensors of 4 MiB, as many as were freed just before."""
    room.keep_freed_memory()
    faults = 0
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        kept = [torch.ones(2**20) for _ in range(16)]
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        kept.clear()
    return faults


@pytest.mark.skipif(torch.cuda.is_available() or platform.libc_ver()[0] != "glibc", reason="about CPUs with glibc")
def test_what_was_freed_is_handed_out_again(workers):
    (faults,) = workers.run(pages_cleared, 1)
    assert faults < 2**26 / resource.getpagesize() / 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU")
def test_cores_are_shared_among_processes(monkeypatch, threads):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for processes, expected in ((1, cores), (cores, 1), (cores + 1, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        room.set_threads(None)
        assert torch.get_num_threads() == expected
    room.set_threads(3)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("configured", "said", "torchrun", "expected"),
    [
        (None, "3", False, (3, "OMP_NUM_THREADS")),
        (None, "3", True, (3, "OMP_NUM_THREADS")),
        (None, "1", False, (1, "OMP_NUM_THREADS")),
        (None, "4,2", False, (4, "OMP_NUM_THREADS")),
        (None, "1", True, (3, "6 cores / 2 processes; training.threads changes it")),
        (None, "", True, (3, "6 cores / 2 processes; training.threads changes it")),
        (None, "many", False, (3, "6 cores / 2 processes; training.threads changes it")),
        (5, "3", True, (5, "training.threads")),
        (None, "24", False, (24, "OMP_NUM_THREADS")),
        (None, "9999", False, (24, "OMP_NUM_THREADS=9999, cut down to 4 a core")),
    ],
)
def test_what_decides_the_number_of_threads(monkeypatch, configured, said, torchrun, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert room.cpu_threads(configured) == expected


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("Tesla V100-SXM2-32GB", 125),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA GB200", 2450),
        ("NVIDIA GB300", 2450),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_known_gpus_have_their_data_sheets_peak(monkeypatch, name, tflops):
    monkeypatch.setattr(room, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert room.peak_flops(torch.bfloat16) == tflops * 1e12
    known = known_gpu(name)  # planning's table says the same
    assert known is not None
    assert known.peak["16"] == tflops * 1e12


def test_an_unknown_gpu_has_no_peak(monkeypatch):
    monkeypatch.setattr(room, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Abacus 3")
    assert room.peak_flops(torch.bfloat16) != room.peak_flops(torch.bfloat16)  # nan
    assert room.peak_flops(torch.bfloat16, configured_tflops=2.0) == 2e12


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU")
def test_a_cpus_peak_is_measured_once():
    measured = room.peak_flops(torch.float32)
    assert 1e8 < measured < 1e14
    assert room.peak_flops(torch.float32) == measured


def test_peak_memory_grows_with_what_is_held():
    before = room.peak_memory_gib()
    assert before > 0.01
    held = torch.ones(int((before + 0.1) * 2**30) // 4) if before < 4 else None
    assert held is None or room.peak_memory_gib() >= before + 0.1
