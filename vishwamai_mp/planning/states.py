"""Memory of parameters, gradients and optimizer state of one rank. A test holds these formulae against built models."""

from vishwamai_mp.config import PretrainConfig, data_parallel_size, frozen_parts, padded_vocab_size
from vishwamai_mp.config.check_tensor_overlap import exchanged_tokens
from vishwamai_mp.config.resolve_fp8 import rounds_operands
from vishwamai_mp.planning.activations import QUANTIZED, micro_batches_underway, number_bytes, stage_layers
from vishwamai_mp.planning.cache_costs import cache_parameters
from vishwamai_mp.planning.component_activations import components_on_stage
from vishwamai_mp.planning.neural_memory_costs import memory_parameters
from vishwamai_mp.planning.parameters import (
    adapter_parameters,
    attention_matrices,
    embedding_parameters,
    layer_parameters,
    mlp_matrices,
)

# Bytes per parameter: gradients are summed in fp32; fp32 copies of 16-bit parameters; AdamW's two moments in fp32.
GRADIENT, MAIN, MOMENTS = 4, 4, 8
WORKSPACE = 32 * 2**20  # bytes of a GPU's matrix products, as Transformer Engine asks for them


def stage_states(config: PretrainConfig, stage: int, world_size: int) -> float:
    """Bytes that one rank of a pipeline stage holds all the time.

    Replicas share the optimizer's state (`parallel.use_distributed_optimizer`), or all (`parallel.fully_sharded`).
    What is not trained has neither gradients nor that state; of fully sharded models it is counted as if it had.

    Args:
        config: resolved.
        stage: from 0.
        world_size: processes.
    """
    parameters, replicas = stage_parameters(config, stage), data_parallel_size(config, world_size)
    trained = trained_parameters(config, stage)
    if config.parallel.fully_sharded and replicas > 1:
        return parameters * (MAIN + GRADIENT + moments_on_device(config)) / replicas
    shared = moments_on_device(config) + (0 if config.precision == "fp32" else MAIN)
    owners = replicas * config.parallel.context_parallel_size  # context parallel ranks share optimizer state as well
    each = gradient_bytes(config) + shared / (owners if config.parallel.use_distributed_optimizer else 1)
    return parameters * number_bytes(config) + trained * each


def moment_bytes(config: PretrainConfig) -> int:
    """Of a parameter's two moments, wherever they lie."""
    return 4 if config.optimizer.moments_in == "bf16" else MOMENTS


def moments_on_device(config: PretrainConfig) -> int:
    """Those of them that lie where the parameters do. A step brings one parameter's at a time, when activations are
    gone."""
    return 0 if config.optimizer.moments_on_host else moment_bytes(config)


def gradient_bytes(config: PretrainConfig) -> int:
    """Of a gradient on its way to others, and of its sum where each rank keeps all of its parameters'."""
    return 2 if config.parallel.reduce_grads_in == "bf16" else GRADIENT


def optimizer_copies(config: PretrainConfig, stage: int, world_size: int) -> float:
    """Bytes that the optimizer's step makes, when activations are gone: fp32 copies of 16-bit sums of gradients, bf16
    copies of fp32 weights that are to be rounded to FP8, and the moments of one parameter at a time from the host."""
    model, parallel = config.model, config.parallel
    assert model.intermediate_size is not None
    replicas = data_parallel_size(config, world_size) * parallel.context_parallel_size
    own = trained_parameters(config, stage) / (replicas if parallel.use_distributed_optimizer else 1)
    copies = GRADIENT * own if parallel.reduce_grads_in == "bf16" else 0.0
    if config.fp8.params:  # all at once
        matrices = stage_layers(config)[stage] * (attention_matrices(model) + mlp_matrices(model))
        copies += 2 * matrices / parallel.tensor_model_parallel_size / replicas
    if config.optimizer.moments_on_host:
        rows = max(2 * model.intermediate_size, padded_vocab_size(config))
        copies += MOMENTS * min(own, rows * model.hidden_size / parallel.tensor_model_parallel_size)
    return copies


