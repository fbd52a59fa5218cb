"""The neural memory: fast weights inside a layer, written by gradient descent at every token."""

from typing import TYPE_CHECKING, Any

from vishwamai_mp.config import MemoryConfig

if TYPE_CHECKING:
    from vishwamai_mp.neural_memory.memory_module import MemoryState, ReasoningMemoryTransformer

__all__ = ["MemoryConfig", "MemoryState", "ReasoningMemoryTransformer"]


def __getattr__(name: str) -> Any:
    """Import what needs megatron-core, which takes seconds, when it is first asked for."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.memory_module"), name)
