#!/usr/bin/env python3
"""Make go wrong whatever can, again and again, while a small model trains; nothing that was saved may be lost.

Trains in two processes under the launcher, once in peace and once while this script kills a rank, the agent above the
ranks or the launcher above that (SIGKILL, half of the times during a save), stops a rank and lets it go on, fills the
disk, makes the checkpoints read-only, takes their folder away, flips bits in a checkpoint, cuts it short, and moves the
times of files by days. After each the job must go on from the newest checkpoint that was whole, or a later one: by
itself where the launcher lives, else by the same command. At the end all must be as in peace, bit for bit. Needs Linux.
As root it mounts a small tmpfs for a disk that is truly full, and a read-only mount; otherwise it limits the size of
files (RLIMIT_FSIZE) and takes permissions away. About 10 s per event on two idle cores, most of it for importing torch
and megatron-core anew; with --forked, in which processes begin as forks of one that has imported them, about 4 s.

example:
  python examples/fault_tolerance/chaos.py --kills 100 --output chaos
  python examples/fault_tolerance/chaos.py --kills 200 --only rank agent launcher --forked --output chaos
  python examples/fault_tolerance/chaos.py --kills 20 --only rank agent launcher --async-save --layout tp
"""

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import forked_programs  # beside this file, as the next two
import psutil
from kill_and_resume import compare, leftovers
from killable_job import LAYOUTS, Job, command, digest, losses, newest_whole, write_corpus

from vishwamai_mp.checkpoint.store import LATEST, step_of
from vishwamai_mp.config import UserError, run_program
from vishwamai_mp.config.files import write_whole

_SAVE_EVERY = 2  # steps
_MODEL = ["model.hidden_size=64", "model.num_layers=2", "training.micro_batch_size=1", "training.global_batch_size=4"]
_DISK_MIB = 96
_DAY = 86400.0
_READINGS = 20


class Finished(Exception):  # noqa: N818 (no error)
    """The run has done its last step."""


@dataclass
class Chaos:
    """A run that is not left in peace.

    Args:
        run: the launcher's command line.
        folder: for logs; has `data`, `peace` and `chaos`.
        random: decides on moments and victims.
        mounts: whether file systems may be mounted here.
        step_seconds: what a step and its part of a save took in peace.
    """

    run: list[str]
    folder: Path
    random: random.Random
    mounts: bool
    step_seconds: float
    job: Job | None = None
    launches: int = 0

    @property
    def checkpoints(self) -> Path:
        return self.folder / "chaos/checkpoints"

    def living(self) -> Job:
        """The job, started by the same command where it has ended."""
        if self.job is None or self.job.process.poll() is not None:
            if self.job is not None and self.job.process.returncode == 0:
                raise Finished
            self.launches += 1
            self.job = Job.start(self.run, self.folder / f"launch_{self.launches:03}.log")
        return self.job

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until the living job has come so far."""
        job = self.living()
        try:
            job.wait_for(condition)
        except RuntimeError:
            if job.process.returncode == 0:
                raise Finished from None
            raise

    def text(self) -> str:
        """What all launches have said."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("launch_*.log")))

    def resumed(self) -> list[int]:
        """The steps that the run was resumed from, one after the other."""
        return [int(step) for step in re.findall(r"resumed from step_(\d+)", self.text())]

    def steps(self) -> int:
        """Steps done, those done again included."""
        return len(re.findall(r"^step \d+/\d+ ", self.text(), re.MULTILINE))

    def settle(self) -> None:
        """Wait until the run has done a step more and has something to lose."""
        before = self.steps()
        self.wait_for(lambda: self.steps() > before and (self.checkpoints / LATEST).exists())

    def random_moment(self) -> None:
        """Wait, half of the times for a save and for a part of that."""
        if self.random.random() < 0.5:
            before = leftovers(self.checkpoints)
            self.wait_for(lambda: bool(leftovers(self.checkpoints) - before))
            time.sleep(self.random.uniform(0, self.step_seconds))
        else:
            time.sleep(self.random.uniform(0, 4 * self.step_seconds))

    def newest(self) -> Path:
        """The newest whole checkpoint. The living job deletes old ones while they are read, on a busy machine all that
        were found: then anew.
        """
        for _ in range(_READINGS):
            if (found := newest_whole(self.checkpoints)) is not None:
                return found
        raise RuntimeError(f"no checkpoint of {self.checkpoints} is whole")

    def processes(self, layer: int) -> list[psutil.Process]:
        """Living ones: 0 the launcher, 1 its agent, 2 the ranks."""
        found = [psutil.Process(self.living().process.pid)]
        for _ in range(layer):
            found = [child for process in found for child in process.children()]
        return found

    def kill(self, layer: int) -> None:
        """SIGKILL a process of a layer. What is below a launcher ends with it, by the kernel."""
        if layer == 0:
            job = self.living()
            below = psutil.Process(job.process.pid).children(recursive=True)
            job.process.kill()
            job.process.wait()
            if psutil.wait_procs(below, 60)[1]:
                raise RuntimeError("processes outlived their launcher")
            return
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            self.random.choice(self.processes(layer)).kill()

    def living_or_dead(self) -> Job:
        assert self.job is not None
        return self.job

    def must_end(self, reason: str, said: int) -> None:
        """Wait until the job has ended by itself and said why in one line, after the `said` characters before."""
        job = self.living_or_dead()
        if job.process.wait(300) == 0:
            raise Finished
        errors = [line for line in job.text()[said:].splitlines() if line.startswith("error")]
        if len(errors) != 1 or not re.search(reason, errors[0]):
            told = job.text()[said:][-4000:]
            raise RuntimeError(f"expected one line with {reason}, found {errors}; it said:\n{told}")


