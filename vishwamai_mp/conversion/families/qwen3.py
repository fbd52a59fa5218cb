"""Qwen 3 without experts: norms of each head's queries and keys."""

from vishwamai_mp.conversion.families.family import Family
from vishwamai_mp.conversion.families.qwen2 import Qwen2


class Qwen3(Family):
    """See the module."""

    architecture = "Qwen3ForCausalLM"
    model_type = "qwen3"
    title = "Qwen 3"
    has = {"qk_norm": "head"}
    defaults = {**Qwen2.defaults, "head_dim": 128}
    only = Qwen2.only
    neutral = Qwen2.neutral
    written = {**Qwen2.written, "attention_bias": False}
