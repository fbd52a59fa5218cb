"""Kernels over lists of tensors: Adam, norms, scaling. They run in as many launches as it takes; here it is one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vishwamai_mp.runtime.simulated.kernel import launch

Lists = Sequence[Sequence[Tensor]]


def multi_tensor_adam(chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, *options: Any) -> None:
    """Gradients, parameters, first and second moments, and where there are fp32 copies of parameters, these."""
    _check("multi_tensor_adam", tensor_lists, (4, 5))
    launch("multi_tensor_adam", noop_flag, *_all(tensor_lists))


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, per_tensor: bool | None = False
) -> tuple[Tensor, Tensor]:
    """The 2-norm of all together, and with `per_tensor` of each, fp32."""
    _check("multi_tensor_l2norm", tensor_lists, (1,))
    where = noop_flag.device
    partial = torch.zeros(320, dtype=torch.float32, device=where)  # of the blocks of threads
    norm = torch.empty(1, dtype=torch.float32, device=where)
    each = torch.empty(len(tensor_lists[0]) if per_tensor else 0, dtype=torch.float32, device=where)
    launch("multi_tensor_l2norm", noop_flag, partial, norm, each, *_all(tensor_lists))
    return norm, each


def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, scale: float) -> None:
    """The first list times a number, into the second."""
    _check("multi_tensor_scale", tensor_lists, (2,))
    launch("multi_tensor_scale", noop_flag, *_all(tensor_lists))


def multi_tensor_compute_scale_and_scale_inv(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Lists,
    max_fp8: float,
    force_pow_2_scales: bool = False,
    epsilon: float = 0.0,
) -> None:
    """From amaxes: scales and their inverses."""
    _check("multi_tensor_compute_scale_and_scale_inv", tensor_lists, (3,))
    launch("multi_tensor_compute_scale_and_scale_inv", noop_flag, *_all(tensor_lists))


def _check(name: str, tensor_lists: Lists, counts: tuple[int, ...]) -> None:
    lengths = {len(tensors) for tensors in tensor_lists}
    if len(tensor_lists) not in counts or len(lengths) != 1 or lengths == {0}:
        raise RuntimeError(f"{name}: {[len(tensors) for tensors in tensor_lists]} tensors in lists")
    for tensors in zip(*tensor_lists, strict=True):
        if len({tensor.numel() for tensor in tensors}) != 1:
            raise RuntimeError(f"{name}: sizes {[list(tensor.shape) for tensor in tensors]} differ")


def _all(tensor_lists: Lists) -> list[Tensor]:
    return [tensor for tensors in tensor_lists for tensor in tensors]
