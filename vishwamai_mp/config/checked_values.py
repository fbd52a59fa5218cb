"""Settings that cannot be written down again or computed with, or that a shell would read otherwise."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from vishwamai_mp.config.errors import ConfigError
from vishwamai_mp.config.schema import PretrainConfig

_PATHS = (
    *(("data", name) for name in ("train", "valid", "tokenizer", "cache_dir")),
    *(("training", "output_dir"), ("checkpoint", "load"), ("tree", "prompts")),
)


def check_values(config: PretrainConfig) -> None:
    """Refuse texts with NUL characters or lone surrogates, which stand for bytes of a command line that are not UTF-8,
    and whole numbers that no float or tensor holds."""
    for key, text in _values(asdict(config), ""):
        if isinstance(text, int):
            if abs(text) >= 1 << 63:
                raise ConfigError(f"{key}={str(text)[:20]}…: has more than 64 bits; write a smaller number")
            continue
        if "\0" in text:
            raise ConfigError(f"{key}={text}: has a NUL character, which no name or text may have; take it out")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{key}={text}: is not UTF-8; write it in UTF-8, or rename what it names") from None


def check_paths(config: PretrainConfig) -> None:
    """Refuse empty paths, which the operating system takes for the folder that a program runs in, and `~` at the
    beginning of one."""
    for section, name in _PATHS:
        value = getattr(getattr(config, section), name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                if not text.strip():
                    raise ConfigError(f"{section}.{name} is empty; write a path, or take the key out")
                refuse_home(f"{section}.{name}=", text)


def refuse_home(named: str, path: str) -> None:
    """Raise `ConfigError` for `~/runs` behind `=`, where no shell expands it: it would become a folder of that name.

    Args:
        named: what stands before the path on the command line.
        path: as it was given.
    """
    if path.startswith("~"):
        raise ConfigError(
            f"{named}{path}: ~ is taken to the letter here; write the whole path, or ./{path} where that is its name"
        )


def _values(value: Any, key: str) -> Iterator[tuple[str, str | int]]:
    if isinstance(value, str | int):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _values(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _values(inner, f"{key}.{number}")
