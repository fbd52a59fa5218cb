"""Floating point operations that the model needs, whatever the implementation does beyond them."""

from vishwamai_mp.config import ModelConfig, PretrainConfig, frozen_parts, micro_batches_per_step, padded_vocab_size
from vishwamai_mp.config.layer_windows import layer_windows
from vishwamai_mp.planning.activations import recomputed_layers, stage_layers, tokens_of_micro_batch
from vishwamai_mp.planning.cache_costs import cache_forward_flops_per_token
from vishwamai_mp.planning.component_activations import components_on_stage
from vishwamai_mp.planning.neural_memory_costs import memory_forward_flops_per_token
from vishwamai_mp.planning.parameters import adapter_parameters, attention_matrices, mlp_matrices


def forward_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs of one token's forward pass, a multiply-add counted as two.

    Matrix products only. Attention is counted causally: a token sees (T+1)/2 keys on average, or its window. The
    embedding look-up costs none; the output layer counts real tokens only.
    """
    assert model.head_dim is not None
    seen = sum(mean_keys(sequence_length, window) for window in layer_windows(model))  # of all layers
    scores_and_values = 2 * 2 * seen * model.num_attention_heads * model.head_dim
    matrices = 2 * model.num_layers * (attention_matrices(model) + mlp_matrices(model))
    return matrices + scores_and_values + 2 * model.hidden_size * model.vocab_size


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs of one token's training step: backward costs twice the forward. Recomputation is not counted."""
    return 3 * forward_flops_per_token(model, sequence_length)


def training_flops_per_token(config: PretrainConfig) -> float:
    """`flops_per_token` of the model with its components, at the sequence length that is trained on.

    Frozen matrices of the base have no gradient to compute; adapters are counted as they are multiplied.
    """
    length = config.training.sequence_length
    components = memory_forward_flops_per_token(config.memory) + cache_forward_flops_per_token(config.cache, length)
    whole = flops_per_token(config.model, length) + 3 * components
    return whole - 2 * _frozen_matrices(config) + 3 * 2 * adapter_parameters(config)


def stage_flops(config: PretrainConfig, world_size: int, stage: int) -> float:
    """FLOPs that one rank of a pipeline stage computes in a step, as torch counts them.

    Unlike `training_flops_per_token`: recomputation counts, the padding of the vocabulary too, and attention is counted
    with all pairs of tokens, masked or not, and backward 2.5 times as much as forward, as fused kernels compute it; in
    fp32, which they do not take, twice as much.

    Args:
        config: resolved.
        world_size: processes.
        stage: from 0.
    """
    model, parallel, length = config.model, config.parallel, config.training.sequence_length
    assert model.head_dim is not None
    per_stage, frozen = stage_layers(config), frozen_parts(config)
    matrices = 2 * (attention_matrices(model) + mlp_matrices(model))
    attention = 4 * length * model.num_attention_heads * model.head_dim
    adapters = 2 * adapter_parameters(config) / model.num_layers
    components = components_again = 0.0
    for options, whole in (
        (config.memory, memory_forward_flops_per_token(config.memory)),
        (config.cache, cache_forward_flops_per_token(config.cache, length)),
    ):
        if options.enabled and options.layers:
            here = components_on_stage(config, options.layers, per_stage, stage)
            components += whole * here / len(options.layers)
            first = config.training.recompute_layers
            components_again += (
                whole * components_on_stage(config, options.layers, per_stage, stage, first) / len(options.layers)
            )
    forward = per_stage[stage] * (matrices + attention + adapters) + components
    again = forward if config.training.recompute == "full" else 0.0
    if config.training.recompute_layers is not None:
        recomputed = recomputed_layers(config, per_stage[stage])
        again = recomputed * (matrices + attention + adapters) + components_again
    elif config.training.recompute == "selective":
        modules = config.training.recompute_modules or ["core_attn"]
        mlp = 2 * (mlp_matrices(model) + adapter_parameters(config, ("linear_fc1", "linear_fc2")) / model.num_layers)
        again = per_stage[stage] * (attention * ("core_attn" in modules) + mlp * ("mlp" in modules))
    scores_again = attention / 2 if config.precision != "fp32" else 0.0
    backward = 2 * forward + per_stage[stage] * (scores_again - (matrices if "base" in frozen else 0))
    head = 0.0
    if stage == parallel.pipeline_model_parallel_size - 1:
        head = 2 * model.hidden_size * padded_vocab_size(config) * (2 if "embedding" in frozen else 3)
    tokens = tokens_of_micro_batch(config) * micro_batches_per_step(config, world_size)
    return tokens * (forward + again + backward + head) / parallel.tensor_model_parallel_size


def _frozen_matrices(config: PretrainConfig) -> int:
    """Weights of the base that no gradient is computed of; the embedding's look-up has none to speak of."""
    model, frozen = config.model, frozen_parts(config)
    layer = attention_matrices(model) + mlp_matrices(model)
    layers = model.num_layers * layer if "base" in frozen else 0
    return layers + (model.hidden_size * model.vocab_size if "embedding" in frozen else 0)


def mean_keys(length: int, window: int | None) -> float:
    """Keys that a token attends to, averaged over positions 1 … length."""
    if window is None or window >= length:
        return (length + 1) / 2
    return (window * (window + 1) / 2 + (length - window) * window) / length
