"""Micro-batches for one rank, and the exact place in the data.

Shapes: B sequences of a micro-batch, T tokens of a sequence (full length; context parallel ranks slice), G sequences of
a global batch.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.data import DataLoader

from vishwamai_mp.config import PretrainConfig, UserError
from vishwamai_mp.data.consecutive import ConsecutiveSegments
from vishwamai_mp.data.datasets import Datasets, EvaluationSamples, Samples
from vishwamai_mp.data.given import GivenSamples, StreamedSamples
from vishwamai_mp.data.marks import BEGINS, JUDGED, LEARNT, SOLVED
from vishwamai_mp.model.masks import DocumentBounds, document_bounds
from vishwamai_mp.runtime import Runtime


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        tokens: int64 [B, T], what the model reads.
        labels: int64 [B, T], the token after each.
        loss_mask: float32 [B, T], 1 where the loss of `labels` counts.
        position_ids: int64 [B, T], from 0 at the start of each row (or of each document, `reset_position_ids`).
        document_ids: int32 [B, T], which document of its row a token belongs to, counted from 0; a token attends only
            to tokens of its own. None: rows are one document.
        verdicts: float32 [B, T], whether the text up to a token leads to a solution: 1, 0, or NaN where that is not
            known. None: known of no token.
        bounds: of the documents, rows laid end to end, found by the host; under context parallelism of this rank's
            parts. None: not looked for.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor | None
    verdicts: torch.Tensor | None = None
    bounds: DocumentBounds | None = None


@dataclass(frozen=True)
class DocumentRules:
    """What the end of a document within a row means.

    Attributes:
        eod_id: the token that ends documents and belongs to the document it ends.
        reset_attention_mask: documents of a row do not see each other: `Batch.document_ids` is given.
        reset_position_ids: positions start at 0 in each document.
        eod_mask_loss: no loss where the model reads `eod_id`, that is, on predicting the first token of the next
            document. Predicting `eod_id` itself counts.
        leading_token: texts begin with the token before the first: where it is not `eod_id`, the row goes on with the
            document of the same row in the last micro-batch, and its `document_ids` begin with 0, else with 1.
        marked: texts are prepared rows, whose marks say where documents begin and what counts; nothing above applies.
    """

    eod_id: int = -1
    reset_attention_mask: bool = False
    reset_position_ids: bool = False
    eod_mask_loss: bool = False
    leading_token: bool = False
    marked: bool = False


def make_batch(text: torch.Tensor, rules: DocumentRules) -> Batch:
    """Build a micro-batch from token ids.

    megatron-core's own routine loops over documents in Python and makes T × T masks; this one is a few vector
    operations, with the same results.

    Args:
        text: int64 [B, T + 1], or [B, T + 2] with a leading token, or [B, 2, T + 1] with marks.
        rules: what document ends mean.
    """
    if rules.marked:
        return _marked_batch(text[:, 0], text[:, 1], rules.reset_attention_mask)
    begins = None
    if rules.leading_token:
        begins, text = text[:, :1] == rules.eod_id, text[:, 1:]
    tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    ends = tokens == rules.eod_id
    position_ids = torch.arange(tokens.shape[1], device=text.device).expand(tokens.shape)
    if rules.reset_position_ids:
        # A document starts after an end; the latest start at or before a token is a running maximum.
        starts = torch.where(ends, position_ids + 1, 0).roll(1, dims=1)
        starts[:, 0] = 0
        position_ids = position_ids - starts.cummax(dim=1).values
    document_ids = None
    if rules.reset_attention_mask:
        document_ids = (ends.cumsum(dim=1) - ends.long()).to(torch.int32)
        if begins is not None:
            document_ids += begins
    loss_mask = (~ends).float() if rules.eod_mask_loss else torch.ones(tokens.shape, device=text.device)
    return Batch(tokens, labels, loss_mask, position_ids.contiguous(), document_ids)


def _marked_batch(text: torch.Tensor, marks: torch.Tensor, apart: bool) -> Batch:
    """A micro-batch of rows with marks, both [B, T + 1]; `apart`: documents do not see each other."""
    begins = (marks & BEGINS) > 0
    # The first token of a conversation is predicted from another's last: never counts.
    learnt = ((marks & LEARNT) > 0) & ~begins
    places = torch.arange(text.shape[1] - 1, device=text.device).expand(text.shape[0], -1)
    starts = torch.where(begins[:, :-1], places, 0).cummax(dim=1).values
    return Batch(
        tokens=text[:, :-1].contiguous(),
        labels=text[:, 1:].contiguous(),
        loss_mask=learnt[:, 1:].float(),
        position_ids=places - starts,
        document_ids=begins[:, :-1].cumsum(dim=1).to(torch.int32) if apart else None,
        verdicts=_verdicts(marks[:, :-1]),
    )


def _verdicts(marks: torch.Tensor) -> torch.Tensor:
    return ((marks & SOLVED) > 0).float().masked_fill((marks & JUDGED) == 0, math.nan)


class BatchStream:
    """This rank's micro-batches, in order: an iterator.

    Global batch n of a run that starts at 0 is samples [n·G, (n+1)·G), whatever the data parallel size, the micro-batch
    size and the number of workers. Micro-batch m of it, on data parallel rank r of R, is B samples from
    n·G + (m·R + r)·B. All ranks that share r read the same samples, each from its own mapping of the files.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        data_rank: int = 0,
        data_parallel_size: int = 1,
        context_rank: int = 0,
        context_parallel_size: int = 1,
        consumed_samples: int = 0,
        stop_samples: int | None = None,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        rules: DocumentRules | None = None,
        vocab_size: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Start at a position.

        Args:
            samples: in their final order, endless or with at least `stop_samples`.
            micro_batch_size: B.
            global_batch_size: G, a multiple of B × `data_parallel_size`.
            context_rank: whose part of documents attention is told of, of `context_parallel_size`.
            consumed_samples: where to start: samples that all ranks together have seen. Restores a position exactly,
                also one reached with other sizes.
            stop_samples: end before the global batch that would pass this sample; None: never.
            num_workers: processes that read ahead; 0: this one reads.
            prefetch_factor: micro-batches that each of these reads ahead; None: 2.
            rules: what document ends mean; None: nothing.
            vocab_size: if given, a token outside it is a UserError.
            device: where batches go; None: the CPU.
        """
        per_pass = micro_batch_size * data_parallel_size
        assert global_batch_size % per_pass == 0, "config.micro_batches_per_step refuses this"
        assert 0 <= data_rank < data_parallel_size
        self.micro_batches_per_step = global_batch_size // per_pass
        self._global_batch_size = global_batch_size
        self._start = consumed_samples
        self._given = 0  # micro-batches handed out
        self._context = context_rank, context_parallel_size
        self._rules = rules or DocumentRules()
        self._vocab_size = vocab_size
        self._device = device or torch.device("cpu")
        plan = _micro_batches(
            consumed_samples, stop_samples, micro_batch_size, global_batch_size, data_rank, data_parallel_size
        )
        self._texts = iter(
            DataLoader(
                samples,  # type: ignore[arg-type]  # it only ever indexes it
                batch_sampler=plan,
                num_workers=num_workers,
                prefetch_factor=prefetch_factor,
                pin_memory=self._device.type != "cpu",
                # Otherwise it draws a seed from the global generator, and reading data would change dropout.
                generator=torch.Generator(),
            )
        )

    @property
    def consumed_samples(self) -> int:
        """Samples of all global batches handed out in full, over all ranks: the number to store in a checkpoint."""
        return self._start + self._given // self.micro_batches_per_step * self._global_batch_size

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Batch:
        text = next(self._texts)
        if self._vocab_size is not None:
            _check_vocabulary(text, self._vocab_size)
        self._given += 1
        batch = make_batch(text.to(self._device, non_blocking=True), self._rules)
        if batch.document_ids is None:
            return batch
        on_host = batch if self._device.type == "cpu" else make_batch(text, self._rules)
        assert on_host.document_ids is not None
        return replace(batch, bounds=document_bounds(on_host.document_ids, *self._context).to(self._device))


def _micro_batches(
    start: int, stop: int | None, micro_batch_size: int, global_batch_size: int, rank: int, ranks: int
) -> Iterator[list[int]]:
    """Sample numbers of each of one rank's micro-batches."""
    for batch in itertools.count(start, global_batch_size):
        if stop is not None and batch + global_batch_size > stop:
            return
        for first in range(rank * micro_batch_size, global_batch_size, ranks * micro_batch_size):
            yield list(range(batch + first, batch + first + micro_batch_size))


