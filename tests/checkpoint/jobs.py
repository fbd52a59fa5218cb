"""Small training jobs whose checkpoints the tests look at; they run in the workers.

Gradients are a function of the parameters (`sin`), not of data: equal in every layout, so a resumed job can be
compared with an uninterrupted one bit by bit, whatever the layouts.
"""

import errno
import math
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from vishwamai_mp.checkpoint import CheckpointManager, Found, manager, manifest, restricted_reading, store, writer
from vishwamai_mp.config import (
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PretrainConfig,
    TrainingConfig,
    UserError,
    resolve,
)
from vishwamai_mp.model import build_model
from vishwamai_mp.runtime import initialize
from vishwamai_mp.runtime.simulated import Recorder
from vishwamai_mp.training import optimizer as training_optimizer
from vishwamai_mp.training.optimizer import build_optimizer, wrap_data_parallel

MODEL = ModelConfig(
    hidden_size=24, num_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40, vocab_size=301
)


def config(precision: str = "fp32", model: ModelConfig = MODEL, checkpoint: CheckpointConfig | None = None, **parallel):
    """A resolved configuration of the small model in the given layout."""
    return resolve(
        PretrainConfig(
            model=model,
            precision=precision,  # type: ignore[arg-type]
            parallel=ParallelConfig(**parallel),
            optimizer=OptimizerConfig(learning_rate=1e-2, clip_grad_norm=0.0),
            training=TrainingConfig(sequence_length=32, threads=1),
            checkpoint=checkpoint or CheckpointConfig(),
        )
    )


class TinyJob:
    """A model, its optimizer and its checkpoints on this rank."""

    def __init__(self, settings: PretrainConfig, root: Path) -> None:
        self.runtime = initialize(settings)
        models = build_model(settings, self.runtime)
        self.chunks = wrap_data_parallel(settings, self.runtime, models)
        self.optimizer = build_optimizer(settings, self.runtime, self.chunks)
        self.manager = CheckpointManager(root, settings, self.runtime)
        self.step = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            for chunk in self.chunks:
                for param in chunk.parameters():
                    gradient = torch.sin(50 * param.detach().float())
                    if hasattr(param, "main_grad"):
                        param.main_grad.copy_(gradient)
                    else:
                        param.grad = gradient  # fully sharded, as the parameter is
            self.optimizer.step()
            self.step += 1

    def save(self, **options: Any) -> None:
        self.manager.save(self.step, self.chunks, self.optimizer, {"step": self.step, "pi": math.pi}, **options)

    def load(self, path: Path, **options: Any) -> dict[str, Any]:
        state = self.manager.load(path, self.chunks, self.optimizer, **options)
        self.step = state["step"]
        return state


def train_and_save(root: Path, settings: PretrainConfig, before: int, after: int = 0) -> None:
    """Train, save, train on, save again."""
    job = TinyJob(settings, root)
    job.train(before)
    job.save()
    if after:
        job.train(after)
        job.save()
    job.manager.wait()


def resume_and_save(path: Path, root: Path, settings: PretrainConfig, after: int) -> dict[str, Any]:
    """Load, train on, save."""
    job = TinyJob(settings, root)
    state = job.load(path)
    job.train(after)
    job.save()
    job.manager.wait()
    return state


def train_and_save_in_buckets(root: Path, settings: PretrainConfig, steps: int, bucket_size: int) -> int:
    """Train with gradient buckets of about `bucket_size` elements, and save; returns the number of buckets."""
    with mock.patch.object(
        training_optimizer,
        "DistributedDataParallelConfig",
        partial(training_optimizer.DistributedDataParallelConfig, bucket_size=bucket_size),
    ):
        job = TinyJob(settings, root)
    job.train(steps)
    job.save()
    return len(job.chunks[0].buffers[0].buckets)


