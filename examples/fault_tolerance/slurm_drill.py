"""Does `launch/slurm.sbatch` do what it says? Tried on a real Slurm whose machines are network namespaces.

    python examples/fault_tolerance/slurm_drill.py [--only requeued node_lost] [--json FILE]

Needs Linux, root, and Debian's slurm-wlm, munge and iproute2; see `slurm_cluster.py`. Trains `tiny` on two of three
machines over gloo and disturbs it in the ways below. A table says of each what came of it. Exit status 1 if something
did not hold.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import machines
from killable_job import write_corpus
from slurm_cluster import Cluster, cluster, why_not

_STEPS, _SAVE_EVERY = 240, 20
# Fewer tokens than the preset has, so that a step takes a fraction of a second.
_SETTINGS = """
    model.vocab_size=512 training.sequence_length=32 training.micro_batch_size=1 training.global_batch_size=2
    training.evaluate_every=null logging.report_to=[] logging.log_every=1 data.split=100,0,0 checkpoint.keep_last=3
"""


class NotHeldError(AssertionError):
    """Something that the drill is about was not so."""


class Job:
    """A job that trains, its run folder and its output."""

    def __init__(self, slurm: Cluster, name: str, *options: str, **environment: str) -> None:
        self.slurm, self.run, self.output = slurm, slurm.folder / name, slurm.folder / f"{name}.out"
        given = {"PYTHON": sys.executable, "LOG_DIR": f"{self.run}-logs", "NPROC": "1", "PREFLIGHT": "--gpus 0"}
        settings = [*_SETTINGS.split(), f"data.train={slurm.folder / 'corpus'}", f"training.max_steps={_STEPS}"]
        settings += [f"checkpoint.save_every={_SAVE_EVERY}", f"training.output_dir={self.run}"]
        command = ["sbatch", "--parsable", f"--output={self.output}", "--exclusive", *options, "launch/slurm.sbatch"]
        self.number = slurm.run(*command, "--config", "tiny", *settings, **given | environment)

    def said(self) -> str:
        """All that the job has written, over all its attempts."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def steps(self) -> list[int]:
        """Numbers of the steps that were done, in order, over all attempts."""
        return [int(number) for number in re.findall(r"\bstep (\d+)/\d+", self.said())]

    def reach(self, step: int) -> None:
        """Wait for a step; a job that has ended will not reach it."""
        states = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")

        def reached() -> bool:
            if max(self.steps(), default=0) >= step:
                return True
            state = self.slurm.state(self.number)
            require(state in states, f"the job is {state} before step {step}")
            return False

        machines.wait_for(f"step {step}", reached)

    def wait(self, *states: str) -> None:
        """Wait until the job is in one of `states`."""
        machines.wait_for(f"to be {' or '.join(states)}", lambda: self.slurm.state(self.number) in states)

    def complete(self) -> int:
        """Wait for the end of training; returns how many steps were done twice."""
        self.reach(_STEPS)
        self.wait("COMPLETED")
        steps = self.steps()
        require(set(steps) == set(range(1, _STEPS + 1)), "some steps were left out")
        return len(steps) - _STEPS


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise NotHeldError(otherwise)


def trains(slurm: Cluster) -> str:
    """Two machines train to the end."""
    job = Job(slurm, "trains", "--nodes=2")
    require(job.complete() == 0, "steps were done twice")
    return f"{_STEPS} steps on {slurm.job(job.number)['NodeList']}"


def warned(slurm: Cluster) -> str:
    """Slurm's warning before the time limit: saved, queued again, resumed."""
    job = Job(slurm, "warned", "--nodes=2")
    job.reach(30)
    slurm.run("scancel", "--batch", "--signal=USR1", job.number)
    return _resumed(job, 0)


def requeued(slurm: Cluster) -> str:
    """`scontrol requeue`: saved, queued again, resumed."""
    job = Job(slurm, "requeued", "--nodes=2")
    job.reach(30)
    slurm.run("scontrol", "requeue", job.number)
    return _resumed(job, 0)


def preempted(slurm: Cluster) -> str:
    """A job of higher priority takes the machines: saved, waits, resumed."""
    job = Job(slurm, "preempted", "--nodes=2")
    job.reach(30)
    urgent = ["--partition=urgent", "--nodes=3", "--exclusive", f"--output={slurm.folder}/urgent.out"]
    other = slurm.run("sbatch", "--parsable", *urgent, "--wrap", "sleep 3")
    machines.wait_for("the other job", lambda: slurm.state(other) == "COMPLETED")
    return _resumed(job, 0)


def node_lost(slurm: Cluster) -> str:
    """A machine of a running job dies: Slurm queues the job again, and it goes on elsewhere."""
    job = Job(slurm, "node_lost", "--nodes=2")
    job.reach(_SAVE_EVERY + 10)
    last = slurm.run("scontrol", "show", "hostnames", slurm.job(job.number)["NodeList"]).split()[-1]
    lost = next(node for node in slurm.nodes if node.name == last)
    lost.kill()
    try:
        said = _resumed(job, _SAVE_EVERY + 10)
        require(lost.name not in slurm.job(job.number)["NodeList"], f"it ran on {lost.name}")
    finally:
        slurm.start_node(lost)
    return f"{said}; without {lost.name}, which was lost"


