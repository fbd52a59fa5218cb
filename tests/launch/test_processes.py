"""Launchers with real processes: orderly stops, mistakes that are final, machines that drop out and come back."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from torch.distributed import HashStore

from vishwamai_mp.data.indexed import IndexedWriter
from vishwamai_mp.launch import attempt

_REPOSITORY = Path(__file__).resolve().parents[2]
_RECIPE = """\
model: {hidden_size: 32, num_layers: 1, num_attention_heads: 2, vocab_size: 256, max_position_embeddings: 16}
precision: fp32
training: {sequence_length: 16, micro_batch_size: 1, global_batch_size: 2, max_steps: 1000000}
data: {split: "100,0,0"}
logging: {report_to: [], hardware_peak_tflops: 1}
"""
# A worker without training. `behaviour` decides by rank and by how often the rank was started.
_PROGRAM = """
import ctypes, os, signal, sys, time
from pathlib import Path
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with its parent, as `vishwamai_mp.pretrain`
rank, folder = os.environ["RANK"], Path(sys.argv[1])
with (folder / f"rank_{rank}").open("a") as file:
    file.write("started\\n")
behaviour = sys.argv[2 + int(rank)]
if behaviour.isdigit():
    sys.exit(int(behaviour))
if behaviour.startswith("saves"):
    wishes = []
    signal.signal(signal.SIGTERM, lambda number, frame: wishes.append(number))
    (folder / f"ready_{rank}").touch()
    while not wishes:
        time.sleep(0.05)
    if behaviour == "saves and fails":
        sys.exit(1)
    time.sleep(3)  # a long save
    (folder / f"saved_{rank}").touch()
if behaviour == "sleeps":
    (folder / f"ready_{rank}").touch()
    time.sleep(600)
if behaviour == "talks":  # to its peers, until told to end; fails when one is gone
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    (folder / f"ready_{rank}").write_text(str(os.getpid()))
    ends = torch.zeros(1)
    while not ends.item():
        ends.fill_(float((folder / "end").exists()))
        dist.all_reduce(ends)
        time.sleep(0.05)
