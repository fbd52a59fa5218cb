"""One of megatron-core's parallel linear layers on its own, forward and backward."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor


def run_sharded(
    kind: str, operands: tuple[Tensor, Tensor, Tensor], arithmetic: Callable[[Any], None], sequence_parallel: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs in a worker: this rank's y, dx and dw.

    Args:
        kind: "column" or "row".
        operands: whole x (T, B, I), w (O, I) and gradient of y (T, B, O), in the type of the layer.
        arithmetic: changes how the layer multiplies.
        sequence_parallel: whether the sequence is split too.
    """
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import TransformerConfig

    from tests.model.builds import build

    rank, size = dist.get_rank(), dist.get_world_size()
    _, runtime, _ = build(f"parallel.tensor_model_parallel_size={size}")
    x, w, grad = operands
    outputs, inputs = w.shape
    config = TransformerConfig(
        num_layers=1,
        hidden_size=inputs,
        num_attention_heads=2,
        params_dtype=w.dtype,
        perform_initialization=False,
        use_cpu_initialization=True,
        tensor_model_parallel_size=size,
        sequence_parallel=sequence_parallel,
    )
    common: dict[str, Any] = {"config": config, "init_method": lambda _: None, "bias": False, "skip_bias_add": False}
    common["tp_group"] = runtime.groups.tp
    column = kind == "column"
    layer = (
        ColumnParallelLinear(inputs, outputs, gather_output=False, **common)
        if column
        else RowParallelLinear(inputs, outputs, input_is_parallel=True, **common)
    )
    arithmetic(layer)
    layer.weight.data.copy_(w.chunk(size, 0 if column else 1)[rank])
    if column:
        x, grad = x.chunk(size, 0)[rank] if sequence_parallel else x, grad.chunk(size, -1)[rank]
    else:
        x, grad = x.chunk(size, -1)[rank], grad.chunk(size, 0)[rank] if sequence_parallel else grad
    x = x.contiguous().requires_grad_()
    y = layer(x)[0]
    y.backward(grad)
    assert x.grad is not None
    assert layer.weight.grad is not None
    return y.detach(), x.grad, layer.weight.grad
