"""From a recipe (YAML), a preset's name or the guide's JSON, plus dotted overrides, to a `PretrainConfig`."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from vishwamai_mp.config.checked_values import check_values
from vishwamai_mp.config.errors import ConfigError, one_line
from vishwamai_mp.config.json_text import parse_json
from vishwamai_mp.config.pointers import refuse_pointer_or_pipe
from vishwamai_mp.config.resolve_schedule import shortened_schedule
from vishwamai_mp.config.schema import Blend, PretrainConfig
from vishwamai_mp.config.yaml_text import read_yaml

# The guide's and Hugging Face's names for our keys.
_MODEL_ALIASES = {"dim": "hidden_size", "num_hidden_layers": "num_layers"}
_ADAPTER = TypeAdapter(PretrainConfig)


def preset_names() -> list[str]:
    """Names that `load_config` accepts in place of a file."""
    folder = resources.files("vishwamai_mp.config") / "presets"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_config(
    source: str | Path | Mapping[str, Any], overrides: Iterable[str] = (), notes: list[str] | None = None
) -> PretrainConfig:
    """Read a configuration.

    Args:
        source: a YAML recipe's path, a preset's name, the guide's JSON file, or a nested mapping.
        overrides: `section.key=value` strings. The value of a text setting (a path, a name) is what is written, to
            the letter; others are read like a recipe's. `null` undoes what the source says: the default holds again.
        notes: gets a line for each setting of the source that had to give way to an override.

    Raises:
        ConfigError: unreadable file, unknown key (the nearest known one is named), or a value of the wrong type.
    """
    tree = dict(source) if isinstance(source, Mapping) else _read(str(source))
    tree = _apply_aliases(tree)
    changed = [_set(tree, override) for override in overrides]
    try:
        config = _ADAPTER.validate_python(tree)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None
    check_values(config)
    config, said = shortened_schedule(config, changed)
    if notes is not None:
        notes += said
    return config


def to_dict(config: PretrainConfig) -> dict[str, Any]:
    """The configuration as plain nested dictionaries, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def to_yaml(config: PretrainConfig) -> str:
    """The configuration as a recipe that `load_config` reads back to an equal object."""
    tree = to_dict(config)
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    # PyYAML writes the rare line breaks, U+0085 for one, as they are and reads them back as spaces: escape all then.
    return text if text.isascii() or yaml.safe_load(text) == tree else yaml.safe_dump(tree, sort_keys=False)


def _read(name: str) -> dict[str, Any]:
    path = Path(name)
    preset = resources.files("vishwamai_mp.config") / "presets" / f"{name}.yaml"
    if path.suffix in (".yaml", ".yml", ".json"):
        try:
            refuse_pointer_or_pipe(path)
            text = path.read_text(encoding="utf-8-sig")  # editors on Windows begin a file with a byte order mark
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"--config {name}: is not UTF-8 ({error.reason} at byte {error.start}); save it so"
            ) from None
        except OSError as error:
            raise ConfigError(f"--config {name}: cannot be read ({_reason(error)})") from None
    elif path.name == name and preset.is_file():
        text = preset.read_text(encoding="utf-8")
    else:
        near = difflib.get_close_matches(name, preset_names(), n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"--config {name}: neither a .yaml/.json file nor a preset ({', '.join(preset_names())}){meant}"
        )
    try:
        tree = parse_json(text) if path.suffix == ".json" else read_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--config {name}: not valid {path.suffix[1:]} ({_reason(error)})") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {name}: expected sections such as 'model:', found {type(tree).__name__}")
    return tree


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return one_line(error)


def _apply_aliases(tree: dict[str, Any]) -> dict[str, Any]:
    """Accept the guide's `model_config` section and its names of fields; a section without keys is an empty one."""
    tree = _rename(tree, _section_name, "")
    for section in _field_names(PretrainConfig):
        if section in tree and tree[section] is None and _section_type((section, "")) is not None:
            tree[section] = {}
    if isinstance(tree.get("model"), Mapping):
        tree["model"] = _rename(tree["model"], lambda key: _MODEL_ALIASES.get(key, key), "model.")
    return tree


def _section_name(key: Any) -> Any:
    """`model` for `model_config`, and so for each section."""
    stem = key.removesuffix("_config") if isinstance(key, str) else key
    return stem if stem in _field_names(PretrainConfig) else key


def _rename(tree: Mapping[str, Any], rename: Callable[[str], str], prefix: str) -> dict[str, Any]:
    given: dict[str, str] = {}
    for key in tree:
        name = rename(key)
        if name in given:
            raise ConfigError(f"{prefix}{given[name]} and {prefix}{key} are the same key; keep one")
        given[name] = key
    return {name: tree[key] for name, key in given.items()}


