"""Fully sharded data parallelism beside what `test_layouts`, `test_resume` and the checkpoints' tests hold of it."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.synthetic import tiny_corpus
from tests.training.layouts import SMALL
from tests.training.runs import VOCAB, train
from tests.training.test_layouts import assert_equal, curve
from tests.workers import WorkerPool
from vishwamai_mp.config import ConfigError, load_config, padded_vocab_size, resolve
from vishwamai_mp.model import build_model
from vishwamai_mp.planning import total_parameters
from vishwamai_mp.planning.states import stage_states
from vishwamai_mp.runtime import initialize
from vishwamai_mp.training.loop import Trainer
from vishwamai_mp.training.optimizer import build_optimizer, clip_and_step, gradient_norm, wrap_data_parallel

_FULLY_SHARDED = "parallel.fully_sharded=true"
_COMPONENTS = [
    *("memory.enabled=true", "memory.layers=[1]", "memory.memory_size=32", "memory.head_dim=8", "memory.dropout=0"),
    *("cache.enabled=true", "cache.layers=[2]", "cache.num_heads=4", "cache.segment_length=8", "cache.dropout=0"),
    *("tree.enabled=true", "tree.step_token=3"),
]


@pytest.mark.parametrize("frozen", [[], ["training.freeze=[base,embedding]"]])
def test_components_and_heads_train_alike(workers: WorkerPool, frozen):
    """Also on a frozen model. Some of their parameters have fewer rows than there are ranks."""
    one = curve(workers, 1, [*_COMPONENTS, *frozen], steps=4)
    for processes in (2, 4):
        assert_equal(curve(workers, processes, [_FULLY_SHARDED, *_COMPONENTS, *frozen], steps=4), one)


def held(overrides: list[str]) -> tuple[int, int, float]:
    """In a worker, after a step: bytes of parameters, gradients and optimizer state; the largest of the tensors of this
    rank; and what the formula says."""
    from megatron.core.distributed import DistributedDataParallel

    config = resolve(load_config(SMALL, overrides), dist.get_world_size())
    runtime = initialize(config)
    chunks = wrap_data_parallel(config, runtime, build_model(config, runtime))
    optimizer = build_optimizer(config, runtime, chunks)
    tokens = torch.zeros(2, 32, dtype=torch.long)
    chunks[0](tokens, labels=tokens).sum().backward()
    with torch.no_grad():
        chunks[0](tokens, labels=tokens)  # an evaluation must not leave whole parameters behind
    clip_and_step(optimizer, gradient_norm(optimizer), 1.0)
    tensors: list[Any] = [*chunks[0].parameters(), *(parameter.grad for parameter in chunks[0].parameters())]
    for buffer in chunks[0].buffers if isinstance(chunks[0], DistributedDataParallel) else []:
        tensors += [buffer.grad_data, buffer.param_data]
    (part,) = optimizer.chained_optimizers
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            tensors += [parameter, *(value for value in part.optimizer.state[parameter].values() if value.dim())]
    local = [getattr(tensor, "to_local", lambda tensor=tensor: tensor)() for tensor in tensors if tensor is not None]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in local}
    return sum(storages.values()), max(storages.values()), stage_states(config, 0, dist.get_world_size())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_rank_holds_its_share(workers: WorkerPool, precision):
    """As much less as there are ranks, within 5 % (rows are not split), and as the formula says."""
    whole = total_parameters(config := resolve(load_config(SMALL)), padded_vocab_size(config))
    for processes in (2, 4):
        for size, largest, formula in workers.run(held, processes, [_FULLY_SHARDED, f"precision={precision}"]):
            assert size == pytest.approx(16 * whole / processes, rel=0.05)
            assert size == pytest.approx(formula, rel=0.05)
            assert largest < 4 * whole / processes
    for size, _, formula in workers.run(held, 2, ["parallel.use_distributed_optimizer=true", f"precision={precision}"]):
        assert size == pytest.approx(formula, rel=0.05)


def poison(trainer: Trainer, notes: list[Any]) -> None:
    """Rank 1's second step has a NaN gradient behind a sound loss."""
    run, rank = trainer.steps._forward, trainer.runtime.rank

    def poisoned(batches: Any, model: Any) -> Any:
        output, loss = run(batches, model)
        if rank == 1 and trainer.state.step == 1 and output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.nan)
        return output, loss

    trainer.steps._forward = poisoned  # type: ignore[method-assign]


def test_a_nan_is_not_learnt_and_its_rank_is_named(workers: WorkerPool, tmp_path: Path):
    corpus = tiny_corpus(tmp_path / "corpus", VOCAB, 4000, seed=1)
    settings = [_FULLY_SHARDED, "training.max_steps=3"]
    first, _ = workers.run(train, 2, tmp_path / "run", corpus, settings, prepare=poison)
    assert first.state["skipped_steps"] == 1
    said = [line for line in first.said.splitlines() if "skipped" in line]
    assert len(said) == 1
    assert said[0].startswith("step 2 skipped: ")
    assert "non-finite gradients on rank 1 " in said[0]
    assert "rank 0" not in said[0]


def test_fp16_overflow_skips_the_step_and_halves_the_scale(workers: WorkerPool, tmp_path: Path):
    corpus = tiny_corpus(tmp_path / "corpus", VOCAB, 4000, seed=1)
    settings = ["precision=fp16", "training.max_steps=8", "optimizer.initial_loss_scale=524288"]
    run = partial(workers.run, train, 2)
    whole = run(tmp_path / "whole", corpus, settings)[0]
    split = run(tmp_path / "split", corpus, [*settings, _FULLY_SHARDED])[0]
    assert split.state == whole.state
    assert 0 < split.state["skipped_steps"] < 8
    assert split.losses == pytest.approx(whole.losses, abs=1e-3)


def test_evaluation_between_steps_changes_nothing(workers: WorkerPool, tmp_path: Path):
    corpus = tiny_corpus(tmp_path / "corpus", VOCAB, 8000, seed=1)
    settings = [_FULLY_SHARDED, "training.max_steps=3", "checkpoint.save_every=2"]
    run = partial(workers.run, train, 2)
    plain = run(tmp_path / "plain", corpus, settings)
    evaluated = run(tmp_path / "evaluated", corpus, [*settings, "training.evaluate_every=1"])
    for a, b in zip(plain, evaluated, strict=True):
        assert a.tensors == b.tensors
        assert a.losses == b.losses
    assert len({record["validation_loss"] for record in evaluated[0].records}) == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.tensor_model_parallel_size=2", "set parallel.tensor_model_parallel_size=1"),
        ("parallel.pipeline_model_parallel_size=2", "set parallel.pipeline_model_parallel_size=1"),
        ("parallel.context_parallel_size=2", "set parallel.context_parallel_size=1"),
        ("precision=fp8_current", "use bf16"),
        ("precision=nvfp4", "use bf16"),
        ("lora.enabled=true", "lora.enabled=true with"),
    ],
)
def test_what_does_not_go_together_is_refused(override, message):
    with pytest.raises(ConfigError) as error:
        resolve(load_config(SMALL, [_FULLY_SHARDED, override]))
    assert message in str(error.value)
    assert "parallel.fully_sharded" in str(error.value)


def test_alone_there_is_nothing_to_split(workers: WorkerPool):
    assert curve(workers, 1, [_FULLY_SHARDED], steps=2) == curve(workers, 1, [], steps=2)
