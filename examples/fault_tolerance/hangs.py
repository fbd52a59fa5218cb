#!/usr/bin/env python3
"""Make one of four ranks hang in ten ways: does the watchdog name the right rank, and what the others wait for?

Trains a small model in four processes under the launcher (two tensor parallel ranks, two replicas), lets one rank go
wrong, and reads `hang_report.json`. The truth is known: which rank it was, in which function it hangs, what its peers
call. Then trains for so many healthy steps, with evaluations and saves, under the same limits: no alarm may be raised.
Needs Linux; makes its own data; half a minute per kind on two cores.

example:
  python examples/fault_tolerance/hangs.py --steps 1000
  python examples/fault_tolerance/hangs.py --kinds stops loops --steps 0 --machines 2
"""

import argparse
import json
import re
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import forked_programs  # beside this file, as the next
from killable_job import Job, command, write_corpus

from vishwamai_mp.config import UserError, run_program
from vishwamai_mp.config.errors import HUNG_STATUS

_JOB = str(Path(__file__).with_name("hanging_job.py"))
_RANK, _STEP = 2, 12
_LAYOUT = ["parallel.tensor_model_parallel_size=2", "training.micro_batch_size=1"]
_SLACK = 15  # seconds from the limit to the end of the job


@dataclass(frozen=True)
class Truth:
    """What a report must say: patterns of the reason, of the operation, and of the stack of the rank at fault."""

    why: str
    operation: str
    stack: str = ""
    status: int = HUNG_STATUS


_COLLECTIVE = r"(all_reduce|all_gather|reduce_scatter|broadcast), number \d+ of \w+ \(ranks [\d, -]+\)"
_TRUTHS = {
    "stops": Truth("stopped", _COLLECTIVE, "stops"),
    "dies": Truth("dead", _COLLECTIVE, status=1),
    "leaves_out_a_collective": Truth(  # gloo ends a process that gets more than it expects
        "left out a collective", rf"number \d+ of .*: .* on rank {_RANK}; .* on the others", status=1
    ),
    "brings_another_shape": Truth("did another", rf"all_reduce of 12 bytes on rank {_RANK}; all_reduce of 8 bytes"),
    "reads_slowly": Truth("waiting for data", _COLLECTIVE, "read_slowly"),
    "saves_behind_a_lock": Truth("saving", "gather|all_reduce|broadcast|reduce", "write_behind_a_lock"),
    "loops": Truth("forward pass", _COLLECTIVE, "loop_forever"),
    "evaluates_for_ever": Truth("evaluation", _COLLECTIVE, "evaluate_for_ever"),
    "writes_to_nobody": Truth("between steps", _COLLECTIVE, "writes_to_nobody"),
    "holds_the_interpreter": Truth("between steps", _COLLECTIVE, "holds_the_interpreter"),
}


def main() -> int:
    """Parse the command line, run the drill."""
    options = parse_arguments()
    if not sys.platform.startswith("linux"):
        raise UserError("the watchdog looks at processes in /proc; run this on Linux")
    if options.forked:
        forked_programs.begin(_JOB)
    with tempfile.TemporaryDirectory(prefix="hangs-") as temporary:
        folder = Path(temporary)
        (folder / "data").mkdir()
        write_corpus(folder / "data/chain", 0)
        print(f"{'kind':<26}{'verdict':<9}{'report':>8}{'end':>8}  what it said", flush=True)
        right = [drill(folder, kind, options.limit, options.machines) for kind in options.kinds]
        print(f"\n{sum(right)} of {len(right)} right", flush=True)
        calm = not options.steps or stay_calm(folder, options.steps, options.limit)
    return 0 if all(right) and calm else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", choices=_TRUTHS, default=list(_TRUTHS), help="which (default: all)")
    parser.add_argument("--limit", type=float, default=10, help="seconds of every phase (%(default)s)")
    parser.add_argument("--machines", type=int, choices=(1, 2), default=1, help="launchers that share the ranks")
    parser.add_argument("--forked", action="store_true", help="begin processes as forks; see chaos.py")
    parser.add_argument("--steps", type=int, default=1000, help="healthy ones afterwards (%(default)s)")
    return parser.parse_args()


