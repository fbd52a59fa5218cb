"""From a configuration to endless train, valid and test samples, in an order that only the data and the seed decide.

Sample n of a blend is the same whatever the layout, the batch sizes and the length of the run. Epoch 0 of a corpus is
megatron-core's shuffle; each later epoch is another permutation of the same samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from vishwamai_mp.config import ConfigError, PretrainConfig, UserError
from vishwamai_mp.config.schema import DataConfig, TrainingConfig
from vishwamai_mp.config.wording import counted
from vishwamai_mp.data.blends import Source, SourceIdentity, identify, parse_blend, parse_split
from vishwamai_mp.data.consecutive import ConsecutiveSegments
from vishwamai_mp.data.indexed import check_indexed
from vishwamai_mp.data.order import Interleaving, permute
from vishwamai_mp.data.packed_documents import PackedDocuments
from vishwamai_mp.data.position import DataFingerprint
from vishwamai_mp.data.prepared_rows import PreparedRows, check_rows, check_verdicts
from vishwamai_mp.runtime import Runtime, local_rank

# isort: split
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

_FEW_DOCUMENTS = 20  # of which a share of a few percent is none
_EVALUATION_SEED = 0  # evaluation samples do not follow training.seed, so that runs of different seeds compare
_Built = TypeVar("_Built")


class Vocabulary(Protocol):
    """What is needed of a tokenizer, as `vishwamai_mp.data.tokenizer.Tokenizer` has it.

    `eod_id` is -1 where there is no end-of-document token.
    """

    vocab_size: int
    eod_id: int


class Samples(Protocol):
    """Anything with int64 [T + 1] token ids, or [2, T + 1] ids and their marks, under every number from 0."""

    def __getitem__(self, index: int) -> torch.Tensor: ...


class EvaluationSamples(Samples, Protocol):
    """Samples of which there are so many before they repeat."""

    @property
    def samples_per_epoch(self) -> int: ...


class TokenSamples(torch.utils.data.Dataset):
    """Samples of one or several corpora, endless: past its last sample a corpus starts its next epoch.

    `samples[n]` is int64 [T + 1]: tokens are `[:-1]`, labels `[1:]`. A prepared row is [2, T + 1], with its marks.
    """

    def __init__(
        self, corpora: Sequence[PackedDocuments | PreparedRows], weights: Sequence[float] | None, seed: int
    ) -> None:
        self.corpora = list(corpora)
        self.sizes = [len(corpus) for corpus in self.corpora]  # samples in one epoch of each
        self._interleaving = Interleaving(weights, self.sizes)
        self._seed = seed

    def __getitem__(self, index: int) -> torch.Tensor:
        source, sample = self._interleaving(index)
        epoch, within = divmod(sample, self.sizes[source])
        if epoch:
            within = permute(within, self.sizes[source], self._seed * 1_000_003 + epoch)
        return self.corpora[source].text(within)

    @property
    def samples_per_epoch(self) -> int:
        """Distinct samples, over all corpora."""
        return sum(self.sizes)

    @property
    def shares(self) -> list[float]:
        """The fraction of samples that comes from each corpus."""
        return self._interleaving.shares


@dataclass(frozen=True)
class Datasets:
    """The data of a run. `notes` are sentences for the log; `fingerprint` recognises `train` on resume."""

    train: Samples
    valid: EvaluationSamples | None
    test: EvaluationSamples | None
    eod_id: int
    fingerprint: DataFingerprint
    notes: list[str]

    def epochs(self, training: TrainingConfig) -> list[str]:
        """A sentence for each corpus: how much of it the run will read. None for a user's own datasets."""
        train, needed = self.train, training.max_steps * training.global_batch_size
        if not isinstance(train, TokenSamples | ConsecutiveSegments):
            return []
        return [
            f"data.train: {source.name}: {share:.1%} of {counted(needed, 'sample', ',')} of {training.sequence_length}"
            f" tokens, {needed * share / size:.2f} epochs of {counted(size, 'sample', ',')}"
            for source, size, share in zip(self.fingerprint.sources, train.sizes, train.shares, strict=True)
        ]


@dataclass(frozen=True)
class _Corpus:
    source: Source
    identity: SourceIdentity
    indexed: IndexedDataset

    def part(self, begin: float, end: float) -> range:
        """Documents between two fractions of the corpus."""
        count = len(self.indexed)
        return range(round(begin * count), round(end * count))


