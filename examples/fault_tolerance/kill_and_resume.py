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
from dataclasses import dataclass
from pathlib import Path

import forked_programs  # beside this file, as the next
from killable_job import LAYOUTS, Job, command, digest, losses, newest_whole, write_corpus

from vishwamai_mp.config import UserError, run_program

_SAVE_EVERY = 2  # steps
_MOST_STEPS = 8  # of one attempt, about
_HEAD = f"{'kill':>4}  {'moment':<16}  {'phase':<8}  {'left behind':<31}  {'to resume from':<14}  as uninterrupted"


@dataclass(frozen=True)
class Kill:
    """What was found after one kill."""

    seconds: float  # since this attempt started
    steps: int  # that it had done
    left: list[str]  # what it left beside whole checkpoints
    newest: Path | None  # whole checkpoint

    @property
    def phase(self) -> str:
        return "saving" if self.left else "training" if self.steps else "starting"


def main() -> int:
    """Parse the command line, run the study."""
    options = parse_arguments()
    if not sys.platform.startswith("linux"):
        raise UserError("this study finds a job's processes in /proc; run it on Linux")
    if options.work_dir is None:
        with tempfile.TemporaryDirectory(prefix="kill-and-resume-") as temporary:
            return study(Path(temporary), options)
    folder = Path(options.work_dir).resolve()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--work-dir {folder} is not empty; name another")
    folder.mkdir(parents=True, exist_ok=True)
    return study(folder, options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many; half of them during a save (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the data (%(default)s)")
    parser.add_argument("--layout", choices=list(LAYOUTS), default="dp", help="of the two processes (%(default)s)")
    parser.add_argument("--async-save", action="store_true", help="write checkpoints in the background")
    parser.add_argument("--forked", action="store_true", help="begin processes as forks; see chaos.py")
    parser.add_argument("--work-dir", metavar="FOLDER", help="an empty or new one, kept; default: temporary")
    options = parser.parse_args()
    if options.kills < 1:
        parser.error("--kills: at least 1")
    return options


def study(folder: Path, options: argparse.Namespace) -> int:
    """Run both jobs; returns 0 where they are equal."""
    if options.forked:
        forked_programs.begin()
    data, moments = folder / "data/chain", random.Random(options.seed)
    data.parent.mkdir()
    write_corpus(data, options.seed)
    steps = _MOST_STEPS * options.kills + 10
    settings = [
        *LAYOUTS[options.layout],
        f"training.max_steps={steps}",
        f"checkpoint.save_every={_SAVE_EVERY}",
        f"checkpoint.async_save={str(options.async_save).lower()}",
    ]
    how = "in the background" if options.async_save else "in the foreground"
    print(f"{steps} steps, layout {options.layout}, a save every {_SAVE_EVERY} steps, {how}", flush=True)
    whole, killed = folder / "uninterrupted", folder / "killed"
    job = Job.start(command(whole, data, settings), folder / "uninterrupted.log")
    startup = job.wait_for(lambda: job.steps() > 0)
    job.wait()
    print(f"uninterrupted: done; starting took {startup:.0f} s; now with {options.kills} kills\n\n{_HEAD}", flush=True)
    # keep_last deletes old checkpoints: that, too, may be what a kill interrupts.
    run = command(killed, data, [*settings, "checkpoint.keep_last=2"])
    kills = kill_repeatedly(run, folder, options.kills, moments, startup)
    job = Job.start(run, folder / "killed_last.log")
    job.wait()
    check_resumed(job, kills[-1].newest)
    return verdict(folder, steps, kills)


def kill_repeatedly(run: list[str], folder: Path, count: int, moments: random.Random, startup: float) -> list[Kill]:
    """At least `count` kills, and go on until half of them were during a save: some saves end before the signal."""
    kills: list[Kill] = []
    expected: Path | None = None
    missing = (count + 1) // 2
    while len(kills) < count or missing > 0:
        during_save = moments.random() * max(1, count - len(kills)) < missing
        job = Job.start(run, folder / f"killed_{len(kills) + 1:02}.log")
        try:
            kill = kill_once(job, folder / "killed/checkpoints", during_save, moments, startup)
        finally:
            job.kill()
        check_resumed(job, expected)
        missing -= kill.phase == "saving"
        kills.append(kill)
        expected = kill.newest
        print(row(len(kills), kill, compare(expected, folder / "uninterrupted")), flush=True)
    return kills


def kill_once(job: Job, checkpoints: Path, during_save: bool, moments: random.Random, startup: float) -> Kill:
    """Kill the job within a save, at a moment drawn from the time that its save before took; or at any moment."""
    before = leftovers(checkpoints)
    if during_save:
        begun = job.wait_for(lambda: bool(leftovers(checkpoints) - before))
        duration = job.wait_for(lambda: not leftovers(checkpoints)) - begun
        job.wait_for(lambda: bool(leftovers(checkpoints)))
        time.sleep(moments.uniform(0, duration))
        job.wait_for(lambda: bool(leftovers(checkpoints)))  # it was quicker this time: at once in the next
    elif moments.random() < 0.2:
        moment = moments.uniform(0, startup)
        job.wait_for(lambda: job.seconds() > moment or job.steps() >= _MOST_STEPS)
    else:
        wanted = moments.randrange(1, _MOST_STEPS - 2)
        job.wait_for(lambda: job.steps() >= wanted)
        time.sleep(moments.uniform(0, 0.1))
    seconds = job.kill()
    return Kill(seconds, job.steps(), sorted(leftovers(checkpoints) - before), newest_whole(checkpoints))


def leftovers(checkpoints: Path) -> set[str]:
    """Names of what is being written or deleted, or was when its writer was killed."""
    return {path.name for path in checkpoints.glob("*.*")}


def check_resumed(job: Job, expected: Path | None) -> None:
    """The job continued from the newest whole checkpoint, and met none that it had to skip."""
    resumed = job.resumed_from()
    if resumed is None and not job.steps():
        return  # killed before it could say
    if resumed != (expected.name if expected else None) or " skipped: " in job.text():
        raise RuntimeError(f"expected to resume from {expected}, but the job says:\n{job.text()}")


def compare(checkpoint: Path | None, whole: Path) -> str:
    """In words: does a checkpoint equal the uninterrupted run's of that step?"""
    if checkpoint is None:
        return "-"
    return "bitwise equal" if digest(checkpoint) == digest(whole / "checkpoints" / checkpoint.name) else "DIFFERENT"


def row(number: int, kill: Kill, compared: str) -> str:
    moment = f"{kill.seconds:.2f} s, {kill.steps} steps"
    left = kill.left[0] + (f" +{len(kill.left) - 1}" if len(kill.left) > 1 else "") if kill.left else "-"
    newest = kill.newest.name if kill.newest else "the beginning"
    return f"{number:>4}  {moment:<16}  {kill.phase:<8}  {left:<31}  {newest:<14}  {compared}"


def verdict(folder: Path, steps: int, kills: list[Kill]) -> int:
    """Compare the two finished runs; returns 0 where they are equal."""
    last = f"checkpoints/step_{steps:08d}"
    ours, theirs = digest(folder / "killed" / last), digest(folder / "uninterrupted" / last)
    different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    of_optimizer = sum(name.startswith("optimizer.") for name in ours)
    curve, whole_curve = losses(folder / "killed"), losses(folder / "uninterrupted")
    once = [step for step, _ in curve] == list(range(1, steps + 1))
    saving = sum(kill.phase == "saving" for kill in kills)
    print(f"\n{len(kills)} kills, {saving} of them during a save; the run finished its {steps} steps")
    parts = f"{len(ours) - of_optimizer - 1} tensors of weights, {of_optimizer} of the optimizer, the trainer's state"
    print(f"final checkpoint: {parts}: {', '.join(different) + ' DIFFER' if different else 'bitwise equal'}")
    print(f"metrics.jsonl: {'each step once' if once else 'NOT each step once'}", end=", ")
    print("losses equal" if curve == whole_curve else "losses DIFFER")
    print("no attempt met, or loaded, a torn checkpoint")
    return 0 if not different and once and curve == whole_curve else 1


if __name__ == "__main__":
    run_program(main)
