"""Rows that `prepare` wrote, as training samples: tokens, and beside them a mark for each.

Shapes: T tokens of a sequence.
"""

from collections.abc import Sequence

import numpy as np
import torch

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)
from vishwamai_mp.config import ConfigError, UserError
from vishwamai_mp.data.indexed import check_indexed
from vishwamai_mp.data.marks import JUDGED, SUFFIX
from vishwamai_mp.data.order import permute

# isort: split
from megatron.core.datasets.indexed_dataset import IndexedDataset

_AT_ONCE = 1 << 24  # marks looked through


class PreparedRows:
    """Some rows of one corpus, shuffled: one epoch.

    Args:
        corpus: the opened tokens.
        documents: the rows to read, of those that the file has.
        seed: of the shuffle.
    """

    def __init__(self, corpus: IndexedDataset, documents: range, seed: int) -> None:
        self._tokens, self._marks = corpus, IndexedDataset(corpus.path_prefix + SUFFIX)
        self._documents, self._seed = documents, seed

    def __len__(self) -> int:
        return len(self._documents)

    def text(self, index: int) -> torch.Tensor:
        """Tokens and marks of sample `index`, int64 [2, T + 1]."""
        row = self._documents[permute(index, len(self), self._seed)]
        return torch.from_numpy(np.stack([self._tokens.get(row), self._marks.get(row)]).astype(np.int64))


def check_rows(prefix: str, corpus: IndexedDataset, sequence_length: int) -> None:
    """Check that a corpus consists of rows of `sequence_length` + 1 tokens with marks.

    Raises:
        UserError: says what to do.
    """
    check_indexed(prefix + SUFFIX)
    marks = IndexedDataset(prefix + SUFFIX)  # held: its lengths are a view of its mapping
    lengths = corpus.sequence_lengths
    if np.any(lengths != lengths[0]):
        raise UserError(f"{prefix} holds no prepared rows: make them with tools/prepare_chat_data.py")
    if lengths[0] != sequence_length + 1:
        raise UserError(
            f"{prefix} was prepared with --sequence-length {lengths[0] - 1} but training.sequence_length="
            f"{sequence_length}; set one to the other"
        )
    if not np.array_equal(lengths, marks.sequence_lengths):
        raise UserError(f"{prefix}{SUFFIX} does not belong to {prefix}: prepare both again")


def check_verdicts(prefixes: Sequence[str]) -> None:
    """Check that rows of some corpus have verdicts; the others may be there for the language model alone.

    Raises:
        ConfigError: values would learn nothing.
    """
    for prefix in prefixes:
        marks = np.memmap(f"{prefix}{SUFFIX}.bin", dtype=np.uint8, mode="r")
        if any(np.any(marks[start : start + _AT_ONCE] & JUDGED) for start in range(0, len(marks), _AT_ONCE)):
            return
    raise ConfigError(
        f"tree.value_signal=verdicts but there are none in data.train ({', '.join(prefixes)}); add rows of"
        " vishwamai_mp.tree_of_thoughts.write_rollouts, or set tree.value_signal=likelihood"
    )
