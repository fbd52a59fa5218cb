"""Small corpora for tests: `.bin/.idx` pairs written by megatron-core's own builder."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


def write_corpus(
    prefix: str | Path, documents: Iterable[Sequence[int] | np.ndarray], dtype: type[np.number] = np.uint16
) -> str:
    """Write `documents` (token ids, end-of-document tokens included) to `prefix.bin/.idx`; returns the prefix."""
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.as_tensor(np.asarray(document, dtype=np.int64)), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def random_documents(vocab_size: int, tokens: int, seed: int, eod: int = 0) -> list[np.ndarray]:
    """Documents of 8 to 120 tokens, at least `tokens` in all, each ended by `eod` and learnable.

    A chain: three times of four, a token is followed by one certain other.
    """
    rng = np.random.default_rng(seed)
    ordinary = np.setdiff1d(np.arange(vocab_size), [eod])
    successor = rng.permutation(len(ordinary))
    documents, count = [], 0
    while count < tokens:
        length = int(rng.integers(8, 121))
        chain = rng.integers(len(ordinary), size=length)
        follows = rng.random(length) < 0.75
        for i in range(1, length):
            if follows[i]:
                chain[i] = successor[chain[i - 1]]
        documents.append(np.append(ordinary[chain[:-1]], eod))
        count += length
    return documents


def tiny_corpus(folder: str | Path, vocab_size: int, tokens: int, seed: int, eod: int = 0) -> str:
    """A corpus of `random_documents` in `folder`; returns its prefix."""
    dtype = np.uint16 if vocab_size <= 2**16 else np.int32
    prefix = Path(folder) / f"tiny_{vocab_size}_{tokens}_{seed}"
    return write_corpus(prefix, random_documents(vocab_size, tokens, seed, eod), dtype)
