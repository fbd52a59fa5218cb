"""Quantized weights of a foreign folder: which kind they are, and what the one kind that is read means.

Read is FP8 in blocks, as transformers' fine-grained FP8 and DeepSeek's and Qwen's folders have it: a tensor of E4M3
numbers, and behind its name `_scale_inv`, a matrix of what to multiply those of each block with. Every other kind is
refused by its name. Needs no torch.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vishwamai_mp.config import UserError
from vishwamai_mp.conversion.safetensors_files import Entry

SCALES = "_scale_inv"
_NUMBERS, _SCALE_TYPES = "F8_E4M3", ("F32", "BF16", "F16")
_WHERE = ("quantization_config", "compression_config")  # the latter from before compressed-tensors joined transformers
_KNOWN = {  # of FP8 in blocks; the last three change nothing of what the tensors are
    *("quant_method", "fmt", "activation_scheme", "weight_block_size", "scale_fmt"),
    *("modules_to_not_convert", "ignored_layers", "dequantize"),
}
# How tensors of quantized layers end, for folders whose `config.json` does not say that they are quantized.
_ENDINGS = {
    ".qweight": "GPTQ or AWQ",
    ".SCB": "bitsandbytes, 8 bits",
    ".weight.absmax": "bitsandbytes, 4 bits",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "compressed-tensors",
    SCALES: "FP8 in blocks, of which config.json has no quantization_config",
}
_MEND = "give the folder with the original weights"


def block_of(config: Mapping[str, Any], path: Path) -> tuple[int, int] | None:
    """Rows and columns of a block that has a scale of its own; None: no weights are quantized.

    Args:
        config: `config.json`.
        path: of it, for messages.

    Raises:
        UserError: weights are quantized in another way.
    """
    said = next((config[key] for key in _WHERE if config.get(key)), None)
    if said is None:
        return None
    if not isinstance(said, dict):
        raise UserError(f"{path}: quantization_config={said!r} is not an object")
    method, block = said.get("quant_method"), said.get("weight_block_size")
    if method != "fp8":
        bits = [key.removeprefix("load_in_") for key in ("load_in_4bit", "load_in_8bit") if said.get(key)]
        named = ", ".join([str(method or ("bitsandbytes" if bits else "unknown")), *bits])
        raise UserError(f"{path}: its weights are quantized ({named}); {_MEND}")
    wanted = {"fmt": ("e4m3",), "activation_scheme": ("dynamic",), "scale_fmt": ("float", "ue8m0")}
    for key, values in wanted.items():
        if said.get(key) not in (None, *values):
            raise UserError(f"{path}: its weights are quantized (fp8) with {key}={said[key]!r}; {_MEND}")
    if unknown := [key for key in sorted(said.keys() - _KNOWN) if said[key]]:
        raise UserError(f"{path}: quantization_config with {unknown[0]}={said[unknown[0]]!r} is unknown here; {_MEND}")
    if not isinstance(block, list) or len(block) != 2 or not all(type(one) is int and one > 0 for one in block):
        raise UserError(f"{path}: its weights are quantized (fp8) with weight_block_size={block!r}; {_MEND}")
    return block[0], block[1]


def with_scales(entries: Mapping[str, Entry], block: tuple[int, int] | None, path: Path) -> dict[str, Entry]:
    """The tensors of a folder without their scales, each of which its numbers know.

    Args:
        entries: all tensors, by name.
        block: what `block_of` says.
        path: of the folder, for messages.

    Raises:
        UserError: numbers without scales, scales of something else, or tensors of another kind of quantization.
    """
    for name in entries:
        kinds = [kind for ending, kind in _ENDINGS.items() if name.endswith(ending)]
        if kinds and not (block and name.endswith(SCALES)):
            raise UserError(f"{path} has {name}: its weights are quantized ({kinds[0]}); {_MEND}")
    if block is None:
        return dict(entries)
    for name in entries:
        numbers = entries.get(name.removesuffix(SCALES))
        if name.endswith(SCALES) and (numbers is None or numbers.tag != _NUMBERS):
            raise UserError(f"{path} has {name}, but no FP8 numbers {name.removesuffix(SCALES)} (F8_E4M3); {_MEND}")
    tensors = (entry for name, entry in entries.items() if not name.endswith(SCALES))
    return {entry.name: _scaled(entry, entries, block, path) if entry.tag == _NUMBERS else entry for entry in tensors}


def _scaled(entry: Entry, entries: Mapping[str, Entry], block: tuple[int, int], path: Path) -> Entry:
    """FP8 numbers with their scales."""
    scales = entries.get(entry.name + SCALES)
    if scales is None:
        raise UserError(f"{path}: {entry.name} is FP8 and lacks its scales, {entry.name + SCALES}; {_MEND}")
    needed = tuple(-(-length // size) for length, size in zip(entry.shape, block, strict=False))
    if len(entry.shape) != 2 or scales.shape != needed or scales.tag not in _SCALE_TYPES:
        raise UserError(
            f"{path}: {scales.name} has the shape {list(scales.shape)} and the type {scales.tag}; {entry.name} of"
            f" {list(entry.shape)} in blocks of {list(block)} needs {list(needed)}, F32 or BF16"
        )
    return replace(entry, scales=scales, block=block)