def kill_rank(chaos: Chaos) -> None:
    chaos.kill(2)


def kill_agent(chaos: Chaos) -> None:
    chaos.kill(1)


def kill_launcher(chaos: Chaos) -> None:
    chaos.kill(0)


def stop_rank(chaos: Chaos) -> None:
    """SIGSTOP, and SIGCONT after a while; nothing is to be resumed."""
    victim = chaos.random.choice(chaos.processes(2))
    victim.suspend()
    time.sleep(chaos.random.uniform(0.5, 3))
    victim.resume()


def _fill(ballast: Path, ended: threading.Event) -> None:
    """Take what is free, and what becomes free when an old checkpoint goes."""
    with ballast.open("wb", buffering=0) as file:
        while not ended.is_set():
            try:
                file.write(b"\0" * 4096)
            except OSError:
                ended.wait(0.02)


def full_disk(chaos: Chaos) -> None:
    said = len(chaos.living().text())
    ballast = chaos.folder / "chaos/ballast"
    ended = threading.Event()
    if chaos.mounts:
        filling = threading.Thread(target=_fill, args=(ballast, ended))
        filling.start()
    else:
        for rank in chaos.processes(2):
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (1 << 14, resource.RLIM_INFINITY))
    try:
        chaos.must_end("No space left|no space left|File too large", said)
    finally:
        ended.set()
        if chaos.mounts:
            filling.join()
            ballast.unlink()


