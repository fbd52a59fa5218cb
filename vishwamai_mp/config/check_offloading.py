"""What `training.offload_layers` goes with."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vishwamai_mp.config.errors import ConfigError, leave_out
from vishwamai_mp.config.resolve_fp8 import rounds_operands
from vishwamai_mp.config.wording import counted

if TYPE_CHECKING:
    from vishwamai_mp.config.schema import PretrainConfig


def check_offloading(config: "PretrainConfig", per_stage: Sequence[int]) -> None:
    """Refuse what activations cannot be offloaded with.

    Args:
        config: as loaded.
        per_stage: layers on each pipeline stage.

    Raises:
        ConfigError: names the key, the value and the mend.
    """
    count, key = config.training.offload_layers, "training.offload_layers"
    if count is None:
        return
    if config.training.recompute != "none":
        raise ConfigError(
            f"{key}={count} with training.recompute={config.training.recompute}: what is computed again need not be"
            f" kept; set training.recompute=none, or {leave_out(key)}"
        )
    if rounds_operands(config.precision):
        raise ConfigError(
            f"{key}={count} with precision={config.precision}: a layer keeps rounded copies of its weights among its"
            f" activations; use bf16, or {leave_out(key)}"
        )
    if config.parallel.fully_sharded:
        raise ConfigError(
            f"{key}={count} with parallel.fully_sharded=true: a layer's gathered weights are among its activations; set"
            f" parallel.fully_sharded=false, or {leave_out(key)}"
        )
    most = max(per_stage) // (config.parallel.virtual_pipeline_model_parallel_size or 1)
    if count >= most:
        raise ConfigError(
            f"{key}={count}: of the {counted(most, 'layer')} of a chunk the last, whose backward pass comes first,"
            f" stays; use fewer, or {leave_out(key)}"
        )
