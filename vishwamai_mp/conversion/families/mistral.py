"""Mistral: a Llama whose layers may all attend within a window."""

from vishwamai_mp.conversion.families.family import Family, Key


class Mistral(Family):
    """See the module."""

    architecture = "MistralForCausalLM"
    model_type = "mistral"
    title = "Mistral"
    keys = (Key("sliding_window", "sliding_window"),)
    defaults = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
