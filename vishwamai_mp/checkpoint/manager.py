"""Saves and loads checkpoints of a running job. Every method is collective: all ranks call it, all return or raise."""

import json
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from vishwamai_mp.config.wording import counted
from vishwamai_mp.runtime import Runtime  # before megatron.core

# isort: split
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from vishwamai_mp.checkpoint import manifest, restricted_reading, sharded, store
from vishwamai_mp.checkpoint.agreement import check_adapters, check_components, check_value_head
from vishwamai_mp.checkpoint.collective import Failure, attempt, on_all_ranks, on_first_rank
from vishwamai_mp.checkpoint.lock import RunLock
from vishwamai_mp.checkpoint.manifest import Manifest
from vishwamai_mp.checkpoint.record import manifest_of
from vishwamai_mp.checkpoint.writer import PlannedWrite, Written, plan_write
from vishwamai_mp.config import PretrainConfig, UserError
from vishwamai_mp.config.extensions import check_extensions, extensions_of
from vishwamai_mp.config.files import write_through

_log = logging.getLogger(__name__)
_TRAINER_FILE = "trainer.json"
_SHAPE_KEYS = (
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
    "attention_bias",
    "qk_norm",
    "norm_position",
)
_BEHAVIOUR_KEYS = (
    *("activation", "rms_norm_eps", "norm_zero_centered", "rope_theta", "rope_scaling", "rotary_fraction"),
    *("window_rope_theta", "rotary_pattern"),
    *("sliding_window", "layer_pattern", "embedding_multiplier", "attention_multiplier"),
    *("residual_multiplier", "logit_multiplier", "attention_softcap", "logit_softcap"),
)


@dataclass(frozen=True)
class _Pending:
    """A save between planning and publishing."""

    step: int
    partial: Path
    planned: PlannedWrite
    trainer: dict[str, Any]
    best: int | None


