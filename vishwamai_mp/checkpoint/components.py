"""Whether a checkpoint has the components that the model has, in the same layers."""

import re
from collections.abc import Iterable

from vishwamai_mp.config import PretrainConfig, UserError

_COMPONENT = re.compile(r"decoder\.layers\.(\d+)\.(memory|cache)\.")
_NAMES = {"memory": "neural memory", "cache": "cache"}


def check_components(path: object, tensors: Iterable[str], config: PretrainConfig) -> None:
    """Refuse a checkpoint with a component that the model lacks, and the reverse.

    Args:
        path: of the checkpoint, for the message.
        tensors: names of its tensors.
        config: resolved.

    Raises:
        UserError: says which switch makes them agree.
    """
    saved: dict[str, set[int]] = {name: set() for name in _NAMES}
    for found in filter(None, map(_COMPONENT.match, tensors)):
        saved[found[2]].add(int(found[1]))
    for name, title in _NAMES.items():
        section = getattr(config, name)
        wanted = sorted(section.layers or ()) if section.enabled else []
        held = sorted(saved[name])
        if held == wanted:
            continue
        if not wanted:
            raise UserError(
                f"{path} has a {title} in layers {held} and this model has none;"
                f" set {name}.enabled=true {name}.layers={_list(held)}"
            )
        if not held:
            raise UserError(
                f"{path} has no {title} and this model has one in layers {wanted}; set {name}.enabled=false"
            )
        raise UserError(f"{path} has a {title} in layers {held}, not {wanted}; set {name}.layers={_list(held)}")


def _list(layers: list[int]) -> str:
    return "[" + ",".join(map(str, layers)) + "]"