def read_only(chaos: Chaos) -> None:
    said, folder = len(chaos.living().text()), str(chaos.checkpoints)
    if chaos.mounts:
        subprocess.run(["mount", "--bind", "-o", "ro", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
    else:
        chaos.checkpoints.chmod(0o555)
    try:
        chaos.must_end("Read-only file system|Permission denied", said)
    finally:
        if chaos.mounts:
            subprocess.run(["umount", "--lazy", folder], check=True)
        else:
            chaos.checkpoints.chmod(0o755)


def vanishing_folder(chaos: Chaos) -> None:
    """The checkpoints are somewhere else for a while, during which the job is killed or ends by itself."""
    away = chaos.checkpoints.with_name("away")
    chaos.checkpoints.rename(away)
    time.sleep(chaos.random.uniform(0, 2))
    chaos.living_or_dead().kill()
    if chaos.checkpoints.exists():  # what was saved meanwhile
        for path in chaos.checkpoints.glob("step_*"):
            if not (away / path.name).exists():
                path.rename(away / path.name)
        shutil.rmtree(chaos.checkpoints)
    away.rename(chaos.checkpoints)


def flipped_bit(chaos: Chaos) -> None:
    _damage(chaos, lambda data, at: data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])


def truncated_file(chaos: Chaos) -> None:
    _damage(chaos, lambda data, at: data[:at])


def _damage(chaos: Chaos, change: Callable[[bytes, int], bytes]) -> None:
    """Kill the job and damage a file of its newest checkpoint, where there is an older one."""
    chaos.kill(0)
    newest = newest_whole(chaos.checkpoints)
    if newest is not None and len(list(chaos.checkpoints.glob("step_????????"))) > 1:
        victim = chaos.random.choice([path for path in newest.iterdir() if path.stat().st_size])
        data = victim.read_bytes()
        victim.write_bytes(change(data, chaos.random.randrange(len(data))))


def jumping_clock(chaos: Chaos) -> None:
    """Every file of the run seems to be from days ago or days ahead; order by time is turned round."""
    chaos.kill(0)
    for path in (chaos.folder / "chaos").rglob("*"):
        when = time.time() + chaos.random.uniform(-10, 10) * _DAY
        with contextlib.suppress(FileNotFoundError):
            os.utime(path, (when, when))


EVENTS: dict[str, Callable[[Chaos], None]] = {
    "rank": kill_rank,
    "agent": kill_agent,
    "launcher": kill_launcher,
    "stop": stop_rank,
    "full-disk": full_disk,
    "read-only": read_only,
    "vanish": vanishing_folder,
    "flip": flipped_bit,
    "truncate": truncated_file,
    "clock": jumping_clock,
}
_DAMAGING = ("flip", "truncate")
_WITHOUT_RESUMING = ("stop",)


def suffer(chaos: Chaos, kind: str) -> str:
    """One event. Returns what was lost by it, in words: nothing, as it should be."""
    chaos.settle()
    chaos.random_moment()
    newest: Path | None = chaos.newest()
    resumed = len(chaos.resumed())
    EVENTS[kind](chaos)
    if kind in _WITHOUT_RESUMING:
        chaos.settle()
        return "" if len(chaos.resumed()) == resumed else "the job started anew"
    if kind in _DAMAGING:
        newest = newest_whole(chaos.checkpoints)
    elif (
        kind not in ("rank", "agent")
        and compare(newest_whole(chaos.checkpoints), chaos.folder / "peace") == "DIFFERENT"
    ):
        return "a checkpoint differs from the peaceful run's"
    chaos.wait_for(lambda: len(chaos.resumed()) > resumed)
    found, least = chaos.resumed()[-1], step_of(newest) if newest else 0
    return "" if found >= least else f"went on from step {found}, though {least} was saved and whole"


def main() -> int:
    """Parse the command line, run the suite."""
    options = parse_arguments()
    if not sys.platform.startswith("linux"):
        raise UserError("this suite finds and stops processes as Linux does; run it there")
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        return suite(Path(temporary), options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many events, of all kinds (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(EVENTS), default=list(EVENTS), help="kinds; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of moments, victims and data (%(default)s)")
    parser.add_argument("--layout", choices=list(LAYOUTS), default="dp", help="of the two processes (%(default)s)")
    parser.add_argument("--async-save", action="store_true", help="write checkpoints in the background")
    parser.add_argument("--forked", action="store_true", help="begin processes as forks; see above")
    parser.add_argument("--steps-per-event", type=int, default=16, help="the length of the run (%(default)s)")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no event after so many (no limit)")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.txt")
    options = parser.parse_args()
    if options.kills < 1:
        parser.error("--kills: at least 1")
    if options.steps_per_event < 1:
        parser.error("--steps-per-event: at least 1")
    return options


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mounts a small tmpfs on `folder` where that is allowed; says whether it did."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m", "tmpfs", str(folder)]
    mounts = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounts
    finally:
        if mounts:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def suite(folder: Path, options: argparse.Namespace) -> int:
    """Run both jobs; returns 0 where nothing was lost and they are equal."""
    if options.forked:
        forked_programs.begin()
    begun = time.monotonic()
    data = folder / "data/chain"
    data.parent.mkdir()
    write_corpus(data, options.seed)
    steps = options.steps_per_event * options.kills + 10
    settings = [
        *_MODEL,
        *LAYOUTS[options.layout],
        f"training.max_steps={steps}",
        f"checkpoint.save_every={_SAVE_EVERY}",
        f"checkpoint.async_save={str(options.async_save).lower()}",
    ]
    job = Job.start(command(folder / "peace", data, settings), folder / "peace.log")
    starting = job.wait_for(lambda: job.steps() > 0)
    job.wait()
    step_seconds = (job.seconds() - starting) / steps
    print(
        f"in peace: {steps} steps of {1000 * step_seconds:.0f} ms, a save every {_SAVE_EVERY}, "
        f"{starting:.0f} s to start; now with {options.kills} events",
        flush=True,
    )
    with small_disk(folder / "chaos") as mounts:
        run = command(folder / "chaos", data, [*settings, "checkpoint.keep_last=3"], restarts=1000)
        chaos = Chaos(run, folder, random.Random(options.seed), mounts, step_seconds)
        try:
            events = torment(chaos, options, begun)
            print("no more events; on to the last step", flush=True)
            with contextlib.suppress(Finished):
                chaos.wait_for(lambda: False)
        finally:
            if chaos.job is not None:
                chaos.job.kill()
        return verdict(chaos, options, steps, events, time.monotonic() - begun)


