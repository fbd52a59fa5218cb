"""The optimizer against torch's own, and what fp16 does when it overflows."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.synthetic import tiny_corpus
from tests.training.layouts import SMALL
from tests.training.runs import VOCAB, hashes, train
from tests.workers import WorkerPool
from vishwamai_mp.checkpoint.sharded import gather_parameters
from vishwamai_mp.config import load_config, resolve
from vishwamai_mp.model import build_model
from vishwamai_mp.runtime import initialize, shutdown
from vishwamai_mp.training.loop import Trainer
from vishwamai_mp.training.optimizer import (
    build_optimizer,
    clip_and_step,
    gradient_norm,
    set_learning_rate,
    wrap_data_parallel,
)
from vishwamai_mp.training.step import StepResult

_SHARDED_OPTIMIZER = "parallel.use_distributed_optimizer=true"
_RATES = [1e-2, 3e-3, 2e-2, 1e-2]


def _gradient(parameter: torch.Tensor, scale: float) -> torch.Tensor:
    return scale * torch.sin(50 * parameter.detach().float())


def _start(overrides: list[str]) -> tuple[Any, Any, Any]:
    config = resolve(load_config(SMALL, ["model.num_layers=2", *overrides]), dist.get_world_size())
    runtime = initialize(config)
    chunks = wrap_data_parallel(config, runtime, build_model(config, runtime))
    return config, chunks, build_optimizer(config, runtime, chunks)


def against_torch(overrides: list[str], scale: float) -> tuple[float, list[float], bool]:
    """A few steps on the same gradients here and with torch's AdamW.

    Returns:
        the largest difference of any parameter, the gradients' norms, and whether the kernel is the fused one.
    """
    config, chunks, optimizer = _start(overrides)
    options = config.optimizer
    copies = [parameter.detach().clone().requires_grad_() for parameter in chunks[0].parameters()]
    reference = torch.optim.AdamW(
        [
            {"params": [copy for copy in copies if copy.dim() > 1], "weight_decay": options.weight_decay},
            {"params": [copy for copy in copies if copy.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
        foreach=False,
        fused=False,
    )
    norms, worst = [], 0.0
    for rate in _RATES:
        chunks[0].zero_grad_buffer()
        for parameter, copy in zip(chunks[0].parameters(), copies, strict=True):
            parameter.main_grad.copy_(_gradient(parameter, scale))
            copy.grad = _gradient(copy, scale)
        norm = gradient_norm(optimizer)
        set_learning_rate(optimizer, rate)
        clip_and_step(optimizer, norm, options.clip_grad_norm)
        gather_parameters(chunks)
        limit = options.clip_grad_norm or math.inf
        norms += [norm, float(torch.nn.utils.clip_grad_norm_(copies, limit))]
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        pairs = zip(chunks[0].parameters(), copies, strict=True)
        worst = max(worst, *(float((ours - theirs).detach().abs().max()) for ours, theirs in pairs))
    fused = all(group["fused"] for group in optimizer.param_groups)
    shutdown(keep_world=True)
    return worst, norms, fused


@pytest.mark.parametrize("sharded", [[], [_SHARDED_OPTIMIZER]])
@pytest.mark.parametrize(
    ("clip", "scale"),
    [
        (1.0, 1.0),  # a norm of 80 or so: clipped
        (1.0, 1e-3),  # below the limit: left alone
        (0.0, 1.0),  # never clipped
    ],
)
def test_equals_torch_adamw(workers: WorkerPool, sharded, clip, scale):
    overrides = [*sharded, f"optimizer.clip_grad_norm={clip}", "optimizer.weight_decay=0.3", "optimizer.epsilon=1e-3"]
    for worst, norms, fused in workers.run(against_torch, 2 if sharded else 1, overrides, scale):
        assert fused
        assert worst < 1e-6
        assert norms[::2] == pytest.approx(norms[1::2], rel=1e-5)
        assert all((norm > 10) == (scale == 1.0) for norm in norms)


def decay_alone(overrides: list[str]) -> dict[str, float | None]:
    """By what each parameter is multiplied in a step without gradients; None: it is bitwise what it was."""
    _, chunks, optimizer = _start(overrides)
    before = {name: value.detach().clone() for name, value in chunks[0].module.named_parameters()}
    chunks[0].zero_grad_buffer()
    set_learning_rate(optimizer, 0.1)
    clip_and_step(optimizer, gradient_norm(optimizer), 1.0)
    gather_parameters(chunks)
    after = {name: value.detach() for name, value in chunks[0].module.named_parameters()}
    factors = {
        name: None if after[name].equal(old) else float(after[name].norm() / old.norm()) for name, old in before.items()
    }
    shutdown(keep_world=True)
    return factors


@pytest.mark.parametrize("overrides", [[], [_SHARDED_OPTIMIZER], ["parallel.fully_sharded=true"]])
def test_only_matrices_decay(workers: WorkerPool, overrides):
    for factors in workers.run(decay_alone, 2, [*overrides, "optimizer.weight_decay=0.5"]):
        vectors = {name for name, factor in factors.items() if factor is None}
        assert vectors == {name for name in factors if "norm" in name}
        assert len(factors) > 2 * len(vectors) > 0
        shrunk = [factor for factor in factors.values() if factor is not None]
        assert shrunk == pytest.approx([1 - 0.1 * 0.5] * len(shrunk), rel=1e-5)


def watch_scale(trainer: Trainer, notes: list[Any]) -> None:
    """Note of each step: was it used, the loss scale after it, did it leave the parameters as they were."""
    run = trainer.steps.train

    def watched(*args: Any) -> StepResult:
        before = hashes(trainer)
        result = run(*args)
        notes.append((result.updated, float(trainer.optimizer.get_loss_scale()), before == hashes(trainer)))
        return result

    trainer.steps.train = watched  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("processes", [1, 2])
def test_fp16_overflow_skips_the_step_and_halves_the_scale(workers: WorkerPool, tmp_path: Path, processes):
    corpus = tiny_corpus(tmp_path / "corpus", VOCAB, 4000, seed=1)
    start = 2.0**20
    settings = [
        *("precision=fp16", "training.max_steps=14", f"optimizer.initial_loss_scale={start}"),
        *("optimizer.loss_scale_window=1000", "parallel.overlap_grad_reduce=false"),
    ]
    run = partial(workers.run, train, processes, tmp_path / "run", corpus, settings)
    for outcome in run(prepare=watch_scale):
        used = [updated for updated, *_ in outcome.notes]
        skipped = used.index(True)
        assert skipped > 1
        assert all(used[skipped:])
        assert [scale for _, scale, _ in outcome.notes[:skipped]] == [start / 2 ** (i + 1) for i in range(skipped)]
        assert {scale for _, scale, _ in outcome.notes[skipped:]} == {start / 2**skipped}
        assert [unchanged for *_, unchanged in outcome.notes] == [not updated for updated in used]
        assert outcome.state["skipped_steps"] == skipped
        assert outcome.losses[-1] < outcome.losses[skipped]
        said = f"step 1 skipped: loss {outcome.losses[0]:.4g}, gradient norm inf; the loss scale is lowered to"
        assert (said in outcome.said) == (outcome.said != "")
