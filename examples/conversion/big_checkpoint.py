#!/usr/bin/env python3
"""Converts a checkpoint larger than memory and measures it: speed against `cp`, peak memory, killed and continued.

    python examples/conversion/big_checkpoint.py --work-dir /tmp/big --size full      # 21 GB; needs 45 GB of disk
    python examples/conversion/big_checkpoint.py --work-dir /tmp/small --size smoke   # seconds

Every step starts with the files out of the page cache and ends with its output on the disk (fsync), `cp` too. Peak
memory is what the kernel counted for the converting process (ru_maxrss). Results: `results.json` in the work folder.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

# No torch in this process: what the kernel counts for a child begins with what its parent held.
ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools/convert_checkpoint.py"
GENERATOR = Path(__file__).with_name("random_checkpoint.py")
SHARDS = {"full": "2GB", "smoke": "4MB"}


@dataclass
class Measured:
    """One step: seconds, bytes per second of what it wrote, and the process's peak memory in bytes."""

    seconds: float
    bytes: int
    peak_memory: int

    @property
    def megabytes_per_second(self) -> float:
        return self.bytes / self.seconds / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="a new folder; emptied at the end")
    parser.add_argument("--size", choices=SHARDS, default="smoke")
    options = parser.parse_args()
    work, size = options.work_dir, options.size
    work.mkdir(parents=True)
    run, hf, back = work / "run", work / "hf", work / "back"

    run_child([sys.executable, GENERATOR, "--output", run, "--size", size])
    checkpoint = run / "checkpoints/step_00000000"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    largest = max(2 * product(record["shape"]) for record in manifest["tensors"].values())
    say(f"checkpoint: {folder_size(checkpoint) / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB")

    copied = measure(["cp", "-r", checkpoint, work / "copy"], work / "copy", run)
    shutil.rmtree(work / "copy")
    report("cp", copied)
    command = [sys.executable, TOOL, "to-hf", "--load", run, "--output", hf, "--max-shard-size", SHARDS[size]]
    exported = measure(command, hf, run)
    report("to-hf", exported)
    expected = digests(hf)
    shutil.rmtree(hf)

    killed_after = kill_halfway(command, hf, len(expected))
    resumed = measure(command, hf, run)
    report(f"to-hf, killed after {killed_after} files and continued", resumed)
    continued_equal = digests(hf) == expected

    shutil.rmtree(run)  # the disk holds two of them
    imported = measure([sys.executable, TOOL, "from-hf", "--load", hf, "--output", back], back, hf)
    report("from-hf", imported)
    shutil.rmtree(hf)
    again = [sys.executable, TOOL, "to-hf", "--load", back, "--output", hf, "--max-shard-size", SHARDS[size]]
    run_child(again)
    round_trip_equal = {name: crc for name, crc in digests(hf).items() if name != "README.md"} == {
        name: crc for name, crc in expected.items() if name != "README.md"
    }

    limit = (2 << 30) + largest
    results = {
        "size": size,
        "largest_tensor_bytes": largest,
        "steps": {
            name: {**asdict(step), "megabytes_per_second": step.megabytes_per_second}
            for name, step in {"cp": copied, "to_hf": exported, "resumed": resumed, "from_hf": imported}.items()
        },
        "to_hf_share_of_cp": exported.megabytes_per_second / copied.megabytes_per_second,
        "from_hf_share_of_cp": imported.megabytes_per_second / copied.megabytes_per_second,
        "killed_after_files": killed_after,
        "continued_is_bitwise_equal": continued_equal,
        "round_trip_is_bitwise_equal": round_trip_equal,
        "peak_memory_within_limit": max(exported.peak_memory, imported.peak_memory) <= limit,
    }
    for folder in (hf, back):
        shutil.rmtree(folder)
    (work / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    say(json.dumps(results, indent=1))
    if not (continued_equal and round_trip_equal and results["peak_memory_within_limit"]):
        sys.exit("a promise does not hold, see above")


def run_child(command: list[object]) -> int:
    """Run to a good end; the process's peak memory in bytes."""
    child = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, env=environment())
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(str(part) for part in command)} ended with {child.returncode}")
    return usage.ru_maxrss * 1024


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def measure(command: list[object], output: Path, source: Path) -> Measured:
    """Time a step from cold files to an output that is on the disk."""
    drop_from_cache(source)
    before = folder_size(output) if output.exists() else 0
    start = time.perf_counter()
    peak = run_child(command)
    for path in files_of(output):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return Measured(time.perf_counter() - start, folder_size(output) - before, peak)


def kill_halfway(command: list[object], output: Path, files: int) -> int:
    """Start the conversion and kill it when it has finished half of its files; how many it had."""
    child = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, env=environment())
    while child.poll() is None and len(list(output.glob("*.safetensors"))) < files // 3:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    return len(list(output.glob("*.safetensors")))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_of(folder))


def drop_from_cache(folder: Path) -> None:
    for path in files_of(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def digests(folder: Path) -> dict[str, int]:
    """CRC-32 of each file."""
    found = {}
    for path in files_of(folder):
        crc = 0
        with path.open("rb") as file:
            while block := file.read(8 << 20):
                crc = zlib.crc32(block, crc)
        found[path.name] = crc
    return found


def product(lengths: list[int]) -> int:
    count = 1
    for length in lengths:
        count *= length
    return count


def report(what: str, step: Measured) -> None:
    say(
        f"{what}: {step.bytes / 1e9:.2f} GB in {step.seconds:.1f} s, {step.megabytes_per_second:.0f} MB/s,"
        f" peak memory {step.peak_memory / 1e9:.2f} GB"
    )


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    assert psutil.Process().memory_info().rss < 200e6  # a child's peak begins with what its parent held
    main()