def torment(chaos: Chaos, options: argparse.Namespace, begun: float) -> list[tuple[str, str]]:
    """The events: each kind in turn. (kind, what was lost)."""
    events: list[tuple[str, str]] = []
    for number in range(options.kills):
        if time.monotonic() - begun > 60 * options.minutes:
            break
        kind = options.only[number % len(options.only)]
        try:
            lost = suffer(chaos, kind)
        except Finished:
            print("the run was done before all events", flush=True)
            break
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            lost = " ".join(str(error).split())[-400:]
        events.append((kind, lost))
        print(f"{number + 1:>4}  {kind:<10}  {lost or 'survived'}", flush=True)
    return events


def verdict(
    chaos: Chaos, options: argparse.Namespace, steps: int, events: list[tuple[str, str]], seconds: float
) -> int:
    """Print and write the table; returns 0 where nothing was lost."""
    last = f"checkpoints/step_{steps:08d}"
    equal = digest(chaos.folder / "chaos" / last) == digest(chaos.folder / "peace" / last)
    curves = losses(chaos.folder / "chaos") == losses(chaos.folder / "peace")
    kinds = [kind for kind in EVENTS if any(kind == tried for tried, _ in events)]
    table = {
        kind: {
            "tried": sum(tried == kind for tried, _ in events),
            "survived": sum(tried == kind and not lost for tried, lost in events),
            "lost": sum(tried == kind and bool(lost) for tried, lost in events),
        }
        for kind in kinds
    }
    total = {column: sum(row[column] for row in table.values()) for column in ("tried", "survived", "lost")}
    lines = [f"{'event':<10}  tried  survived  lost"]
    for kind, row in [*table.items(), ("all", total)]:
        lines.append(f"{kind:<10}  {row['tried']:>5}  {row['survived']:>8}  {row['lost']:>4}")
    how = f"layout {options.layout}, saves {'in the background' if options.async_save else 'in the foreground'}"
    lines += [
        "",
        f"{steps} steps, {how}, {'tmpfs and mounts' if chaos.mounts else 'limits and permissions'}"
        f"{', processes forked' if options.forked else ''}, {seconds:.0f} s",
        f"final weights, optimizer, position in the data: {'bitwise equal' if equal else 'DIFFERENT'}",
        f"losses of all steps: {'equal' if curves else 'DIFFERENT'}",
        *(f"lost: {kind}: {lost}" for kind, lost in events if lost),
    ]
    print("\n" + "\n".join(lines))
    if options.output:
        found = {
            "events": table,
            "total": total,
            "steps": steps,
            "layout": options.layout,
            "async_save": options.async_save,
            "seed": options.seed,
            "mounts": chaos.mounts,
            "forked": options.forked,
            "final_bitwise_equal": equal,
            "losses_equal": curves,
            "seconds": round(seconds),
        }
        write_whole(options.output.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
        write_whole(options.output.with_suffix(".txt"), "\n".join(lines) + "\n")
    return 0 if equal and curves and not total["lost"] else 1


if __name__ == "__main__":
    run_program(main)