def bad_node(slurm: Cluster) -> str:
    """A machine fails its checks: it is named, and the job is queued again to run without it."""
    with _port_taken(slurm.nodes[0]):
        job = Job(slurm, "bad_node", "--nodes=2", PREFLIGHT="--gpus 0 --port 7777")
        repeated = job.complete()
    record = slurm.job(job.number)
    require(repeated == 0 and record["ExcNodeList"] == "n1", f"excluded: {record['ExcNodeList']}")
    require("slurm: unfit: n1" in job.said(), "n1 was not named")
    return f"n1 named and excluded, ran on {record['NodeList']}"


def spare(slurm: Cluster) -> str:
    """The same with a machine to spare: the job goes on without it at once."""
    with _port_taken(slurm.nodes[0]):
        job = Job(slurm, "spare", "--nodes=3", SPARE_NODES="1", PREFLIGHT="--gpus 0 --port 7777")
        repeated = job.complete()
    require(repeated == 0 and slurm.job(job.number)["Restarts"] == "0", "it was queued again")
    require("slurm: unfit: n1" in job.said(), "n1 was not named")
    return re.findall("slurm: (attempt 1 on .*)", job.said())[0]


@contextlib.contextmanager
def _port_taken(node: machines.Machine) -> Iterator[None]:
    """Something that `launch/preflight.py --port 7777` finds wrong with a machine."""
    takes = "import socket, time; s = socket.create_server(('', 7777)); print(flush=True); time.sleep(3600)"
    command = node.command(sys.executable, "-c", takes)
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            machines.end(process)


def cancelled(slurm: Cluster) -> str:
    """`scancel --batch --signal=TERM`: saved, ended, not queued again."""
    job = Job(slurm, "cancelled", "--nodes=2")
    job.reach(30)
    slurm.run("scancel", "--batch", "--signal=TERM", job.number)
    job.wait("COMPLETED")
    saved = (job.run / "checkpoints/latest").read_text().strip()
    require(int(saved.split("_")[1]) == max(job.steps()), f"saved {saved}, step {max(job.steps())} was done")
    return f"saved {saved}"


def sweep(slurm: Cluster) -> str:
    """A job array: each member trains with its own line of a file."""
    lines = slurm.folder / "sweep.txt"
    folders = [slurm.folder / f"sweep-{n}" for n in (0, 1)]
    lines.write_text(
        "".join(f"training.output_dir={f} optimizer.learning_rate={n + 1}e-3\n" for n, f in enumerate(folders))
    )
    job = Job(slurm, "sweep", "--nodes=1", "--array=0-1", SWEEP=str(lines))
    for folder in folders:
        machines.wait_for(f"the end of {folder.name}", lambda: _last_step(folder) == _STEPS)  # noqa: B023
    rates = [re.findall(r"learning_rate: (\S+)", (folder / "config.yaml").read_text())[0] for folder in folders]
    machines.wait_for("the array's end", lambda: not slurm.run("squeue", "--noheader", "--job", job.number))
    return f"learning rates {' and '.join(rates)}"


def _last_step(folder: Path) -> int:
    latest = folder / "checkpoints/latest"
    return int(latest.read_text().split("_")[1]) if latest.exists() else 0


def _resumed(job: Job, may_repeat: int) -> str:
    """That the job came back once, and repeated no more steps than it may."""
    before = max(job.steps())
    begin = time.monotonic()
    repeated = job.complete()
    job_record = job.slurm.job(job.number)
    require(job_record["Restarts"] == "1", f"{job_record['Restarts']} restarts")
    require(repeated <= may_repeat, f"{repeated} steps done twice, {may_repeat} allowed")
    return f"disturbed at step {before}, {repeated} steps done twice, at its end after {time.monotonic() - begin:.0f} s"


DRILLS: dict[str, Callable[[Cluster], str]] = {
    drill.__name__: drill
    for drill in (trains, warned, requeued, preempted, node_lost, bad_node, spare, cancelled, sweep)
}


def main() -> int:
    """Run the drills and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=DRILLS, default=list(DRILLS), metavar="DRILL", help=f"{[*DRILLS]}")
    parser.add_argument("--json", type=Path, help="write what was seen")
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        print(f"not tried: {reason}", file=sys.stderr)
        return 1
    seen = {}
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        write_corpus(folder / "corpus", seed=1)
        with cluster(folder, 3) as slurm:
            for drill in options.only:
                begin = time.monotonic()
                try:
                    said, held = DRILLS[drill](slurm), True
                except (NotHeldError, TimeoutError, RuntimeError) as error:
                    output = folder / f"{drill}.out"
                    tail = output.read_text()[-3000:] if output.exists() else ""
                    said, held = f"{error}\n{tail}", False
                seen[drill] = {"held": held, "seconds": round(time.monotonic() - begin), "said": said}
                print(f"{drill:10} {'held' if held else 'FAILED':7} {seen[drill]['seconds']:4} s  {said}", flush=True)
                slurm.run("scancel", "--user=root")
    if options.json:
        options.json.write_text(json.dumps(seen, indent=1) + "\n")
    return 0 if all(row["held"] for row in seen.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
