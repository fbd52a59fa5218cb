"""Llama 1 to 3.3: what all other families are told by."""

from vishwamai_mp.conversion.families.family import Family


class Llama(Family):
    """See the module."""

    architecture = "LlamaForCausalLM"
    model_type = "llama"
    title = "Llama"
    written = {"attention_bias": False, "mlp_bias": False}
