"""State that lives from micro-batch to micro-batch of training: segments of one long document in the same row.

Shapes: B rows of a micro-batch.
"""

from collections import deque
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig


class CarriedState:
    """What the rows of the last micro-batch left behind, without gradients.

    Pipeline schedules run a stage's forward passes in the order of the micro-batches and its backward passes too, but
    intertwined. Where layers are recomputed in backward, each pass must find again what its first run found: those
    wait here in a queue.
    """

    def __init__(self, megatron: TransformerConfig) -> None:
        self._recomputes = megatron.recompute_granularity == "full"
        self._state: Any = None
        self._awaiting: deque[Any] = deque()
        self._again = False  # whether this pass is a layer's second, in backward

    def reset(self) -> None:
        """Begin anew: the next rows find nothing."""
        self._state = None
        self._awaiting.clear()

    def before(self, rows: int) -> Any:
        """The state that this pass starts from; None where there is none, or of another number of rows."""
        # First passes of recomputed layers run without gradients; of the other layers none is queued.
        self._again = torch.is_grad_enabled() and bool(self._awaiting)
        if self._again:
            return self._awaiting.popleft()
        state = self._state if self._state is not None and self._state.recent.shape[1] == rows else None
        if self._recomputes and not torch.is_grad_enabled():
            self._awaiting.append(state)
        return state

    def keep(self, after: Any) -> None:
        """What this pass ended with."""
        if not self._again:
            self._state = after.detached()
