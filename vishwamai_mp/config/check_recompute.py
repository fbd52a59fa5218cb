"""What `training.recompute` goes with: which layers, and which of their parts, are computed again."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vishwamai_mp.config.errors import ConfigError, leave_out
from vishwamai_mp.config.wording import counted

if TYPE_CHECKING:
    from vishwamai_mp.config.schema import TrainingConfig


def check_recompute(training: "TrainingConfig", per_stage: Sequence[int], chunks: int | None) -> None:
    """Refuse what `training.recompute` has no use for.

    Args:
        training: as loaded.
        per_stage: layers on each pipeline stage.
        chunks: model chunks per stage; None: one.

    Raises:
        ConfigError: names the key, the value and the mend.
    """
    for name, kind in (("recompute_layers", "full"), ("recompute_modules", "selective")):
        value = getattr(training, name)
        if value is not None and training.recompute != kind:
            raise ConfigError(
                f"training.{name}={_text(value)} has no effect at training.recompute={training.recompute}; set"
                f" training.recompute={kind}, or {leave_out(f'training.{name}')}"
            )
    modules = training.recompute_modules
    if modules is not None and (not modules or len(set(modules)) < len(modules)):
        raise ConfigError(
            f"training.recompute_modules={_text(modules)}: name core_attn, mlp or both, each once, or set"
            " training.recompute=none"
        )
    most = max(per_stage) // (chunks or 1)
    if training.recompute_layers is not None and training.recompute_layers >= most:
        where = "a chunk of a pipeline stage" if chunks else "a pipeline stage" if len(per_stage) > 1 else "the model"
        raise ConfigError(
            f"training.recompute_layers={training.recompute_layers}: {where} has no more than"
            f" {counted(most, 'layer')}; use fewer, or, to recompute all, {leave_out('training.recompute_layers')}"
        )


def _text(value: object) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, list) else str(value)
