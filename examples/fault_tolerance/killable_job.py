"""The small training job that `kill_and_resume.py` kills and `chaos.py` torments: data, command, processes, results."""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vishwamai_mp.checkpoint import find_checkpoint
from vishwamai_mp.data.indexed import IndexedWriter, token_dtype
from vishwamai_mp.data.lines import json_records

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 512
_RECIPE = """\
model: {hidden_size: 96, num_layers: 4, num_attention_heads: 4, vocab_size: 512, max_position_embeddings: 64}
precision: fp32
optimizer: {learning_rate: 0.001}
training: {sequence_length: 64, micro_batch_size: 2, global_batch_size: 8}
data: {split: "100,0,0"}
logging: {report_to: [], hardware_peak_tflops: 1}
"""
LAYOUTS = {
    "dp": ["parallel.use_distributed_optimizer=true"],
    "tp": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
}


def write_corpus(prefix: Path, seed: int, documents: int = 2000) -> None:
    """Documents of a chain in which most tokens follow from the one before: something to learn."""
    random = np.random.default_rng(seed)
    successor = random.permutation(VOCAB)
    lengths = random.integers(20, 100, documents)
    tokens = random.integers(0, VOCAB, int(lengths.sum()))
    for i in np.flatnonzero(random.random(len(tokens)) < 0.75)[1:]:
        tokens[i] = successor[tokens[i - 1]]
    dtype = token_dtype(VOCAB)
    with IndexedWriter(prefix, dtype) as writer:
        writer.add(tokens.astype(dtype).tobytes(), lengths)
        writer.publish()


def command(folder: Path, data: Path, settings: list[str], restarts: int = 0) -> list[str]:
    """The launcher with two processes that train into `folder`; it starts them again so many times."""
    recipe = data.parent / "recipe.yaml"
    recipe.write_text(_RECIPE)
    return [
        *(sys.executable, "-m", "vishwamai_mp.launch", "--nproc-per-node", "2", "--max-restarts", str(restarts)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", "killable"),
        *("-m", "vishwamai_mp.pretrain", "--config", str(recipe)),
        *(f"data.train={data}", f"training.output_dir={folder}", *settings),
    ]


@dataclass
class Job:
    """A running job of several processes. What it prints goes to `log`."""

    process: subprocess.Popen
    log: Path
    started: float

    @classmethod
    def start(cls, command: list[str], log: Path) -> "Job":
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with log.open("wb") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        return cls(process, log, time.monotonic())

    def kill(self) -> float:
        """SIGKILL the launcher and all processes below it, and wait until they are gone.

        Returns:
            seconds from the start to the signal.
        """
        everyone = [self.process.pid, *descendants(self.process.pid)] if self.process.poll() is None else []
        seconds = self.seconds()
        for pid in everyone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        while any(is_running(pid) for pid in everyone):
            time.sleep(0.002)
        return seconds

    def wait(self) -> None:
        """Wait for the end; raises where it is a failure."""
        if self.process.wait() != 0:
            raise RuntimeError(f"the job failed:\n{self.text()}")

    def wait_for(self, condition: Callable[[], bool]) -> float:
        """Wait until something is so; returns the seconds since the start. Raises where the job ends before."""
        while not condition():
            if self.process.poll() is not None:
                raise RuntimeError(f"the job ended before its time:\n{self.text()}")
            time.sleep(0.001)
        return self.seconds()

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def resumed_from(self) -> str | None:
        """The checkpoint this job said it continues from."""
        found = re.search(r"resumed from (step_\d+)", self.text())
        return found[1] if found else None

    def steps(self) -> int:
        """Steps that this job has done."""
        return len(re.findall(r"^step \d+/\d+ ", self.text(), re.MULTILINE))


def descendants(pid: int) -> list[int]:
    """Processes below `pid` (Linux): torchrun starts its workers in sessions of their own."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children.setdefault(int(_after_name(path)[1]), []).append(int(path.parent.name))
    found = [pid]
    for parent in found:  # grows while it is walked
        found += children.get(parent, [])
    return found[1:]


def is_running(pid: int) -> bool:
    """Whether a process still executes; one that is dead but not yet collected does not."""
    try:
        return _after_name(Path(f"/proc/{pid}/stat"))[0] not in "ZX"
    except OSError:
        return False


def _after_name(stat: Path) -> list[str]:
    return stat.read_text().rsplit(")", 1)[1].split()


def newest_whole(checkpoints: Path) -> Path | None:
    """The checkpoint a restart ought to continue from: by name, manifest and checksums."""
    return find_checkpoint(checkpoints).path


def digest(checkpoint: Path) -> dict[str, str]:
    """A hash of each tensor of a checkpoint, weights and optimizer state, and of the trainer's state."""
    import torch  # here: the launcher's other work needs none of it
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(checkpoint)
    tensors = {
        name: torch.empty(record.size, dtype=record.properties.dtype)
        for name, record in reader.read_metadata().state_dict_metadata.items()
        if isinstance(record, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is no process group
        load(tensors, storage_reader=reader, no_dist=True)
    hashes = {
        name: hashlib.sha256(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, value in tensors.items()
    }
    trainer = json.loads((checkpoint / "trainer.json").read_text())
    return hashes | {"trainer.json": json.dumps(trainer, sort_keys=True)}


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of each line of a run's metrics."""
    return [(row["step"], row["lm_loss"]) for row in json_records(folder / "metrics.jsonl")]
