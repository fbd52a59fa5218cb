"""`config.json` from our model configuration, and back. Needs neither torch nor transformers.

Every key of a `config.json` that is imported is either read here, or known to leave what the model computes as it is,
or refused by its name: transformers would let it change the model, and the import would not.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vishwamai_mp.config import ConfigError, ModelConfig, PretrainConfig, UserError, load_config, resolve
from vishwamai_mp.config.errors import one_line
from vishwamai_mp.config.json_text import parse_json
from vishwamai_mp.config.pointers import refuse_pointer_or_pipe
from vishwamai_mp.conversion import components, quantized_weights
from vishwamai_mp.conversion.families import Family, family_holding
from vishwamai_mp.conversion.value_kinds import NUMBER, check_kinds

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Read of every family, beside the keys that families name.
_READ = {
    "architectures", "auto_map", "is_causal", "layer_types", "model_type", "original_max_position_embeddings",
    "partial_rotary_factor", "quantization_config", "rope_parameters", "rope_scaling", "rope_theta",
    *_TOKEN_IDS,
}  # fmt: skip
_KINDS: dict[str, tuple[type, ...]] = {  # of values
    **dict.fromkeys(("architectures", "layer_types"), (list,)),
    **dict.fromkeys(("rope_parameters", "rope_scaling", "memory", "cache"), (dict,)),
    **dict.fromkeys(("partial_rotary_factor", "rope_theta"), NUMBER),
}
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


def to_hf(
    model: ModelConfig, dtype: str, token_ids: Mapping[str, Any], family: type[Family] | None = None
) -> dict[str, Any]:
    """`config.json` of a model without components.

    Args:
        model: resolved.
        dtype: of the weights, torch's name.
        token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`, as far as they exist; a number each, or a list.
        family: one that holds the model; None: the first that does.

    Raises:
        UserError: transformers has no such model.
    """
    if model.hidden_size % model.num_attention_heads:
        raise UserError(
            f"model.hidden_size={model.hidden_size} is not a multiple of model.num_attention_heads="
            f"{model.num_attention_heads}: transformers' Llama refuses that"
        )
    family = family or family_holding(model)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.write(model),
        "torch_dtype": dtype,
        "use_cache": True,
        **{name: token_ids.get(name) for name in _TOKEN_IDS},
    }


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    path = folder / "config.json"
    refuse_pointer_or_pipe(path)
    try:
        config = parse_json(path.read_bytes())
    except FileNotFoundError:
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{folder} holds adapters of PEFT, not a model; merge them into their base first (merge_and_unload)"
            ) from None
        raise UserError(f"{folder} is no Hugging Face folder (config.json is missing)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no JSON object")
    return config


def from_hf(config: Mapping[str, Any], path: Path, family: type[Family]) -> PretrainConfig:
    """Our configuration, resolved, of a `config.json`; other sections than `model` have their defaults.

    Raises:
        UserError: a feature of the family that this model has not.
    """
    _check_supported(config, path, family)
    model = family.read(config, path)
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


def without_effect(config: Mapping[str, Any], family: type[Family]) -> list[str]:
    """Keys of a supported `config.json` that are unknown here, but switched off: null, false, 0 or empty."""
    return sorted(config.keys() - _READ - _NEUTRAL - family.known_keys())


def is_neutral(key: str) -> bool:
    """Whether a key of any `config.json` leaves what the model computes as it is."""
    return key in _NEUTRAL


def is_read(key: str, family: type[Family]) -> bool:
    """Whether a key of a family's `config.json` is part of what `from_hf` reads."""
    return key in _READ | family.known_keys()


def _check_supported(config: Mapping[str, Any], path: Path, family: type[Family]) -> None:
    """What is refused of any family."""
    check_kinds(config, _KINDS, path)
    quantized_weights.block_of(config, path)
    code = components.AUTO_MAP if family.architecture == components.ARCHITECTURE else {}
    refused = {
        "model_type": (
            config.get("model_type", family.model_type),
            family.model_type,
            f"it is a {family.architecture}",
        ),
        "auto_map": (config.get("auto_map") or code, code, "the model is computed by Python code of its own"),
        # The one switch of all families that null or false turns on: see `without_effect`.
        "is_causal": (config.get("is_causal", True), True, "tokens here see none behind them"),
    }
    for key, (value, wanted, why) in refused.items():
        if value != wanted:
            raise UserError(f"{path}: {key}={value} is not supported ({why})")
    for key in without_effect(config, family):
        if config[key]:
            raise UserError(
                f"{path}: {key}={config[key]!r} is unknown here and may change what the model computes; if it does"
                " not, take it out of the file"
            )
