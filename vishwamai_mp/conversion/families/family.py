"""What a model family is to the conversion: a class of attributes that say how its folders name what ours name.

Both directions read the same attributes. docs/extending.md shows how to write one. Needs no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from vishwamai_mp.config import ModelConfig, UserError
from vishwamai_mp.conversion import layer_types, rope_scaling
from vishwamai_mp.conversion.mapping import WeightNames


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Key:
    """A key of `config.json` that says what one key of our section `model` says.

    Attributes:
        theirs: its name in `config.json`.
        ours: its name in our section `model`.
        read: our value from theirs.
        write: theirs from ours.
    """

    theirs: str
    ours: str
    read: Callable[[Any], Any] = _same
    write: Callable[[Any], Any] = _same


_COMMON = (
    *(Key(name, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")),
    Key("num_hidden_layers", "num_layers"),
    *(Key(name, name) for name in ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps")),
    *(Key(name, name) for name in ("tie_word_embeddings", "initializer_range", "attention_dropout")),
)
_COMMON_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
}
_COMMON_ONLY: dict[str, tuple[Any, str]] = {
    "attention_bias": (False, "linears here have no biases"),
    "mlp_bias": (False, "linears here have no biases"),
    "hidden_act": ("silu", "the MLP here is SwiGLU"),
}
# Of our keys: what `rope_scaling` says, what only training asks for, and code of the user's own, refused elsewhere.
_ELSEWHERE = {"rope_theta", "rope_scaling", "hidden_dropout", "attention"}


class Family:
    """One architecture of transformers. Derive a class from it and set what differs from a Llama.

    Attributes:
        architecture: in `architectures` of `config.json`.
        model_type: there too.
        title: for people.
        has: what every model of the family has, whatever its `config.json` says: values of our section `model`.
        keys: keys of `config.json` besides those that all families have.
        defaults: what transformers takes where `config.json` does not say, if not what a Llama's does.
        only: keys of `config.json` that are refused unless they have one value, and why.
        neutral: keys of `config.json` that change nothing where the others are as they are accepted.
        default_pattern: `model.layer_pattern` where `layer_types` is not said, of a family whose layers may differ in
            their window; None: they are all alike.
        rotary_by_type: of such a family whose layers with a window may turn by a base of their own: for each type of
            layer the key of `config.json` with its base, where `rope_parameters` has none, and the default.
        rotary_rules: the values of `model.rope_scaling.rope_type` that transformers takes; None: all.
        written: keys of `config.json` that an export writes as they stand here.
        weights: what its folders call their tensors.
    """

    architecture: ClassVar[str]
    model_type: ClassVar[str]
    title: ClassVar[str]
    has: ClassVar[Mapping[str, Any]] = {}
    keys: ClassVar[tuple[Key, ...]] = ()
    defaults: ClassVar[Mapping[str, Any]] = {}
    only: ClassVar[Mapping[str, tuple[Any, str]]] = {}
    neutral: ClassVar[frozenset[str]] = frozenset()
    default_pattern: ClassVar[str | None] = None
    rotary_by_type: ClassVar[Mapping[str, tuple[str, float]]] = {}
    rotary_rules: ClassVar[frozenset[str] | None] = None
    written: ClassVar[Mapping[str, Any]] = {}
    weights: ClassVar[WeightNames] = WeightNames()

    @classmethod
    def all_keys(cls) -> tuple[Key, ...]:
        """The family's own keys, and the common ones that they do not replace."""
        keys = (*cls.keys, Key("sliding_window", "sliding_window")) if cls.default_pattern else cls.keys
        own = {key.ours for key in keys}
        return (*(key for key in _COMMON if key.ours not in own), *keys)

    @classmethod
    def restricted(cls) -> dict[str, tuple[Any, str]]:
        """`only`, and what is so in all families that do not read the key."""
        read = {key.theirs for key in cls.all_keys()}
        return {key: value for key, value in _COMMON_ONLY.items() if key not in read} | dict(cls.only)

    @classmethod
    def known_keys(cls) -> set[str]:
        """Keys of `config.json` whose meaning is known in this family."""
        return {key.theirs for key in cls.all_keys()} | cls.restricted().keys() | cls.neutral

    @classmethod
    def read(cls, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """Our section `model`; override it where a table of keys cannot say it.

        Args:
            config: `config.json`, without unknown keys.
            path: of it, for messages.

        Raises:
            UserError: a key is missing, or has a value that this package has not.
        """
        config = {**_COMMON_DEFAULTS, **cls.defaults, **config}
        windows: dict[str, Any] = {}
        if cls.default_pattern:
            windows = layer_types.from_hf(config, path, cls.default_pattern)
            if cls.rotary_by_type:
                config = layer_types.with_one_rotary(config, path, windows, cls.rotary_by_type)
        cls._check(config, path)
        model = dict(cls.has)
        for key in cls.all_keys():
            if key.theirs not in config:
                raise UserError(f"{path} lacks {key.theirs}")
            model[key.ours] = key.read(config[key.theirs])
        rotary = rope_scaling.from_hf(config, path)
        if unread := cls._unread_rule(rotary["rope_scaling"] and rotary["rope_scaling"]["rope_type"]):
            raise UserError(f"{path}: rotary scaling {unread!r} is not supported (no {cls.architecture} has it)")
        return model | windows | rotary

    @classmethod
    def _unread_rule(cls, kind: str | None) -> str | None:
        """A rotary rule, if transformers does not take it."""
        return kind if kind and cls.rotary_rules is not None and kind not in cls.rotary_rules else None

    @classmethod
    def _check(cls, config: Mapping[str, Any], path: Path) -> None:
        layers = set(config.get("layer_types") or () if cls.default_pattern is None else ())
        windowed = any(key.ours == "sliding_window" and config.get(key.theirs) is not None for key in cls.keys)
        whole = {"sliding_attention" if windowed else "full_attention"}
        found = {key: (config.get(key), *wanted) for key, wanted in cls.restricted().items()}
        if all(key.ours != "rotary_fraction" for key in cls.keys):
            fraction = rope_scaling.rotary_fraction(config, path)
            found["partial_rotary_factor"] = (fraction, 1.0, f"no {cls.architecture} has it")
        found["layer_types"] = (layers or whole, whole, "all layers here attend alike")
        for key, (value, wanted, why) in found.items():
            if value is not None and (value or False) != wanted:
                raise UserError(f"{path}: {key}={value} is not supported ({why})")

    @classmethod
    def write(cls, model: ModelConfig) -> dict[str, Any]:
        """Keys of `config.json` for a model that the family can hold; the inverse of `read`."""
        keys = {key.theirs: key.write(getattr(model, key.ours)) for key in cls.all_keys()}
        layers = layer_types.to_hf(model, cls.rotary_by_type) if cls.default_pattern else {}
        if model.sliding_window is None and layer_types.has_windows(cls.default_pattern):
            keys["sliding_window"] = cls.defaults["sliding_window"]  # transformers makes such a mask for no layer, too
        return {**keys, "hidden_act": "silu", **rope_scaling.to_hf(model), **layers, **cls.written}

    @classmethod
    def lacks(cls, model: ModelConfig) -> list[str]:
        """Our keys, with their values, that a folder of this family could not say."""
        said, found = {key.ours for key in cls.all_keys()} | _ELSEWHERE, []
        said |= {"layer_pattern"} if cls.default_pattern else set()
        said |= {"window_rope_theta"} if cls.rotary_by_type else set()
        for field in fields(ModelConfig):
            value = getattr(model, field.name)
            if field.name not in said and value != cls.has.get(field.name, field.default):
                found.append(f"model.{field.name}={value}")
        if scaling := model.rope_scaling:
            if cls._unread_rule(scaling.rope_type):
                found.append(f"model.rope_scaling of rope_type={scaling.rope_type}")
            if cls.rotary_by_type and not scaling.truncate:
                found.append("model.rope_scaling.truncate=False")
        return found
