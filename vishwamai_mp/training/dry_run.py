"""One training step of any rank of a job, on a simulated device: what the rank needs and does, found out in seconds."""

import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from vishwamai_mp.config import PretrainConfig, UserError, micro_batches_per_step
from vishwamai_mp.config.wording import counted
from vishwamai_mp.data.batches import Batch, DocumentRules, make_batch
from vishwamai_mp.model import build_model
from vishwamai_mp.model.fully_sharded import FullySharded
from vishwamai_mp.model.layer import VishwamAILayer
from vishwamai_mp.model.masks import DocumentBounds, document_bounds
from vishwamai_mp.planning.flops import stage_flops
from vishwamai_mp.planning.footprint import stage_footprint
from vishwamai_mp.planning.footprint_advice import advice, size_text, stage_memory
from vishwamai_mp.planning.hardware import Gpu
from vishwamai_mp.precision import PrecisionPolicy, use_transformer_engine
from vishwamai_mp.runtime.fused_layers import is_doubled
from vishwamai_mp.runtime.simulated import Communication, SimulatedJob, simulated_job
from vishwamai_mp.runtime.simulated.kernel import parts
from vishwamai_mp.training.compact_adamw import fill_moments
from vishwamai_mp.training.graphed_layers import note_on_graphs
from vishwamai_mp.training.optimizer import build_optimizer, wrap_data_parallel
from vishwamai_mp.training.step import TrainStep


@dataclass(frozen=True)
class DryRun:
    """A step of one rank.

    Attributes:
        rank: which.
        world_size: of how many.
        stage: its pipeline stage, from 0.
        place: its place in the layout, in words.
        layers: whose they were: "Transformer Engine" or "torch".
        parameters: that it holds.
        peak_bytes: most memory in use at once: tensors, without the allocator's slack, libraries and buffers of theirs.
        at_peak: what that consisted of: parameters, gradients, optimizer, activations.
        activations_at_peak: what the activations among it consisted of, by class of the module that made them.
        course: bytes in use in the course of the step, the most in each of some hundred equal spans of allocations.
        standing_bytes: memory in use before the step.
        predicted_bytes: the peak from `planning`, which runs nothing.
        updated: whether the step ran to its end.
        flops: of matrix products and attention, of all pairs of tokens; a multiply-add counts as two.
        predicted_flops: the same from `planning`.
        launches: kernels, counted as operators, and CUDA graphs.
        graphs: of the launches, those of graphs.
        kernels_in_graphs: that these launch.
        launches_by_part: of them, those in forward passes, made again or not, by class of the part of a layer; "none"
            are outside layers and in backward passes.
        host_waits: reads of the device by the host, by place in the program.
        host_copies: copies of the host's tensors to the device, by place.
        collectives: what was exchanged, by operation and group.
        notes: what was done otherwise than asked.
        seconds: that the simulation took.
        host_bytes: the most memory that this process has held.
    """

    rank: int
    world_size: int
    stage: int
    place: str
    layers: str
    parameters: int
    peak_bytes: int
    at_peak: dict[str, int]
    activations_at_peak: dict[str, int]
    course: list[int]
    standing_bytes: int
    predicted_bytes: int
    updated: bool
    flops: int
    predicted_flops: int
    launches: int
    graphs: int
    kernels_in_graphs: int
    launches_by_part: dict[str, int]
    host_waits: dict[str, int]
    host_copies: dict[str, int]
    collectives: list[Communication]
    notes: list[str]
    seconds: float
    host_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def dry_run(config: PretrainConfig, world_size: int, rank: int, device: str = "simulated") -> DryRun:
    """Run a step of a job on rank `rank`, as any after the first: the optimizer has its state.

    Args:
        config: resolved for `world_size`.
        world_size: ranks of the job.
        rank: one of them.
        device: as `simulated_job` has it.
    """
    began, notes = time.perf_counter(), []
    policy = PrecisionPolicy.of_run(config)
    if device != "cpu" and policy.fp8 and not is_doubled():
        notes.append(f"precision={config.precision} is simulated as bf16: fewer bits are Transformer Engine's")
        config = replace(config, precision="bf16")
    if config.parallel.nccl:
        notes.append("parallel.nccl is not simulated: it says how NCCL works, not what is exchanged")
    if outside := note_on_graphs(config):
        notes.append(outside)
    with simulated_job(config, world_size, rank, device) as job, training_step(config, job) as step:
        batches = empty_batches(config, job)
        if config.training.cuda_graphs:  # of which a first step has none
            step.train(batches, 0, config.optimizer.learning_rate, float("inf"))
            step.capture()
        job.recorder.restart()
        standing = job.recorder.memory.now
        result = step.train(batches, 0, config.optimizer.learning_rate, float("inf"))
        recorder, memory, runtime = job.recorder, job.recorder.memory, job.runtime
        stage = stage_memory(config, world_size, runtime.pipeline_rank, on_gpu=device != "cpu")
        return DryRun(
            rank=rank,
            world_size=world_size,
            stage=runtime.pipeline_rank,
            place=runtime.describe(),
            layers="Transformer Engine" if use_transformer_engine(policy) else "torch",
            parameters=sum(_local(parameter).numel() for chunk in step.chunks for parameter in chunk.parameters()),
            peak_bytes=memory.peak,
            at_peak={kind: size for kind, size in memory.at_peak.items() if size},
            activations_at_peak={kind: size for kind, size in memory.activations_at_peak.items() if size},
            course=memory.course,
            standing_bytes=standing,
            predicted_bytes=round(stage.total),
            updated=result.updated,
            flops=sum(recorder.flops.values()),
            predicted_flops=round(stage_flops(config, world_size, runtime.pipeline_rank)),
            launches=sum(recorder.launches.values()),
            graphs=recorder.launches["graph"],
            kernels_in_graphs=sum(recorder.replayed.values()),
            launches_by_part=_by_part(recorder.launches_within),
            host_waits=dict(recorder.waits),
            host_copies=dict(recorder.host_copies),
            collectives=recorder.communications,
            notes=notes,
            seconds=time.perf_counter() - began,
            host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )


