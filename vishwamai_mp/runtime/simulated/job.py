"""One rank of a job without its device and its peers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh

from vishwamai_mp.config import PretrainConfig
from vishwamai_mp.runtime import fused_layers
from vishwamai_mp.runtime.device import compute_on
from vishwamai_mp.runtime.distributed import Runtime, initialize, shutdown
from vishwamai_mp.runtime.simulated import registration
from vishwamai_mp.runtime.simulated.recorder import Recorder


@dataclass(frozen=True)
class SimulatedJob:
    """A rank of a job and what is counted of it.

    Attributes:
        runtime: where the rank stands, as `runtime.initialize` gives it.
        recorder: memory, operations, collectives and waits.
    """

    runtime: Runtime
    recorder: Recorder


@contextmanager
def simulated_job(
    config: PretrainConfig, world_size: int, rank: int, device: str = registration.NAME
) -> Iterator[SimulatedJob]:
    """Meanwhile this process is a rank of a job, on a device without memory and values and without its peers.

    Args:
        config: resolved for `world_size`.
        world_size: ranks of the job.
        rank: which of them this is.
        device: "simulated": an accelerator; "cpu": a CPU, which has no memory of its own to wait for.

    Raises:
        ConfigError: the world does not fit the layout.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a simulated rank has a world of its own"
    registration.register()
    if fused_layers.is_doubled():
        from vishwamai_mp.runtime.simulated.transformer_engine_double.gpu import GPU
        from vishwamai_mp.runtime.simulated.transformer_engine_double.imports import forget

        assert device != "cpu", "with Transformer Engine's double megatron-core takes its optimizer on any device"
        GPU.capability = (10, 0) if config.precision in ("fp8_mx", "nvfp4") else (9, 0)  # the first generation that can
        forget()
    where = torch.device("cpu") if device == "cpu" else torch.device(device, 0)
    with ExitStack() as stack:
        stack.enter_context(compute_on(where))
        stack.enter_context(_absent_peers())
        dist.init_process_group(dist.Backend.FAKE, store=FakeStore(), rank=rank, world_size=world_size)
        stack.callback(shutdown)
        # Backward in this thread, not in one of the device's own: what that one lets go of late, at the end of the
        # process, needs an interpreter which is gone by then, and C++ aborts.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        runtime = initialize(config)
        recorder = Recorder(where, simulates=True)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_real_meshes())
        stack.enter_context(_lists_read_once(recorder))
        stack.enter_context(recorder.memory.watching())
        stack.enter_context(recorder)
        yield SimulatedJob(runtime, recorder)


@contextmanager
def _lists_read_once(recorder: Recorder) -> Iterator[None]:
    """A tensor that becomes a list is one read by the host; torch would read a fake tensor number by number."""

    def to_list(tensor: FakeTensor) -> Any:
        if tensor.device.type == recorder.device.type:
            recorder.note_wait()
        return _ones(list(tensor.shape), 1.0 if tensor.is_floating_point() else 1)

    with mock.patch.object(FakeTensor, "tolist", to_list):
        yield


def _ones(shape: list[int], one: Any) -> Any:
    return [_ones(shape[1:], one) for _ in range(shape[0])] if shape else one


@contextmanager
def _real_meshes() -> Iterator[None]:
    """A device mesh finds its place by reading numbers of the host, which therefore have to have values."""
    make = DeviceMesh.from_group

    def from_group(*args: Any, **options: Any) -> DeviceMesh:
        with unset_fake_temporarily():
            return make(*args, **options)

    with mock.patch.object(DeviceMesh, "from_group", from_group):
        yield


@contextmanager
def _absent_peers() -> Iterator[None]:
    """Objects that ranks exchange are this rank's own: the others are as it is. No group has others to find."""
    make = dist.new_group

    def gather(gathered: list[Any], own: Any, group: Any = None) -> None:
        gathered[:] = [own] * len(gathered)

    def broadcast(objects: list[Any], *_: Any, **__: Any) -> None:
        """They are there already."""

    def new_group(*args: Any, **options: Any) -> Any:
        return make(*args, **{**options, "backend": None})

    with ExitStack() as stack:
        for module in (dist, dist.distributed_c10d):
            stack.enter_context(mock.patch.object(module, "new_group", new_group))
            stack.enter_context(mock.patch.object(module, "all_gather_object", gather))
            stack.enter_context(mock.patch.object(module, "broadcast_object_list", broadcast))
        yield
