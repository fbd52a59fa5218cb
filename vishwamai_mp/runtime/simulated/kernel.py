"""What a kernel is to the simulation: a name, the tensors it reads and writes, and how much it multiplies."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vishwamai_mp.runtime.simulated.registration import NAME

NAMESPACE = "simulated_accelerator"
_library = torch.library.Library(NAMESPACE, "DEF")
# An operator, so that the recorder sees it where it sees all others: at torch's dispatcher.
_library.define("kernel(str name, Tensor[] tensors, Tensor[] workspaces, int flops) -> ()")

DTYPES = {0: torch.uint8, 2: torch.int32, 4: torch.float32, 5: torch.float16, 6: torch.bfloat16}  # by `DType`


def launch(name: str, *arguments: Any, workspaces: Sequence[Tensor] = (), flops: int = 0) -> None:
    """A kernel runs on what `arguments` hold.

    Args:
        name: of the kernel, or of the function of `transformer_engine_torch` that runs it.
        arguments: tensors, quantized tensors, or None.
        workspaces: what libraries keep for themselves from call to call.
        flops: of its matrix products; a multiply-add counts as two.

    Raises:
        RuntimeError: a tensor is not on the accelerator.
    """
    tensors = [tensor for argument in arguments for tensor in parts(argument)]
    for tensor in tensors:
        if tensor.device.type != NAME:
            raise RuntimeError(f"{name}: expected tensors of the accelerator, got one of {tensor.device}")
    torch.ops.simulated_accelerator.kernel(name, tensors, list(workspaces), flops)


def parts(tensor: Any) -> list[Tensor]:
    """The plain tensors that one consists of: itself, or codes and scales of a quantized one."""
    if tensor is None:
        return []
    held = tensor.get_metadata().values() if hasattr(tensor, "get_metadata") else [tensor]
    return [part for part in held if isinstance(part, Tensor)]


def shape_of(tensor: Any) -> list[int]:
    """Of a tensor, or of the matrix that a quantized one stands for."""
    if hasattr(tensor, "_fp4_dtype") and tensor._rowwise_data is None:  # its own size() warns that it has to guess
        columns, pairs = tensor._columnwise_data.shape
        return [2 * pairs, columns]
    return list(tensor.size())