def build_datasets(
    config: PretrainConfig, tokenizer: Vocabulary | None = None, runtime: Runtime | None = None
) -> Datasets:
    """Open the corpora that `config.data` names, check them, and index them in the cache.

    All ranks call it together; rank 0 fills the cache, the others then read it (or, where the disk is not shared,
    fill their own). What rank 0 finds wrong, every rank raises.

    Args:
        config: resolved.
        tokenizer: whose ids the corpora hold; None: nothing about documents' ends can be asked for.
        runtime: None: this process works alone.

    Raises:
        UserError: a file is missing, empty, corrupt or of another vocabulary; too few tokens; the cache cannot be
            written.
        ConfigError: a setting of `data` cannot work.
    """
    _check_settings(config, tokenizer)
    replicas = 1 if runtime is None else runtime.data_parallel_size
    rows = config.training.micro_batch_size * replicas if config.data.consecutive else None
    return _first_rank_first(runtime, lambda: _build(config, tokenizer, rows))


def _first_rank_first(runtime: Runtime | None, build: Callable[[], _Built]) -> _Built:
    """`build()` on rank 0, then on the others; the others raise rank 0's UserError too rather than wait for it."""
    if runtime is None or runtime.world_size == 1:
        return build()
    built: list[_Built] = []
    problem: list[str | None] = ["rank 0 failed to build the datasets"]
    if runtime.rank == 0:
        try:
            built.append(build())
            problem = [None]
        except UserError as error:
            problem = [str(error)]
            raise
        finally:
            dist.broadcast_object_list(problem, src=0)
        return built[0]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise UserError(problem[0])
    return build()


