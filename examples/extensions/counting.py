"""`data.source=examples.extensions.counting:counting`: rows that count, made as they are asked for.

What a source returns is what `train_dataset` and `eval_dataset` of `VishwamAIPretrainer` may be: datasets with `len()`
and items of token ids or texts, shuffled by `training.seed`, or an iterable, read in its own order.
"""

from vishwamai_mp.config import PretrainConfig
from vishwamai_mp.data.tokenizer import Tokenizer


class Counting:
    """Row n counts on from n, modulo the vocabulary."""

    def __init__(self, rows: int, length: int, vocab_size: int) -> None:
        self.rows, self.length, self.vocab_size = rows, length, vocab_size

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> list[int]:
        return [(index + place) % self.vocab_size for place in range(self.length)]


def counting(config: PretrainConfig, tokenizer: Tokenizer | None) -> tuple[Counting, Counting]:
    """Datasets for training and for validation (None: none). Called on every rank; all must make the same."""
    length, vocab_size = config.training.sequence_length + 1, config.model.vocab_size
    return Counting(vocab_size, length, vocab_size), Counting(8, length, vocab_size)