def _set(tree: dict[str, Any], override: str) -> tuple[str, ...]:
    """Apply one `section.key=value` to the nested dictionaries; returns the key's parts, aliases replaced."""
    key, equals, text = override.partition("=")
    key = key.strip().removeprefix("--")
    *sections, last = key.split(".")
    if not equals or not all([*sections, last]):
        raise ConfigError(f"override {override!r}: write section.key=value")
    sections[:1] = [_section_name(section) for section in sections[:1]]
    last = _MODEL_ALIASES.get(last, last) if sections == ["model"] else last if sections else _section_name(last)
    for section in sections:
        inner = tree.get(section)
        tree[section] = dict(inner) if isinstance(inner, Mapping) else {}
        tree = tree[section]
    path = (*sections, last)
    hint = field_type(path)
    if not text.strip():
        default = "" if hint is str else f", or {key}=null for the default"
        raise ConfigError(f"override {override!r}: the value is empty; write one{default}")
    if hint in (str, str | None) or (hint == Blend and not text.lstrip().startswith("[")):
        value = None if text.strip() == "null" and hint is not str else text
    else:
        try:
            value = read_yaml(text.strip())
        except (yaml.YAMLError, RecursionError) as error:
            raise ConfigError(f"override {override!r}: the value is not valid YAML ({_reason(error)})") from None
    if value is None and hint is not None:
        tree.pop(last, None)
    else:
        tree[last] = value
    return path


def field_type(path: tuple[str, ...]) -> Any:
    """The annotation of the field under a dotted key; None: there is no such field."""
    cls = _section_type(path)
    return get_type_hints(cls, include_extras=True).get(path[-1]) if cls else None


def _field_names(cls: type) -> list[str]:
    return [item.name for item in dataclasses.fields(cls)]


def _section_type(path: tuple[Any, ...]) -> type | None:
    """The dataclass that holds the last key of `path`, following dataclass-typed fields from the root."""
    cls: type = PretrainConfig
    for key in path[:-1]:
        hint = get_type_hints(cls).get(key)
        inner = next((item for item in (hint, *get_args(hint)) if dataclasses.is_dataclass(item)), None)
        if inner is None:
            return None
        cls = inner  # type: ignore[assignment]
    return cls


def _one_line(error: ValidationError) -> str:
    """One of pydantic's complaints as: key, value, what to do."""
    unknown = ("unexpected_keyword_argument", "extra_forbidden")
    first = min(error.errors(), key=lambda item: item["type"] not in unknown)  # a misspelt key is also a missing one
    path = tuple(part for part in first["loc"] if not (isinstance(part, str) and "[" in part))  # its names of types
    path = path or first["loc"]  # a user's own key with a bracket
    key = ".".join(str(part) for part in path)
    if first["type"] in unknown:
        return _unknown(path)
    if first["type"] == "missing":
        return f"{key} is missing; it has no default"
    shown = _shown(first["input"])
    if first["type"] in ("dataclass_type", "dataclass_exact_type"):
        return f"{key}={shown}: expected keys under it, such as {_example(path)}"
    if first["type"] == "list_type" and isinstance(first["input"], str):
        return f"{key}={shown}: it needs a list; write [{shown}]"
    if first["input"] is None and first["type"] == "string_type":
        return f"{key}=null: it needs a text; put quotes around a text that is 'null', or take the key out"
    if first["input"] is None and field_type(tuple(map(str, path))) is not None:
        return f"{key}=null: it needs a value; take the key out for its default"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{key}={shown}: {message}"


def _shown(value: Any) -> str:
    """A value as a recipe has it, on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return " ".join(value.split()) if isinstance(value, str) else repr(value)


def _unknown(path: tuple[Any, ...]) -> str:
    cls = _section_type(path)
    known = _field_names(cls) if cls else []
    where = "".join(f"{part}." for part in path[:-1])
    dotted = str(path[0]).split(".")
    if len(path) == 1 < len(dotted) and field_type(tuple(dotted)) is not None:
        return f"unknown key {path[0]!r}; a recipe has {dotted[-1]}: under {'.'.join(dotted[:-1])}:"
    near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean '{where}{near[0]}'?" if near else f"known: {', '.join(known)}"
    return f"unknown key {where + str(path[-1])!r}{f' in section {where[:-1]!r}' if where else ''}; {hint}"


def _example(path: tuple[Any, ...]) -> str:
    cls = _section_type((*path, ""))
    return ".".join(map(str, (*path, _field_names(cls)[0]))) if cls else "section.key"
