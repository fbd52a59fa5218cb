"""Whole runs of a `Trainer` in the workers, and what came of them: the subject of the tests of this folder."""

import contextlib
import hashlib
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.training.layouts import SMALL
from vishwamai_mp.config import PretrainConfig, load_config, resolve
from vishwamai_mp.data.batches import Samples
from vishwamai_mp.data.given import run_datasets
from vishwamai_mp.runtime import initialize, shutdown
from vishwamai_mp.training.callbacks import Callback, usual_callbacks
from vishwamai_mp.training.callbacks.base import Order
from vishwamai_mp.training.loop import Trainer

VOCAB = SMALL["model"]["vocab_size"]
_SETTINGS = [
    "model.num_layers=2",
    "logging.report_to=[]",
    "logging.hardware_peak_tflops=1",  # otherwise measured, at each start
    "data.split=80,20,0",
]


@dataclass
class Outcome:
    """What one rank saw.

    Attributes:
        records: of each step, as the last callback left them.
        state: the trainer's, at the end.
        tensors: a hash of each of this rank's parameters and of its optimizer's state.
        samples: numbers of the training samples this rank read, in order.
        said: what went to standard error.
        notes: what a `prepare` function wrote down.
    """

    records: list[dict[str, float]]
    state: dict[str, Any]
    tensors: dict[str, str]
    samples: list[int]
    said: str
    notes: list[Any] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        return [record["lm_loss"] for record in self.records]


class Interruption(Exception):  # noqa: N818 (no error: the test's wish)
    """The end of a run that had no time to save."""


class Counter(Callback):
    """Counts steps, over resumed runs too."""

    def __init__(self) -> None:
        self.count = 0

    def on_step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        self.count += 1
        record["counted"] = self.count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state.get("count", 0)


class _Watch(Callback):
    order = Order.WATCH

    def __init__(self, stop_after: int | None, crash_after: int | None) -> None:
        self.stop_after, self.crash_after = stop_after, crash_after
        self.records: list[dict[str, float]] = []

    def on_step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        self.records.append(record)
        if trainer.state.step == self.stop_after:
            trainer.stop_reason = "the test wants it"
        if trainer.state.step == self.crash_after:
            trainer.checkpoints.wait()
            raise Interruption


class _Recorded:
    """Training samples that note which of them were read."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.read: list[int] = []

    def __getitem__(self, index: int) -> torch.Tensor:
        self.read.append(index)
        return self.samples[index]


def configure(folder: Path, data: str, overrides: list[str], world_size: int | None = None) -> PretrainConfig:
    """A small run in `folder` on `data`, a prefix or a blend as the command line has it."""
    places = [f"training.output_dir={folder}", f"data.train={data}"]
    return resolve(load_config(SMALL, [*_SETTINGS, *places, *overrides]), world_size)


def train(
    folder: Path,
    data: str,
    overrides: list[str],
    stop_after: int | None = None,
    crash_after: int | None = None,
    prepare: Callable[[Trainer, list[Any]], None] | None = None,
) -> Outcome:
    """Train on this rank until the end, or until told.

    Args:
        folder: of the run; continues what is there.
        stop_after: stop in order after this step, as on a signal.
        crash_after: end after this step without saving, once what was being saved is.
        prepare: called before training with the trainer and a list for notes.
    """
    config = configure(folder, data, overrides, dist.get_world_size())
    runtime = initialize(config)
    datasets = run_datasets(config, None, runtime)
    is_files = config.data.source == "indexed"  # batches of other samples are made by what class they are of
    recorded = _Recorded(datasets.train)
    watch = _Watch(stop_after, crash_after)
    notes: list[Any] = []
    with contextlib.redirect_stderr(io.StringIO()) as said:
        trainer = Trainer(
            config,
            runtime,
            replace(datasets, train=recorded) if is_files else datasets,
            # Handed over from the last to the first: the trainer puts them in order.
            sorted([watch, *usual_callbacks(config)], key=lambda callback: -callback.order),
        )
        if prepare:
            prepare(trainer, notes)
        with contextlib.suppress(Interruption):
            trainer.train()
    outcome = Outcome(watch.records, asdict(trainer.state), hashes(trainer), recorded.read, said.getvalue(), notes)
    shutdown(keep_world=True)
    return outcome


def hashes(trainer: Trainer) -> dict[str, str]:
    """A hash of each parameter and each tensor of the optimizer's state on this rank."""
    tensors = {
        f"chunk {i}: {name}": value
        for i, chunk in enumerate(trainer.chunks)
        for name, value in chunk.named_parameters()
    }
    for i, part in enumerate(trainer.optimizer.chained_optimizers):
        if getattr(part, "is_stub_optimizer", False):
            continue
        for j, group in enumerate(part.optimizer.param_groups):
            for k, main in enumerate(group["params"]):
                tensors[f"optimizer {i}.{j}.{k}"] = main
                for key, value in part.optimizer.state[main].items():
                    tensors[f"optimizer {i}.{j}.{k} {key}"] = value
    return {name: _hash(value) for name, value in tensors.items()}


def _hash(tensor: torch.Tensor) -> str:
    local = getattr(tensor, "to_local", lambda: tensor)()  # of a fully sharded parameter
    data = local.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()
