"""Memories, caches and the value head in Hugging Face folders: their tensors, and their part of `config.json`.

Both sides name and lay out these tensors alike: features are ordered by head. Needs no torch.
"""

from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

from vishwamai_mp.config import CacheConfig, MemoryConfig, PretrainConfig
from vishwamai_mp.config.component_shapes import CONVOLUTION_TAPS, IMPORTANCE_WIDTH, cache_heads, memory_widths
from vishwamai_mp.conversion.mapping import Mapped, whole

ARCHITECTURE = "VishwamaiForCausalLM"
MODEL_TYPE = "vishwamai"
AUTO_MAP = {
    "AutoConfig": "configuration_vishwamai.VishwamaiConfig",
    "AutoModelForCausalLM": f"modeling_vishwamai.{ARCHITECTURE}",
}
KEYS = ("memory", "cache", "value_head")  # of `config.json`
_VALUE_HEAD = ("value_head.weight", "value_head.bias")
_CODE = ("configuration_vishwamai.py", "modeling_vishwamai.py")


def has_value_head(tensors: Iterable[str]) -> bool:
    """Whether tensors of these names, a checkpoint's or a folder's, include one."""
    return _VALUE_HEAD[0] in set(tensors)


def component_mapping(config: PretrainConfig, value_head: bool) -> list[Mapped]:
    """All tensors of components, layer by layer, and of the value head.

    Args:
        config: resolved.
        value_head: whether there is one.
    """
    mapping = []
    for layer in range(config.model.num_layers):
        if config.memory.enabled and layer in (config.memory.layers or ()):
            mapping += _component(layer, "memory", _memory_shapes(config.memory))
        if config.cache.enabled and layer in (config.cache.layers or ()):
            mapping += _component(layer, "cache", _cache_shapes(config.cache))
    if value_head:
        shapes = ((config.model.hidden_size,), (1,))
        mapping += [whole(name, name, shape) for name, shape in zip(_VALUE_HEAD, shapes, strict=True)]
    return mapping


def _component(layer: int, name: str, shapes: dict[str, tuple[int, ...]]) -> list[Mapped]:
    ending = f"layers.{layer}.{name}."
    return [whole(f"decoder.{ending}{key}", f"model.{ending}{key}", shape) for key, shape in shapes.items()]


def _memory_shapes(memory: MemoryConfig) -> dict[str, tuple[int, ...]]:
    width, levels = memory.hidden_size, memory.num_memory_layers
    assert width is not None
    size, head_dim = memory_widths(memory)
    heads, gates = size // head_dim, 3 if memory.momentum else 2
    convolved = 3 * levels * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "norm.weight": (width,),
        "projection.weight": (heads * (convolved + head_dim + levels * gates), width),
        "output.weight": (width, size),
        "taps": (heads * convolved * CONVOLUTION_TAPS,),
        "gate_bias": (heads * levels * gates,),
        "read_norm": (size,),
    }
    return {**shapes, "level_mix": (heads * levels,)} if levels > 1 else shapes


def _cache_shapes(cache: CacheConfig) -> dict[str, tuple[int, ...]]:
    width, heads, latents = cache.hidden_size, cache_heads(cache), cache.latents_per_segment
    assert width is not None
    return {
        "norm.weight": (width,),
        "projection.weight": (3 * width + heads * (IMPORTANCE_WIDTH + latents), width),
        "output.weight": (width, width),
        "position_bias": (heads * latents * cache.segment_length,),
        "importance_weight": (heads * IMPORTANCE_WIDTH,),
        "importance_bias": (heads,),
        "null_key": (width,),
    }


def to_hf(config: PretrainConfig, value_head: bool) -> dict[str, Any]:
    """What `config.json` says besides a plain model's; empty for a plain one."""
    memory, cache = config.memory, config.cache
    if not (memory.enabled or cache.enabled or value_head):
        return {}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "auto_map": AUTO_MAP,
        "sliding_window": config.model.sliding_window,
        "memory": None
        if not memory.enabled
        else {
            "layers": memory.layers,
            "heads": memory_widths(memory)[0] // memory_widths(memory)[1],
            "head_dim": memory.head_dim,
            "levels": memory.num_memory_layers,
            "momentum": memory.momentum,
            "chunk_size": memory.chunk_size,
            "dropout": memory.dropout,
        },
        "cache": None
        if not cache.enabled
        else {
            "layers": cache.layers,
            "heads": cache.num_heads,
            "segment_length": cache.segment_length,
            "latents_per_segment": cache.latents_per_segment,
            "retrieve_segments": cache.retrieve_segments,
            "max_segments": cache.max_cache_length // cache.latents_per_segment,
            "retrieval_factor": cache.retrieval_factor,
            "before_memory": cache.before_memory,
            "dropout": cache.dropout,
        },
        "value_head": value_head,
    }


def from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our sections `memory` and `cache`, from `config.json`. Raises KeyError where it lacks a key."""
    sections: dict[str, Any] = {}
    if memory := config.get("memory"):
        sections["memory"] = {
            "enabled": True,
            "layers": memory["layers"],
            "memory_size": memory["heads"] * memory["head_dim"],
            "head_dim": memory["head_dim"],
            "num_memory_layers": memory["levels"],
            **{key: memory[key] for key in ("momentum", "chunk_size", "dropout")},
        }
    if cache := config.get("cache"):
        same = ("layers", "segment_length", "latents_per_segment", "retrieve_segments", "retrieval_factor")
        sections["cache"] = {
            "enabled": True,
            "num_heads": cache["heads"],
            "max_cache_length": cache["max_segments"] * cache["latents_per_segment"],
            **{key: cache[key] for key in (*same, "before_memory", "dropout")},
        }
    return sections


def code_files() -> dict[str, bytes]:
    """The Python files that a folder with components carries for `trust_remote_code`."""
    folder = resources.files("vishwamai_mp.conversion") / "remote_code"
    return {name: (folder / name).read_bytes() for name in _CODE}