def job_command(folder: Path, run: Path, kind: str, steps: int, limit: float) -> list[str]:
    """The launcher with four processes that run `hanging_job.py`."""
    every = max(2, _STEP + 2)
    limits = [f"watchdog.{name}_seconds={limit}" for name in ("step", "data", "evaluation", "save", "other")]
    settings = [*_LAYOUT, *limits, f"training.max_steps={steps}", f"training.evaluate_every={every}"]
    settings += ["training.evaluate_batches=1", f"checkpoint.save_every={every}", "data.split=90,10,0"]
    whole = command(run, folder / "data/chain", [*settings, "checkpoint.keep_last=2"])
    whole[whole.index("--nproc-per-node") + 1] = "4"
    at = whole.index("-m", 3)  # what the launcher starts
    program = [_JOB, kind, str(_RANK), str(_STEP), str(run) + ".mark"]
    return [*whole[:at], *program, *whole[at + 2 :]]


def of_machine(whole: list[str], machine: int, port: int) -> list[str]:
    """The same job, as one of two launchers with two processes each that meet at a port of this machine."""
    whole = ["2" if before == "--nproc-per-node" else word for before, word in zip(["", *whole], whole, strict=False)]
    whole = [word.replace("localhost:0", f"localhost:{port}") for word in whole]
    return [*whole[:3], "--nnodes", "2", "--rdzv-conf", f"is_host={int(machine == 0)}", *whole[3:]]


def start(folder: Path, kind: str, limit: float, machines: int) -> list[Job]:
    """The launchers of a job that will hang."""
    whole = job_command(folder, folder / kind, kind, 100, limit)
    if machines == 1:
        return [Job.start(whole, folder / f"{kind}.log")]
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return [Job.start(of_machine(whole, i, port), folder / f"{kind}_{i}.log") for i in range(machines)]


def drill(folder: Path, kind: str, limit: float, machines: int) -> bool:
    """Let the job hang; returns whether the report is right."""
    run, truth = folder / kind, _TRUTHS[kind]
    mark, report = Path(f"{run}.mark"), run / "hang_report.json"
    jobs = start(folder, kind, limit, machines)
    try:
        begun = jobs[0].wait_for(mark.exists)
        deadline = time.monotonic() + limit + _SLACK
        while any(job.process.poll() is None for job in jobs) and time.monotonic() < deadline:
            time.sleep(0.05)
        ended = jobs[0].seconds() - begun
        running = any(job.process.poll() is None for job in jobs)
    finally:
        for job in jobs:
            job.kill()
    time.sleep(3)  # the watchdog outlives the ranks by a moment
    said = json.loads(report.read_text()) if report.exists() else {"why": "", "operation": "", "ranks_at_fault": []}
    problems = compare(said, truth) if report.exists() else ["no report"]
    problems += [f"still running after {ended:.0f} s"] if running else []
    text = "".join(job.text() for job in jobs)
    problems += [f"printed {count} times"] if (count := text.count("all of it, with every stack: ")) != 1 else []
    statuses = [job.process.returncode for job in jobs]
    problems += [f"statuses {statuses}"] if truth.status not in statuses else []
    reported = report.stat().st_mtime - mark.stat().st_mtime if report.exists() else float("nan")
    verdict = "right" if not problems else "WRONG"
    told = f"rank {said['ranks_at_fault']}: {said['why']}; {said['operation']}"
    print(f"{kind:<26}{verdict:<9}{reported:>6.1f} s{ended:>6.1f} s  {told}", flush=True)
    if problems:
        print(f"    {'; '.join(problems)}\n{text}", flush=True)
    return not problems


def compare(report: dict, truth: Truth) -> list[str]:
    """What a report says wrongly."""
    problems = [] if report["ranks_at_fault"] == [_RANK] else [f"named {report['ranks_at_fault']}"]
    found = {name: (getattr(truth, name), report[name]) for name in ("why", "operation")}
    problems += [f"{name}: {said!r}" for name, (true, said) in found.items() if not re.search(true, said)]
    guilty = next(state for state in report["ranks"] if state["rank"] == _RANK)
    frames = [frame for stack in guilty["stacks"] for frame in stack]
    if truth.stack and not any(frame.endswith(f" {truth.stack}") for frame in frames):
        problems.append(f"{truth.stack} is not in the stack: {frames}")
    return problems


def stay_calm(folder: Path, steps: int, limit: float) -> bool:
    """Train in health; returns whether nothing was reported."""
    run = folder / "healthy"
    job = Job.start(job_command(folder, run, "nothing", steps, limit), folder / "healthy.log")
    job.process.wait()
    calm = (
        job.process.returncode == 0 and not (run / "hang_report.json").exists() and "with every stack" not in job.text()
    )
    print(
        f"{steps} healthy steps with {steps // (_STEP + 2)} evaluations and saves: "
        f"{'no alarm' if calm else 'A FALSE ALARM'}, {job.seconds():.0f} s",
        flush=True,
    )
    if not calm:
        print(job.text())
    return calm


if __name__ == "__main__":
    run_program(main)