def _by_part(launches: Counter[tuple[str, ...]]) -> dict[str, int]:
    """Of launches by the classes of modules that they ran within: by that of the layer's part."""
    found: Counter[str] = Counter()
    for within, count in launches.items():
        place = within.index(VishwamAILayer.__name__) + 1 if VishwamAILayer.__name__ in within else len(within)
        found[within[place] if place < len(within) else "none"] += count
    return dict(found)


@contextmanager
def training_step(config: PretrainConfig, job: SimulatedJob) -> Iterator[TrainStep]:
    """The rank's model and optimizer, as `Trainer` builds them."""
    memory = job.recorder.memory
    models = build_model(config, job.runtime, initialize=False)
    for model in models:
        memory.claim("parameters", *map(_local, model.parameters()), *model.buffers())
    with memory.allocating("exchange buffers"):
        chunks = wrap_data_parallel(config, job.runtime, models)
    for chunk in chunks:
        if not isinstance(chunk, FullySharded):  # whose gradients come and go with the backward pass
            memory.claim("gradients", *(buffer.grad_data for buffer in chunk.buffers))
    held = (part for chunk in chunks for parameter in chunk.parameters() for part in parts(_local(parameter)))
    memory.claim("parameters", *held)
    with memory.allocating("optimizer"):
        optimizer = build_optimizer(config, job.runtime, chunks)
        for part in optimizer.chained_optimizers:
            if not part.is_stub_optimizer:
                fill_moments(part.optimizer)
    yield TrainStep(config, job.runtime, chunks, optimizer)


def empty_batches(config: PretrainConfig, job: SimulatedJob) -> list[Batch]:
    """Micro-batches of a step, of tokens without values: where a size depends on them, it is the largest it can be.

    Each row is one document to attention that asks for their lengths.
    """
    data, training = config.data, config.training
    rules = DocumentRules(
        reset_attention_mask=data.reset_attention_mask,
        reset_position_ids=data.reset_position_ids,
        eod_mask_loss=data.eod_mask_loss,
        marked=data.prepared_rows,
    )
    marks = (2,) if data.prepared_rows else ()
    rows, length, device = training.micro_batch_size, training.sequence_length, job.runtime.device
    text = torch.zeros((rows, *marks, length + 1), dtype=torch.int64)
    batch = make_batch(text.to(device, non_blocking=True), rules)
    if data.reset_attention_mask:
        context = job.runtime.groups.cp
        with unset_fake_temporarily():  # sizes depend on these values
            bounds = document_bounds(torch.zeros((rows, length), dtype=torch.int32), context.rank(), context.size())
        batch = replace(batch, bounds=DocumentBounds(*(_empty(part, device) for part in bounds)))
    return [batch] * micro_batches_per_step(config, job.runtime.world_size)


