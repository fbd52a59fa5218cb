"""Layers that differ, in `config.json`: `layer_types`, and `rope_parameters` for each type of layer."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vishwamai_mp.config import ModelConfig, UserError
from vishwamai_mp.config.layer_windows import layer_windows
from vishwamai_mp.config.wording import counted
from vishwamai_mp.conversion import rope_scaling
from vishwamai_mp.conversion.value_kinds import NUMBER, check_kinds

_WINDOWED, _WHOLE = "sliding_attention", "full_attention"
_LETTERS = {_WINDOWED: "S", _WHOLE: "F"}


def to_hf(model: ModelConfig, bases: Mapping[str, tuple[str, float]]) -> dict[str, Any]:
    """`layer_types`, and where types of layers may turn differently their `rope_parameters` and bases.

    The parameters are transformers 5's, the bases under keys of their own 4's. A type that no layer is of has the
    default.

    Args:
        model: resolved.
        bases: as `with_one_rotary` has them; empty: all types turn alike.
    """
    types = [_WHOLE if window is None else _WINDOWED for window in layer_windows(model)]
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling:
        rope |= rope_scaling.to_hf(model)["rope_scaling"]
    windowed = {"rope_type": "default", "rope_theta": model.window_rope_theta} if model.window_rope_theta else rope
    if not bases:
        return {"layer_types": types}
    found, by_type = {}, {_WINDOWED: windowed, _WHOLE: rope}
    # Where types share a key, that of layers without a window stays there, if there are such.
    for kind in sorted(bases, key=lambda kind: (kind in types, kind == _WHOLE)):
        key, default = bases[kind]
        by_type[kind] = by_type[kind] if kind in types else {"rope_type": "default", "rope_theta": default}
        found[key] = by_type[kind]["rope_theta"]
    return {"layer_types": types, "rope_parameters": by_type, **found}


def from_hf(config: Mapping[str, Any], path: Path, default: str) -> dict[str, Any]:
    """`sliding_window` and `layer_pattern` of our section `model`.

    Args:
        config: `config.json`.
        path: of it, for messages.
        default: the pattern where it has no `layer_types`.

    Raises:
        UserError: what layers there are is not said, or not how long their window is.
    """
    check_kinds(config, {"num_hidden_layers": (int,), "layer_types": (list,)}, path)
    layers, window = config.get("num_hidden_layers") or 0, config.get("sliding_window")
    letters = default[:layers]
    if (types := config.get("layer_types")) is not None:
        if unknown := [kind for kind in types if kind not in _LETTERS]:
            raise UserError(f"{path}: {unknown[0]!r} in layer_types is not supported; {' and '.join(_LETTERS)} are")
        if len(types) != layers:
            raise UserError(f"{path}: {len(types)} layer_types of {counted(layers, 'layer')}")
        letters = "".join(_LETTERS[kind] for kind in types)
    if "S" not in letters:
        return {"sliding_window": None, "layer_pattern": None}
    if window is None:
        raise UserError(f"{path}: sliding_window=null, and layers attend within a window; say how long it is")
    if "F" not in letters:
        return {"sliding_window": window, "layer_pattern": None}
    return {"sliding_window": window, "layer_pattern": shortest_pattern(letters)}


def has_windows(pattern: str | None) -> bool:
    """Whether a family's layers have windows where `layer_types` is not said."""
    return _LETTERS[_WINDOWED] in (pattern or "")


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
        if others := [kind for kind in types or () if kind != _WHOLE]:
            raise UserError(f"{path}: layer_types has {others[0]!r} and use_sliding_window is not set; make them agree")
        return {**config, "sliding_window": None, "layer_types": None}
    if types:
        return config
    has_window = config.get("sliding_window", True) is not None  # not said: the family's default
    windowed = [has_window and is_windowed(layer) for layer in range(layers)]
    return {**config, "layer_types": [_WINDOWED if one else _WHOLE for one in windowed]}


def with_one_rotary(
    config: Mapping[str, Any], path: Path, model: dict[str, Any], bases: Mapping[str, tuple[str, float]]
) -> dict[str, Any]:
    """`config.json` as if all layers were of one type; where windowed ones differ, `window_rope_theta` joins `model`.

    What each type has is what transformers 5 makes of the keys of either version.

    Args:
        config: `config.json`.
        path: of it, for messages.
        model: what `from_hf` says.
        bases: of each type of layer, the key that has its base where `rope_parameters` has not, and the default.

    Raises:
        UserError: layers with a window turn queries and keys by more than a base of their own, or it depends on the
            version of transformers how they do.
    """
    objects = dict.fromkeys(("rope_parameters", "rope_scaling"), (dict,))
    check_kinds(config, {**objects, **{key: NUMBER for key, _ in bases.values()}}, path)
    by_type, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if unknown := sorted(by_type.keys() - bases.keys()):
        raise UserError(
            f"{path}: rope_parameters with {unknown[0]}={by_type[unknown[0]]!r} does not say which layers that is of;"
            f" write an object for each of {' and '.join(bases)}"
        )
    check_kinds(by_type, dict.fromkeys(bases, (dict,)), path)
    said = {kind: dict(by_type.get(kind) or {}) | (old if kind == _WHOLE else {}) for kind in bases}
    key, usual = bases[_WINDOWED]
    base, is_unsaid = config.get(key), "rope_theta" not in said[_WINDOWED]
    if key == bases[_WHOLE][0] and is_unsaid and model["sliding_window"] is not None and base not in (None, usual):
        raise UserError(
            f"{path}: rope_theta={base} does not say which layers it is of: transformers 4 turns all by it, and 5 those"
            f" with a window by {usual}; write rope_parameters, with a rope_theta for each of {' and '.join(bases)}"
        )
    kinds = [_WINDOWED] if model["sliding_window"] is not None else [_WHOLE]
    kinds = [_WHOLE, _WINDOWED] if model["layer_pattern"] else kinds
    each = []
    for kind in kinds:
        key, default = bases[kind]
        theta = config.get(key)
        each.append({"rope_type": "default", "rope_theta": default if theta is None else theta, **said[kind]})
        if each[-1].get("truncate") is False:
            raise UserError(f"{path}: truncate=false of {kind} is not supported: transformers does not read it there")
    if each[-1] != each[0]:
        model["window_rope_theta"] = _base(each[-1], path)
    # The length that a scaling begins from is not read outside of a type's own parameters.
    outside = {"rope_scaling", "rope_theta", "original_max_position_embeddings"}
    return {**{key: value for key, value in config.items() if key not in outside}, "rope_parameters": each[0]}


def _base(rope: Mapping[str, Any], path: Path) -> Any:
    """`rope_theta` of layers with a window."""
    kind = rope.get("type", "default") if rope["rope_type"] == "default" else rope["rope_type"]
    if kind != "default":
        raise UserError(f"{path}: rotary scaling {kind!r} of layers with a window is not supported")
    for key in sorted(rope.keys() - {"rope_type", "type", "rope_theta"}):
        if rope[key] and (key, rope[key]) != ("partial_rotary_factor", 1):
            raise UserError(f"{path}: {key}={rope[key]!r} of layers with a window is not supported")
    return rope["rope_theta"]
