"""Checks of machines before a job: programs that answer like nvidia-smi, broken folders, taken ports, gloo."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vishwamai_mp.launch import gpus, links
from vishwamai_mp.launch.checks import check_disk, check_files, check_port, check_shared_memory

_SCRIPT = Path(__file__).resolve().parents[2] / "launch/preflight.py"
_H100 = "NVIDIA H100 80GB HBM3, 570.86, 81559, 4, 1980, Not Active, Enabled, 0, No, No"


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a program of that name on PATH; it has not met a real driver's."""

    def put(*lines: str, status: int = 0, before: str = "") -> None:
        (tmp_path / "answer").write_text("".join(f"{line}\n" for line in lines))
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{before}\ncat {tmp_path}/answer\nexit {status}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return put


def _faults(findings):
    return [finding.says for finding in findings if finding.state == "fault"]


def test_sound_gpus_pass(nvidia_smi):
    nvidia_smi(*(f"{index}, {_H100}" for index in range(8)))
    found = gpus.check_gpus(8, "535")
    assert [(finding.check, finding.state) for finding in found] == [
        (check, "passed") for check in ("gpus", "gpu memory", "driver", "clocks", "ecc")
    ]
    assert found[0].says == "8 × NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ("HBM3", "PCIe", "GPU 2 is a NVIDIA H100 80GB PCIe, the others are NVIDIA H100 80GB HBM3"),
        ("570.86", "530.30", "driver 530.30, 535 or later wanted"),
        ("81559, 4", "40960, 4", "GPU 2 has 40960 MiB, the others 81559 MiB"),
        (" 4, 1980", " 30000, 1980", "GPU 2: 30000 of 81559 MiB are in use by another process"),
        ("1980", "1200", "GPU 2: clocks up to 1200 MHz, the others 1980 MHz"),
        ("Not Active", "Active", "GPU 2: the hardware holds its clocks down (heat or power)"),
        ("Enabled, 0", "Disabled, [N/A]", "GPU 2: ECC is off; nvidia-smi -e 1 and a restart"),
        ("Enabled, 0", "Enabled, 7", "GPU 2: 7 uncorrected memory errors since the driver was loaded"),
        ("No, No", "Yes, No", "GPU 2: a row of memory waits to be remapped; reset the GPU"),
        ("No, No", "Yes, Yes", "GPU 2: a row of memory could not be remapped; the GPU must be replaced"),
    ],
)
def test_a_fault_of_one_gpu_is_one_line(nvidia_smi, was, now, said):
    nvidia_smi(f"0, {_H100}", f"1, {_H100}", f"2, {_H100.replace(was, now)}")
    assert _faults(gpus.check_gpus(None, "535")) == [said]


def test_too_few_gpus(nvidia_smi):
    nvidia_smi(f"0, {_H100}")
    assert _faults(gpus.check_gpus(8, None)) == ["8 GPUs wanted, nvidia-smi lists 1"]


def test_a_driver_that_does_not_tell(nvidia_smi, monkeypatch):
    nvidia_smi("Failed to initialize NVML: Insufficient Permissions", status=4)
    said = "nvidia-smi ended with status 4: Failed to initialize NVML: Insufficient Permissions"
    assert _faults(gpus.check_gpus(None, None)) == [said]
    nvidia_smi("0, something new")
    assert _faults(gpus.check_gpus(None, None)) == ["nvidia-smi answers '0,something new', not 11 fields"]
    nvidia_smi(before="exec sleep 30")
    monkeypatch.setattr(gpus, "_SECONDS", 0.2)
    assert "does not answer within 0.2 s" in _faults(gpus.check_gpus(None, None))[0]


def test_gpus_without_ecc(nvidia_smi):
    nvidia_smi("0, NVIDIA GeForce RTX 4090, 570.86, 24564, 4, 3105, Not Active, [N/A], [N/A], [N/A], [N/A]")
    assert {finding.check: finding.state for finding in gpus.check_gpus(1, None)}["ecc"] == "does not apply"


def test_without_a_driver(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert {finding.state for finding in gpus.check_gpus(None, None)} == {"does not apply"}
    assert _faults(gpus.check_gpus(8, None)) == ["8 GPUs wanted, and there is no nvidia-smi; install the driver"]


def test_disk(tmp_path):
    (finding,) = check_disk(tmp_path / "a/b", 1e-3)
    assert finding.state == "passed"
    assert finding.measured["mb_per_second"] > 0
    assert list(tmp_path.iterdir()) == []
    assert "1e+09 MB/s wanted" in _faults(check_disk(tmp_path, 1e9))[0]
    (tmp_path / "file").touch()
    why = f"{tmp_path}/file/run cannot be written (Not a directory); checkpoints would go there"
    assert _faults(check_disk(tmp_path / "file/run", 1)) == [why]


def test_shared_memory_files_and_ports(tmp_path):
    assert _faults(check_shared_memory(1e9, tmp_path))[0].endswith("emptyDir with medium Memory)")
    assert check_shared_memory(1, tmp_path / "none")[0].state == "does not apply"
    assert "open files allowed, 1000000000000 wanted" in _faults(check_files(10**12))[0]
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        assert _faults(check_port(99999)) == ["port 99999 is none: they are below 65536"]
        assert _faults(check_port(port))[0].startswith(f"port {port} cannot be listened on (Address already in use)")


def test_links_are_judged_by_the_table_and_by_their_like():
    hosts = ["a", "a", "b", "b"]
    gpu = "NVIDIA H100 80GB HBM3"
    assert _faults(links.judge_links(hosts, [380, 40, 390, 41], gpu, 50)) == []
    assert _faults(links.judge_links(hosts, [380, 40, 90, 12], gpu, 50)) == [
        "rank 2 (b) – rank 3 (b): 90.00 GB/s, 450 GB/s by the table",
        "rank 3 (b) – rank 0 (a): 12.00 GB/s, 50 GB/s by the table",
    ]
    hosts = ["a", "b", "c"]
    assert _faults(links.judge_links(hosts, [10, 11, 4], "", None)) == [
        "rank 2 (c) – rank 0 (a): 4.00 GB/s, the median of such links is 10.00 GB/s"
    ]
    assert _faults(links.judge_clocks(hosts, [0, 0.2, -3], 1)) == ["the clock of c is 3.000 s behind a's; run chrony"]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_links_that_are_measured_together_share_no_rank(count):
    turns = links._turns(count)
    assert sorted(link for turn in turns for link in turn) == list(range(count))
    for turn in turns:
        ends = [rank for link in turn for rank in (link, (link + 1) % max(count, 2))]
        assert len(ends) == len(set(ends))


def _measured():
    return links.measure(cuda=False)


def test_links_of_three_processes(workers):
    (speeds, offsets), *_ = workers.run(_measured, 3)
    assert len(speeds) == 3
    assert min(speeds) > 0
    assert max(map(abs, offsets)) < 0.5


def test_one_line_per_fault_and_one_object(tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, str(_SCRIPT), "--json", "--gpus", "0", "--output-dir", str(tmp_path / "file/run")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    host = socket.gethostname()
    assert (
        line
        == f"fault: {host}: disk: {tmp_path}/file/run cannot be written (Not a directory); checkpoints would go there"
    )
    report = json.loads(result.stdout)
    assert report["host"] == host
    assert report["fit"] is False
    assert [finding["check"] for finding in report["findings"] if finding["state"] == "fault"] == ["disk"]


def test_a_limit_that_nothing_could_break_is_refused():
    result = subprocess.run(
        [sys.executable, str(_SCRIPT), "--least-files", "0"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: --least-files=0: use a number above 0\n"
