"""What fully sharded data parallelism goes with."""

from typing import TYPE_CHECKING

from vishwamai_mp.config.errors import ConfigError
from vishwamai_mp.config.resolve_fp8 import rounds_operands

if TYPE_CHECKING:
    from vishwamai_mp.config.schema import PretrainConfig


def check_fully_sharded(config: "PretrainConfig") -> None:
    """Refuse what cannot run with `parallel.fully_sharded`.

    Raises:
        ConfigError: names the key, the value and the mend.
    """
    if not config.parallel.fully_sharded:
        return
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        size = getattr(config.parallel, name)
        if size > 1:
            raise ConfigError(
                f"parallel.{name}={size} with parallel.fully_sharded=true: parameters are split over replicas only;"
                f" set parallel.{name}=1, or parallel.fully_sharded=false"
            )
    if rounds_operands(config.precision):
        raise ConfigError(
            f"precision={config.precision} with parallel.fully_sharded=true is not supported; use bf16, or"
            " parallel.fully_sharded=false"
        )
    if config.lora.enabled:
        raise ConfigError(
            "lora.enabled=true with parallel.fully_sharded=true is not supported; set parallel.fully_sharded=false"
        )
    if config.tree.enabled and config.tree.prompts:
        raise ConfigError(
            f"tree.prompts={config.tree.prompts} with parallel.fully_sharded=true: a search needs whole parameters;"
            " leave tree.prompts out"
        )
