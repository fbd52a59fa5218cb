"""One training step: forward and backward over the step's micro-batches, then the optimizer.

Shapes: B micro-batch, T tokens, Q this context parallel rank's tokens.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from vishwamai_mp.config import PretrainConfig
from vishwamai_mp.data.batches import Batch, context_shard
from vishwamai_mp.diagnosis.shared import Phase
from vishwamai_mp.model.fully_sharded import FullySharded
from vishwamai_mp.precision.linears import begin_step
from vishwamai_mp.runtime import Runtime, seed_step
from vishwamai_mp.runtime.measures import (
    all_names,
    mean_measures,
    measures_of,
    summed_measures,
)
from vishwamai_mp.runtime.step_journal import phase
from vishwamai_mp.training.graphed_layers import graph_layers
from vishwamai_mp.training.optimizer import clip_and_step, ready_gradients, set_learning_rate, update_loss_scale


@dataclass(frozen=True)
class StepResult:
    """What one step yielded, equal on all ranks.

    Attributes:
        lm_loss: mean over the step's unmasked tokens, nats.
        tokens: the number of those.
        grad_norm: before clipping.
        updated: False: the step was skipped.
        measures: of the components (`runtime.measures`), their losses included.
    """

    lm_loss: float
    tokens: int
    grad_norm: float
    updated: bool
    measures: Mapping[str, float]


class TrainStep:
    """Runs training steps and evaluations on this rank's model chunks."""

    def __init__(
        self,
        config: PretrainConfig,
        runtime: Runtime,
        chunks: Sequence[DistributedDataParallel],
        optimizer: ChainedOptimizer,
    ) -> None:
        self.config, self.runtime, self.chunks, self.optimizer = config, runtime, list(chunks), optimizer
        self.graphs = graph_layers(config, self.chunks)
        self._forward_backward = get_forward_backward_func()
        self._connect_schedule()
        self._rounds_at_random = config.precision == "nvfp4"
        self._measures = measures_of(self.chunks)
        self._measure_names = all_names(self._measures)

    def _connect_schedule(self) -> None:
        """Tell megatron-core's schedule how to scale, reduce and gather."""
        megatron = self.chunks[0].config
        megatron.grad_scale_func = self.optimizer.scale_loss
        megatron.finalize_model_grads_func = self._finish_gradients
        ddp = self.chunks[0].ddp_config
        if ddp.overlap_grad_reduce:
            megatron.no_sync_func = _one_or_all([chunk.no_sync for chunk in self.chunks])
            megatron.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in self.chunks])
        if ddp.overlap_param_gather:
            megatron.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in self.chunks])

    def _finish_gradients(
        self, chunks: Sequence[DistributedDataParallel], tokens: Tensor, pg_collection: Any = None, **options: Any
    ) -> None:
        """megatron-core's `finalize_model_grads`, whose division by the step's tokens would have the host read them."""
        groups = self.runtime.groups
        finalize_model_grads(list(chunks), None, pg_collection=groups, **options)
        dist.broadcast(tokens, dist.get_global_rank(groups.pp, groups.pp.size() - 1), group=groups.pp)
        dist.all_reduce(tokens, group=groups.dp_cp)
        for chunk in chunks:
            chunk.scale_gradients(1.0 / tokens.clamp(min=1))

    def train(self, batches: Sequence[Batch], step: int, learning_rate: float, loss_limit: float) -> StepResult:
        """One optimizer step.

        Args:
            batches: this rank's micro-batches.
            step: seeds dropout and stochastic rounding.
            learning_rate: of this step.
            loss_limit: with a loss above it, or a non-finite loss or gradient, parameters stay as they are.
        """
        self.capture()
        self._begin(step)
        total = self._run(batches, forward_only=False)
        ready = ready_gradients(self.optimizer)
        table = summed_measures(self._measures, self._measure_names, self.runtime.device)
        # The one time in a step that the host waits for the device.
        parts = (total, torch.stack((ready.norm, ready.fits)), table.flatten())
        with phase(Phase.READING):
            loss_sum, count, norm, fits, *sums = torch.cat(parts).tolist()
        lm_loss, tokens = _mean_loss(loss_sum, count)
        update_loss_scale(self.optimizer, overflow=fits == 0)
        norm = norm if fits else math.inf
        sound = math.isfinite(norm) and math.isfinite(lm_loss) and lm_loss <= loss_limit
        if sound:
            with phase(Phase.UPDATE):
                set_learning_rate(self.optimizer, learning_rate)
                clip_and_step(self.optimizer, norm, self.config.optimizer.clip_grad_norm)
        measures = mean_measures(self._measure_names, list(zip(sums[::2], sums[1::2], strict=True)))
        return StepResult(lm_loss, tokens, norm, sound, measures)

    def capture(self) -> None:
        """Capture CUDA graphs of layers that have run, if they are asked for and not yet there.

        Gradients are not whole meanwhile: a step zeroes them, and those of the last one are used.
        """
        for graphs in self.graphs:
            graphs.capture()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Mean loss in nats over the unmasked tokens of `batches` on all replicas, and the number of those tokens."""
        for chunk in self.chunks:
            chunk.eval()
        loss_sum, count = self._run(batches, forward_only=True).tolist()
        return _mean_loss(loss_sum, count)

    def own_gradients_are_finite(self, batches: Sequence[Batch], step: int) -> bool:
        """Whether what this rank adds to the gradients of a step is finite: computed again, and not reduced.

        Reduced gradients do not tell: a NaN is then on other replicas too. All ranks call it, after `train` with the
        same arguments and before the next.
        """
        megatron = self.chunks[0].config
        connected = megatron.no_sync_func, megatron.grad_sync_func, megatron.finalize_model_grads_func
        megatron.no_sync_func = megatron.grad_sync_func = megatron.finalize_model_grads_func = None
        self._begin(step)
        with ExitStack() as stack:
            own = [stack.enter_context(_own_gradients(chunk)) for chunk in self.chunks]
            self._run(batches, forward_only=False)
            finite = all(are_finite() for are_finite in own)
        megatron.no_sync_func, megatron.grad_sync_func, megatron.finalize_model_grads_func = connected
        return finite

    def _begin(self, step: int) -> None:
        """Seeds of a step, and gradients and measures of zero."""
        seed_step(self.config.training.seed, step, self.runtime.groups)
        if self._rounds_at_random:
            begin_step([chunk.module for chunk in self.chunks], self.config.training.seed, step)
        scale = self.optimizer.scale_loss(torch.ones((), device=self.runtime.device)).squeeze()
        for measures in self._measures:
            measures.take()
            measures.loss_scale = scale
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _run(self, batches: Sequence[Batch], forward_only: bool) -> Tensor:
        """Sum of the loss over the unmasked tokens of all replicas, and their number: (2,) fp64, on the device."""
        training = self.config.training
        sums = self._forward_backward(
            forward_step_func=self._forward,
            data_iterator=[iter(batches) for _ in self.chunks] if len(self.chunks) > 1 else iter(batches),
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=training.sequence_length,
            micro_batch_size=training.micro_batch_size,
            forward_only=forward_only,
        )
        groups = self.runtime.groups
        total = torch.zeros(2, dtype=torch.float64, device=self.runtime.device)
        if sums:
            total += torch.stack(sums).sum(0)
            dist.all_reduce(total, group=groups.dp_cp)
        if groups.pp.size() > 1:  # only the last stage has a loss; all take the decision about the step
            dist.broadcast(total, dist.get_global_rank(groups.pp, groups.pp.size() - 1), group=groups.pp)
        return total

    def _forward(self, batches: Iterator[Batch], model: DistributedDataParallel) -> tuple[Tensor, partial]:
        """megatron-core's forward step: the output and how to make a loss of it."""
        batch = next(batches)
        with phase(Phase.FORWARD):
            output = model(
                batch.tokens,
                # Positions that all rows share cost the model less.
                position_ids=batch.position_ids if self.config.data.reset_position_ids else None,
                labels=batch.labels,
                document_ids=batch.document_ids,
                verdicts=batch.verdicts,
                bounds=batch.bounds,
            )
        cp = self.runtime.groups.cp
        return output, partial(_loss, context_shard(batch.loss_mask, cp.rank(), cp.size()))


def _mean_loss(loss_sum: float, tokens: float) -> tuple[float, int]:
    return loss_sum / max(tokens, 1.0), int(tokens)


def _loss(mask_BQ: Tensor, losses_BQ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over unmasked tokens, their number, and both detached for the report."""
    loss, tokens = (losses_BQ * mask_BQ).sum(), mask_BQ.sum()
    return loss, tokens.int(), torch.stack((loss.detach().double(), tokens.double()))


@contextmanager
def _own_gradients(chunk: DistributedDataParallel | FullySharded) -> Iterator[Callable[[], bool]]:
    """Lets backward passes leave this rank's gradients to itself, and tells whether they are finite."""
    if isinstance(chunk, FullySharded):
        with chunk.watched_gradients() as gradients:
            yield lambda: bool(gradients.finite)
    else:
        with chunk.no_sync():
            yield lambda: all(bool(torch.isfinite(buffer.grad_data).all()) for buffer in chunk.buffers)


def _one_or_all(functions: list) -> object:
    return functions[0] if len(functions) == 1 else functions
