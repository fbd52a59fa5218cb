"""Buffers through which tensor parallel ranks exchange while products run: Transformer Engine's userbuffers."""

import contextlib
import os
import sys
from collections.abc import Sequence

import torch

from vishwamai_mp.config import UserError

_SKIP_MULTICAST = "UB_SKIPMC"  # Transformer Engine's own word for: over CUDA's IPC


def open_exchange_buffers(shape: Sequence[int], ranks: int, dtype: torch.dtype, in_fp8: bool) -> None:
    """Make the buffers of this process, in the place of those that it had. Every rank of the job has to come.

    They are Transformer Engine's and the process's: twelve, one for each product of a layer that something is
    exchanged beside, whichever layer it is.

    Args:
        shape: (tokens of a micro-batch on a context parallel rank, width).
        ranks: tensor parallel, which follow each other in the world.
        dtype: of what is summed, and of what is gathered except `in_fp8`.
        in_fp8: products of 8 bits: what is gathered is, too.

    Raises:
        UserError: the hardware has no multicast.
    """
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.module import base

    if not tex.device_supports_multicast() and os.environ.get(_SKIP_MULTICAST, "0") == "0":
        raise UserError(
            "parallel.overlap_tensor_parallel=true: this GPU or its driver has no multicast between GPUs; set it to"
            f" false, or {_SKIP_MULTICAST}=1 in the environment to exchange by CUDA's IPC"
        )
    close_exchange_buffers()
    modes = base.UserBufferQuantizationMode
    # Gloo, which finds the peers' memory once: communicators of NCCL would take the device's for that.
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it makes
        base.initialize_ub(
            list(shape),
            ranks,
            quantization_modes=[modes.FP8 if in_fp8 else modes.NONE],
            dtype=dtype,
            bootstrap_backend="gloo",
        )


def close_exchange_buffers() -> None:
    """Give the buffers back, if there are any. Before the process groups go."""
    base = sys.modules.get("transformer_engine.pytorch.module.base")
    if base is not None and base.is_ub_initialized():
        base.destroy_ub()
