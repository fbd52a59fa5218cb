"""YAML in which a plain scalar is its text: the schema says what a value means, not how it happens to look.

YAML 1.1, which PyYAML implements, reads `010` as 8, `1:30` as 90, `off` as false and `2026-01-01` as a date. Here all
of these stay the text that was written; only `null` (also `~`, or nothing) and the merge key `<<` keep their meaning.
"""

from typing import Any

import yaml
from yaml.composer import ComposerError

_TAG = "tag:yaml.org,2002:"
_RESOLVED = {f"{_TAG}{kind}" for kind in ("null", "merge")}
_MOST_VALUES = 100_000
_CONSTRUCTED = {f"{_TAG}{kind}" for kind in ("null", "str", "seq", "map")}


class _TextLoader(yaml.SafeLoader):
    """SafeLoader with the smallest set of types; `!!int 010` and other explicit tags are refused."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own way)
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _RESOLVED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag in _CONSTRUCTED  # None: what to do with an unknown tag
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """PyYAML lets the last of several equal keys win, without a word."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ComposerError(None, None, f"the key {key.value} stands twice", key.start_mark)
                seen.add(key.value)
        return node


def read_yaml(text: str) -> Any:
    """The document in `text`: mappings, lists, strings and None.

    Raises:
        yaml.YAMLError: not valid, a key that stands twice in one mapping, or an explicit tag; aliases that contain
            themselves, or by which a few lines become more than a configuration ever has.
    """
    document = yaml.load(text, Loader=_TextLoader)
    _size(document, {})
    return document


def _size(value: Any, known: dict[int, int | None]) -> int:
    """How many values there are with each alias written out. `known`: of lists and mappings; None: begun."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = None
        known[id(value)] = 1 + sum(
            _size(item, known) for item in (value.values() if isinstance(value, dict) else value)
        )
    size = known[id(value)]
    if size is None:
        raise yaml.YAMLError("an alias stands within what it stands for")
    if size > _MOST_VALUES:
        raise yaml.YAMLError(f"its aliases make more than {_MOST_VALUES} values of it")
    return size
