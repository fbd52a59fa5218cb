"""Whether a checkpoint has the components, adapters and value head that the model has, in the same layers."""

import re
from collections.abc import Iterable, Mapping

from vishwamai_mp.checkpoint.manifest import TensorRecord
from vishwamai_mp.config import PretrainConfig, UserError
from vishwamai_mp.config.finetuning import VALUE_HEAD_STATE

_COMPONENT = re.compile(r"decoder\.layers\.(\d+)\.(memory|cache)\.")
_ADAPTER = re.compile(r"decoder\.layers\.\d+\.\w+\.(\w+)_adapter\.a")
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


def check_adapters(path: object, tensors: Mapping[str, TensorRecord], config: PretrainConfig, fresh: bool) -> None:
    """Refuse a checkpoint with adapters that the model lacks, and the reverse.

    Args:
        path: of the checkpoint, for the message.
        tensors: its.
        config: resolved.
        fresh: whether the model may have adapters where the checkpoint has none at all.

    Raises:
        UserError: says which settings make them agree.
    """
    found = {match[1]: tensors[match[0]].shape[0] for match in filter(None, map(_ADAPTER.fullmatch, tensors))}
    wanted = dict.fromkeys(config.lora.targets, config.lora.rank) if config.lora.enabled else {}
    if found == wanted or (fresh and not found):
        return
    if not found:
        raise UserError(
            f"{path} has no adapters and this model has; to train new ones on its weights name it in checkpoint.load"
            " with checkpoint.load_optimizer=false, else set lora.enabled=false"
        )
    settings = f"lora.enabled=true lora.rank={next(iter(found.values()))} lora.targets=[{','.join(sorted(found))}]"
    more = "" if wanted else ", or merge them: tools/convert_checkpoint.py to-hf, then from-hf"
    raise UserError(
        f"{path} has adapters that are not this model's; set {settings} and the lora.alpha of its run{more}"
    )


def check_value_head(path: object, tensors: Iterable[str], config: PretrainConfig, fresh: bool) -> None:
    """Refuse a checkpoint without a value head for a model with one. The reverse is a model that does without.

    Args:
        path: of the checkpoint, for the message.
        tensors: names of its tensors.
        config: resolved.
        fresh: whether the model may have a new one.

    Raises:
        UserError: says which settings make them agree.
    """
    if config.tree.enabled and not fresh and not set(tensors) & set(VALUE_HEAD_STATE):
        raise UserError(
            f"{path} has no value head and this model has; to train a new one on its weights name it in checkpoint.load"
            " with checkpoint.load_optimizer=false, else set tree.enabled=false"
        )


def _list(layers: list[int]) -> str:
    return "[" + ",".join(map(str, layers)) + "]"
