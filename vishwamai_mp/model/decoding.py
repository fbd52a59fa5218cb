"""A model as generation runs it, also while it is trained in another way."""

from types import TracebackType
from typing import Any

from torch import nn

# What splits the tokens over tensor parallel ranks, in megatron-core's names, or sums them beside a product, in
# Transformer Engine's: new tokens are too few and too uneven for that. And FP8: its scales would make a text depend on
# what else is generated, so generation computes in bf16.
_SWITCHES = (
    "sequence_parallel",
    "scatter_to_sequence_parallel",
    "reduce_scatter_embeddings",
    "ub_overlap_ag_fprop",
    "ub_overlap_rs_fprop",
    "emulates_fp8",
)


class Decoding:
    """Inside `with decoding:` a model reads tokens without sequence parallelism and without emulated FP8.

    It is left in evaluation mode. Transformer Engine's layers compute in FP8 only inside its context, which generation
    does not enter.

    Args:
        model: a pipeline stage.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        owners: list[Any] = [*model.modules(), model.config]
        self._on = [(owner, name) for owner in owners for name in _SWITCHES if getattr(owner, name, None) is True]

    def __enter__(self) -> None:
        if self._model.training:
            self._model.eval()
        self._set(False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._set(True)

    def _set(self, value: bool) -> None:
        for owner, name in self._on:
            setattr(owner, name, value)
