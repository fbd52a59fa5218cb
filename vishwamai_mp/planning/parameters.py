"""How many parameters a model has. A test holds these formulae against the built model."""

from collections.abc import Collection

from vishwamai_mp.config import ModelConfig, PretrainConfig
from vishwamai_mp.planning.cache_costs import cache_parameters
from vishwamai_mp.planning.neural_memory_costs import memory_parameters


def layer_parameters(model: ModelConfig) -> int:
    """Parameters of one transformer layer: attention, gated MLP and norms."""
    norms = 4 if model.norm_position == "sandwich" else 2
    return attention_matrices(model) + attention_vectors(model) + mlp_matrices(model) + norms * model.hidden_size


def attention_vectors(model: ModelConfig) -> int:
    """Biases of queries, keys and values, and the weights of the norms of queries and keys, of one layer."""
    assert model.num_key_value_heads is not None
    assert model.head_dim is not None
    queries, keys = model.num_attention_heads, model.num_key_value_heads
    norms = {"none": 0, "head": 2, "full": queries + keys}[model.qk_norm]
    return model.head_dim * ((queries + 2 * keys if model.attention_bias else 0) + norms)


def attention_matrices(model: ModelConfig) -> int:
    """Weights of the query, key, value and output projections of one layer."""
    assert model.num_key_value_heads is not None
    assert model.head_dim is not None
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads  # query and output; key and value
    return model.hidden_size * model.head_dim * heads


def mlp_matrices(model: ModelConfig) -> int:
    """Weights of one layer's MLP: gate, up and down."""
    assert model.intermediate_size is not None
    return 3 * model.hidden_size * model.intermediate_size


def embedding_parameters(model: ModelConfig, vocab_size: int | None = None) -> int:
    """Input embedding and, unless tied, output layer, for `vocab_size` rows (default: real tokens)."""
    tables = 1 if model.tie_word_embeddings else 2
    return tables * (vocab_size or model.vocab_size) * model.hidden_size


def parameter_count(model: ModelConfig, vocab_size: int | None = None) -> int:
    """Parameters of the whole model.

    Args:
        model: resolved.
        vocab_size: rows of the embedding, for instance padded; default: real tokens.
    """
    return embedding_parameters(model, vocab_size) + model.num_layers * layer_parameters(model) + model.hidden_size


def adapter_parameters(config: PretrainConfig, targets: Collection[str] | None = None) -> int:
    """Parameters of all adapters, or of those of `targets`: `lora.rank` × (inputs + outputs) of each adapted layer."""
    model, lora = config.model, config.lora
    if not lora.enabled:
        return 0
    assert model.head_dim is not None
    assert model.num_key_value_heads is not None
    assert model.intermediate_size is not None
    width, heads, inner = model.hidden_size, model.num_attention_heads * model.head_dim, model.intermediate_size
    sizes = {
        "linear_qkv": width + heads + 2 * model.num_key_value_heads * model.head_dim,
        "linear_proj": heads + width,
        "linear_fc1": width + 2 * inner,
        "linear_fc2": inner + width,
    }
    return (
        model.num_layers
        * lora.rank
        * sum(sizes[target] for target in lora.targets if targets is None or target in targets)
    )


def total_parameters(config: PretrainConfig, vocab_size: int | None = None) -> int:
    """`parameter_count` of the model with its components and adapters."""
    components = memory_parameters(config.memory) + cache_parameters(config.cache)
    return parameter_count(config.model, vocab_size) + components + adapter_parameters(config)
