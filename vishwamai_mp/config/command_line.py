"""Command lines of options and `section.key=value` settings: what is neither is answered with what to write."""

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Sequence

from vishwamai_mp.config.errors import ConfigError
from vishwamai_mp.config.load import field_type
from vishwamai_mp.config.schema import PretrainConfig


def parse_command_line(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse options and settings in any order.

    Raises:
        ConfigError: an option that the parser does not know; a setting in the form of an option is named as a setting.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options, unknown = parser.parse_known_intermixed_args(given)
    if unknown:
        option = unknown[0]
        name, equals, value = option.lstrip("-").partition("=")
        following = given[given.index(option) + 1 :][:1]
        if not equals and following and not following[0].startswith("-") and "=" not in following[0]:
            value = following[0]
        key = _known_key(name)
        mend = f"write {key}={value or '...'}" if key else "settings are written section.key=value; see --help"
        raise ConfigError(f"unknown option '{option}'; {mend}")
    return options


def section_list() -> str:
    """A line for each section and for each key outside sections, for a program's help."""
    lines = []
    for item in dataclasses.fields(PretrainConfig):
        is_section = dataclasses.is_dataclass(item.type)
        about = (inspect.getdoc(item.type) or "").splitlines()[0] if is_section else f"a key: {item.default} by default"
        lines.append(f"  {item.name:10} {about}")
    return "\n".join(lines)


def _known_key(name: str) -> str | None:
    """The setting that `name` means: a dotted key, or a key's last part that only one section has."""
    name = name.replace("-", "_")
    if field_type(tuple(name.split("."))) is not None:
        return name
    sections = [item.name for item in dataclasses.fields(PretrainConfig) if field_type((item.name, name)) is not None]
    return f"{sections[0]}.{name}" if len(sections) == 1 else None