def fused_gradients(config: PretrainConfig) -> float:
    """Bytes of what stands for a weight's gradient that was added to its sum at once: one of each shape."""
    if not config.parallel.fuse_grad_accumulation:
        return 0.0
    model = config.model
    matrices = attention_matrices(model) + mlp_matrices(model)
    return number_bytes(config) * matrices / config.parallel.tensor_model_parallel_size


def exchange_buffers(config: PretrainConfig) -> float:
    """Bytes that `parallel.overlap_tensor_parallel` takes all the time: what eight products gather and four sum, and
    the workspaces of those that run beside one another."""
    if not config.parallel.overlap_tensor_parallel:
        return 0.0
    gathered = 1 if rounds_operands(config.precision) else 2
    return 3 * WORKSPACE + exchanged_tokens(config) * config.model.hidden_size * (8 * gathered + 4 * 2)


def fp8_weights(config: PretrainConfig, stage: int, micro_batches: int) -> float:
    """Bytes of the FP8 or NVFP4 copies of weights that a rank of a stage makes in a step's first micro-batch, on a GPU.

    Two of each: as it lies and transposed, for the backward pass. Recomputation leaves the transposes of query, key,
    value, gate and up to the first backward pass of their chunk, and some chunks' come when the peak is past. Weights
    that stay in FP8 (`fp8.params`) need none: they are two such copies, as large together as bf16.

    Args:
        config: resolved.
        stage: from 0.
        micro_batches: of a step.
    """
    if not rounds_operands(config.precision) or config.fp8.params:
        return 0.0
    model, parallel = config.model, config.parallel
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    assert model.head_dim is not None
    assert model.intermediate_size is not None
    second = model.hidden_size * (model.num_attention_heads * model.head_dim + model.intermediate_size)
    first = attention_matrices(model) + mlp_matrices(model) - second
    begun = 1.0
    if config.training.recompute == "full" and config.training.recompute_layers is None:
        passes = (micro_batches - micro_batches_underway(config, stage, micro_batches)) * chunks
        begun = min(1.0, (1 + passes // parallel.pipeline_model_parallel_size) / chunks)
    copies = (2 * second + (1 + begun) * first) * QUANTIZED.get(config.precision, 1.0)
    return stage_layers(config)[stage] * copies / parallel.tensor_model_parallel_size


def stage_parameters(config: PretrainConfig, stage: int) -> float:
    """Parameters of one rank of a pipeline stage; norms, which each tensor parallel rank has whole, count as split."""
    return sum(_parts(config, stage).values())


def trained_parameters(config: PretrainConfig, stage: int) -> float:
    """Those that have gradients and optimizer state: all but what `lora` or `training.freeze` leaves as it is."""
    frozen = frozen_parts(config)
    return sum(count for part, count in _parts(config, stage).items() if part not in frozen)


def _parts(config: PretrainConfig, stage: int) -> dict[str, float]:
    """A stage's parameters by `Part`, and those of adapters."""
    model, parallel, rows = config.model, config.parallel, padded_vocab_size(config)
    per_stage, last = stage_layers(config), parallel.pipeline_model_parallel_size - 1
    parts: dict[str, float] = {
        "base": per_stage[stage] * layer_parameters(model),
        "adapter": per_stage[stage] * adapter_parameters(config) / model.num_layers,
    }
    for name, options, whole in (
        ("memory", config.memory, memory_parameters(config.memory)),
        ("cache", config.cache, cache_parameters(config.cache)),
    ):
        if options.enabled and options.layers:
            here = components_on_stage(config, options.layers, per_stage, stage)
            parts[name] = whole * here / len(options.layers)
    if last == 0:
        parts["embedding"] = embedding_parameters(model, rows)
    elif stage in (0, last):  # tied tables lie on both
        parts["embedding"] = rows * model.hidden_size
    parts = {name: count / parallel.tensor_model_parallel_size for name, count in parts.items()}
    if stage == last:
        parts["base"] += model.hidden_size
    return parts
