"""Takes the components out of a checkpoint, each layer's into a folder of its own."""

import re
from pathlib import Path

import torch
from torch import Tensor

from vishwamai_mp.checkpoint.manifest import is_optimizer, read_manifest
from vishwamai_mp.checkpoint.pieces import PieceReader
from vishwamai_mp.components.standalone import write_component
from vishwamai_mp.config import PretrainConfig

_NAME = re.compile(r"(?:decoder\.layers\.(\d+)\.)?(memory|cache|value_head)\.(.+)")
_SECTIONS = {"memory": "memory", "cache": "cache", "value_head": "tree"}


def write_components(checkpoint: Path, config: PretrainConfig, folder: Path) -> list[Path]:
    """Write `memory_layer_3`, `cache_layer_4`, … and `tree`: what the components' `from_pretrained` reads.

    Args:
        checkpoint: saved at any layout.
        config: resolved, of its model.
        folder: the parent of these.

    Raises:
        UserError: the checkpoint is damaged, or a folder cannot be written.
    """
    found: dict[str, tuple[str, dict[str, Tensor]]] = {}
    manifest = read_manifest(checkpoint)
    with PieceReader(checkpoint, manifest) as reader:
        for name, record in manifest.tensors.items():
            match = None if is_optimizer(name) else _NAME.fullmatch(name)
            if match is None:
                continue
            layer, kind, parameter = match.groups()
            section = _SECTIONS[kind]
            place = section if layer is None else f"{section}_layer_{layer}"
            whole = reader.read(name, torch.empty(record.size, dtype=torch.uint8))
            found.setdefault(place, (section, {}))[1][parameter] = whole
    for place, (section, weights) in found.items():
        write_component(folder / place, getattr(config, section), weights)
    return [folder / place for place in found]