def save_and_load_recorded(root: Path, settings: PretrainConfig) -> dict[str, Any]:
    """What saving and loading add to the memory of this process, what they exchange, and what the optimizer keeps of
    the model; in bytes."""
    job = TinyJob(settings, root)
    job.train(1)
    found: dict[str, Any] = {"state": 12 * sum(p.numel() for chunk in job.chunks for p in chunk.parameters())}
    for name, act in (("save", job.save), ("load", lambda: job.load(root / "step_00000001"))):
        recorder = Recorder(torch.device("cpu"), simulates=False)
        with recorder, recorder.memory.watching():
            act()
        found[name] = recorder.memory.peak, sum(c.bytes for c in recorder.communications)
    return found


def load_weights_and_save(path: Path, root: Path, settings: PretrainConfig) -> None:
    job = TinyJob(settings, root)
    job.load(path, weights_only=True)
    job.save()


def save_weights(root: Path, settings: PretrainConfig) -> None:
    job = TinyJob(settings, root)
    job.manager.save(0, job.chunks, None, {})


def save_every_step(root: Path, settings: PretrainConfig, steps: int) -> None:
    job = TinyJob(settings, root)
    for _ in range(steps):
        job.train(1)
        job.save()
    job.manager.wait()


def save_while_the_first_rank_is_slow(root: Path, settings: PretrainConfig) -> list[list[str]]:
    """Checkpoints there are while rank 0 completes one, while it deletes the one before, and then."""
    job, go, found = TinyJob(settings, root), threading.Event(), []
    slowly, there = partial(_when, go), partial(_published, root)

    def train_until(condition: Callable[[], object]) -> None:
        box = [False]
        while not box[0]:  # the same number of steps on all ranks
            job.train(1)
            job.manager.poll()
            box = [bool(condition())]
            dist.broadcast_object_list(box)

    job.train(1)
    job.save()
    job.manager.wait()
    with mock.patch.object(manager, "save_config", slowly(manager.save_config)):
        job.train(1)
        job.save()
        train_until(lambda: [*root.glob("*.partial/common.pt")])
        found.append(there())
        go.set()
        job.manager.wait()
    go.clear()
    with mock.patch.object(store, "retain", slowly(store.retain)):
        last = job.step
        job.save()
        train_until(lambda: f"step_{last:08d}" in there())
        found.append(there())
        go.set()
        job.manager.wait()
    return [*found, there()]


def save_while_deleting_is_slow(root: Path, settings: PretrainConfig) -> list[list[str]]:
    """Checkpoints there are when a second save returns, while rank 0 is held up at deleting the first, and then."""
    job, go, found = TinyJob(settings, root), threading.Event(), []
    with mock.patch.object(store, "retain", _when(go, store.retain)):
        for _ in range(2):
            job.train(1)
            job.save()
            found = [_published(root)]
            go.set()
            job.manager.wait()
            go.clear()
    return [*found, _published(root)]


def _when(event: threading.Event, function: Callable[..., Any]) -> Callable[..., Any]:
    def wait_and_do(*arguments: Any) -> Any:
        assert event.wait(60)
        return function(*arguments)

    return wait_and_do


def _published(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("step_*") if path.suffix != ".partial")


def save_twice_with_final(root: Path, settings: PretrainConfig) -> tuple[bool, bool]:
    """Is a final save there when `save` returns, and did saving the same step again change nothing?"""
    job = TinyJob(settings, root)
    job.train(1)
    job.save()
    job.train(1)
    job.save(final=True)
    there = (root / "step_00000002/manifest.json").exists()
    before = (root / "step_00000002").stat().st_ino
    job.save(final=True)
    return there, before == (root / "step_00000002").stat().st_ino


def save_and_let_the_core_save(root: Path, folder: Path, settings: PretrainConfig) -> None:
    from megatron.core import dist_checkpointing

    job = TinyJob(settings, root)
    job.train(1)
    job.save()
    folder.mkdir()
    dist_checkpointing.save(job.chunks[0].module.sharded_state_dict(), str(folder))


def latest(root: Path, settings: PretrainConfig) -> Found:
    return TinyJob(settings, root).manager.latest()


