"""What a GGUF file says of a model, and which models llama.cpp computes as they are.

From llama.cpp's own sources: which architecture it has for a family, what it reads of it, what it takes for granted.
A setting that a file could not say is refused: llama.cpp would leave it out and compute something else.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from vishwamai_mp.config import ModelConfig, RopeScaling, UserError
from vishwamai_mp.conversion.families import Family


@dataclass(frozen=True)
class Form:
    """llama.cpp's architecture for a family.

    Attributes:
        name: of it.
        turns_neighbours: its rotary embedding turns neighbouring rows of a head, not its two halves.
        norm_offset: added to the weights of norms.
        head: "any": without an output layer the embedding is taken; "own": there has to be one; "tied": none is read.
        says: settings of ours that it reads, or that the family always has.
        free_head_width: heads may have another width than their share of `hidden_size`.
        scale_from_width: its number of layers at which scores are divided by √(hidden_size / heads); None: at none.
    """

    name: str
    turns_neighbours: bool = False
    norm_offset: float = 0.0
    head: str = "any"
    says: frozenset[str] = frozenset()
    free_head_width: bool = True
    scale_from_width: int | None = None


_WINDOWS = frozenset({"sliding_window", "layer_pattern", "window_rope_theta"})
_GEMMA = frozenset({"embedding_multiplier", "attention_multiplier", "logit_softcap"})
_SMOLLM3_PATTERN = "RRRN"  # whatever a file says
# Of ours, as Granite's files call them.
_MULTIPLIERS = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logit_multiplier": "logit_scale",
}
FORMS: Mapping[str, Form] = {
    "LlamaForCausalLM": Form("llama", turns_neighbours=True),
    "MistralForCausalLM": Form("llama", turns_neighbours=True),
    "Qwen2ForCausalLM": Form("qwen2", free_head_width=False),
    "Qwen3ForCausalLM": Form("qwen3"),
    "Phi3ForCausalLM": Form("phi3", says=frozenset({"rotary_fraction"}), free_head_width=False),
    "Olmo2ForCausalLM": Form("olmo2", head="own", free_head_width=False),
    "Olmo3ForCausalLM": Form("olmo2", head="own", says=_WINDOWS, free_head_width=False),
    "SmolLM3ForCausalLM": Form("smollm3", turns_neighbours=True, says=frozenset({"rotary_pattern"})),
    "GraniteForCausalLM": Form("granite", turns_neighbours=True, says=frozenset(_MULTIPLIERS)),
    "Gemma2ForCausalLM": Form(
        "gemma2", norm_offset=1.0, head="tied", says=_WINDOWS | _GEMMA | {"attention_softcap"}, scale_from_width=46
    ),
    "Gemma3ForCausalLM": Form("gemma3", norm_offset=1.0, says=_WINDOWS | _GEMMA, scale_from_width=62),
}
_SAID = frozenset(
    {
        *("hidden_size", "num_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"),
        *("vocab_size", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling"),
        *("initializer_range", "attention_dropout", "hidden_dropout"),  # of training alone
    }
)


def form_of(family: type[Family], model: ModelConfig) -> Form:
    """The architecture that a model is written as.

    Raises:
        UserError: llama.cpp has none for the family, or would not compute what the model says.
    """
    form = FORMS.get(family.architecture)
    if form is None:
        known = ", ".join(sorted({architecture.removesuffix("ForCausalLM") for architecture in FORMS}))
        raise UserError(f"--gguf: llama.cpp has no {family.architecture}; it is written for {known}")
    if lacks := _lacks(form, family, model):
        raise UserError(f"--gguf: llama.cpp's {form.name} has no {', '.join(lacks)}; export without --gguf")
    return form


def _lacks(form: Form, family: type[Family], model: ModelConfig) -> list[str]:
    found = []
    for field in fields(ModelConfig):
        value = getattr(model, field.name)
        if field.name not in _SAID | form.says and value != family.has.get(field.name, field.default):
            found.append(f"model.{field.name}={value}")
    if model.sliding_window is not None and model.sliding_window >= model.max_position_embeddings:
        found = [item for item in found if not item.startswith("model.sliding_window=")]  # it never acts
    if not form.free_head_width and model.head_dim != model.hidden_size // model.num_attention_heads:
        found.append(f"model.head_dim={model.head_dim}")
    if form.head == "tied" and not model.tie_word_embeddings:
        found.append("model.tie_word_embeddings=false")
    if "attention_softcap" in form.says and not (model.attention_softcap and model.logit_softcap):
        found.append("model.attention_softcap=null or model.logit_softcap=null")
    if model.attention_multiplier and form.norm_offset:  # a Gemma's, which is not written
        assert model.head_dim is not None
        is_wide = model.num_layers == form.scale_from_width
        width = model.hidden_size // model.num_attention_heads if is_wide else model.head_dim
        if not math.isclose(model.attention_multiplier, width**-0.5, rel_tol=1e-6):
            found.append(f"model.attention_multiplier={model.attention_multiplier}")
    if "rotary_pattern" in form.says and model.rotary_pattern != _SMOLLM3_PATTERN:
        found.append(f"model.rotary_pattern={model.rotary_pattern}")
    return found + _rope_lacks(model.rope_scaling)


def _rope_lacks(scaling: RopeScaling | None) -> list[str]:
    if scaling is None:
        return []
    named = f"model.rope_scaling of rope_type={scaling.rope_type}"
    if scaling.rope_type == "dynamic":
        return [named]
    if scaling.rope_type == "yarn":
        usual = 0.1 * math.log(max(scaling.factor, 1.0)) + 1  # which llama.cpp computes itself
        if not scaling.truncate:
            return [f"{named} with truncate=false"]
        if not math.isclose(scaling.attention_factor or usual, usual, rel_tol=1e-6):
            return [f"{named} with attention_factor={scaling.attention_factor}"]
    return []


def metadata(form: Form, model: ModelConfig) -> dict[str, Any]:
    """Keys of the file behind the architecture's name and a dot, with values of Python's types.

    A list of truth values is one; whole numbers are unsigned of 32 bits, others fp32.
    """
    assert model.head_dim is not None
    found: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "context_length": model.max_position_embeddings,
        "embedding_length": model.hidden_size,
        "block_count": model.num_layers,
        "feed_forward_length": model.intermediate_size,
        "attention.head_count": model.num_attention_heads,
        "attention.head_count_kv": model.num_key_value_heads,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "attention.layer_norm_rms_epsilon": model.rms_norm_eps,
        "rope.dimension_count": int(model.head_dim * model.rotary_fraction),
        "rope.freq_base": float(model.rope_theta),
        **_rope(model),
    }
    if "sliding_window" in form.says and model.sliding_window is not None:
        pattern = model.layer_pattern or "S"
        found["attention.sliding_window"] = model.sliding_window
        found["attention.sliding_window_pattern"] = [
            pattern[number % len(pattern)] == "S" for number in range(model.num_layers)
        ]
        found["rope.freq_base_swa"] = float(model.window_rope_theta or model.rope_theta)
    if form.name == "phi3":
        found["attention.sliding_window"] = 0  # none
        scaling = model.rope_scaling
        found.setdefault(
            "rope.scaling.original_context_length",
            scaling.original_max_position_embeddings if scaling else model.max_position_embeddings,
        )
    if form.name == "granite":
        for ours, theirs in _MULTIPLIERS.items():
            if (multiplier := getattr(model, ours)) is not None:
                found[theirs] = float(multiplier)
        found["logit_scale"] = 1 / (model.logit_multiplier or 1.0)  # logits are divided by it
    if model.attention_softcap is not None:
        found["attn_logit_softcapping"] = model.attention_softcap
    if model.logit_softcap is not None:
        found["final_logit_softcapping"] = model.logit_softcap
    return found


def _rope(model: ModelConfig) -> dict[str, Any]:
    scaling = model.rope_scaling
    if scaling is None or scaling.rope_type == "llama3":  # which is in a tensor
        return {}
    found: dict[str, Any] = {"rope.scaling.type": scaling.rope_type}
    if scaling.rope_type != "longrope":
        found["rope.scaling.factor"] = float(scaling.factor)
    if scaling.rope_type != "linear":
        found["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
    if scaling.rope_type == "yarn":
        found["rope.scaling.yarn_beta_fast"] = float(scaling.beta_fast)
        found["rope.scaling.yarn_beta_slow"] = float(scaling.beta_slow)
    if scaling.rope_type == "longrope":
        original, factor = scaling.original_max_position_embeddings, max(scaling.factor, 1.0)
        sharpened = math.sqrt(1 + math.log(factor) / math.log(original))
        found["rope.scaling.attn_factor"] = float(scaling.attention_factor or sharpened)
    return found


def rope_tensors(model: ModelConfig) -> dict[str, torch.Tensor]:
    """Tensors by which llama.cpp divides frequencies, fp32."""
    scaling = model.rope_scaling
    if scaling is None:
        return {}
    if scaling.rope_type == "llama3":
        import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)
        from vishwamai_mp.model.rotary import inverse_frequencies  # other exports need no megatron-core

        plain = inverse_frequencies(replace(model, rope_scaling=None))
        return {"rope_freqs.weight": plain / inverse_frequencies(model)}
    if scaling.rope_type == "longrope":
        named = {"long": scaling.long_factor, "short": scaling.short_factor}
        return {f"rope_factors_{name}.weight": torch.tensor(factors) for name, factors in named.items()}
    return {}