def _check_vocabulary(text: torch.Tensor, vocab_size: int) -> None:
    """An embedding split over ranks would silently read such a token as zeros."""
    low, high = (int(value) for value in text.aminmax())
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"the data holds token {low if low < 0 else high} but model.vocab_size={vocab_size};"
            " was it preprocessed with another tokenizer?"
        )


def train_stream(
    config: PretrainConfig, datasets: Datasets, runtime: Runtime, consumed_samples: int = 0
) -> BatchStream:
    """This rank's endless stream of training batches, from `consumed_samples` on."""
    return _stream(config, datasets, datasets.train, runtime, consumed_samples, None, config.data.num_workers)


def evaluation_stream(
    config: PretrainConfig, datasets: Datasets, runtime: Runtime, samples: EvaluationSamples | None = None
) -> BatchStream:
    """This rank's share of the evaluation: always the same samples, at every layout and every call.

    `evaluation_batches` global batches, from the first sample on; then it ends.

    Args:
        samples: `datasets.valid` (None) or `datasets.test`.
    """
    samples = samples or datasets.valid
    assert samples is not None, "there is no validation data"
    stop = evaluation_batches(config, samples) * config.training.global_batch_size
    return _stream(config, datasets, samples, runtime, 0, stop, num_workers=0)


def evaluation_batches(config: PretrainConfig, samples: EvaluationSamples) -> int:
    """Global batches in one evaluation: `training.evaluate_batches`, or as many as one epoch of `samples` fills.

    At least 1: where an epoch does not fill a single global batch, some of its samples are read again.
    """
    whole = samples.samples_per_epoch // config.training.global_batch_size
    return max(1, min(config.training.evaluate_batches, whole))


