"""Qwen 3 without experts: a Qwen 2 with norms of each head's queries and keys in place of biases."""

from vishwamai_mp.conversion.families.qwen2 import Qwen2


class Qwen3(Qwen2):
    """See the module."""

    architecture = "Qwen3ForCausalLM"
    model_type = "qwen3"
    title = "Qwen 3"
    has = {"qk_norm": "head"}
    defaults = {**Qwen2.defaults, "head_dim": 128}
    written = {"attention_bias": False}
