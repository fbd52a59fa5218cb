"""What to do when memory runs out: which settings to change, in which order, and what each saves."""

from dataclasses import dataclass, replace

from vishwamai_mp.config import ConfigError, PretrainConfig, micro_batches_per_step, resolve
from vishwamai_mp.planning.activations import stage_activations
from vishwamai_mp.planning.fully_sharded_footprint import fully_sharded_parts, shares_parameters
from vishwamai_mp.planning.states import (
    WORKSPACE,
    exchange_buffers,
    fp8_weights,
    fused_gradients,
    optimizer_copies,
    stage_states,
)

_WORTH = 0.01  # of the need: what saves less is not mentioned


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the rank that needs most."""

    states: float
    activations: float

    @property
    def total(self) -> float:
        return self.states + self.activations


def rank_memory(config: PretrainConfig, world_size: int, on_gpu: bool) -> RankMemory:
    """What training takes. Not counted: the allocator's slack, communication buffers and libraries.

    Args:
        config: resolved.
        world_size: processes.
        on_gpu: as `activations.layer_activations` has it.
    """
    stages = range(config.parallel.pipeline_model_parallel_size)
    return max((stage_memory(config, world_size, stage, on_gpu) for stage in stages), key=lambda stage: stage.total)


def stage_memory(config: PretrainConfig, world_size: int, stage: int, on_gpu: bool) -> RankMemory:
    """`rank_memory` of the ranks of one pipeline stage, from 0."""
    micro_batches = micro_batches_per_step(config, world_size)
    activations = stage_activations(config, stage, micro_batches, on_gpu)
    workspace = WORKSPACE + fp8_weights(config, stage, micro_batches) if on_gpu else 0
    if shares_parameters(config, world_size):
        parts = fully_sharded_parts(config, world_size, activations)
        kept = parts.pop("activations")
        return RankMemory(sum(parts.values()) + workspace, kept)
    workspace += fused_gradients(config) + exchange_buffers(config)
    later = activations.beside(optimizer_copies(config, stage, world_size))
    return RankMemory(stage_states(config, stage, world_size) + workspace, later)


def advice(config: PretrainConfig, world_size: int, on_gpu: bool) -> str:
    """A line of what the run needs, and a line for each setting that would lower it, from the cheapest to the dearest.

    Each line's saving supposes that those before it are followed.
    """
    need = rank_memory(config, world_size, on_gpu)
    lines = [
        f"this run needs about {size_text(need.total)} per process: {size_text(need.states)} for weights, gradients and"
        f" optimizer state, {size_text(need.activations)} for activations"
    ]
    steps: list[tuple[str, float]] = []
    for section, name, value in _changes(config, on_gpu):
        # More processes only where those that are there cannot be divided differently.
        for processes in (world_size, 2 * world_size) if name.endswith("parallel_size") else (world_size,):
            changed = _changed(config, section, name, value, processes)
            after = need if changed is None else rank_memory(changed, processes, on_gpu)
            worth = 0.0 if name == "cuda_graphs" else _WORTH * need.total
            if changed is not None and need.total - after.total > worth:
                more = f" on {processes} processes" if processes > world_size else ""
                written = "null" if value is None else str(value).lower()
                steps.append((f"{section}.{name}={written}{more}", need.total - after.total))
                config, world_size, need = changed, processes, after
                break
    if not steps:
        return f"{lines[0]}; make the model or training.sequence_length smaller"
    lines[0] += ". Change in this order:"
    width = max(len(settings) for settings, _ in steps)
    return "\n".join([*lines, *(f"  {settings:{width}}  saves about {size_text(saved)}" for settings, saved in steps)])


def _changes(config: PretrainConfig, on_gpu: bool) -> list[tuple[str, str, object]]:
    """Section, name and value of settings to try, whether they apply or not."""
    parallel, training = config.parallel, config.training
    sizes = []
    size = training.micro_batch_size
    while size > 1:
        size = size // 2
        sizes.append(("training", "micro_batch_size", size))
    return [
        *([("training", "cuda_graphs", False)] if training.cuda_graphs else []),  # others cannot be had with them
        ("parallel", "sequence_parallel", True),
        ("parallel", "use_distributed_optimizer", True),
        ("parallel", "overlap_tensor_parallel", False),
        ("training", "recompute", "selective"),
        *sizes,
        ("training", "recompute", "full"),
        ("training", "recompute_layers", None),
        ("parallel", "fully_sharded", True),
        ("optimizer", "moments_in", "bf16"),
        *([("optimizer", "moments_on_host", True)] if on_gpu else []),
        ("parallel", "tensor_model_parallel_size", 2 * parallel.tensor_model_parallel_size),
        ("parallel", "pipeline_model_parallel_size", 2 * parallel.pipeline_model_parallel_size),
    ]


def _changed(config: PretrainConfig, section: str, name: str, value: object, world_size: int) -> PretrainConfig | None:
    """The configuration with one setting changed; None where it has it, would go back, or cannot have it."""
    old = getattr(config, section)
    if getattr(old, name) == value or (name == "recompute" and old.recompute == "full"):
        return None
    changes = (
        {name: value, "recompute_layers": None, "recompute_modules": None} if name == "recompute" else {name: value}
    )
    try:
        return resolve(replace(config, **{section: replace(old, **changes)}), world_size)
    except ConfigError:
        return None


def size_text(size: float) -> str:
    """Bytes in GiB or MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