def _stream(
    config: PretrainConfig,
    datasets: Datasets,
    samples: Samples,
    runtime: Runtime,
    consumed_samples: int,
    stop_samples: int | None,
    num_workers: int,
) -> BatchStream:
    data, training = config.data, config.training
    return BatchStream(
        samples,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        data_rank=runtime.data_rank,
        data_parallel_size=runtime.data_parallel_size,
        context_rank=runtime.groups.cp.rank(),
        context_parallel_size=runtime.groups.cp.size(),
        consumed_samples=consumed_samples,
        stop_samples=stop_samples,
        num_workers=num_workers,
        prefetch_factor=data.prefetch_factor if num_workers else None,
        rules=DocumentRules(
            datasets.eod_id,
            data.reset_attention_mask,
            data.reset_position_ids,
            data.eod_mask_loss,
            leading_token=isinstance(samples, ConsecutiveSegments),
            marked=data.prepared_rows or isinstance(samples, GivenSamples | StreamedSamples),
        ),
        vocab_size=config.model.vocab_size,
        device=runtime.device,
    )


def context_shard(tensor: torch.Tensor, rank: int, size: int, dim: int = 1) -> torch.Tensor:
    """The tokens that context parallel rank `rank` of `size` works on.

    The dimension is cut into 2·size chunks; rank r takes chunks r and 2·size-1-r. So each rank has as much of the
    causal triangle as any other.

    Args:
        tensor: `dim` holds T tokens, a multiple of 2·size. Returned with T / size.
    """
    if size == 1:
        return tensor
    assert tensor.shape[dim] % (2 * size) == 0, "config.resolve refuses this"
    chunks = tensor.chunk(2 * size, dim)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]), dim)


def context_unshard(shards: Sequence[torch.Tensor], dim: int = 1) -> torch.Tensor:
    """The inverse of `context_shard`: all ranks' parts, in rank order, to the whole."""
    if len(shards) == 1:
        return shards[0]
    halves = [shard.chunk(2, dim) for shard in shards]
    return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], dim)
