"""Writes Hugging Face folders of checkpoints while training goes on (`checkpoint.export_hf_every`)."""

import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from vishwamai_mp.checkpoint.manifest import is_optimizer, read_manifest
from vishwamai_mp.checkpoint.store import name_of, steps_in
from vishwamai_mp.config import ConfigError, PretrainConfig, UserError
from vishwamai_mp.config.files import leftovers
from vishwamai_mp.conversion.export_job import start_export
from vishwamai_mp.conversion.source import check_exportable
from vishwamai_mp.data.corpus_tools import byte_bar
from vishwamai_mp.diagnosis.shared import Phase
from vishwamai_mp.runtime.step_journal import phase
from vishwamai_mp.training.callbacks.base import Callback, Order

if TYPE_CHECKING:
    from vishwamai_mp.training.loop import Trainer

_ENDS_WITHIN = 10  # seconds, once it has been told to
_LOOKS = 0.5  # seconds between looks at a process that is waited for


@dataclass
class _Job:
    """An export that is being written."""

    step: int
    process: "subprocess.Popen[bytes]"
    messages: IO[bytes]


class HuggingFaceExport(Callback):
    """Exports every so many steps, and the last one, each in a process of its own, started by rank 0.

    One export runs at a time; of the checkpoints that are due meanwhile the newest waits and the others are left out.
    A checkpoint that waits or is exported is not deleted. The end of training is the end of the exports: they are
    waited for. Where training only pauses, on a signal or after a set time, they are ended instead, and begun anew when
    it goes on.

    Args:
        config: resolved.

    Raises:
        ConfigError: the model cannot be exported.
    """

    order = Order.REPORT

    def __init__(self, config: PretrainConfig) -> None:
        assert config.checkpoint.export_hf_every is not None
        self._every = config.checkpoint.export_hf_every
        try:
            check_exportable(config)
        except UserError as error:
            raise ConfigError(f"checkpoint.export_hf_every={self._every}: {error}; leave it out") from None
        self._waiting: int | None = None  # the step whose export comes next
        self._job: _Job | None = None
        self._whole = 0  # steps up to this one were saved by earlier attempts of the run

    def on_train_begin(self, trainer: "Trainer") -> None:
        if trainer.runtime.rank:
            return
        self._whole = trainer.state.step
        folder = _folder(trainer)
        if folder.is_dir():
            for path in leftovers(folder):
                shutil.rmtree(path, ignore_errors=True)
        last = trainer.config.training.max_steps
        due = [
            step for step in steps_in(trainer.checkpoints.root) if step and (step % self._every == 0 or step == last)
        ]
        due = [step for step in due if step <= trainer.state.step]
        if due and not (folder / name_of(due[-1])).exists():
            self._await(trainer, due[-1])
            self._advance(trainer)

    def on_step_end(self, trainer: "Trainer", record: dict[str, float]) -> None:
        if trainer.runtime.rank:
            return
        self._advance(trainer)  # what waits goes before what falls due now
        step = trainer.state.step
        ends = step == trainer.config.training.max_steps or trainer.stop_reason is not None
        if step % self._every == 0 or (ends and not trainer.goes_on_later):
            self._await(trainer, step)
        self._advance(trainer)

    def on_train_end(self, trainer: "Trainer") -> None:
        if trainer.runtime.rank:
            return
        try:
            if not trainer.goes_on_later:
                self._finish(trainer)
        finally:
            self._end(trainer)
        if not trainer.goes_on_later:
            trainer.checkpoints.held.clear()
            trainer.checkpoints.delete_old(trainer.state.best_step)

    def _await(self, trainer: "Trainer", step: int) -> None:
        left_out, self._waiting = self._waiting, step
        trainer.checkpoints.held.add(step)
        if left_out is not None:
            trainer.checkpoints.held.discard(left_out)
            trainer.say(
                f"step {left_out} is not exported to a Hugging Face folder: an export takes longer than"
                f" checkpoint.export_hf_every={self._every} steps; raise it"
            )

    def _advance(self, trainer: "Trainer") -> None:
        """Take note of an export that has ended, and start the next one once its checkpoint is whole."""
        if self._job is not None and self._job.process.poll() is not None:
            self._conclude(trainer, self._job)
        step = self._waiting
        if self._job is None and step is not None and step <= max(self._whole, trainer.checkpoints.saved_step or 0):
            self._waiting = None
            self._start(trainer, step)

    def _start(self, trainer: "Trainer", step: int) -> None:
        folder = _folder(trainer)
        try:
            folder.mkdir(exist_ok=True)
            if (folder / name_of(step)).exists():  # of a run that was set back
                shutil.rmtree(folder / name_of(step))
            messages = tempfile.TemporaryFile()  # noqa: SIM115 (read and closed when the process has ended)
            process = start_export(trainer.checkpoints.root / name_of(step), folder / name_of(step), messages)
        except OSError as error:
            trainer.checkpoints.held.discard(step)
            trainer.say(f"step {step} is not exported to {folder}: {error.strerror}; training goes on")
        else:
            self._job = _Job(step, process, messages)

    def _conclude(self, trainer: "Trainer", job: _Job) -> None:
        self._job = None
        trainer.checkpoints.held.discard(job.step)
        status = job.process.wait()
        with job.messages as messages:
            messages.seek(0)
            lines = messages.read().decode(errors="replace").strip().splitlines()
        if status:
            reason = lines[-1].removeprefix("error: ") if lines else f"its process ended with {status}"
            trainer.say(f"step {job.step} is not exported to a Hugging Face folder: {reason}")

    def _finish(self, trainer: "Trainer") -> None:
        """Wait for what is due. The other ranks have nothing left to do, so that none of them waits for this one."""
        self._advance(trainer)
        while self._job is not None:
            step, folder = self._job.step, _folder(trainer)
            total = _weight_bytes(trainer.checkpoints.root / name_of(step))
            with byte_bar(total, f"export of step {step}") as bar:
                while self._job is not None and self._job.process.poll() is None:
                    with phase(Phase.SAVE):  # each look begins it anew: it is no hang, however long it takes
                        time.sleep(_LOOKS)
                    bar.update(min(total, _written(folder)) - bar.n)
            self._advance(trainer)
            if (folder / name_of(step)).is_dir():
                trainer.say(f"Hugging Face folder: {folder / name_of(step)}")

    def _end(self, trainer: "Trainer") -> None:
        """End what still runs or waits, such that nothing of it is left."""
        steps = [self._job.step] if self._job is not None else []
        steps += [self._waiting] if self._waiting is not None else []
        if self._job is not None:
            process = self._job.process
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(_ENDS_WITHIN)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self._job.messages.close()
            for path in leftovers(_folder(trainer)):
                shutil.rmtree(path, ignore_errors=True)
        self._job = self._waiting = None
        missing = [step for step in steps if not (_folder(trainer) / name_of(step)).is_dir()]
        for step in missing:
            trainer.say(f"the export of step {step} to a Hugging Face folder was ended before it was whole")


def _folder(trainer: "Trainer") -> Path:
    return trainer.folder / "hf"


def _weight_bytes(checkpoint: Path) -> int:
    tensors = read_manifest(checkpoint).tensors
    return sum(record.size for name, record in tensors.items() if not is_optimizer(name))


def _written(folder: Path) -> int:
    """Bytes of the unfinished export, as far as they can be told."""
    try:
        return sum(path.stat().st_size for partial in leftovers(folder) for path in partial.iterdir())
    except OSError:  # a file got its name meanwhile
        return 0