def save_on_full_disk(root: Path, settings: PretrainConfig, place: str) -> tuple[str, str]:
    """Save, fail to save with the disk full when writing at `place`, save again; returns the error."""
    job = TinyJob(settings, root)
    return _error_between_saves(job, _fault(place, job.runtime.rank, _no_space))


def save_with_defect(root: Path, settings: PretrainConfig) -> tuple[str, str]:
    job = TinyJob(settings, root)
    return _error_between_saves(job, _fault("data of rank 1", job.runtime.rank, _defect))


def lose_background_writer(root: Path, settings: PretrainConfig) -> tuple[str, str]:
    """Rank 1's background writer is killed while it writes."""
    job = TinyJob(settings, root)
    return _error_between_saves(job, _fault("data of rank 1", job.runtime.rank, _die), again=False)


def die_while_saving(root: Path, settings: PretrainConfig, moment: str) -> None:
    """Save twice; the second time this process is killed at `moment`."""
    job = TinyJob(settings, root)
    job.train(1)
    job.save()
    job.manager.wait()
    job.train(1)
    with _fault(moment, 0, _sleep if moment == "data" and settings.checkpoint.async_save else _die):
        job.save()
        if moment == "data":
            time.sleep(0.2)  # the writer is at it
            _die()
        job.manager.wait()


def save_slowly_in_background(root: Path, settings: PretrainConfig, pid_file: Path) -> None:
    """Save, then save again with a writer that tells its process number and does not end."""

    def tell_and_sleep(*_: Any, **__: Any) -> None:
        pid_file.write_text(str(os.getpid()))
        time.sleep(300)

    job = TinyJob(settings, root)
    job.train(1)
    job.save()
    job.manager.wait()
    job.train(1)
    with mock.patch.object(writer, "_write_file", tell_and_sleep):
        job.save()
        job.manager.wait()


def _error_between_saves(job: TinyJob, fault: AbstractContextManager[Any], again: bool = True) -> tuple[str, str]:
    job.train(1)
    job.save()
    job.manager.wait()
    job.train(1)
    caught: Exception | None = None
    with fault:
        try:
            job.save()
            job.manager.wait()
        except (UserError, RuntimeError) as error:
            caught = error
    if again:
        job.train(1)
        job.save()
        job.manager.wait()
    return type(caught).__name__, str(caught)


def _fault(place: str, rank: int, effect: Callable[..., Any]) -> AbstractContextManager[Any]:
    """Let `effect` happen instead of a write."""
    if place == "data of rank 1" and rank != 1:
        return nullcontext()
    target, name = {
        "folder": (Path, "mkdir"),
        "data": (torch, "save"),
        "data of rank 1": (writer.ChecksummedFile, "write"),
        "metadata": (pickle, "dump"),
        "common": (manager, "save_config"),
        "manifest": (manifest.Manifest, "to_json"),
        "rename": (Path, "rename"),
        "latest": (Path, "replace"),
    }[place]
    return mock.patch.object(target, name, effect)


def _no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _defect(*_: Any, **__: Any) -> None:
    raise ZeroDivisionError


def _sleep(*_: Any, **__: Any) -> None:
    time.sleep(60)


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tensors_of(path: Path, vocab_size: int = MODEL.vocab_size) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole, without the padding of the vocabulary."""
    metadata = restricted_reading.read_metadata(path).state_dict_metadata
    flat = {
        name: torch.empty(record.size, dtype=record.properties.dtype)
        for name, record in metadata.items()
        if isinstance(record, TensorStorageMetadata)
    }
    load(flat, storage_reader=FileSystemReader(path), no_dist=True)
    padded = ("word_embeddings.weight", "output_layer.weight")
    return {name: value[:vocab_size] if name.endswith(padded) else value for name, value in flat.items()}


def with_checkpoint(settings: PretrainConfig, **options: Any) -> PretrainConfig:
    return replace(settings, checkpoint=CheckpointConfig(**options))
