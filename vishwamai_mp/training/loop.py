"""The training loop: short, because everything beside the step is a callback."""

import errno
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vishwamai_mp.checkpoint import CheckpointManager, locate
from vishwamai_mp.checkpoint.collective import Failure, on_first_rank
from vishwamai_mp.checkpoint.lock import RunLock
from vishwamai_mp.config import PretrainConfig, UserError
from vishwamai_mp.config.wording import counted
from vishwamai_mp.data.batches import BatchStream, evaluation_stream, train_stream
from vishwamai_mp.data.datasets import Datasets
from vishwamai_mp.data.position import DataPosition
from vishwamai_mp.data.tokenizer import token_difference
from vishwamai_mp.diagnosis.shared import Phase
from vishwamai_mp.model import build_model
from vishwamai_mp.planning import training_flops_per_token
from vishwamai_mp.precision import PrecisionPolicy
from vishwamai_mp.runtime import Runtime, is_accelerator
from vishwamai_mp.runtime.choices import table_of_run
from vishwamai_mp.runtime.choices import use as use_ways
from vishwamai_mp.runtime.device import peak_flops
from vishwamai_mp.runtime.distributed import collectives_within
from vishwamai_mp.runtime.out_of_memory import advice_when_out_of_memory, check_memory
from vishwamai_mp.runtime.step_journal import phase, step
from vishwamai_mp.training.callbacks.base import Callback
from vishwamai_mp.training.garbage import garbage_collected_every
from vishwamai_mp.training.graphed_layers import note_on_graphs
from vishwamai_mp.training.loss_guard import LossGuard, explain
from vishwamai_mp.training.optimizer import build_optimizer, wrap_data_parallel
from vishwamai_mp.training.schedule import learning_rate
from vishwamai_mp.training.step import StepResult, TrainStep
from vishwamai_mp.training.summary import building_line
from vishwamai_mp.training.watching import watched

# Errors of files that stay until somebody mends them: another user's, read-only, a folder where a file should be.
_IN_THE_WAY = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ELOOP,
}


