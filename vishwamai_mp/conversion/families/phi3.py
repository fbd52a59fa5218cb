"""Phi 3 and 4 without experts: projections in one matrix, a part of each head turned, LongRoPE."""

from vishwamai_mp.conversion.families.family import Family, Key
from vishwamai_mp.conversion.mapping import WeightNames

_PROJECTIONS, _GATED = "self_attn.qkv_proj", "mlp.gate_up_proj"


class Phi3(Family):
    """See the module."""

    architecture = "Phi3ForCausalLM"
    model_type = "phi3"
    title = "Phi 3 and 4"
    keys = (Key("sliding_window", "sliding_window"), Key("partial_rotary_factor", "rotary_fraction"))
    defaults = {
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "original_max_position_embeddings": 4096,  # comes before the one within the scaling
        "partial_rotary_factor": None,  # it may stand with the scaling: rope_scaling.py reads both places
    }
    rotary_rules = frozenset({"longrope"})
    neutral = frozenset({"embd_pdrop", "resid_pdrop"})  # of training
    weights = WeightNames(queries=_PROJECTIONS, keys=_PROJECTIONS, values=_PROJECTIONS, gate=_GATED, up=_GATED)
