"""The device named "simulated": registered with torch, and its fused attention."""

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NAME = "simulated"
_OF_GRAPHS = {"CUDAGraph", "graph", "graph_pool_handle", "is_current_stream_capturing"}
_kernels: list[torch.library.Library] = []  # alive as long as the process


class _Module:
    """What `torch.simulated` is: torch.cpu, whose streams and events are no-ops, with one device that is there."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """There are no random numbers to seed."""

    @staticmethod
    def get_rng_state(*_: Any) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    @staticmethod
    def set_rng_state(*_: Any) -> None:
        _graphs().refuse_in_capture("the state of random numbers is set")

    @staticmethod
    def synchronize(*_: Any) -> None:
        _graphs().refuse_in_capture("the host waits for the device")

    def __getattr__(self, name: str) -> Any:
        return getattr(_graphs() if name in _OF_GRAPHS else torch.cpu, name)


def _graphs() -> Any:
    from vishwamai_mp.runtime.simulated import graphs  # which needs what counts, and that this device's name

    return graphs


@cache
def register() -> None:
    """Make the device known to torch, for the rest of this process."""
    # The example of a backend in Python that torch's own tests use; torch has no other way to a device without C++.
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  (registers the backend)
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) makes a tensor of the host and copies it
    dist.Backend.backend_capability[dist.Backend.FAKE].append(NAME)
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
    library.impl("scaled_dot_product_attention", _attention, "PrivateUse1")
    _kernels.append(library)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that torch would choose on a GPU: flash attention, or the memory-efficient one for fp32 and masks.

    Left to itself, torch would take its attention for devices without a kernel, which keeps all weights.
    """
    if attn_mask is None and query.element_size() == 2:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[
            0
        ]
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]
