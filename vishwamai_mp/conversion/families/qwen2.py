"""Qwen 2 and 2.5: biases of queries, keys and values."""

from vishwamai_mp.conversion.families.family import Family


class Qwen2(Family):
    """See the module."""

    architecture = "Qwen2ForCausalLM"
    model_type = "qwen2"
    title = "Qwen 2"
    has = {"attention_bias": True}
    defaults = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
    only = {"use_sliding_window": (False, "its windows are of some layers only")}
    neutral = frozenset({"sliding_window", "max_window_layers"})  # read where windows are used
    written = {"use_sliding_window": False, "sliding_window": None}
