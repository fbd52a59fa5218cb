"""Rotary embeddings in `config.json`: `rope_parameters` of transformers 5, `rope_scaling` and `rope_theta` of 4."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vishwamai_mp.config import ModelConfig, UserError
from vishwamai_mp.conversion.value_kinds import NUMBER, check_kinds

_ORIGINAL = "original_max_position_embeddings"
# By transformers' `rope_type`: what its own rule reads and has to be there, and what may be.
_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {_ORIGINAL}),
    "yarn": (
        set(),
        {"factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim", _ORIGINAL},
    ),
    "longrope": ({"short_factor", "long_factor"}, {"factor", "attention_factor", _ORIGINAL}),
}
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("rope_type", "type"), (str,)),
    **dict.fromkeys(("rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor"), NUMBER),
    **dict.fromkeys(("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", _ORIGINAL), NUMBER),
}
_NAMES = {"rope_type", "type", "rope_theta", "partial_rotary_factor", _ORIGINAL}


def to_hf(model: ModelConfig) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and lengths of a resolved model.

    Their names are those that transformers 4 and 5, vLLM and llama.cpp read.
    """
    scaling, length = model.rope_scaling, model.max_position_embeddings
    found: dict[str, Any] = {"max_position_embeddings": length, "rope_theta": model.rope_theta, "rope_scaling": None}
    if scaling is None:
        return found
    required, optional = _KEYS[scaling.rope_type]
    written = {key: value for key, value in asdict(scaling).items() if key in required | optional}
    found["rope_scaling"] = {"rope_type": scaling.rope_type, **written}
    match scaling.rope_type:
        case "linear":
            found["rope_scaling"]["type"] = "linear"
        case "dynamic":  # its rule takes the original length from there
            found["max_position_embeddings"] = scaling.original_max_position_embeddings
        case "longrope":
            found[_ORIGINAL] = scaling.original_max_position_embeddings
    return found


def from_hf(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Keys of our section `model` from a `config.json`.

    Raises:
        UserError: a rule that is not known here, or one with keys that it does not read.
    """
    rope = parameters(config, path)
    return {
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        "rope_scaling": _scaling(rope, config, path),
        "rotary_fraction": rotary_fraction(config, path),
    }


def parameters(config: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Of whichever of the two forms is there."""
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    rope = new or old
    check_kinds(rope, _KINDS, path)
    if new and old and new != old:
        raise UserError(f"{path}: rope_parameters={new} and rope_scaling={old} do not agree; take one out of the file")
    theta = config.get("rope_theta")
    if theta is not None and rope.get("rope_theta", theta) != theta:
        raise UserError(f"{path}: rope_theta is {theta}, and {rope['rope_theta']} with the scaling; keep one of them")
    return rope


def rotary_fraction(config: Mapping[str, Any], path: Path) -> float:
    """Share of a head's width that is turned.

    Raises:
        UserError: the two places for it do not agree.
    """
    check_kinds(config, {"partial_rotary_factor": NUMBER}, path)
    places = (config.get("partial_rotary_factor"), parameters(config, path).get("partial_rotary_factor"))
    said = {float(share) for share in places if share is not None}
    if len(said) > 1:
        raise UserError(
            f"{path}: partial_rotary_factor is {places[0]}, and {places[1]} with the scaling; keep one of them"
        )
    return said.pop() if said else 1.0


def _scaling(rope: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _KEYS:
        known = ", ".join(sorted(_KEYS.keys() - {"default"}))
        raise UserError(f"{path}: rotary scaling {kind!r} is not supported; {known} are")
    required, optional = _KEYS[kind]
    if missing := sorted(name for name in required if rope.get(name) is None):
        raise UserError(f"{path}: rotary scaling {kind!r} lacks {missing[0]}")
    unknown = [name for name in rope if name not in required | optional | _NAMES and rope[name]]
    if unknown:
        raise UserError(f"{path}: rotary scaling {kind!r} with {unknown[0]}={rope[unknown[0]]!r} is not supported")
    if kind == "default":
        return None
    found = {name: rope[name] for name in sorted(required | optional) if rope.get(name) is not None}
    length = config.get("max_position_embeddings", 2048)
    if kind == "dynamic":
        found[_ORIGINAL] = length
    elif kind != "linear":  # transformers takes the length outside of the rule before the one within
        found[_ORIGINAL] = config.get(_ORIGINAL) or rope.get(_ORIGINAL) or length
        found.setdefault("factor", length / found[_ORIGINAL])
    scales = [found.pop("mscale", None), found.pop("mscale_all_dim", None)]
    if all(scales) and "attention_factor" not in found:
        above, below = (1 + 0.1 * scale * math.log(max(found["factor"], 1)) for scale in scales)
        found["attention_factor"] = above / below
    return {"rope_type": kind, **found}
