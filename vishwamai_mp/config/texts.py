"""Text settings that name no file and cannot be written down again, or that a shell would read otherwise."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from vishwamai_mp.config.errors import ConfigError
from vishwamai_mp.config.schema import PretrainConfig

_PATHS = (
    *(("data", name) for name in ("train", "valid", "tokenizer", "cache_dir")),
    *(("training", "output_dir"), ("checkpoint", "load"), ("tree", "prompts")),
)


def check_texts(config: PretrainConfig) -> None:
    """Refuse NUL characters and lone surrogates, which stand for bytes of a command line that are not UTF-8."""
    for key, text in _texts(asdict(config), ""):
        if "\0" in text:
            raise ConfigError(f"{key}={text}: has a NUL character, which no name or text may have; take it out")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{key}={text}: is not UTF-8; write it in UTF-8, or rename what it names") from None


def check_paths(config: PretrainConfig) -> None:
    """Refuse `~` at the beginning of a path: `output_dir=~/runs`, which no shell expands behind `=`, would make a
    folder of that name."""
    for section, name in _PATHS:
        value = getattr(getattr(config, section), name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text.startswith("~"):
                raise ConfigError(
                    f"{section}.{name}={text}: ~ is taken to the letter here; write the whole path, or ./{text} where"
                    " that is its name"
                )


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{key}.{number}")