"""


class Launch:
    """A launcher whose output goes to a file."""

    def __init__(self, command: list[str], log: Path, **environment: str) -> None:
        path = os.pathsep.join(filter(None, [str(_REPOSITORY), os.environ.get("PYTHONPATH")]))
        known = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        known |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                env=known | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                # Tests under nohup would hand on that SIGHUP is ignored, which the launcher respects.
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
            )

    def text(self) -> str:
        return self.log.read_text()

    def wait(self) -> int:
        return self.process.wait(120)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.05)

    def kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            psutil.wait_procs(below, 20)  # the kernel ends them
            assert not [process for process in below if process.is_running() and process.status() != "zombie"]
        self.process.wait()


@pytest.fixture
def launches(tmp_path) -> Iterator[Callable[..., Launch]]:
    """Starts `python -m vishwamai_mp.launch` with the program above."""
    program = tmp_path / "program.py"
    running: list[Launch] = []
    program.write_text(_PROGRAM)

    def start(*behaviours: str, restarts: int = 0, node: int | None = None, port: int = 0) -> Launch:
        where = ["--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", "x"]
        if node is not None:
            where = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id"]
            where += ["x", "--rdzv-conf", f"is_host={int(node == 0)},join_timeout=900"]
        processes = len(behaviours) if node is None else 1
        command = [sys.executable, "-m", "vishwamai_mp.launch", *where, "--nproc-per-node", str(processes)]
        command += ["--max-restarts", str(restarts), "--log-dir", str(tmp_path / f"logs_{node}"), "--redirects", "3"]
        command += ["--tee", "3", str(program), str(tmp_path), *behaviours]
        running.append(Launch(command, tmp_path / f"launch_{len(running)}.log"))
        return running[-1]

    yield start
    for launch in running:
        launch.kill()


def starts(folder: Path, rank: int) -> int:
    path = folder / f"rank_{rank}"
    return path.read_text().count("started") if path.exists() else 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_for_workers_to_save(launches, tmp_path, number):
    launch = launches("saves", "saves", restarts=3)
    launch.wait_for(lambda: (tmp_path / "ready_0").exists() and (tmp_path / "ready_1").exists())
    launch.process.send_signal(number)
    assert launch.wait() == 0
    assert (tmp_path / "saved_0").exists()
    assert (tmp_path / "saved_1").exists()
    assert launch.text() == ""


def test_a_signal_before_workers_listen_ends_them(launches, tmp_path):
    launch = launches("sleeps", "sleeps", restarts=3)
    launch.wait_for(lambda: (tmp_path / "ready_0").exists() and (tmp_path / "ready_1").exists())
    launch.process.terminate()
    assert launch.wait() == 0
    assert launch.text() == "launch: stopped before the first step; the same command starts it\n"


def test_a_killed_launcher_takes_all_with_it(launches, tmp_path):
    launch = launches("sleeps", "saves")
    launch.wait_for(lambda: (tmp_path / "ready_0").exists() and (tmp_path / "ready_1").exists())
    launch.kill()


def test_failures_are_retried_and_mistakes_are_not(launches, tmp_path):
    launch = launches("5", restarts=1)
    assert launch.wait() == 1
    assert launch.text() == (
        "launch: rank 0 ended with status 5\n"
        "launch: restart 1 of 1; training goes on from its last checkpoint\n"
        "launch: rank 0 ended with status 5\n"
    )
    assert starts(tmp_path, 0) == 2
    launch = launches("78", restarts=4)
    assert launch.wait() == 1
    assert starts(tmp_path, 0) == 3
    assert launch.text() == ""


def test_a_failure_after_the_signal_is_a_failure(launches, tmp_path):
    launch = launches("saves", "saves and fails", restarts=3)
    launch.wait_for(lambda: (tmp_path / "ready_0").exists() and (tmp_path / "ready_1").exists())
    launch.process.terminate()
    assert launch.wait() == 1
    assert launch.text() == "launch: rank 1 ended with status 1\n"


@pytest.mark.parametrize("mistaken", [0, 1])
def test_a_mistake_on_one_machine_is_final_for_all(launches, tmp_path, mistaken):
    port = free_port()
    behaviours = ["1", "78"] if mistaken else ["78", "1"]  # the other rank sees a lost connection
    both = [launches(*behaviours, restarts=4, node=node, port=port) for node in (0, 1)]
    assert [launch.wait() for launch in both] == [1, 1]
    assert (starts(tmp_path, 0), starts(tmp_path, 1)) == (1, 1)
    assert sum("a mistake that only its user can mend" in launch.text() for launch in both) == 1


def test_a_killed_machine_comes_back(launches, tmp_path):
    port = free_port()
    machines = [launches("talks", "talks", restarts=3, node=node, port=port) for node in (0, 1)]
    ready = [tmp_path / "ready_0", tmp_path / "ready_1"]
    for victim in (1, 0):  # 0 has the rendezvous' store
        machines[0].wait_for(lambda: all(path.exists() for path in ready))
        machines[victim].kill()
        for path in ready:
            path.unlink()
        time.sleep(4)
        machines[victim] = launches("talks", "talks", restarts=3, node=victim, port=port)
    machines[0].wait_for(lambda: all(path.exists() for path in ready))
    (tmp_path / "end").touch()
    assert [launch.wait() for launch in machines] == [0, 0]


def test_machines_that_have_not_come_are_named_while_one_waits(monkeypatch, capfd):
    monkeypatch.setattr(attempt, "_PATIENT_SECONDS", 0.05)
    store = HashStore()
    for number in (2, 0):
        meeting = attempt.Meeting(number)
        meeting.store = store
        with meeting.telling_who_is_missing(4):
            time.sleep(0.2)
    assert "waiting for machines 1, 3 of 4: NODE_RANK=1 has not come" in capfd.readouterr().err
    time.sleep(0.2)
    assert not capfd.readouterr().err  # no word once they have met


@pytest.fixture
def recipe(tmp_path) -> Path:
    with IndexedWriter(tmp_path / "corpus", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(5000, dtype=np.uint16).__mod__(256).tobytes(), np.full(50, 100))
        writer.publish()
    path = tmp_path / "recipe.yaml"
    path.write_text(_RECIPE)
    return path


def test_training_stops_in_order_and_shares_its_folder_with_nobody(recipe, tmp_path):
    run = tmp_path / "run"
    command = ["bash", str(_REPOSITORY / "launch/torchrun_single_node.sh"), "--config", str(recipe)]
    command += [f"data.train={tmp_path / 'corpus'}", f"training.output_dir={run}"]
    launch = Launch(command, tmp_path / "log", NPROC="2", LOG_DIR=str(tmp_path / "logs"))
    try:
        launch.wait_for(lambda: "step 3/" in launch.text())
        workers = psutil.Process(launch.process.pid).children(recursive=True)
        for worker in workers:  # they hold the folder without training on beside the second's imports
            worker.suspend()
        second = Launch(command, tmp_path / "second", LOG_DIR=str(tmp_path / "logs"), MAX_RESTARTS="3")
        try:
            assert second.wait() == 1
        finally:
            second.kill()
            for worker in workers:
                worker.resume()
        (error,) = second.text().splitlines()[-1:]
        assert re.search(rf"error: training not started: training.output_dir={run} is in use by process \d+ on", error)
        launch.process.terminate()
        assert launch.wait() == 0, launch.text()
    finally:
        launch.kill()
    last = launch.text().splitlines()[-1]
    found = re.search(r"stopped after step (\d+): signal SIGTERM; the same command continues$", last)
    assert found, launch.text()
    assert (run / "checkpoints/latest").read_text() == f"step_{int(found[1]):08d}\n"
    assert "Traceback" not in launch.text()
    assert not (run / "run.lock").exists()
