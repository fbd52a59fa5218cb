"""`config.json` from our model configuration, and back. Needs neither torch nor transformers.

Every key of a `config.json` that is imported is either read here, or known to leave what the model computes as it is,
or refused by its name: transformers would let it change the model, and the import would not.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vishwamai_mp.config import ConfigError, ModelConfig, PretrainConfig, UserError, load_config, resolve
from vishwamai_mp.config.pointers import refuse_pointer
from vishwamai_mp.conversion import components

PLAIN_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
MODEL_TYPES = {
    **dict(zip(PLAIN_ARCHITECTURES, ("llama", "mistral", "qwen2", "qwen3"), strict=True)),
    components.ARCHITECTURE: components.MODEL_TYPE,
}
_NO_ROOM_FOR = {
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
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What transformers takes where config.json does not say; a Llama's are in `from_hf`.
_MISTRAL_DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
_QWEN_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": _QWEN_DEFAULTS,
    "Qwen3ForCausalLM": {**_QWEN_DEFAULTS, "head_dim": 128},
}
# What a family has besides, whatever its config.json says.
_FEATURES: dict[str, dict[str, Any]] = {
    "Qwen2ForCausalLM": {"attention_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": "head"},
}
_READ = {
    "architectures", "attention_bias", "attention_dropout", "auto_map", "head_dim", "hidden_act", "hidden_size",
    "initializer_range", "intermediate_size", "layer_types", "max_position_embeddings", "mlp_bias", "model_type",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "partial_rotary_factor", "quantization_config",
    "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings", "vocab_size", *_TOKEN_IDS,
}  # fmt: skip
_NUMBER = (int, float)
_KINDS: dict[str, tuple[type, ...]] = {  # of values; any may be null
    **dict.fromkeys(("architectures", "layer_types"), (list,)),
    **dict.fromkeys(("quantization_config", "rope_parameters", "rope_scaling", "memory", "cache"), (dict,)),
    **dict.fromkeys(("partial_rotary_factor", "rope_theta"), _NUMBER),
}
_ROPE_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("rope_type", "type"), (str,)),
    **dict.fromkeys(("rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor"), _NUMBER),
}
_KIND_NAMES = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
_NEUTRAL = {
    # where the folder comes from
    "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "unsloth_version", "unsloth_fixed",
    "transformers.js_config", "license", "is_llama_config",
    # how transformers computes and what it returns, not what; pretraining_tp cuts products into equal slices
    "torch_dtype", "dtype", "use_cache", "pretraining_tp", "torchscript", "use_bfloat16", "return_dict",
    "output_attentions", "output_hidden_states", "_attn_implementation", "attn_implementation",
    "_attn_implementation_autoset", "_attn_implementation_internal", "chunk_size_feed_forward",
    "gradient_checkpointing",
    # of classifiers, encoders and other tasks
    "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "tokenizer_class",
    "sep_token_id", "cls_token_id", "mask_token_id", "decoder_start_token_id", "is_encoder_decoder", "is_decoder",
    # of generate(), from before generation_config.json
    "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "num_return_sequences", "bad_words_ids", "output_scores", "return_dict_in_generate",
    "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "suppress_tokens", "begin_suppress_tokens",
}  # fmt: skip


def to_hf(model: ModelConfig, dtype: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of a model without components, of the family that has its features (`_architecture`).

    Args:
        model: resolved.
        dtype: of the weights, torch's name.
        token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`, as far as they exist; a number each, or a list.

    Raises:
        UserError: transformers has no such model.
    """
    if model.hidden_size % model.num_attention_heads:
        raise UserError(
            f"model.hidden_size={model.hidden_size} is not a multiple of model.num_attention_heads="
            f"{model.num_attention_heads}: transformers' Llama refuses that"
        )
    architecture = _architecture(model)
    own: dict[str, dict[str, Any]] = {
        "MistralForCausalLM": {"sliding_window": model.sliding_window},
        "Qwen2ForCausalLM": {"use_sliding_window": False, "sliding_window": None},
        "Qwen3ForCausalLM": {"use_sliding_window": False, "sliding_window": None, "attention_bias": False},
    }
    return {
        "architectures": [architecture],
        "model_type": MODEL_TYPES[architecture],
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
        "attention_dropout": model.attention_dropout,
        "torch_dtype": dtype,
        "use_cache": True,
        **own.get(architecture, {"attention_bias": False, "mlp_bias": False}),
        **{name: token_ids.get(name) for name in _TOKEN_IDS},
    }


