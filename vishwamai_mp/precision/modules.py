"""The module classes that a backend offers to the components inside a layer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Linears:
    """Classes of one backend: megatron-core's own, their emulation of FP8, or Transformer Engine's.

    Attributes:
        column: linear whose output features are split over tensor parallel ranks.
        row: linear whose input features are.
        norm: RMSNorm over the hidden size, aware of sequence parallelism.
    """

    column: type
    row: type
    norm: type
