"""Two machines train together; an agent is killed, a machine is lost, a cable is pulled: does the job mend itself?

    python examples/fault_tolerance/machines_drill.py [--steps 1500] [--cut-seconds 15 150] [--json FILE]

Each machine is a network namespace and runs `launch/torchrun_multi_node.sh`, as an operator would start it. Needs
Linux, root and iproute2. A table says after each fault how long it took until training went on, and how many steps were
done twice; at the end, whether the losses are those of a run that nothing befell. Exit status 1 if something did not
hold.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import machines
import psutil
from killable_job import VOCAB, write_corpus

_SAVE_EVERY = 20
_RECIPE = f"""\
model: {{hidden_size: 64, num_layers: 2, num_attention_heads: 4, vocab_size: {VOCAB}, max_position_embeddings: 64}}
precision: fp32
training: {{sequence_length: 64, micro_batch_size: 2, global_batch_size: 8, evaluate_every: null}}
data: {{split: "100,0,0"}}
checkpoint: {{save_every: {_SAVE_EVERY}, keep_last: 3}}
watchdog: {{step_seconds: 40}}
logging: {{report_to: [], log_every: 1, hardware_peak_tflops: 1}}
"""


@dataclass
class Outcome:
    """What a fault cost."""

    fault: str
    at_step: int
    seconds: float  # until a step beyond `at_step` was done
    steps_lost: int


class Job:
    """A job on two machines. What each writes to its console goes to a file."""

    def __init__(self, folder: Path, nodes: list[machines.Machine], run: str, steps: int) -> None:
        self.folder, self.nodes, self.run = folder, nodes, folder / run
        self._command = ["bash", "launch/torchrun_multi_node.sh", "--config", str(folder / "recipe.yaml")]
        self._command += [f"data.train={folder / 'corpus'}", f"training.output_dir={self.run}"]
        self._command += [f"training.max_steps={steps}"]
        self._processes: dict[str, subprocess.Popen] = {}
        for node in nodes:
            self.start(node)

    def start(self, node: machines.Machine) -> None:
        """Start, or start again, the launcher of a machine."""
        settings = {"NNODES": "2", "NODE_RANK": str(self.nodes.index(node)), "MASTER_ADDR": self.nodes[0].name}
        settings |= {"MAX_RESTARTS": "10", "NPROC": "1", "LOG_DIR": str(self.run) + "-logs", "PYTHON": sys.executable}
        with self._log(node).open("ab") as log:
            self._processes[node.name] = subprocess.Popen(
                node.command(*self._command),
                cwd=machines.ROOT,
                env={**os.environ, **settings},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill_agent(self, node: machines.Machine) -> None:
        """SIGKILL for torchrun's agent; its workers end with it."""
        for process in psutil.Process(self._processes[node.name].pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "vishwamai_mp.launch.attempt" in process.cmdline():
                    process.kill()

    def kill(self, node: machines.Machine) -> None:
        """SIGKILL for all of a machine, its launcher included."""
        node.kill()
        self._processes[node.name].wait()

    def steps(self) -> list[int]:
        """Numbers of the steps that were done, in order, over all attempts."""
        text = self._log(self.nodes[0]).read_text() + self._log(self.nodes[1]).read_text()
        return [int(number) for number in re.findall(r"\bstep (\d+)/\d+", text)]

    def losses(self) -> dict[int, float]:
        """The loss of each step, of the last attempt at it."""
        rows = map(json.loads, (self.run / "metrics.jsonl").read_text().splitlines())
        return {row["step"]: row["lm_loss"] for row in rows if "lm_loss" in row}

    def wait(self) -> list[int]:
        """Exit statuses of both launchers."""
        return [process.wait(600) for process in self._processes.values()]

    def said(self) -> str:
        """The launchers' own lines."""
        lines = [line for node in self.nodes for line in self._log(node).read_text().splitlines()]
        return "\n".join(line for line in lines if line.startswith("launch: ") or "error" in line)

    def end(self) -> None:
        """Leave nothing running."""
        for node in self.nodes:
            self.kill(node)

    def _log(self, node: machines.Machine) -> Path:
        return Path(f"{self.run}-{node.name}.log")


@contextlib.contextmanager
def _job(*arguments) -> Iterator[Job]:
    job = Job(*arguments)
    try:
        yield job
    finally:
        job.end()


def _undergo(job: Job, fault: str, harm, mend, mend_after: float) -> Outcome:
    """Do harm when training is well under way, mend it, and wait until training has passed that point."""
    start = max(job.steps(), default=0)
    machines.wait_for(f"training before: {fault}", lambda: max(job.steps(), default=0) > start + _SAVE_EVERY + 5)
    before = job.steps()
    harm()
    begin = time.monotonic()
    time.sleep(mend_after)
    mend()
    reached = max(before) + 3  # it may do a step or two before the harm is felt
    machines.wait_for(f"training after: {fault}", lambda: max(job.steps()) > reached, 600)
    seconds = time.monotonic() - begin
    done = job.steps()
    lost = len(done) - len(set(done)) - (len(before) - len(set(before)))
    outcome = Outcome(fault, max(before), round(seconds, 1), lost)
    print(f"{fault:36} {outcome.at_step:8} {outcome.seconds:10.1f} {outcome.steps_lost:10}", flush=True)
    return outcome


def _drill(job: Job, cuts: list[float]) -> list[Outcome]:
    first, second = job.nodes
    nothing = lambda: None
    print(f"{'fault':36} {'at step':>8} {'seconds':>10} {'steps lost':>10}")
    return [
        _undergo(job, "agent of machine 1 killed", lambda: job.kill_agent(second), nothing, 0),
        _undergo(job, "agent of machine 0 killed", lambda: job.kill_agent(first), nothing, 0),
        _undergo(job, "machine 1 lost, back after 10 s", lambda: job.kill(second), lambda: job.start(second), 10),
        *(_undergo(job, f"link cut for {seconds:g} s", second.cut, second.restore, seconds) for seconds in cuts),
    ]


def main() -> int:
    """Run the drill and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="of the job (default 1500)")
    parser.add_argument("--cut-seconds", type=float, nargs="*", default=[15, 150], help="default 15 150")
    parser.add_argument("--json", type=Path, help="write what was seen")
    options = parser.parse_args()
    reason = machines.why_not()
    if reason is not None:
        print(f"not tried: {reason}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="machines-") as name, machines.machines(2) as nodes:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(_RECIPE)
        write_corpus(folder / "corpus", seed=1)
        with _job(folder, nodes, "disturbed", options.steps) as job:
            try:
                outcomes = _drill(job, options.cut_seconds)
            except TimeoutError as error:
                print(f"{error}\n{job.said()}", file=sys.stderr)
                return 1
            statuses, losses = job.wait(), job.losses()
        with _job(folder, nodes, "undisturbed", options.steps) as job:
            job.wait()
            same = losses == job.losses()
    print(f"exit statuses {statuses}; losses of all steps as in an undisturbed run: {'yes' if same else 'no'}")
    if options.json:
        report = {"faults": [asdict(outcome) for outcome in outcomes], "statuses": statuses, "same_losses": same}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if same and statuses == [0, 0] else 1


if __name__ == "__main__":
    sys.exit(main())