def _check_settings(config: PretrainConfig, tokenizer: Vocabulary | None) -> None:
    data = config.data
    if data.train is None:
        raise ConfigError("data.train is not set; name the prefix that tools/preprocess_data.py printed")
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} but the tokenizer {data.tokenizer or ''} has"
            f" {tokenizer.vocab_size} tokens; set model.vocab_size={tokenizer.vocab_size}"
        )
    asked = [key for key in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss") if getattr(data, key)]
    if asked and not data.prepared_rows and (tokenizer is None or tokenizer.eod_id < 0):
        raise ConfigError(f"data.{asked[0]}=true needs a tokenizer with an end-of-document token; set data.tokenizer")


def _build(config: PretrainConfig, tokenizer: Vocabulary | None, rows: int | None) -> Datasets:
    """`rows` of a micro-batch over all replicas for consecutive training data; None: shuffled."""
    data, seed = config.data, config.training.seed
    assert data.train is not None
    eod_id = -1 if tokenizer is None else tokenizer.eod_id
    corpora = [_open(source, config, eod_id) for source in parse_blend("data.train", data.train)]
    if config.tree.enabled and config.tree.value_signal == "verdicts":
        check_verdicts([corpus.source.prefix for corpus in corpora])
    cache_dir = Path(data.cache_dir) if data.cache_dir else Path(corpora[0].source.prefix).parent / "cache"
    shares = parse_split(data.split)
    notes: list[str] = []
    train: TokenSamples | ConsecutiveSegments | None
    share = shares[0] if data.valid is None else (0.0, 1.0)
    if rows is not None:
        train = _consecutive(config, corpora, share, rows, eod_id)
    else:
        train = _samples(config, Split.train, corpora, share, cache_dir, seed, notes)
    if data.valid is None:
        valid = _samples(config, Split.valid, corpora, shares[1], cache_dir, _EVALUATION_SEED, notes)
        test = _samples(config, Split.test, corpora, shares[2], cache_dir, _EVALUATION_SEED, notes)
    else:
        held_out = [_open(source, config, eod_id) for source in parse_blend("data.valid", data.valid)]
        valid = _samples(config, Split.valid, held_out, (0.0, 1.0), cache_dir, _EVALUATION_SEED, notes)
        test = None
        if data.split != DataConfig().split:
            notes.append(
                f"data.split={data.split} has no effect: data.valid is given and data.train is trained on whole"
            )
    assert train is not None, "_samples leaves out no part of the training data"
    if valid is None and config.training.evaluate_every:
        raise ConfigError(
            f"training.evaluate_every={config.training.evaluate_every} but data.split={data.split} leaves validation"
            f" less than one sequence{_few_documents(corpora, data.prepared_rows)}; raise its second share, set"
            " data.valid or training.evaluate_every=null"
        )
    split = data.split if data.valid is None else None
    identities = tuple(corpus.identity for corpus in corpora)
    fingerprint = DataFingerprint(identities, tuple(train.shares), config.training.sequence_length, split, seed, rows)
    return Datasets(train, valid, test, eod_id, fingerprint, notes)


def _few_documents(corpora: Sequence[_Corpus], prepared_rows: bool) -> str:
    """Why shares of a split may be empty, for a message; nothing where documents are many."""
    corpus = min(corpora, key=lambda corpus: len(corpus.indexed))
    if len(corpus.indexed) >= _FEW_DOCUMENTS:
        return ""
    count = len(corpus.indexed)
    if prepared_rows:
        return f", for {corpus.source.prefix} has only {count} row{'s' if count > 1 else ''}"
    return (
        f", for corpora are split between documents and {corpus.source.prefix} has only {count} (preprocess plain text"
        " with --split-documents-at blank-lines)"
    )


def _consecutive(
    config: PretrainConfig, corpora: Sequence[_Corpus], share: tuple[float, float], rows: int, eod_id: int
) -> ConsecutiveSegments:
    """Training data in order, `rows` parts of one corpus."""
    if len(corpora) > 1:
        raise ConfigError(
            f"data.consecutive=true with {len(corpora)} sources in data.train: a row reads one corpus from start to"
            " end; name one prefix"
        )
    (corpus,) = corpora
    return ConsecutiveSegments(
        corpus.indexed,
        corpus.part(*share),
        sequence_length=config.training.sequence_length,
        rows=rows,
        eod_id=eod_id,
        name=corpus.source.prefix,
    )


def _open(source: Source, config: PretrainConfig, eod_id: int) -> _Corpus:
    # Files may differ from machine to machine but not from process to process: one on each checks.
    checks = local_rank() == 0
    if checks:
        check_indexed(source.prefix)
    corpus = _Corpus(source, identify(source.prefix), IndexedDataset(source.prefix))
    if checks:
        _check_tokens(source.prefix, corpus.indexed, config.model.vocab_size)
        data = config.data
        if data.prepared_rows:
            check_rows(source.prefix, corpus.indexed, config.training.sequence_length)
        elif data.reset_position_ids or data.reset_attention_mask or data.eod_mask_loss:
            _check_ends(source.prefix, corpus.indexed, eod_id)
    return corpus


def _check_tokens(prefix: str, indexed: IndexedDataset, vocab_size: int) -> None:
    """Look at a million tokens, spread over the file, and at all of a smaller one. Batches check the rest."""
    tokens = np.memmap(f"{prefix}.bin", dtype=indexed.index.dtype, mode="r")
    for start in np.linspace(0, max(0, tokens.size - 2**14), 64, dtype=np.int64):
        window = tokens[start : start + 2**14]
        for token in (int(window.min()), int(window.max())):
            if not 0 <= token < vocab_size:
                raise UserError(
                    f"{prefix}.bin holds token {token} but model.vocab_size={vocab_size};"
                    " was it preprocessed with another tokenizer?"
                )


def _check_ends(prefix: str, indexed: IndexedDataset, eod_id: int) -> None:
    """Documents without their end would make the document settings silently mean nothing."""
    firsts = range(min(8, len(indexed)))
    if not any(indexed.get(i, offset=int(indexed.sequence_lengths[i]) - 1)[0] == eod_id for i in firsts):
        raise ConfigError(
            f"data.train: documents of {prefix} do not end with the end-of-document token {eod_id}, which data.reset_*"
            " and data.eod_mask_loss look for; preprocess with --append-eod or set them to false"
        )


def _samples(
    config: PretrainConfig,
    split: Split,
    corpora: Sequence[_Corpus],
    share: tuple[float, float],
    cache_dir: Path,
    seed: int,
    notes: list[str],
) -> TokenSamples | None:
    """The samples of one split; None where it has none. Training must have some of every corpus."""
    parts: list[PackedDocuments | PreparedRows] = []
    weights = []
    for corpus in corpora if share[1] > share[0] else []:
        part, problem = _part(config, split, corpus, corpus.part(*share), cache_dir, seed)
        if part is not None:
            parts.append(part)
            weights.append(corpus.source.weight)
        elif split is Split.train or config.data.valid is not None:
            few = _few_documents([corpus], config.data.prepared_rows)
            raise UserError(f"{problem}{few}; shorten training.sequence_length or use more data")
        else:
            notes.append(f"{problem}: left out of {split.name}")
    if not parts:
        return None
    given = [weight for weight in weights if weight is not None]
    return TokenSamples(parts, given or None, seed)


def _part(
    config: PretrainConfig, split: Split, corpus: _Corpus, documents: range, cache_dir: Path, seed: int
) -> tuple[PackedDocuments | PreparedRows | None, str]:
    """The samples of some documents of a corpus, or why there are none."""
    length, prefix = config.training.sequence_length, corpus.source.prefix
    if config.data.prepared_rows:
        rows = PreparedRows(corpus.indexed, documents, seed) if documents else None
        return rows, f"{prefix} has no row for {split.name}"
    tokens = int(corpus.indexed.sequence_lengths[documents.start : documents.stop].sum(dtype=np.int64))
    if tokens <= length:
        problem = (
            f"{prefix} has {counted(tokens, 'token', ',')} for {split.name}, fewer than one sequence and its label"
        )
        return None, f"{problem} ({length} + 1)"
    return PackedDocuments(
        corpus.indexed,
        corpus.identity,
        documents,
        split,
        sequence_length=length,
        seed=seed,
        vocab_size=config.model.vocab_size,
        cache_dir=cache_dir,
    ), ""
