#!/usr/bin/env python3
"""Kill a training job again and again, half of the times while it saves; it must end as if nothing had happened.

Trains a small model in two processes under torchrun, once without interruption and once with SIGKILL to all its
processes at random moments, each time started again with the same command. Then compares the two, bit by bit: final
weights, optimizer state, position in the data, the loss of every step; and every checkpoint that was resumed from with
the one the uninterrupted run saved at that step. Needs Linux; makes its own data; about 8 s per kill on two cores.

example:
  python examples/fault_tolerance/kill_and_resume.py --kills 20
  python examples/fault_tolerance/kill_and_resume.py --kills 10 --layout tp --async-save
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.fault_tolerance.job import LAYOUTS, Job, command, digest, losses, newest_whole, write_corpus
from vishwamai_mp.config import UserError, run_program

_SAVE_EVERY = 2
_MOST_STEPS = 6  # that an attempt may do before it is killed
_HEAD = f"{'kill':>4}  {'phase':<8}  {'step':>4}  {'left behind':<36}  {'next resumes from':<17}  compared"


@dataclass(frozen=True)
class Kill:
    """What was found after one kill."""

    step: int  # done when it came
    saving: bool  # a checkpoint was being written
    left: list[str]  # what lies beside the whole checkpoints
    newest: Path | None


def main() -> int:
    """Run both jobs and compare them."""
    options = parse_arguments()
    if not sys.platform.startswith("linux"):
        raise UserError("this study finds a job's processes in /proc; run it on Linux")
    if options.work_dir is None:
        with tempfile.TemporaryDirectory(prefix="kill-and-resume-") as folder:
            return study(Path(folder), options)
    folder = Path(options.work_dir)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--work-dir {folder} is not empty; name another")
    folder.mkdir(parents=True, exist_ok=True)
    return study(folder, options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many; half of them during a save (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the data (%(default)s)")
    parser.add_argument("--layout", choices=list(LAYOUTS), default="dp", help="of the two processes (%(default)s)")
    parser.add_argument("--async-save", action="store_true", help="checkpoints are written in the background")
    parser.add_argument("--work-dir", metavar="FOLDER", help="an empty or new one, kept; default: temporary")
    options = parser.parse_args()
    if options.kills < 1:
        parser.error("--kills: at least 1")
    return options


def study(folder: Path, options: argparse.Namespace) -> int:
    """Returns 0 where the runs are equal."""
    data, moments = folder / "data/chain", random.Random(options.seed)
    data.parent.mkdir()
    write_corpus(data, options.seed)
    steps = _MOST_STEPS * options.kills + 2 * _SAVE_EVERY
    settings = [
        *LAYOUTS[options.layout],
        f"training.max_steps={steps}",
        f"checkpoint.save_every={_SAVE_EVERY}",
        f"checkpoint.async_save={str(options.async_save).lower()}",
    ]
    whole, killed = folder / "uninterrupted", folder / "killed"
    kind = "in the background" if options.async_save else "in the foreground"
    print(f"{steps} steps, layout {options.layout}, saving every {_SAVE_EVERY} steps {kind}: uninterrupted", flush=True)
    start = time.monotonic()
    Job.start(command(whole, data, settings), folder / "uninterrupted.log").wait()
    print(f"{time.monotonic() - start:.0f} s; now with {options.kills} kills\n\n{_HEAD}", flush=True)
    expected: Path | None = None
    # keep_last deletes checkpoints: that, too, may be what a kill interrupts.
    run = command(killed, data, [*settings, "checkpoint.keep_last=2"])
    for number, during_save in enumerate(plan(options.kills, moments), start=1):
        job = Job.start(run, folder / f"killed_{number:02}.log")
        kill = kill_once(job, killed / "checkpoints", during_save, moments)
        check_resumed(job, expected)
        expected = kill.newest
        print(row(number, kill, compare_checkpoint(expected, whole)), flush=True)
    job = Job.start(run, folder / "killed_last.log")
    job.wait()
    check_resumed(job, expected)
    return verdict(whole, killed, steps)


def plan(kills: int, moments: random.Random) -> list[bool]:
    """Which kills come during a save: half of them, the first of an odd number too, in random order."""
    during_save = [i < (kills + 1) // 2 for i in range(kills)]
    moments.shuffle(during_save)
    return during_save


def kill_once(job: Job, checkpoints: Path, during_save: bool, moments: random.Random) -> Kill:
    """Let the job do some steps and kill it; `during_save`: at a random moment of its next save.

    A save may be over before the signal arrives; then the next one is waited for, as long as the attempt may run.
    """
    wait_for(job, moments.randrange(1, _MOST_STEPS - _SAVE_EVERY))
    if during_save:
        started = wait_for_save(job, checkpoints)
        time.sleep(moments.uniform(0, 0.03))
        while not list(checkpoints.glob("*.partial")) and job.running:
            started = wait_for_save(job, checkpoints)
        assert started
    else:
        time.sleep(moments.uniform(0, 0.15))
    if not job.running:
        raise RuntimeError(f"the job ended before it could be killed:\n{job.text()}")
    job.kill()
    left = sorted(path.name for path in checkpoints.glob("*.*")) if checkpoints.exists() else []
    return Kill(job.steps(), any(name.endswith(".partial") for name in left), left, newest_whole(checkpoints))