@dataclass
class TrainerState:
    """How far a run is and how good it was. `step` counts finished steps, skipped ones included."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0
    best_loss: float | None = None  # lowest validation loss so far
    best_step: int | None = None
    evaluations_since_best: int = 0


class Trainer:
    """Trains one model on this rank of the job.

    Args:
        config: resolved for this world size.
        runtime: process groups and device.
        datasets: where batches come from.
        callbacks: what happens beside the steps (`callbacks.usual_callbacks`); run in the order that they declare.
    """

    def __init__(
        self,
        config: PretrainConfig,
        runtime: Runtime,
        datasets: Datasets,
        callbacks: Sequence[Callback],
    ) -> None:
        self.config, self.runtime, self.datasets = config, runtime, datasets
        self.folder = Path(config.training.output_dir)
        _make_folder(self.folder)
        self.lock = RunLock(self.folder, self.say)
        if too_much := check_memory(config, runtime.world_size):
            self.say(too_much)
        if building := building_line(config, runtime):
            self.say(building)
        if outside := note_on_graphs(config):
            self.say(outside)
        self.chunks = wrap_data_parallel(config, runtime, build_model(config, runtime))
        self.optimizer = build_optimizer(config, runtime, self.chunks)
        self.steps = TrainStep(config, runtime, self.chunks, self.optimizer)
        self.checkpoints = CheckpointManager(self.folder / "checkpoints", config, runtime, self.lock)
        self.guard = LossGuard(config.training)
        self.state = TrainerState()
        self._began_elsewhere = False  # from a step of another run's
        self.stop_reason: str | None = None
        self.goes_on_later = False  # whether it stops for a while only: on a signal, or when its time is up
        self.callbacks = sorted(callbacks, key=lambda callback: callback.order)
        self._flops_per_token = training_flops_per_token(config)
        peak = peak_flops(PrecisionPolicy.of_run(config).compute, config.logging.hardware_peak_tflops)
        self._peak_flops = peak * runtime.world_size

    def train(self) -> TrainerState:
        """Train from the newest checkpoint, or from the start, until `training.max_steps` or until asked to stop."""
        locked = on_first_rank(self.lock.acquire)
        if isinstance(locked, Failure):
            locked.throw("training not started")
        try:
            with (
                advice_when_out_of_memory(self.config),
                watched(self.config, self.runtime, self.folder),
                _named_files(self.folder),
                garbage_collected_every(self.config.training.collect_garbage_every) as collect,
            ):
                return self._train(collect)
        finally:
            self.lock.release()

    def _train(self, collect_garbage: Callable[[int], None]) -> TrainerState:
        self.resume()
        self._check_there_are_steps()
        self._settle_ways()
        parallel, first = self.config.parallel, self.state.step
        batches = train_stream(self.config, self.datasets, self.runtime, self.state.consumed_samples)
        for callback in self.callbacks:
            callback.on_train_begin(self)
        while self.state.step < self.config.training.max_steps and self.stop_reason is None:
            for callback in self.callbacks:
                callback.on_step_begin(self)
            limit = parallel.step_timeout_minutes if self.state.step > first else None
            with step(self.state.step + 1), collectives_within(limit, parallel):
                record = self._step(batches)
            for callback in self.callbacks:
                callback.on_step_end(self, record)
            collect_garbage(self.state.step)
        for callback in self.callbacks:
            callback.on_train_end(self)
        if self.stop_reason:
            self.say(f"stopped after step {self.state.step}: {self.stop_reason}")
        return self.state

    def _check_there_are_steps(self) -> None:
        """Refuse to go on from another run's checkpoint that is beyond the last step. This run's own is finished."""
        step, training, load = self.state.step, self.config.training, self.config.checkpoint.load
        if self._began_elsewhere and step >= training.max_steps:
            raise UserError(
                f"training.max_steps={training.max_steps} counts from the beginning and checkpoint.load={load} is at"
                f" step {step}: raise the former above that, or begin at step 0 from these weights with"
                " checkpoint.load_optimizer=false"
            )

    def _settle_ways(self) -> None:
        """On CPUs, compute on every rank and after every restart by the ways that the run began with."""
        if is_accelerator(self.runtime.device):
            return
        table = on_first_rank(lambda: table_of_run(self.folder / "ways.json"))
        if isinstance(table, Failure):
            table.throw("training not started")
        use_ways(table)

    def _step(self, batches: BatchStream) -> dict[str, float]:
        start = time.perf_counter()
        rate = learning_rate(self.config, self.state.step)
        with phase(Phase.BATCH):
            micro_batches = list(itertools.islice(batches, batches.micro_batches_per_step))
        result = self.steps.train(micro_batches, self.state.step, rate, self.guard.limit)
        if not result.updated:
            why = explain(result, self.guard.limit, self.steps, micro_batches, self.state.step)
            self.say(f"step {self.state.step + 1} skipped: {why}")
        self._account(result)
        seconds = time.perf_counter() - start
        tokens = self.config.training.global_batch_size * self.config.training.sequence_length
        return {
            "consumed_tokens": self.state.consumed_tokens,
            "lm_loss": result.lm_loss,
            "loss": result.lm_loss + sum(value for name, value in result.measures.items() if name.endswith("_loss")),
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "tokens_per_second": tokens / seconds,
            "mfu": tokens / seconds * self._flops_per_token / self._peak_flops,
            "skipped_steps": self.state.skipped_steps,
            **result.measures,
        }

    def _account(self, result: StepResult) -> None:
        training, state = self.config.training, self.state
        state.step += 1
        state.consumed_samples += training.global_batch_size
        state.consumed_tokens += training.global_batch_size * training.sequence_length
        if not result.updated:
            state.skipped_steps += 1
        self.guard.observe(result)

    def evaluate(self) -> float:
        """Mean validation loss in nats per token, over the same samples at every call and layout."""
        stream = evaluation_stream(self.config, self.datasets, self.runtime)
        total, count = 0.0, 0
        with phase(Phase.EVALUATION):
            while batches := list(itertools.islice(stream, stream.micro_batches_per_step)):
                loss, tokens = self.steps.evaluate(batches)
                total, count = total + loss * tokens, count + tokens
        return total / count

    def save(self, *, final: bool = False) -> None:
        """Save a checkpoint of the current step; in the background with `checkpoint.async_save`, unless `final`."""
        best = self.state.best_step if self.config.checkpoint.load_best else None
        self.checkpoints.save(self.state.step, self.chunks, self.optimizer, self._state_dict(), final=final, best=best)

    def resume(self) -> None:
        """Continue from the newest whole checkpoint of the run folder, else from `checkpoint.load`, else do nothing."""
        found = self.checkpoints.latest()
        for reason in found.skipped:
            self.say(reason)
        if found.path is not None:
            self._refuse_other_tokenizer()
            self._load_state_dict(self.checkpoints.load(found.path, self.chunks, self.optimizer))
            self.say(f"resumed from {found.path.name}, {counted(self.state.consumed_samples, 'sample', ',')} in")
            for section in (self.config.memory, self.config.cache):
                if section.enabled and section.carry_state:
                    self.say("carry_state: what rows remember is not in a checkpoint; they start empty")
                    break
        elif self.config.checkpoint.load:
            self._start_from(Path(self.config.checkpoint.load))

    def _refuse_other_tokenizer(self) -> None:
        """A run's tokenizer takes the place of the one in its folder, and its weights know the latter's ids alone."""
        other = on_first_rank(lambda: token_difference(self.folder, self.config.data.tokenizer))
        if isinstance(other, Failure):
            other.throw("training not started")
        if other:
            raise UserError(
                f"data.tokenizer={self.config.data.tokenizer} is not the one that this run began with: {other}; name"
                " that one, or begin a new training.output_dir from these weights with checkpoint.load"
            )

    def _start_from(self, load: Path) -> None:
        found = on_first_rank(lambda: locate(load))
        if isinstance(found, Failure):
            found.throw("checkpoint.load")
        for reason in found.skipped:
            self.say(reason)
        path = found.path
        assert path is not None
        weights_only = not self.config.checkpoint.load_optimizer
        state = self.checkpoints.load(path, self.chunks, self.optimizer, weights_only=weights_only)
        if not weights_only:
            self._load_state_dict(state)
            self._began_elsewhere = True
        other = on_first_rank(lambda: token_difference(path.absolute().parent.parent, self.config.data.tokenizer))
        if isinstance(other, Failure):
            self.say(f"data.tokenizer cannot be compared with the one that {path} was trained with: {other.message}")
        elif other:
            self.say(f"data.tokenizer is not the one that {path} was trained with: {other}")
        self.say(f"starts from {'the weights of ' if weights_only else ''}{path}, at step {self.state.step}")

    def _state_dict(self) -> dict[str, Any]:
        position = DataPosition(self.state.consumed_samples, self.datasets.fingerprint)
        return {
            "trainer": asdict(self.state),
            "guard": self.guard.state_dict(),
            "data": position.to_dict(),
            "callbacks": {type(c).__name__: state for c in self.callbacks if (state := c.state_dict())},
        }

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = TrainerState(**state["trainer"])
        self.guard.load_state_dict(state["guard"])
        kept = state.get("callbacks", {})
        for callback in self.callbacks:
            callback.load_state_dict(kept.get(type(callback).__name__, {}))
        for change in DataPosition.from_dict(state["data"]).changes(self.datasets.fingerprint):
            self.say(change)

    def say(self, text: str) -> None:
        """A line for the person who watches, from rank 0."""
        if self.runtime.reports:
            print(text, file=sys.stderr, flush=True)


@contextmanager
def _named_files(folder: Path) -> Iterator[None]:
    """A file of the run folder that cannot be read or written, because it is another user's or a folder, is a line.

    What may pass by itself, such as a failing network disk, stays an error after which the launcher tries again.
    """
    try:
        yield
    except OSError as error:
        file = error.filename2 or error.filename
        if error.errno not in _IN_THE_WAY or not isinstance(file, str) or not Path(file).is_relative_to(folder):
            raise
        raise UserError(
            f"training.output_dir={folder}: {file} cannot be used ({error.strerror}); take it away or mend its"
            " permissions"
        ) from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"training.output_dir={folder}: cannot be made ({error.strerror}); name another") from None
