"""`config.json` from our model configuration, and back. Needs neither torch nor transformers."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vishwamai_mp.config import ConfigError, ModelConfig, PretrainConfig, UserError, load_config, resolve
from vishwamai_mp.conversion import components

PLAIN_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
_NO_ROOM_FOR = {
    "Qwen2ForCausalLM": "biases of queries, keys and values",
    "Qwen3ForCausalLM": "norms of queries and keys",
    "GemmaForCausalLM": "GELU and norm weights offset by one",
    "Gemma2ForCausalLM": "soft-capped logits",
    "Gemma3ForCausalLM": "norms of queries and keys",
    "MixtralForCausalLM": "mixture of experts",
    "Phi3ForCausalLM": "partial rotary embeddings and LongRoPE",
    "CohereForCausalLM": "parallel attention and MLP",
    "OlmoForCausalLM": "norms without weights",
    "Olmo2ForCausalLM": "norms after attention and MLP",
    "GraniteForCausalLM": "multipliers of embeddings, residuals and logits",
    "StableLmForCausalLM": "LayerNorm and partial rotary embeddings",
}


def to_hf(model: ModelConfig, dtype: str, token_ids: Mapping[str, int]) -> dict[str, Any]:
    """`config.json` of a model without components: a Llama, or with a sliding window a Mistral, which is one with it.

    Args:
        model: resolved.
        dtype: of the weights, torch's name.
        token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`, as far as they exist.

    Raises:
        UserError: transformers has no such model.
    """
    if model.hidden_size % model.num_attention_heads:
        raise UserError(
            f"model.hidden_size={model.hidden_size} is not a multiple of model.num_attention_heads="
            f"{model.num_attention_heads}: transformers' Llama refuses that"
        )
    windowed = model.sliding_window is not None
    return {
        "architectures": [PLAIN_ARCHITECTURES[windowed]],
        "model_type": "mistral" if windowed else "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,  # these two names: transformers 4 and 5, vLLM and llama.cpp read them
        "rope_scaling": _scaling_to_hf(model),
        "tie_word_embeddings": model.tie_word_embeddings,
        "initializer_range": model.initializer_range,
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
        "use_cache": True,
        **({"sliding_window": model.sliding_window} if windowed else {"attention_bias": False, "mlp_bias": False}),
        **{name: token_ids.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder} is no Hugging Face folder (config.json is missing)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no JSON object")
    return config


def from_hf(config: Mapping[str, Any], path: Path) -> PretrainConfig:
    """Our configuration, resolved, of a Llama-family `config.json`; other sections than `model` have their defaults.

    Raises:
        UserError: another architecture, or a feature of the family that this model has not.
    """
    _check_supported(config, path)
    try:
        model: dict[str, Any] = {
            "hidden_size": config["hidden_size"],
            "num_layers": config["num_hidden_layers"],
            "num_attention_heads": config["num_attention_heads"],
            "num_key_value_heads": config.get("num_key_value_heads"),
            "head_dim": config.get("head_dim"),
            "intermediate_size": config["intermediate_size"],
            "vocab_size": config["vocab_size"],
            "max_position_embeddings": config.get("max_position_embeddings", 2048),
            "tie_word_embeddings": config.get("tie_word_embeddings", False),
            "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
            "initializer_range": config.get("initializer_range", 0.02),
        }
    except KeyError as error:
        raise UserError(f"{path} lacks {error.args[0]}") from None
    if config["architectures"][0] != "LlamaForCausalLM":
        model["sliding_window"] = config.get("sliding_window")
    rope = _rope(config)
    model["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    model["rope_scaling"] = _scaling_from_hf(rope, path)
    try:
        training = {"sequence_length": model["max_position_embeddings"]}
        return resolve(load_config({"model": model, "training": training, **components.from_hf(config)}))
    except KeyError as error:
        raise UserError(f"{path}: memory or cache lacks {error.args[0]}") from None
    except (ConfigError, TypeError) as error:
        raise UserError(f"{path}: {error}") from None


def _check_supported(config: Mapping[str, Any], path: Path) -> None:
    named = config.get("architectures")
    if not isinstance(named, list) or not named:
        raise UserError(f"{path} names no architecture; expected {' or '.join(PLAIN_ARCHITECTURES)}")
    if named[0] not in (*PLAIN_ARCHITECTURES, components.ARCHITECTURE):
        why = f", which has {_NO_ROOM_FOR[named[0]]}" if named[0] in _NO_ROOM_FOR else ""
        raise UserError(f"{path}: {named[0]}{why}, cannot be converted; only Llama and Mistral models can")
    partial = config.get("partial_rotary_factor") or _rope(config).get("partial_rotary_factor") or 1
    refused = {
        "attention_bias": (config.get("attention_bias", False), False, "linears here have no biases"),
        "mlp_bias": (config.get("mlp_bias", False), False, "linears here have no biases"),
        "hidden_act": (config.get("hidden_act", "silu"), "silu", "the MLP here is SwiGLU"),
        "partial_rotary_factor": (float(partial), 1.0, "heads are turned whole here"),
    }
    for key, (value, wanted, why) in refused.items():
        if value != wanted:
            raise UserError(f"{path}: {key}={value} is not supported ({why})")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UserError(f"{path}: its weights are quantized ({method}); give the folder with the original weights")


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformers 5 writes `rope_parameters`; 4 wrote `rope_scaling` beside `rope_theta`."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _scaling_from_hf(rope: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    names = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in names:
        raise UserError(f"{path}: rotary scaling {kind!r} is not supported; only linear and llama3 are")
    missing = [name for name in names[kind] if name not in rope]
    if missing:
        raise UserError(f"{path}: rotary scaling {kind!r} lacks {missing[0]}")
    return {"rope_type": kind, **{name: rope[name] for name in names[kind]}}


def _scaling_to_hf(model: ModelConfig) -> dict[str, Any] | None:
    scaling = model.rope_scaling
    if scaling is None:
        return None
    if scaling.rope_type == "linear":
        return {"rope_type": "linear", "type": "linear", "factor": scaling.factor}
    return asdict(scaling)
