"""Documents in their order, for a state that is carried from micro-batch to micro-batch.

The corpus is one stream of tokens, cut into as many equal parts as there are rows in a micro-batch over all replicas.
Each row reads its own part from start to end: its segment in one micro-batch goes on in the same row of the next.

Shapes: T tokens of a segment.
"""

import numpy as np
import torch

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)
from vishwamai_mp.config import UserError

# isort: split
from megatron.core.datasets.indexed_dataset import IndexedDataset


class ConsecutiveSegments(torch.utils.data.Dataset):
    """Endless segments: number n is segment n // rows of row n % rows; after its last, a row begins anew.

    Segments are int64 [T + 2]: the token before, `eod_id` at the start of a row's part; T tokens; and the last label.
    """

    def __init__(
        self, corpus: IndexedDataset, documents: range, *, sequence_length: int, rows: int, eod_id: int, name: str
    ) -> None:
        """Lay out the rows.

        Args:
            corpus: the opened `.bin/.idx`.
            documents: the part of its documents to read.
            sequence_length: T.
            rows: of a micro-batch, over all replicas.
            eod_id: the token that ends documents.
            name: of the corpus, for messages.

        Raises:
            UserError: less than one segment for each row.
        """
        self._corpus, self._first, self._length = corpus, documents.start, sequence_length
        self._rows, self._eod_id = rows, eod_id
        lengths = corpus.sequence_lengths[documents.start : documents.stop]
        self._ends = np.cumsum(lengths, dtype=np.int64)
        tokens = int(self._ends[-1]) if len(self._ends) else 0
        self._part = tokens // rows
        self._segments = (self._part - 1) // sequence_length
        if self._segments < 1:
            raise UserError(
                f"{name} has {tokens:,} tokens for training: less than one sequence of {sequence_length} and its label"
                f" for each of {rows} rows (data.consecutive=true); use more data or shorten training.sequence_length"
            )

    def __getitem__(self, index: int) -> torch.Tensor:
        row, segment = index % self._rows, index // self._rows % self._segments
        start = row * self._part + segment * self._length
        tokens = self._tokens(max(0, start - 1), start + self._length + 1)
        if start == 0:
            tokens = np.concatenate(([self._eod_id], tokens))
        elif segment == 0:
            tokens[0] = self._eod_id
        return torch.from_numpy(tokens)

    def _tokens(self, start: int, stop: int) -> np.ndarray:
        """Of the stream of all documents."""
        parts = []
        document = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = int(self._ends[document])
            begin = end - int(self._corpus.sequence_lengths[self._first + document])
            count = min(stop, end) - start
            parts.append(self._corpus.get(self._first + document, offset=start - begin, length=count))
            start += count
            document += 1
        return np.concatenate(parts).astype(np.int64)

    @property
    def sizes(self) -> list[int]:
        """Segments in one epoch of the one corpus."""
        return [self._rows * self._segments]

    @property
    def samples_per_epoch(self) -> int:
        return self.sizes[0]

    @property
    def shares(self) -> list[float]:
        return [1.0]
