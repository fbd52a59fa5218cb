"""Packed documents for Transformer Engine, whose attention takes the documents' lengths and reads no boolean mask.

The rows of a micro-batch are laid end to end, one sequence of documents ("thd" in Transformer Engine's words).
Shapes: B rows, T tokens of a row, N documents of the micro-batch.
"""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from vishwamai_mp.config import ConfigError, PretrainConfig


def check_packing(config: PretrainConfig) -> None:
    """Refuse what Transformer Engine's packed attention cannot do.

    Raises:
        ConfigError: packed documents under context parallelism; rows that are to go on in the next micro-batch.
    """
    context = config.parallel.context_parallel_size
    if config.data.reset_attention_mask and context > 1:
        raise ConfigError(
            f"data.reset_attention_mask=true with parallel.context_parallel_size={context}: on Transformer Engine a"
            " document would have to be a multiple of 2 × context_parallel_size long; use context_parallel_size=1"
            " or data.reset_attention_mask=false"
        )
    for section in ("memory", "cache"):
        options = getattr(config, section)
        if options.enabled and options.carry_state:
            raise ConfigError(
                f"{section}.carry_state=true on Transformer Engine: packed attention lays the rows of a micro-batch end"
                f" to end, so none goes on in its place; set {section}.carry_state=false"
            )


def packed_documents(document_ids_BT: Tensor) -> PackedSeqParams:
    """Where documents start and end when rows are laid end to end; a row's end also ends a document.

    Args:
        document_ids_BT: integers; neighbours in a row are of one document where theirs are equal.

    Returns:
        megatron-core's parameters: `cu_seqlens_*` are (N + 1,) int32, the first token of each document and the end.
    """
    starts = torch.ones_like(document_ids_BT, dtype=torch.bool)
    starts[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    bounds = torch.nn.functional.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=starts.numel()).int()
    longest = int(bounds.diff().max())  # waits for the device, once per micro-batch: the kernels ask for a number
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
