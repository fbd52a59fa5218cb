"""Copies between an accelerator's memory and the host's, beside what computes."""

from typing import Any

import torch
from torch import Tensor


def sent(host: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device that nobody waits for. A GPU fetches it from pinned memory; from other memory the host
    would have to hand it over, when the GPU has done what was asked before.
    """
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


class HostCopies:
    """A stream of its own for copies of one accelerator.

    Both ways share it, so that what comes back was there. Memory is the computing stream's: a tensor may be let go
    only when that stream has waited for its copy (`wait`), which keeps the order that the allocator goes by.

    Args:
        where: the accelerator.
    """

    def __init__(self, where: torch.device) -> None:
        self._module: Any = torch.get_device_module(where.type)
        self._where, self._stream = where, self._module.Stream()

    def to_host(self, tensor: Tensor) -> Tensor:
        """Begin to copy a contiguous tensor."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._copy(host, tensor)
        return host

    def to_device(self, host: Tensor) -> Tensor:
        """Begin to copy it back."""
        tensor = torch.empty(host.shape, dtype=host.dtype, device=self._where)
        self._copy(tensor, host)
        return tensor

    def wait(self) -> None:
        """What is computed from now on waits for all copies that were begun; the host does not."""
        self._module.current_stream().wait_stream(self._stream)

    def _copy(self, target: Tensor, source: Tensor) -> None:
        self._stream.wait_stream(self._module.current_stream())
        with self._module.stream(self._stream):
            target.copy_(source, non_blocking=True)
