"""Userbuffers: memory that tensor parallel ranks exchange through while products run, and what runs on it.

What is exchanged goes through `torch.distributed`, in the tensor parallel group, so that whoever counts collectives
counts these as those without overlap. Sizes are those of Transformer Engine's C++ sources: a buffer holds a whole
(tokens, width), on every rank.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vishwamai_mp.runtime.simulated.kernel import launch
from vishwamai_mp.runtime.simulated.registration import NAME

_MX_TILE = 128  # rows and columns that scales of MXFP8 are padded to, which pieces of a matrix cannot be


class CommOverlapHelper:
    """The process groups by which buffers find each other.

    Args:
        world: all ranks.
        domain: the tensor parallel ranks.
    """

    def __init__(self, world: dist.ProcessGroup, domain: dist.ProcessGroup) -> None:
        self.domain = domain


class CommOverlap:
    """A buffer that is exchanged whole beside a product, or in strips that follow each other (`num_splits`)."""

    def __init__(
        self,
        buffer_shape: list[int],
        buffer_dtype: torch.dtype,
        helper: CommOverlapHelper,
        tp_size: int,
        use_cublasmp: bool = False,
        comm_type: Any = 0,
        num_splits: int = 4,
        **_: Any,
    ) -> None:
        from megatron.core.parallel_state import get_tensor_model_parallel_group

        if use_cublasmp:
            raise NotImplementedError("cuBLASMp is no part of the simulation of Transformer Engine")
        self.group = get_tensor_model_parallel_group()
        if dist.get_process_group_ranks(self.group) != dist.get_process_group_ranks(helper.domain):
            raise RuntimeError("userbuffers: tensor parallel ranks do not follow each other")
        self.pieces, self.ranks = num_splits, tp_size
        self.whole = torch.empty(buffer_shape, dtype=buffer_dtype, device=NAME)
        self.own = self.whole.chunk(tp_size)[self.group.rank()]

    def copy_into_buffer(self, input: Tensor, local_chunk: bool = False) -> None:
        """By a copy of the device."""
        place = self.own if local_chunk else self.whole
        if input.numel() != place.numel() or input.element_size() != place.element_size():
            raise RuntimeError(f"userbuffers: {list(input.shape)} {input.dtype} into {list(place.shape)} {place.dtype}")
        launch("copy_into_buffer", input, place)

    def get_buffer(self, local_chunk: bool = False, shape: list[int] | None = None) -> Tensor:
        """The buffer, or the part of this rank, as the tensor that it is."""
        place = self.own if local_chunk else self.whole
        return place if shape is None else place.view(list(shape))

    def get_communication_stream(self) -> tuple[None, None]:
        """All work is done at once and in order."""
        return None, None

    def is_fp8_ubuf(self) -> bool:
        return self.whole.element_size() == 1

    def with_cublasmp(self) -> bool:
        return False

    def gather(self) -> None:
        """Each rank's part to all."""
        dist.all_gather_into_tensor(self.whole, self.own, group=self.group)

    def scatter_sums(self, output: Tensor) -> None:
        """Sums over ranks of this rank's part, into `output`. The kernels add numbers of 16 bits, as bf16."""
        if self.whole.dtype != torch.bfloat16:
            raise RuntimeError(f"userbuffers: sums are bf16, not {self.whole.dtype}")
        if output.numel() != self.own.numel():
            raise RuntimeError(f"userbuffers: the output is {list(output.shape)} of {list(self.own.shape)}")
        dist.reduce_scatter_tensor(output.view_as(self.own), self.whole, group=self.group)


class CommOverlapP2P(CommOverlap):
    """A buffer whose parts go round: as many pieces as ranks."""

    def __init__(
        self,
        buffer_shape: list[int],
        buffer_dtype: torch.dtype,
        helper: CommOverlapHelper,
        tp_size: int,
        comm_type: Any,
        **options: Any,
    ) -> None:
        if comm_type.name != "AG":
            raise NotImplementedError("sums that go round are no part of the simulation of Transformer Engine")
        super().__init__(buffer_shape, buffer_dtype, helper, tp_size, **{**options, "num_splits": tp_size})


def exchange(
    overlap: CommOverlap,
    kind: Any,
    bulk: bool,
    operands: tuple[Any, Any],
    transposed: bool,
    extra_output: Tensor | None,
) -> int:
    """What is exchanged beside a product.

    Args:
        overlap: the buffer.
        kind: `CommOverlapType`.
        bulk: it has nothing to do with the product.
        operands: A and B of the product.
        transposed: A is.
        extra_output: where sums go that the product made.

    Returns:
        pieces that the product is cut into.
    """
    if bulk:
        if kind.name == "AG":
            overlap.gather()
        else:
            overlap.scatter_sums(overlap.own)
        return 1
    a, b = operands
    if kind.name == "AG":
        codes = _codes(b)
        if codes.untyped_storage()._cdata != overlap.whole.untyped_storage()._cdata:
            raise RuntimeError("userbuffers: what is gathered beside a product lies elsewhere")
        _check_piece(b, [overlap.whole.shape[0] // overlap.pieces, overlap.whole.shape[1]])
        overlap.gather()
        return overlap.pieces
    assert extra_output is not None
    rows, columns = a.size() if transposed else reversed(a.size())
    if rows % overlap.pieces or math.prod(b.size()[:-1]) * rows != overlap.whole.numel():
        raise RuntimeError(f"userbuffers: {list(a.size())} is not cut into {overlap.pieces} for {overlap.whole.shape}")
    _check_piece(a, [rows // overlap.pieces, columns])
    overlap.scatter_sums(extra_output)
    return overlap.pieces


def _codes(operand: Any) -> Tensor:
    """Of a quantized matrix that was copied into a buffer in one direction, or the matrix."""
    held = operand.get_metadata() if hasattr(operand, "get_metadata") else {"data": operand}
    return next(held[name] for name in ("data", "rowwise_data", "columnwise_data") if held.get(name) is not None)


def _check_piece(operand: Any, shape: list[int]) -> None:
    kind = type(operand).__name__
    if kind.startswith("MXFP8") and any(size % _MX_TILE for size in shape):
        raise RuntimeError(f"Userbuffers requires MXFP8 tensor chunk dims divisible by {_MX_TILE}, not {shape}")
    if hasattr(operand, "get_metadata") and not kind.startswith(("MXFP8", "Float8Tensor")):
        raise RuntimeError(f"userbuffers: unsupported tensor format: {kind}")


def bulk_overlap_ag_with_external_gemm(allgather_communicator: CommOverlap, send_stream: Any, recv_stream: Any) -> None:
    """Gathered beside a product that has been launched."""
    allgather_communicator.gather()
