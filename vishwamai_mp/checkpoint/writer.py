"""Writes this rank's `.distcp` files, checksummed on the way, in this process or in a forked one.

megatron-core plans who writes what; the writing itself is ours, because megatron-core's own (1) hangs when the disk
fills up while rank 0 writes `.metadata` or `common.pt`, for the other ranks wait in a collective, and when `psutil`,
which it does not require, is missing; (2) keeps one more process per rank, which imports the main program again and
outlives a killed job; (3) would have every file read again for its checksum.
"""

import gc
import mmap
import os
import pickle
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from vishwamai_mp.checkpoint.collective import Failure, attempt
from vishwamai_mp.checkpoint.manifest import FileRecord
from vishwamai_mp.runtime.failure import die_with_parent
from vishwamai_mp.runtime.megatron_versions import plan_options

_THREADS = 2  # files per rank, written at once: most of the time goes into writes and checksums, which run in parallel


@dataclass
class Written:
    """What a rank wrote: where each item lies, for `.metadata`, and its files."""

    results: list[WriteResult] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedWrite:
    """This rank's share of a save."""

    storage: Any  # megatron-core's FileSystemWriterAsync
    metadata: Metadata | None  # of the whole checkpoint; on rank 0 only
    memory: "_SharedMemory"

    @property
    def request(self) -> AsyncRequest:
        """For megatron-core's AsyncCallsQueue, which copies tensors off the device and forks."""
        buckets = self.storage.write_buckets
        if not buckets:
            return AsyncRequest(None, (), [])
        stage = partial(self.storage.preload_tensors, buckets, True)
        return AsyncRequest(_write_forked, (self.memory, buckets), [], preload_fn=stage)

    def run(self) -> None:
        """Write in this process."""
        buckets = self.storage.write_buckets
        if buckets:
            self.memory.put(attempt(partial(_write_files, self.storage.preload_tensors(buckets, True))))

    def outcome(self) -> Written | Failure:
        """What came of it, after `run` or when the forked process has ended."""
        if not self.storage.write_buckets:
            return Written()
        killed = Failure(f"the process that wrote for rank {dist.get_rank()} was killed (out of memory?)", True)
        return self.memory.get() or killed

    def write_metadata(self, results: Sequence[list[WriteResult]]) -> Metadata:
        """On rank 0, write `.metadata` from what all ranks wrote."""
        assert self.metadata is not None
        self.storage.finish(self.metadata, results)
        return self.metadata


def plan_write(sharded: ShardedStateDict, folder: Path, replicas: dist.ProcessGroup) -> PlannedWrite:
    """Agree with all ranks on who writes what into `folder`. Collective.

    Args:
        sharded: sharded tensors and objects only, factories applied.
        folder: exists.
        replicas: the data parallel ranks, which share the writing of what they hold alike.
    """
    strategy = _PlanOnly("torch_dist", 1, thread_count=_THREADS)
    shared = FullyParallelSaveStrategyWrapper(strategy, replicas) if replicas.size() > 1 else strategy
    # Anything but None keeps megatron-core from starting its extra process, for a queue that is not used here.
    queue = filesystem_async._results_queue
    filesystem_async._results_queue = queue or "unused"
    try:
        shared.async_save(sharded, str(folder), **plan_options())
    finally:
        filesystem_async._results_queue = queue
    assert strategy.planned is not None
    return strategy.planned


class _PlanOnly(TorchDistSaveShardedStrategy):
    planned: PlannedWrite | None = None

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, *_: Any) -> None:
        """megatron-core's hook between planning and writing."""
        metadata = save_state_dict_ret[1]
        if metadata is not None:
            # Every rank's plan, kept to skip planning in later runs; in large jobs it outweighs the metadata itself.
            del metadata.all_local_plans
        items = sum(len(items) for *_, kinds in writer.write_buckets for items in kinds)
        self.planned = PlannedWrite(writer, metadata, _SharedMemory((1 << 20) + (items << 12)))


def _write_forked(memory: "_SharedMemory", buckets: Sequence[Any]) -> None:
    die_with_parent()
    gc.disable()  # it would finalise the parent's tensors, and so touch its CUDA context
    memory.put(attempt(partial(_write_files, buckets)))


def _write_files(buckets: Sequence[Any]) -> Written:
    with ThreadPoolExecutor(len(buckets)) as pool:
        parts = list(pool.map(_write_file, buckets))
    written = Written()
    for (_, name, _), (results, record) in zip(buckets, parts, strict=True):
        written.results += results
        written.files[name] = record
    return written


def _write_file(bucket: Any) -> tuple[list[WriteResult], FileRecord]:
    """Write one file the way torch's FileSystemReader reads it: items one after another, each tensor a torch.save."""
    path, name, (objects, tensors) = bucket
    results = []
    with open(path, "wb") as raw:
        file = ChecksummedFile(raw)
        for item, data in [*objects, *tensors]:
            start = file.size
            if isinstance(data, torch.Tensor):
                file.save(data)
            else:
                file.write(data.getbuffer())
            length = file.size - start
            results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
        raw.flush()
        os.fsync(raw.fileno())
    return results, FileRecord(file.size, file.crc32)


class ChecksummedFile:
    """As much of a file as torch.save needs, with size and checksum of what passed."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._error: OSError | None = None
        self.size = 0
        self.crc32 = 0

    def save(self, tensor: torch.Tensor) -> None:
        try:
            torch.save(tensor, cast(BinaryIO, self))
        except RuntimeError:
            if self._error is None:
                raise
            raise self._error from None  # torch.save tells of its zip archive instead of a full disk

    def write(self, data: Any) -> int:
        try:
            self._raw.write(data)
        except OSError as error:
            self._error = error
            raise
        length = memoryview(data).nbytes
        self.size += length
        self.crc32 = zlib.crc32(data, self.crc32)
        return length

    def flush(self) -> None:
        self._raw.flush()


class _SharedMemory:
    """One value from a forked process to its parent, where a pipe would fill up and a file may find the disk full."""

    def __init__(self, capacity: int) -> None:
        self._memory = mmap.mmap(-1, capacity)  # pages that nobody writes cost nothing

    def put(self, value: Any) -> None:
        data = pickle.dumps(value)
        self._memory[8 : 8 + len(data)] = data
        self._memory[:8] = len(data).to_bytes(8, "little")  # last: the length says that the value is there

    def get(self) -> Any:
        """The value, or None."""
        length = int.from_bytes(self._memory[:8], "little")
        return pickle.loads(self._memory[8 : 8 + length]) if length else None
