"""One item of a user's dataset as token ids and what of them is learnt.

Shapes: T tokens of a sequence.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from vishwamai_mp.config import ConfigError, UserError
from vishwamai_mp.data.marks import LEARNT
from vishwamai_mp.data.tokenizer import Tokenizer

_IGNORED = -100  # as a label: no loss on predicting this token (Hugging Face's and torch's convention)


class ItemEncoder:
    """Turns items into rows of int64 [2, T + 1]: token ids, and marks, `LEARNT` where a token's prediction counts.

    An item is token ids (a list, an array, a tensor), a text, or a mapping with `input_ids` (and `labels` as long as
    these, with -100 where no loss counts; and `attention_mask`, 0 at padding) or with `text`. An item is a row: what
    is shorter is filled up, what is longer than T + 1 is cut, and `longest` knows of it.

    Args:
        sequence_length: T.
        vocab_size: ids are below it.
        tokenizer: for texts, which get its end-of-document token behind them.
    """

    def __init__(self, sequence_length: int, vocab_size: int, tokenizer: Tokenizer | None) -> None:
        self.sequence_length, self.vocab_size, self.tokenizer = sequence_length, vocab_size, tokenizer
        self.fill = max(0, tokenizer.eod_id) if tokenizer else 0

    def row(self, item: Any, where: str) -> torch.Tensor:
        """The row of an item.

        Raises:
            UserError: it is none of these, or holds ids outside the vocabulary; `where` says which it is.
        """
        ids, learnt = self._read(item, where)
        wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
        if len(wrong):
            raise UserError(
                f"{where} holds token {int(wrong[0])} but model.vocab_size={self.vocab_size};"
                " was it made with another tokenizer?"
            )
        row = self.empty()
        count = min(len(ids), self.sequence_length + 1)
        row[0, :count] = ids[:count]
        row[1, :count] = learnt[:count] * LEARNT
        return row

    def empty(self) -> torch.Tensor:
        """A row of which nothing is learnt."""
        row = torch.zeros(2, self.sequence_length + 1, dtype=torch.int64)
        row[0] = self.fill
        return row

    def length(self, item: Any, where: str) -> int:
        """Tokens of an item."""
        return len(self._read(item, where)[0])

    def _read(self, item: Any, where: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids, and 1 where predicting them counts."""
        if isinstance(item, Mapping):
            return self._read_mapping(item, where)
        if isinstance(item, str):
            ids = self._encode(item, where)
        elif isinstance(item, Sequence | np.ndarray | torch.Tensor):
            ids = _integers(item, where)
        else:
            raise UserError(f"{where} is a {type(item).__name__}; use token ids, a text, or a dict of either")
        return ids, torch.ones_like(ids)

    def _read_mapping(self, item: Mapping[str, Any], where: str) -> tuple[torch.Tensor, torch.Tensor]:
        if "input_ids" not in item:
            if isinstance(item.get("text"), str):
                return self._read(item["text"], where)
            raise UserError(f"{where} has neither 'input_ids' nor a 'text' (keys: {', '.join(map(str, item))})")
        ids = _integers(item["input_ids"], where)
        labels = _beside(item, "labels", ids, where)
        attended = _beside(item, "attention_mask", torch.ones_like(ids), where) != 0
        learnt = labels != _IGNORED
        if not torch.equal(labels[learnt], ids[learnt]):
            raise UserError(f"{where}: labels are neither -100 nor the input_ids; they are not to be shifted")
        return ids[attended], learnt[attended].long()

    def _encode(self, text: str, where: str) -> torch.Tensor:
        if self.tokenizer is None:
            raise ConfigError(f"{where} is a text, which needs a tokenizer; set data.tokenizer in the configuration")
        end = [self.tokenizer.eod_id] if self.tokenizer.eod_id >= 0 else []
        return torch.tensor(self.tokenizer.encode(text) + end, dtype=torch.int64)


def _beside(item: Mapping[str, Any], key: str, default: torch.Tensor, where: str) -> torch.Tensor:
    """What stands under `key`, as long as the `default` that is taken where there is nothing."""
    if item.get(key) is None:
        return default
    given = _integers(item[key], where)
    if len(given) != len(default):
        raise UserError(f"{where}: {len(given)} {key} for {len(default)} input_ids; they must be as many")
    return given


def _integers(values: Any, where: str) -> torch.Tensor:
    try:
        found = torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError):
        found = torch.zeros(0, 0)
    if found.dim() != 1 or found.is_floating_point() or found.is_complex():
        raise UserError(f"{where} is no list of token ids; use one of integers, a text, or a dict of either")
    return found.long()