def _empty(part: Any, device: torch.device) -> Any:
    return torch.empty(part.shape, dtype=part.dtype, device=device) if isinstance(part, torch.Tensor) else part


def _local(parameter: Any) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def render(found: DryRun) -> str:
    """The same as text."""
    lines = [
        f"{found.place} of {found.world_size}, {found.layers}'s layers",
        *(f"note: {note}" for note in found.notes),
        f"parameters  {found.parameters:,}",
        f"peak memory {_size(found.peak_bytes)}; predicted {_size(found.predicted_bytes)}",
        *_table(found.at_peak),
        "  activations, by the module that made them:",
        *_table(found.activations_at_peak, indent=4),
        f"operations  {found.flops:.4g} FLOP in {_kernels(found)}; predicted {found.predicted_flops:.4g} FLOP",
        "  kernels of forward passes, made again or not, by the part of a layer:",
        *(f"    {part:24} {count:,}" for part, count in found.launches_by_part.items()),
        "collectives (operation, group × ranks, count, size):",
        *(f"  {c.operation:14} {c.group} × {c.size}  {c.count:,}  {_size(c.bytes)}" for c in found.collectives),
        f"the host waits for the device {counted(sum(found.host_waits.values()), 'time', ',')}:",
        *(f"  {place}  {count:,}" for place, count in found.host_waits.items()),
    ]
    return "\n".join(lines)


def _kernels(found: DryRun) -> str:
    if not found.graphs:
        return f"{found.launches:,} kernels"
    alone = found.launches - found.graphs
    return (
        f"{alone + found.kernels_in_graphs:,} kernels, {found.launches:,} launches: {alone:,} kernels and"
        f" {found.graphs:,} graphs of {found.kernels_in_graphs:,}"
    )


def memory_verdict(config: PretrainConfig, runs: list[DryRun], gpu: Gpu) -> str:
    """How much of a GPU the rank that needs most of it takes: its peak, with libraries and the allocator's slack.

    Raises:
        UserError: it is more than there is; by how much, and what to change.
    """
    needs = {}
    for run in runs:
        parts = stage_footprint(config, run.world_size, run.stage).parts
        counted = run.at_peak.get("workspaces", 0)
        needs[run.rank] = run.peak_bytes - counted + parts.get("fragmentation", 0.0) + parts["libraries"]
    rank, need = max(needs.items(), key=lambda item: item[1])
    told = f"rank {rank} needs {size_text(need)} with libraries and fragmentation, of {size_text(gpu.memory)}"
    if need <= gpu.memory:
        return f"fits {gpu.title}: {told}"
    lacking = f"does not fit {gpu.title}: {told}, {size_text(need - gpu.memory)} more than there is"
    raise UserError(lacking, *advice(config, runs[0].world_size, on_gpu=True).split("\n"))


def render_stages(found: list[DryRun]) -> str:
    """A table: a line for each rank, peak and FLOPs beside what was predicted."""
    columns = (
        "rank",
        "seconds",
        "host GiB",
        "peak GiB",
        "predicted",
        "PFLOP",
        "predicted",
        "kernels",
        "exchanges",
        "waits",
    )
    lines = ["".join(f"{name:>11}" for name in columns)]
    for run in found:
        peak, predicted, flops = run.peak_bytes, run.predicted_bytes, run.flops
        cells = (
            str(run.rank),
            f"{run.seconds:.0f}",
            f"{run.host_bytes / 2**30:.2f}",
            f"{peak / 2**30:.2f}",
            f"{predicted / peak - 1:+.2%}",
            f"{flops / 1e15:.4g}",
            f"{run.predicted_flops / flops - 1:+.2%}",
            f"{run.launches:,}",
            f"{sum(one.count for one in run.collectives):,}",
            f"{sum(run.host_waits.values()):,}",
        )
        lines.append("".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def _table(sizes: dict[str, int], indent: int = 2) -> list[str]:
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return [f"{' ' * indent}{name:{28 - indent}} {_size(size):>12}" for name, size in ordered]


def _size(size: int) -> str:
    for unit, exponent in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**exponent:
            return f"{size / 2**exponent:.2f} {unit}"
    return f"{size} B"
