"""Bytes of a rank by what they are for, with what no tensor shows: buffers of libraries and the allocator's slack."""

from dataclasses import dataclass, field, replace

from vishwamai_mp.config import PretrainConfig, data_parallel_size, micro_batches_per_step
from vishwamai_mp.config.layer_windows import layer_windows
from vishwamai_mp.planning.activations import number_bytes, stage_activations
from vishwamai_mp.planning.cache_costs import cache_state_bytes
from vishwamai_mp.planning.fully_sharded_footprint import fully_sharded_parts, shares_parameters
from vishwamai_mp.planning.neural_memory_costs import memory_state_bytes
from vishwamai_mp.planning.parameters import total_parameters
from vishwamai_mp.planning.states import (
    MAIN,
    WORKSPACE,
    exchange_buffers,
    fp8_weights,
    fused_gradients,
    gradient_bytes,
    moment_bytes,
    moments_on_device,
    optimizer_copies,
    stage_parameters,
    trained_parameters,
)

# Of CUDA and its libraries, and of each communicator's channels, as NCCL makes them by default.
_CONTEXT, _COMMUNICATOR = 0.8 * 2**30, 0.2 * 2**30
_FRAGMENTATION = 0.03  # of activations: what the allocator cannot give to anyone


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank by purpose; they add up to `total`.

    Attributes:
        stage: of the pipeline, from 0.
    """

    stage: int
    parts: dict[str, float] = field(hash=False)

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def stage_footprint(config: PretrainConfig, world_size: int, stage: int) -> Footprint:
    """Of the ranks of one pipeline stage, on GPUs.

    Args:
        config: resolved.
        world_size: GPUs.
        stage: from 0.
    """
    parallel, replicas = config.parallel, data_parallel_size(config, world_size)
    micro_batches = micro_batches_per_step(config, world_size)
    activations = stage_activations(config, stage, micro_batches, on_gpu=True)
    shards = replicas * parallel.context_parallel_size
    if shares_parameters(config, world_size):
        parts = fully_sharded_parts(config, world_size, activations)
    else:
        owners = shards if parallel.use_distributed_optimizer else 1
        trained, main = trained_parameters(config, stage), 0 if config.precision == "fp32" else MAIN
        parts = {
            "weights": number_bytes(config) * stage_parameters(config, stage),
            "gradients": gradient_bytes(config) * trained + fused_gradients(config),
            "optimizer": (moments_on_device(config) + main) * trained / owners,
            "activations": activations.beside(optimizer_copies(config, stage, world_size)),
        }
        parts["weights"] += fp8_weights(config, stage, micro_batches)
    groups = [parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, shards]
    parts["fragmentation"] = _FRAGMENTATION * parts["activations"]
    parts["exchange buffers"] = exchange_buffers(config)
    parts["libraries"] = WORKSPACE + _CONTEXT + _COMMUNICATOR * sum(ranks > 1 for ranks in groups)
    return Footprint(stage, {name: value for name, value in parts.items() if value})


def job_footprint(config: PretrainConfig, world_size: int) -> Footprint:
    """Of the rank that needs most."""
    last = config.parallel.pipeline_model_parallel_size - 1
    stages = {0, 1, last} & set(range(last + 1))  # those between the second and the last need less than the second
    return max((stage_footprint(config, world_size, stage) for stage in stages), key=lambda one: one.total)


def moments_host_bytes(config: PretrainConfig, world_size: int, stage: int) -> float:
    """Of the host's memory that one rank's moments take all the time (`optimizer.moments_on_host`)."""
    if not config.optimizer.moments_on_host:
        return 0.0
    owners = data_parallel_size(config, world_size) * config.parallel.context_parallel_size
    shared = config.parallel.use_distributed_optimizer or shares_parameters(config, world_size)
    return moment_bytes(config) * trained_parameters(config, stage) / (owners if shared else 1)


def activations_host_bytes(config: PretrainConfig, world_size: int, stage: int) -> float:
    """Of the host's memory that one rank's activations take at the most (`training.offload_layers`)."""
    if not config.training.offload_layers:
        return 0.0
    micro_batches = micro_batches_per_step(config, world_size)
    without = replace(config, training=replace(config.training, offload_layers=None))
    on_gpu = stage_activations(config, stage, micro_batches, on_gpu=True)
    return stage_activations(without, stage, micro_batches, on_gpu=True).kept - on_gpu.kept


def saving_host_bytes(config: PretrainConfig, world_size: int, stage: int) -> float:
    """Of the host's memory that one rank's save takes: a copy of its share of weights and optimizer state."""
    trained, replicas = trained_parameters(config, stage), data_parallel_size(config, world_size)
    main = 0 if config.precision == "fp32" else MAIN
    return stage_parameters(config, stage) * number_bytes(config) + trained * (moment_bytes(config) + main) / replicas


def inference_bytes(config: PretrainConfig, tokens: int, sequences: int) -> dict[str, float]:
    """Of one GPU (of a tensor and pipeline parallel replica) that answers.

    Args:
        tokens: of each sequence, prompt and answer.
        sequences: at the same time; of a search, its leaves, whose common beginnings are counted as often.
    """
    model, size = config.model, number_bytes(config)
    assert model.num_key_value_heads is not None
    assert model.head_dim is not None
    parallel = config.parallel
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    keys = 2 * model.num_key_value_heads * model.head_dim * size
    seen = sum(min(tokens, window or tokens) for window in layer_windows(model))
    state = (memory_state_bytes(config.memory) if config.memory.enabled else 0) + cache_state_bytes(
        config.cache, tokens, size
    )
    return {
        "weights": total_parameters(config) * size / ranks,
        "keys and values": sequences * seen * keys / ranks,
        "memory and cache": sequences * state / ranks,
    }


def tree_bytes(config: PretrainConfig, prompt: int) -> dict[str, float]:
    """`inference_bytes` of a tree-of-thoughts search: the prompt is kept once, each node's thoughts apart."""
    tree = config.tree
    nodes = tree.beam_width * (tree.branching or tree.beam_width)
    longest = tree.max_depth * tree.max_thought_tokens
    shared, own = inference_bytes(config, prompt, 1), inference_bytes(config, longest, nodes)
    components = inference_bytes(config, prompt + longest, nodes)["memory and cache"]
    keys = shared["keys and values"] + own["keys and values"]
    return {"weights": shared["weights"], "keys and values": keys, "memory and cache": components}
