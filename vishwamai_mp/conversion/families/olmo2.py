"""OLMo 2: norms behind attention and MLP, and of all queries and all keys together."""

from vishwamai_mp.conversion.families.family import Family
from vishwamai_mp.conversion.mapping import WeightNames


class Olmo2(Family):
    """See the module."""

    architecture = "Olmo2ForCausalLM"
    model_type = "olmo2"
    title = "OLMo 2"
    has = {"norm_position": "post", "qk_norm": "full"}
    defaults = {"rms_norm_eps": 1e-5}
    written = {"attention_bias": False}
    weights = WeightNames(
        attention_output_norm="post_attention_layernorm", mlp_output_norm="post_feedforward_layernorm"
    )
