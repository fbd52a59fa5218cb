"""A list of latents that grows while its earlier states live on: appending copies nothing but what is appended.

Shapes: G rows × heads (local), n segments.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class SharedList:
    """Tensors (G, n, …) that grow together along n. Immutable: `append` returns a longer list.

    Lists that come from one another lie in one buffer, of which each sees its first n places. Only the longest may
    write behind its end; another that is appended to (a fork that goes its own way) gets a buffer of its own first.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._buffers = [tensor.detach() for tensor in tensors]
        self.length = tensors[0].shape[1]
        self._used = [self.length]  # places of the buffer that some list sees; one object for all that share it

    @property
    def tensors(self) -> list[Tensor]:
        """What the list holds: views, not copies."""
        return [buffer[:, : self.length] for buffer in self._buffers]

    @torch.no_grad()
    def append(self, new: Sequence[Tensor]) -> "SharedList":
        """This list with `new` (G, m, …) behind it."""
        end = self.length + new[0].shape[1]
        longer = object.__new__(SharedList)
        longer.length = end
        if self._used[0] == self.length and end <= self._buffers[0].shape[1]:
            longer._buffers, longer._used = self._buffers, self._used
            self._used[0] = end
        else:
            longer._buffers, longer._used = [_grown(tensor, end) for tensor in self.tensors], [end]
        for buffer, piece in zip(longer._buffers, new, strict=True):
            buffer[:, self.length : end] = piece
        return longer


def _grown(tensor: Tensor, needed: int) -> Tensor:
    room = max(2 * tensor.shape[1], needed, 16)
    buffer = tensor.new_empty(tensor.shape[0], room, *tensor.shape[2:])
    buffer[:, : tensor.shape[1]] = tensor
    return buffer
