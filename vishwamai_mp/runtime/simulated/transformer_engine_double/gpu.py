"""The GPU that Transformer Engine's Python asks about and schedules work on."""

import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vishwamai_mp.runtime.megatron_cpu import InPlaceOfCuda
from vishwamai_mp.runtime.simulated.registration import NAME


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        """There is no work to wait for."""

    def record(self, stream: Any = None) -> None:
        """All work is done at once."""

    def wait(self, stream: Any = None) -> None:
        """All work is done at once."""


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        """All work is done at once and in order, whatever stream it is given to."""

    def wait_stream(self, stream: Any) -> None:
        """It is done."""

    def wait_event(self, event: _Event) -> None:
        """It is done."""

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


class _Generator:
    """The random numbers of a GPU, of which the simulation draws none."""

    def get_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_state(self, state: Tensor) -> None:
        """There is no state."""

    graphsafe_get_state = clone_state = get_state
    graphsafe_set_state = set_state


class _Generators:
    def __getitem__(self, _: Any) -> _Generator:
        return _Generator()


class Gpu(InPlaceOfCuda):
    """What `torch.cuda` means inside Transformer Engine.

    Attributes:
        capability: compute capability: (9, 0) is a Hopper, (10, 0) a Blackwell.
        version: of CUDA.
    """

    Event, Stream = _Event, _Stream
    default_generators = _Generators()
    capability = (9, 0)
    version = "13.0"

    @staticmethod
    def is_available() -> bool:
        return True

    def get_device_capability(self, _: Any = None) -> tuple[int, int]:
        return self.capability

    def get_device_properties(self, _: Any = None) -> types.SimpleNamespace:
        major, minor = self.capability
        return types.SimpleNamespace(major=major, minor=minor, multi_processor_count=132 if major == 9 else 148)

    @staticmethod
    def current_stream(_: Any = None) -> _Stream:
        return _Stream()

    @staticmethod
    def stream(_: Any) -> AbstractContextManager:
        return nullcontext()

    @staticmethod
    def is_current_stream_capturing() -> bool:
        return torch.get_device_module(NAME).is_current_stream_capturing()

    @staticmethod
    def _lazy_init() -> None:
        """There is no CUDA to start."""

    @staticmethod
    def _lazy_call(function: Callable[[], None]) -> None:
        function()

    @staticmethod
    def is_here(tensor: Tensor) -> bool:
        """`tensor.is_cuda`."""
        return tensor.device.type == NAME

    @staticmethod
    def kind(tensor: Any) -> type:
        """`type(tensor)`: a tensor without values is one of torch's own to it."""
        return Tensor if type(tensor) is FakeTensor else type(tensor)

    @staticmethod
    def operate(operator: Callable[..., Any], arguments: Sequence[Any], options: dict[str, Any] | None = None) -> Any:
        """`part.__torch_dispatch__(operator, types, …)`: a tensor without values would refuse the whole's type."""
        return operator(*arguments, **(options or {}))

    @staticmethod
    def address(memory: Any) -> int:
        """`data_ptr()` of a tensor or storage: it only asks which share memory, and where in it they lie."""
        if isinstance(memory, Tensor):
            return memory.untyped_storage()._cdata + memory.storage_offset() * memory.element_size()
        return memory._cdata


GPU = Gpu("simulated_gpu")
