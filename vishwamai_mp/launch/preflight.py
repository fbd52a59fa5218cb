"""Is this machine fit to train? Checks it before a job starts, says each fault in one line, and ends with 1 on any.

python launch/preflight.py --output-dir /shared/runs --gpus 8                     one machine, without torch
bash launch/torchrun_multi_node.sh --config R.yaml --links                       the links between all ranks
"""

import argparse
import json
import socket
import sys
from dataclasses import asdict
from pathlib import Path

from vishwamai_mp.config import run_program
from vishwamai_mp.launch.checks import (
    Finding,
    check_disk,
    check_files,
    check_port,
    check_shared_memory,
    positive,
)
from vishwamai_mp.launch.gpus import check_gpus

_EXAMPLE = """\
examples:
  python launch/preflight.py --output-dir runs --gpus 8 --least-driver 535
  NPROC=2 bash launch/torchrun_single_node.sh --config tiny --links

exit status: 0 without a fault, 1 with one. Checks that do not apply here (GPUs without an NVIDIA driver) are no faults.
"""


def main() -> int:
    """Check, print, and return the exit status."""
    options = _parse()
    for name in ("least_files", "least_shared_memory_gb", "least_disk_mb_s", "clock_skew_seconds", "network_gb_s"):
        if getattr(options, name) is not None:
            positive("--" + name.replace("_", "-"), getattr(options, name))
    findings = _of_links(options) if options.links else _of_machine(options)
    if not findings:  # a rank other than the first
        return 0
    faults = [finding for finding in findings if finding.state == "fault"]
    _report(findings, faults, options.json)
    return 1 if faults else 0


def _of_machine(options: argparse.Namespace) -> list[Finding]:
    findings = check_gpus(options.gpus, options.least_driver)
    findings += check_shared_memory(options.least_shared_memory_gb)
    findings += check_files(options.least_files)
    if options.port is not None:
        findings += check_port(options.port)
    if options.output_dir is not None:
        findings += check_disk(options.output_dir, options.least_disk_mb_s)
    return findings


def _of_links(options: argparse.Namespace) -> list[Finding]:
    from vishwamai_mp.launch.links import check_links  # torch, which takes seconds to import

    return check_links(options.network_gb_s, options.clock_skew_seconds)


def _report(findings: list[Finding], faults: list[Finding], as_json: bool) -> None:
    host = socket.gethostname()
    for fault in faults:
        print(f"fault: {host}: {fault.check}: {fault.says}", file=sys.stderr)
    if as_json:
        print(json.dumps({"host": host, "fit": not faults, "findings": [asdict(finding) for finding in findings]}))
        return
    for finding in findings:
        if finding.state != "fault":
            print(f"{host}: {finding.check}: {finding.state}: {finding.says}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="preflight.py",
        description="Is this machine fit to train?",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, help="GPUs that must be there (default: as many as there are; 0: none)")
    parser.add_argument("--least-driver", help="oldest NVIDIA driver that will do, such as 535 (default: any)")
    parser.add_argument("--port", type=int, help="must be free here: MASTER_PORT, on machine 0 (default: not checked)")
    parser.add_argument("--output-dir", type=Path, help="where checkpoints go; 128 MiB are written and deleted again")
    parser.add_argument("--least-disk-mb-s", type=float, default=50, help="of the output folder, MB/s (default 50)")
    parser.add_argument("--least-shared-memory-gb", type=float, default=1, help="free in /dev/shm, GB (default 1)")
    parser.add_argument("--least-files", type=int, default=4096, help="open files per process (default 4096)")
    parser.add_argument("--links", action="store_true", help="under a launcher: the links between ranks, and clocks")
    parser.add_argument("--network-gb-s", type=float, help="of a link between machines, GB/s (default: its like)")
    parser.add_argument("--clock-skew-seconds", type=float, default=1, help="between machines, s (default 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, faults on stderr all the same")
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