class CheckpointManager:
    """The checkpoints of a run.

    Of an asynchronous save, rank 0 completes and publishes the folder in a thread, while training goes on everywhere.
    Old checkpoints are always deleted there, after the new one is published.

    Args:
        root: the `checkpoints/` folder, on storage that all ranks see. Made at the first save.
        config: resolved; `checkpoint.{async_save,keep_last,keep_every}`, and the model and layout for the manifest.
        runtime: process groups.
        lock: of the run folder; each save makes sure on rank 0 that this job still has it. None: nobody else saves.
    """

    def __init__(self, root: Path, config: PretrainConfig, runtime: Runtime, lock: RunLock | None = None) -> None:
        self.root, self.config, self.runtime = Path(root), config, runtime
        self._lock = lock
        self._queue = AsyncCallsQueue()
        self._pending: _Pending | None = None
        self._publishing: tuple[_Pending, Future | None] | None = None  # on rank 0 with what does it
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._deleting: Future | None = None
        self.saved_step: int | None = None  # published last
        self.held: set[int] = set()  # steps, on rank 0, that somebody reads: not deleted for their age
        self._verified: set[Path] = set()  # by `latest`

    def save(
        self,
        step: int,
        model_chunks: Sequence[nn.Module],
        optimizer: MegatronOptimizer | None,
        trainer_state: dict[str, Any],
        *,
        final: bool = False,
        best: int | None = None,
    ) -> None:
        """Save a checkpoint, first finishing one that is still being written.

        With `checkpoint.async_save`, returns when the tensors are safe from further training; `poll` publishes it.

        Args:
            step: optimizer steps done; names the checkpoint.
            model_chunks: this rank's chunks, wrapped or not.
            optimizer: None: only weights.
            trainer_state: JSON-able; rank 0's is kept.
            final: the run's last: written before returning, and not again if this step was saved just before.
            best: step whose checkpoint is kept whatever its age.

        Raises:
            UserError: the disk is full or fails. Nothing of the checkpoint is left, earlier ones are untouched.
        """
        self.wait()
        if final and self.saved_step == step:
            return
        partial_folder = on_first_rank(lambda: self._begin(step))
        if isinstance(partial_folder, Failure):
            partial_folder.throw(f"checkpoint of step {step} not saved to {self.root}")
        scalars = sharded.optimizer_scalars(optimizer) if optimizer else []
        trainer = {"extensions": extensions_of(self.config), "optimizer": scalars, "trainer": trainer_state}
        planned = self._plan(partial_folder, model_chunks, optimizer)
        self._pending = _Pending(step, partial_folder, planned, trainer, best)
        if self.config.checkpoint.async_save and not final:
            request = planned.request
            request.add_finalize_fn(self._start_publishing)
            self._queue.schedule_async_request(request)
        else:
            planned.run()
            pending, outcomes = self._collect()
            self._conclude(pending, on_first_rank(lambda: self._commit(pending, outcomes)))
        if final:
            self.wait()

    def poll(self) -> None:
        """Have an asynchronous save published once all ranks have written their part. Cheap; call it every step.

        Raises:
            UserError: as for `save`.
        """
        if self._pending:
            self._queue.maybe_finalize_async_calls()
        elif self._publishing:
            self._look(blocking=False)

    def wait(self) -> None:
        """Finish an asynchronous save, and the deletion of old checkpoints. Raises as `poll` does."""
        if self._pending:
            self._queue.maybe_finalize_async_calls(blocking=True)
        if self._publishing:
            self._look(blocking=True)
        if self._deleting:
            self._deleting.result()

    def delete_old(self, best: int | None = None) -> None:
        """On rank 0: delete what the last save would have, had nobody held it.

        Args:
            best: as for `save`.
        """
        if self.saved_step is not None:
            self._delete_old(best if self.config.checkpoint.load_best else None)

    def latest(self) -> store.Found:
        """The newest whole checkpoint, its checksums verified by all ranks together, and why newer ones are not."""
        skipped: list[str] = []
        folders = on_first_rank(lambda: [path for path, _ in store.candidates(self.root)])
        if isinstance(folders, Failure):
            folders.throw(f"{self.root} cannot be searched for checkpoints")
        for path in folders:
            problems = self._check(path)
            if not problems:
                self._verified.add(path)
                return store.Found(path, store.step_of(path), skipped)
            skipped.append(store.reason(path, problems))
        return store.Found(None, 0, skipped)

    def load(
        self,
        path: Path,
        model_chunks: Sequence[nn.Module],
        optimizer: MegatronOptimizer | None = None,
        *,
        weights_only: bool = False,
    ) -> dict[str, Any]:
        """Load a checkpoint, saved in whatever layout, into this one.

        Its checksums are verified first, unless `latest` has done so.

        Args:
            path: the checkpoint's folder.
            model_chunks: this rank's chunks, wrapped or not.
            optimizer: None: only weights.
            weights_only: the optimizer starts afresh from the loaded weights; so do adapters and value head if these
                have none.

        Returns:
            the trainer state that was saved.

        Raises:
            UserError: no whole checkpoint, of another model, unsafe to read, or without the optimizer's state.
        """
        path, with_optimizer = Path(path), optimizer is not None and not weights_only
        problems = [] if path in self._verified else self._check(path)
        if problems:
            raise UserError(f"checkpoint not loaded: {path}: {'; '.join(problems)}")
        starts = optimizer is not None and weights_only
        opened = on_first_rank(lambda: self._open(path, with_optimizer, starts))
        if isinstance(opened, Failure):
            opened.throw("checkpoint not loaded")
        found, trainer = opened
        state = sharded.model_state(model_chunks, self.runtime)
        if with_optimizer:
            state |= sharded.optimizer_state(optimizer, state, self.runtime, is_loading=True)
        loaded = self._read(path, found, state)
        sharded.load_model(model_chunks, loaded)
        if with_optimizer:
            sharded.load_optimizer(optimizer, loaded, trainer["optimizer"])
        elif optimizer is not None:
            sharded.restart_optimizer(optimizer, model_chunks, loaded)
        return trainer["trainer"]

    def _plan(self, folder: Path, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | None) -> PlannedWrite:
        sharded.gather_parameters(chunks)
        state = sharded.model_state(chunks, self.runtime)
        if optimizer:
            of_optimizer = sharded.optimizer_state(optimizer, state, self.runtime, is_loading=False)
            state |= sharded.without_redundant(of_optimizer, state)
        # That every shard is written exactly once depends on the layout alone: checked at the first save.
        tensors, _ = save_preprocess(state, validate_access_integrity=self.saved_step is None)
        return plan_write(tensors, folder, self.runtime.groups.dp_cp)

    def _collect(self) -> tuple[_Pending, list[Any]]:
        """The save that all ranks have written, and on rank 0 what came of it on each."""
        pending, self._pending = self._pending, None
        assert pending is not None
        outcomes: list[Any] = [None] * self.runtime.world_size
        dist.gather_object(pending.planned.outcome(), outcomes if self.runtime.rank == 0 else None, dst=0)
        return pending, outcomes

    def _start_publishing(self) -> None:
        pending, outcomes = self._collect()
        commit = partial(attempt, partial(self._commit, pending, outcomes))
        self._publishing = pending, self._thread.submit(commit) if self.runtime.rank == 0 else None

    def _look(self, blocking: bool) -> None:
        """Whether rank 0 has published, or failed to."""
        assert self._publishing is not None
        pending, job = self._publishing
        look = on_first_rank(lambda: (job.result(),) if job and (blocking or job.done()) else ())
        if look:
            self._publishing = None
            self._conclude(pending, look if isinstance(look, Failure) else look[0])

    def _conclude(self, pending: _Pending, result: Failure | None) -> None:
        """Note that a save is published, or take it back on all ranks."""
        if isinstance(result, Failure):
            if self.runtime.rank == 0:
                store.discard(pending.partial)
            result.throw(
                f"checkpoint of step {pending.step} not saved to {self.root}",
                "; earlier checkpoints are untouched. Free space there, or keep fewer (checkpoint.keep_last)"
                if result.mendable
                else "",
            )
        self.saved_step = pending.step

    def _begin(self, step: int) -> Path:
        """On rank 0: the folder to write into."""
        if self._lock is not None:
            self._lock.check()
        return store.begin(self.root, step)

    def _commit(self, pending: _Pending, outcomes: Sequence[Written | Failure]) -> Failure | None:
        """On rank 0: complete the folder, publish it, have old ones deleted; or say which rank failed."""
        for outcome in outcomes:
            if isinstance(outcome, Failure):
                return outcome
        if self._lock is not None:
            self._lock.check()
        written = cast(Sequence[Written], outcomes)
        metadata = pending.planned.write_metadata([part.results for part in written])
        folder = pending.partial
        torch.save({}, folder / "common.pt")  # megatron-core wants one; what it would hold is in trainer.json
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        write_through(folder / _TRAINER_FILE, json.dumps(pending.trainer, indent=1).encode())
        files = {name: record for part in written for name, record in part.files.items()}
        for path in folder.iterdir():
            if path.name not in files:
                files[path.name] = manifest.record_of(path)
        described = manifest_of(self.config, self.runtime, pending.step, metadata, files)
        write_through(folder / manifest.NAME, described.to_json().encode())
        store.publish(folder, pending.step)
        self._deleting = self._thread.submit(self._delete_old, pending.best)
        return None

    def _delete_old(self, best: int | None) -> None:
        try:
            options = self.config.checkpoint
            store.retain(self.root, options.keep_last, options.keep_every, best, frozenset(self.held))
        except OSError as error:
            _log.warning("old checkpoints could not be deleted: %s", error)

    def _check(self, path: Path) -> list[str]:
        """What is wrong with a checkpoint; each rank reads a share of its files."""
        rank, world = self.runtime.rank, self.runtime.world_size
        found = on_first_rank(lambda: manifest.read_manifest(path))
        if isinstance(found, Failure):
            return [found.message]
        problems = manifest.check_files(path, found.files, checksums=False) if rank == 0 else []
        results = on_all_ranks(lambda: problems)
        if not isinstance(results, Failure) and not any(results):
            share = manifest.share_of(found.files, rank, world)
            results = on_all_ranks(lambda: manifest.check_files(path, share, checksums=True))
        if isinstance(results, Failure):
            return [results.message]
        return [problem for result in results for problem in result]

    def _open(self, path: Path, with_optimizer: bool, starts: bool) -> tuple[Manifest, dict[str, Any]]:
        """On rank 0: what the checkpoint holds, after all checks that need no other rank.

        Args:
            starts: training starts from its weights, maybe with adapters and a value head that it lacks.
        """
        found = manifest.read_manifest(path)
        model = asdict(self.config.model)
        different = manifest.differences(found.model, model, _SHAPE_KEYS)
        if different:
            raise UserError(f"{path} is a checkpoint of another model: {'; '.join(different)}")
        trainer = json.loads((path / _TRAINER_FILE).read_bytes())
        check_extensions(path, trainer.get("extensions", []), self.config, weights_only=not with_optimizer)
        check_components(path, found.tensors, self.config)
        check_adapters(path, found.tensors, self.config, fresh=starts)
        check_value_head(path, found.tensors, self.config, fresh=starts)
        for difference in manifest.differences(found.model, model, _BEHAVIOUR_KEYS):
            _log.warning("%s: %s; the former is used", path, difference)
        if with_optimizer and not (found.has_optimizer or trainer["optimizer"]):  # one without moments has no tensors
            raise UserError(
                f"{path} has no optimizer state; set checkpoint.load_optimizer=false to start from its weights"
            )
        restricted_reading.check(path, found)
        return found, trainer

    def _read(self, path: Path, found: Manifest, state: dict[str, Any]) -> dict[str, Any]:
        shapes = {name: tuple(record.shape) for name, record in found.tensors.items()}
        request = sharded.split_request(state, shapes, set(found.objects))
        missing = [name for names in _all(on_all_ranks(lambda: request.missing)) for name in names]
        if missing:
            raise UserError(
                f"{path} lacks {counted(len(set(missing)), 'tensor')} that this model has, {missing[0]} for one"
            )
        places = {name for names in _all(on_all_ranks(lambda: sharded.names_of(state))) for name in names}
        if unknown := sorted(name for name in found.tensors if name not in places and not sharded.may_be_left(name)):
            raise UserError(
                f"{path} has {counted(len(unknown), 'tensor')} that this model has no place for, {unknown[0]} for one;"
                " load it with the settings of its run, in a version of this program that knows them"
            )
        loaded = dist_checkpointing.load(request.wanted, str(path), self._load_strategy())
        borrows = any(_all(on_all_ranks(lambda: bool(request.borrowed))))
        borrowed = dist_checkpointing.load(request.borrowed, str(path), self._load_strategy()) if borrows else {}
        return request.join(loaded, borrowed)

    def _load_strategy(self) -> Any:
        """Replicas read a share each and exchange them."""
        strategy, replicas = TorchDistLoadShardedStrategy(), self.runtime.groups.dp_cp
        return FullyParallelLoadStrategyWrapper(strategy, replicas) if replicas.size() > 1 else strategy


def _all(results: Any) -> list[Any]:
    if isinstance(results, Failure):
        results.throw("checkpoint not loaded")
    return results
