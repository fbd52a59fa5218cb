"""Rotary embeddings in `config.json`: `rope_parameters` of transformers 5, `rope_scaling` and `rope_theta` of 4."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vishwamai_mp.config import ModelConfig, UserError
from vishwamai_mp.conversion.value_kinds import NUMBER, check_kinds

_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("rope_type", "type"), (str,)),
    **dict.fromkeys(("rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor"), NUMBER),
}


def to_hf(model: ModelConfig) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and lengths of a resolved model.

    Their names are those that transformers 4 and 5, vLLM and llama.cpp read.
    """
    scaling = model.rope_scaling
    written: dict[str, Any] | None = None
    if scaling is not None and scaling.rope_type == "linear":
        written = {"rope_type": "linear", "type": "linear", "factor": scaling.factor}
    elif scaling is not None:
        written = asdict(scaling)
    return {
        "max_position_embeddings": model.max_position_embeddings,
        "rope_theta": model.rope_theta,
        "rope_scaling": written,
    }


def from_hf(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Keys of our section `model` from a `config.json`.

    Raises:
        UserError: a rule that is not known here, or one with keys that it does not read.
    """
    rope = parameters(config, path)
    return {
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        "rope_scaling": _scaling(rope, path),
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
    """Share of a head's width that is turned."""
    return float(config.get("partial_rotary_factor") or parameters(config, path).get("partial_rotary_factor") or 1)


def _scaling(rope: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
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
