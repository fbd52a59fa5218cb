"""Layers that differ, in `config.json`: `layer_types`, and `rope_parameters` for each type of layer."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vishwamai_mp.config import ModelConfig, UserError
from vishwamai_mp.config.layer_windows import layer_windows
from vishwamai_mp.conversion import rope_scaling
from vishwamai_mp.conversion.value_kinds import check_kinds

_LETTERS = {"sliding_attention": "S", "full_attention": "F"}


def to_hf(model: ModelConfig) -> dict[str, Any]:
    """`layer_types`, and `rope_parameters` as transformers 5 has them for layers that differ."""
    types = ["full_attention" if window is None else "sliding_attention" for window in layer_windows(model)]
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling:
        rope |= rope_scaling.to_hf(model)["rope_scaling"]
    windowed = {"rope_type": "default", "rope_theta": model.window_rope_theta} if model.window_rope_theta else rope
    return {"layer_types": types, "rope_parameters": {"full_attention": rope, "sliding_attention": windowed}}


def from_hf(config: Mapping[str, Any], path: Path, default: str) -> dict[str, Any]:
    """`sliding_window` and `layer_pattern` of our section `model`.

    Args:
        config: `config.json`.
        path: of it, for messages.
        default: the pattern where it has no `layer_types`.
    """
    check_kinds(config, {"num_hidden_layers": (int,), "layer_types": (list,)}, path)
    layers, window = config.get("num_hidden_layers") or 0, config.get("sliding_window")
    letters = default[:layers]
    if types := config.get("layer_types"):
        if unknown := [kind for kind in types if kind not in _LETTERS]:
            raise UserError(f"{path}: {unknown[0]!r} in layer_types is not supported; {' and '.join(_LETTERS)} are")
        if len(types) != layers:
            raise UserError(f"{path}: {len(types)} layer_types of {layers} layers")
        letters = "".join(_LETTERS[kind] for kind in types)
    if "S" not in letters or window is None:
        return {"sliding_window": None, "layer_pattern": None}
    if "F" not in letters:
        return {"sliding_window": window, "layer_pattern": None}
    return {"sliding_window": window, "layer_pattern": shortest_pattern(letters)}


def shortest_pattern(letters: str) -> str:
    """What has to be repeated to begin with `letters`."""
    whole = len(letters)
    return next(letters[:n] for n in range(1, whole + 1) if (letters[:n] * (whole // n + 1)).startswith(letters))


def with_switched_windows(
    config: Mapping[str, Any], path: Path, is_windowed: Callable[[int], bool]
) -> Mapping[str, Any]:
    """`config.json` of a family with `use_sliding_window`, with what is not said where it is false said as null.

    Args:
        config: `config.json`.
        path: of it, for messages.
        is_windowed: whether a layer (from 0) has the window where `layer_types` is not said.

    Raises:
        UserError: layers have windows, and the switch is off.
    """
    check_kinds(config, {"num_hidden_layers": (int,), "layer_types": (list,)}, path)
    types, layers = config.get("layer_types"), config.get("num_hidden_layers") or 0
    if not config.get("use_sliding_window"):
        if "sliding_attention" in (types or ()):
            raise UserError(
                f"{path}: layer_types has 'sliding_attention' and use_sliding_window is not set; make them agree"
            )
        return {**config, "sliding_window": None, "layer_types": None}
    if types:
        return config
    names = {letter: name for name, letter in _LETTERS.items()}
    return {**config, "layer_types": [names["S" if is_windowed(layer) else "F"] for layer in range(layers)]}


def with_one_rotary(config: Mapping[str, Any], path: Path, model: dict[str, Any]) -> dict[str, Any]:
    """`config.json` as if all layers were of one type; where windowed ones differ, `window_rope_theta` joins `model`.

    Args:
        config: `config.json`.
        path: of it, for messages.
        model: what `from_hf` says.

    Raises:
        UserError: layers with a window turn queries and keys by more than a base of their own.
    """
    kinds = ["full_attention"] if model["sliding_window"] is None else ["sliding_attention"]
    kinds = ["full_attention", "sliding_attention"] if model["layer_pattern"] else kinds
    check_kinds(config, {"rope_parameters": (dict,), "rope_scaling": (dict,)}, path)
    found, nested = dict(config), config.get("rope_parameters") or {}
    old = config.get("rope_scaling") or {}
    if nested.keys() & _LETTERS.keys():
        check_kinds(nested, dict.fromkeys(_LETTERS, (dict,)), path)
        each = [dict(nested.get(kind) or {}) for kind in kinds]
        each = [one | (old if kind == "full_attention" else {}) for one, kind in zip(each, kinds, strict=True)]
        found |= {"rope_parameters": each[0], "rope_scaling": None}
        found["rope_theta"] = each[0].get("rope_theta", config.get("rope_theta"))
        if each[-1] != each[0]:
            model["window_rope_theta"] = _base(each[-1], config, path)
    elif old and len(kinds) > 1:  # it is of layers without a window
        model["window_rope_theta"] = _base({}, config, path)
    elif old and kinds == ["sliding_attention"]:
        found["rope_scaling"] = None
    return found


def _base(rope: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> Any:
    """`rope_theta` of layers with a window."""
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"{path}: rotary scaling {rope['rope_type']!r} of layers with a window is not supported")
    return rope.get("rope_theta", config.get("rope_theta", 10000.0))
