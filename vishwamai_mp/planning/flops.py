"""Floating point operations that the model needs, whatever the implementation does beyond them."""

from vishwamai_mp.config import ModelConfig, PretrainConfig, frozen_parts
from vishwamai_mp.config.layer_windows import layer_windows
from vishwamai_mp.planning.cache_costs import cache_forward_flops_per_token
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
