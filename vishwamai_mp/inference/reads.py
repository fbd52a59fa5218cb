"""Where sequences that read one token each find their keys and values.

Shapes: B sequences, G key-value heads (local), R queries of each, K head width, T tokens of a block, S keys.
"""

import itertools
import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from vishwamai_mp.inference.blocks import BLOCK_TOKENS
from vishwamai_mp.runtime import is_accelerator

_FEWEST_KEYS_IN_PLACE = 256  # of all sequences; below, collecting them first is faster
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")  # only its pattern of places is used


def pieces(blocks: list[list[int]], kv: Tensor) -> Tensor:
    """Numbers of the pieces (T, K) of kv that these blocks of B sequences consist of, (B, G, 2, blocks)."""
    heads = kv.shape[1]
    first = torch.tensor(blocks, device=kv.device)[:, None, None] * (2 * heads)
    return first + torch.arange(2 * heads, device=kv.device).view(heads, 2, 1)


def collect(pieces: Tensor, kv: Tensor) -> Tensor:
    """Keys and values in these pieces, (B, G, 2, S, K)."""
    found = kv.view(-1, BLOCK_TOKENS * kv.shape[-1]).index_select(0, pieces.flatten())
    return found.view(*pieces.shape[:3], -1, kv.shape[-1])


def common_beginning(rows: list[list[int]]) -> list[int]:
    """What all rows begin with."""
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    return [column[0] for column in same]


@dataclass(frozen=True)
class Reads:
    """Keys of some sequences that read one token each.

    On a CPU, collecting what lies in many blocks costs more than the attention. Two operators of torch read rows where
    they lie: the product of matrices at given places, for q Kᵀ, and the weighted sum of embeddings, for the values.

    Attributes:
        rows: numbers of sequences among those that read one token, ascending.
        common: pieces of the blocks that all of them begin with, (1, G, 2, blocks), if any.
        own: of the blocks behind, as many for each, (B, G, 2, blocks).
        count: own keys, S.
        mask: (B, 1, 1, S) of own keys, where not all are seen.
        repeat: R.
        size: of kv, in rows of K.
    """

    rows: list[int]
    common: Tensor | None
    own: Tensor
    count: int
    mask: Tensor | None
    repeat: int
    size: int

    @classmethod
    def of(
        cls,
        rows: list[int],
        common: list[int],
        own: list[list[int]],
        lengths: list[int],
        window: int | None,
        repeat: int,
        kv: Tensor,
    ) -> "Reads":
        """What these rows read: all of them the blocks in `common`, then each `lengths` keys in its blocks in `own`."""
        count = max(lengths)
        window = count if window is None else window
        mask = None
        if min(lengths) < count or count > window:
            keys, length = torch.arange(count, device=kv.device), torch.tensor(lengths, device=kv.device)
            mask = ((keys < length[:, None]) & (keys >= length[:, None] - window))[:, None, None]
        widest = max(map(len, own))
        return cls(
            rows=rows,
            common=pieces([common], kv) if common else None,
            own=pieces([blocks + [blocks[0]] * (widest - len(blocks)) for blocks in own], kv),
            count=count,
            mask=mask,
            repeat=repeat,
            size=kv.numel() // kv.shape[-1],
        )

    def in_place(self, kv: Tensor) -> bool:
        """Own keys and values are better not collected."""
        if is_accelerator(kv) or kv.dtype != torch.float32:
            return False
        return len(self.rows) * self.count >= _FEWEST_KEYS_IN_PLACE

    def scores(self, q_BGRK: Tensor, kv: Tensor) -> Tensor:
        """q Kᵀ with own keys, (B, G, R, S)."""
        width = q_BGRK.shape[-1]
        table = kv.view(-1, width)
        found = torch.sparse.sampled_addmm(self._key_places, q_BGRK.reshape(-1, width), table.t(), beta=0.0)
        return found.values().view(*q_BGRK.shape[:3], -1)

    def mix(self, weights_BGRS: Tensor, kv: Tensor) -> Tensor:
        """Own values by their weights, (B, G, R, K)."""
        table, weights = kv.view(-1, kv.shape[-1]), weights_BGRS.flatten(0, 2)
        mixed = F.embedding_bag(self._places[1], table, mode="sum", per_sample_weights=weights)
        return mixed.view(*weights_BGRS.shape[:3], -1)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Rows of own keys and of own values in kv, of each query, (B·G·R, S)."""
        tokens = torch.arange(BLOCK_TOKENS, device=self.own.device)
        rows = (self.own[..., None] * BLOCK_TOKENS + tokens).flatten(-2)[..., : self.count]
        keys, values = rows[:, :, None].expand(-1, -1, self.repeat, -1, -1).flatten(0, 2).unbind(1)
        return keys, values.contiguous()

    @cached_property
    def _key_places(self) -> Tensor:
        """As a matrix with an entry at each, (B·G·R, rows of kv)."""
        keys, _ = self._places
        starts = torch.arange(len(keys) + 1) * self.count
        return torch.sparse_csr_tensor(
            starts, keys.flatten(), torch.zeros(keys.numel()), (len(keys), self.size), check_invariants=False
        )
