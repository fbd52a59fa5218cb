"""A model family of the user's own: Seed-OSS, whose biases of queries, keys and values may be left out.

    python tools/convert_checkpoint.py from-hf --load Seed-OSS-36B-Base --output runs/seed \\
        --family examples.extensions.seed_oss:SeedOss
"""

from vishwamai_mp.conversion.families import Family, Key


class SeedOss(Family):
    """As transformers has it since 4.56."""

    architecture = "SeedOssForCausalLM"
    model_type = "seed_oss"
    title = "Seed-OSS"
    keys = (Key("attention_bias", "attention_bias"), Key("residual_dropout", "hidden_dropout"))
    defaults = {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "attention_bias": True,
        "attention_dropout": 0.1,
        "residual_dropout": 0.1,
    }
    only = {"attention_out_bias": (False, "the output projection of attention has no bias here")}
    written = {"attention_out_bias": False, "mlp_bias": False}
