"""From a run folder, a checkpoint or a configuration to a model that trains or answers: one way for all programs.

`find_run` and a run's configuration need no torch; `laid_out` and `load_model` do, and are imported when asked for.
"""

from typing import TYPE_CHECKING, Any

from vishwamai_mp.opening.run import RunFolder, find_run

if TYPE_CHECKING:
    from vishwamai_mp.opening.answering import LaidOutModel, laid_out
    from vishwamai_mp.opening.loaded_model import LoadedModel, load_model

__all__ = ["LaidOutModel", "LoadedModel", "RunFolder", "find_run", "laid_out", "load_model"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

    module = "answering" if name in ("LaidOutModel", "laid_out") else "loaded_model"
    return getattr(import_module(f"{__name__}.{module}"), name)