def _architecture(model: ModelConfig) -> str:
    features = {
        "model.sliding_window": ("MistralForCausalLM", model.sliding_window is not None),
        "model.attention_bias": ("Qwen2ForCausalLM", model.attention_bias),
        "model.qk_norm": ("Qwen3ForCausalLM", model.qk_norm == "head"),
    }
    found = {key: name for key, (name, is_on) in features.items() if is_on}
    if len(found) > 1:
        raise UserError(f"{' and '.join(found)} together: transformers has no model with both; train with one of them")
    return next(iter(found.values()), "LlamaForCausalLM")


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{folder} holds adapters of PEFT, not a model; merge them into their base first (merge_and_unload)"
            ) from None
        raise UserError(f"{folder} is no Hugging Face folder (config.json is missing)") from None
    except (OSError, ValueError, RecursionError) as error:
        refuse_pointer(path)
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
    architecture = config["architectures"][0]
    config = {**_DEFAULTS.get(architecture, _MISTRAL_DEFAULTS), **config}
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
            "attention_dropout": config.get("attention_dropout", 0.0),
        }
    except KeyError as error:
        raise UserError(f"{path} lacks {error.args[0]}") from None
    model |= _FEATURES.get(architecture, {})
    if architecture not in _DEFAULTS:
        model["sliding_window"] = config["sliding_window"]
    rope = _rope(config, path)
    model["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    model["rope_scaling"] = _scaling_from_hf(rope, path)
    try:
        training = {"sequence_length": model["max_position_embeddings"]}
        return resolve(load_config({"model": model, "training": training, **components.from_hf(config)}))
    except KeyError as error:
        raise UserError(f"{path}: memory or cache lacks {error.args[0]}") from None
    except (ConfigError, TypeError) as error:
        raise UserError(f"{path}: {error}") from None


def token_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """`bos_token_id` and the like that `config` names: a number each, or a list."""
    return {name: config[name] for name in _TOKEN_IDS if config.get(name) is not None}


def without_effect(config: Mapping[str, Any]) -> list[str]:
    """Keys of a supported `config.json` that are unknown here, but switched off: null, false, 0 or empty."""
    return sorted(config.keys() - _known(config))


def _known(config: Mapping[str, Any]) -> set[str]:
    qwen = {"sliding_window", "use_sliding_window", "max_window_layers"}  # without effect where they are not used
    own = {
        "LlamaForCausalLM": set(),
        "MistralForCausalLM": {"sliding_window"},
        "Qwen2ForCausalLM": qwen,
        "Qwen3ForCausalLM": qwen,
    }
    return _READ | _NEUTRAL | own.get(config["architectures"][0], {"sliding_window", *components.KEYS})


def _check_kinds(values: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]], path: Path) -> None:
    for key, wanted in kinds.items():
        value = values.get(key)
        if value is not None and (not isinstance(value, wanted) or isinstance(value, bool)):
            raise UserError(f"{path}: {key}={value!r} is not {_KIND_NAMES[wanted[0]]}")
        if isinstance(value, list) and not all(isinstance(one, str) for one in value):
            raise UserError(f"{path}: {key}={value!r} is not a list of texts")


def _check_supported(config: Mapping[str, Any], path: Path) -> None:
    _check_kinds(config, _KINDS, path)
    named = config.get("architectures")
    if not named:
        raise UserError(f"{path} names no architecture; expected {' or '.join(PLAIN_ARCHITECTURES)}")
    if named[0] not in MODEL_TYPES:
        why = f", which has {_NO_ROOM_FOR[named[0]]}" if named[0] in _NO_ROOM_FOR else ""
        raise UserError(
            f"{path}: {named[0]}{why}, cannot be converted; only Llama, Mistral and Qwen 2 and 3 models can"
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UserError(f"{path}: its weights are quantized ({method}); give the folder with the original weights")
    window = named[0] not in _DEFAULTS and config.get("sliding_window", 1) is not None
    partial = config.get("partial_rotary_factor") or _rope(config, path).get("partial_rotary_factor") or 1
    layers = set(config.get("layer_types") or ())
    whole = {"sliding_attention" if window else "full_attention"}
    code = components.AUTO_MAP if named[0] == components.ARCHITECTURE else {}
    refused = {
        "model_type": (config.get("model_type", MODEL_TYPES[named[0]]), MODEL_TYPES[named[0]], f"it is a {named[0]}"),
        "use_sliding_window": (config.get("use_sliding_window") or False, False, "its windows are of some layers only"),
        "attention_bias": (config.get("attention_bias") or False, False, "linears here have no biases"),
        "mlp_bias": (config.get("mlp_bias") or False, False, "linears here have no biases"),
        "hidden_act": (config.get("hidden_act", "silu"), "silu", "the MLP here is SwiGLU"),
        "partial_rotary_factor": (float(partial), 1.0, "heads are turned whole here"),
        "layer_types": (layers or whole, whole, "all layers here attend alike"),
        "auto_map": (config.get("auto_map") or code, code, "the model is computed by Python code of its own"),
    }
    for key, (value, wanted, why) in refused.items():
        if value != wanted:
            raise UserError(f"{path}: {key}={value} is not supported ({why})")
    for key in sorted(config.keys() - _known(config)):
        if config[key]:
            raise UserError(
                f"{path}: {key}={config[key]!r} is unknown here and may change what the model computes; if it does"
                " not, take it out of the file"
            )


def _rope(config: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """transformers 5 writes `rope_parameters`; 4 wrote `rope_scaling` beside `rope_theta`."""
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    rope = new or old
    _check_kinds(rope, _ROPE_KINDS, path)
    if new and old and new != old:
        raise UserError(f"{path}: rope_parameters={new} and rope_scaling={old} do not agree; take one out of the file")
    theta = config.get("rope_theta")
    if theta is not None and rope.get("rope_theta", theta) != theta:
        raise UserError(f"{path}: rope_theta is {theta}, and {rope['rope_theta']} with the scaling; keep one of them")
    return rope


def _scaling_from_hf(rope: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    names = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in names:
        raise UserError(f"{path}: rotary scaling {kind!r} is not supported; only linear and llama3 are")
    missing = [name for name in names[kind] if name not in rope]
    if missing:
        raise UserError(f"{path}: rotary scaling {kind!r} lacks {missing[0]}")
    # What transformers' own rule of this type does not read either.
    unread = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
    unknown = [name for name in rope if name not in {*names[kind], *unread} and rope[name]]
    if unknown:
        raise UserError(f"{path}: rotary scaling {kind!r} with {unknown[0]}={rope[unknown[0]]!r} is not supported")
    return {"rope_type": kind, **{name: rope[name] for name in names[kind]}} if names[kind] else None


def _scaling_to_hf(model: ModelConfig) -> dict[str, Any] | None:
    scaling = model.rope_scaling
    if scaling is None:
        return None
    if scaling.rope_type == "linear":
        return {"rope_type": "linear", "type": "linear", "factor": scaling.factor}
    return asdict(scaling)
