"""What attention on GPUs cannot do, for who trains there and for who plans to."""

from typing import TYPE_CHECKING

from vishwamai_mp.config.errors import ConfigError

if TYPE_CHECKING:
    from vishwamai_mp.config.schema import PretrainConfig


def check_gpu_attention(config: "PretrainConfig") -> None:
    """Refuse what Transformer Engine has no kernel for.

    Args:
        config: resolved.

    Raises:
        ConfigError: names the key, the value and the mend.
    """
    softcap, context = config.model.attention_softcap, config.parallel.context_parallel_size
    if softcap:
        raise ConfigError(
            f"model.attention_softcap={softcap}: Transformer Engine's attention has no soft cap; run the model on CPUs"
        )
    if config.precision == "fp32" and context > 1:
        raise ConfigError(
            f"precision=fp32 with parallel.context_parallel_size={context}: Transformer Engine's attention over context"
            " parallel ranks is of 16 bits only; set precision=bf16 or parallel.context_parallel_size=1"
        )
    dropout = config.model.attention_dropout
    if dropout and config.data.reset_attention_mask and context > 1:
        raise ConfigError(
            f"model.attention_dropout={dropout} with data.reset_attention_mask=true and parallel.context_parallel_size="
            f"{context}: on Transformer Engine, cuDNN's attention of parts of documents knows no dropout; set"
            " model.attention_dropout=0 or parallel.context_parallel_size=1"
        )
