"""Derives and checks what fine-tuning asks for: prepared rows, adapters, frozen parts."""

from dataclasses import replace
from typing import get_args

from vishwamai_mp.config.errors import ConfigError
from vishwamai_mp.config.schema import DataConfig, LoraTarget, PretrainConfig

# How names of parameters end that may begin anew on a checkpoint without them.
ADAPTER_STATE = ("_adapter.a", "_adapter.b")
VALUE_HEAD_STATE = ("value_head.weight", "value_head.bias")


def resolve_rows(data: DataConfig) -> DataConfig:
    """Prepared rows hold several conversations, which must not see each other.

    Raises:
        ConfigError: a setting that has no meaning for them.
    """
    if not data.prepared_rows:
        return data
    if data.consecutive:
        raise ConfigError(
            "data.prepared_rows=true with data.consecutive=true: no row goes on where another ended;"
            " set data.consecutive=false"
        )
    if data.eod_mask_loss:
        raise ConfigError(
            "data.eod_mask_loss=true has no effect with data.prepared_rows=true; set data.eod_mask_loss=false"
        )
    return replace(data, reset_attention_mask=True, reset_position_ids=True)


def check_trained_parts(config: PretrainConfig) -> None:
    """Check the section `lora` and `training.freeze`.

    Raises:
        ConfigError: names the key, the value and the mend.
    """
    lora = config.lora
    if lora.enabled:
        if not lora.targets or len(set(lora.targets)) < len(lora.targets):
            raise ConfigError(f"lora.targets={lora.targets}: name each once, of {', '.join(get_args(LoraTarget))}")
        if lora.dropout >= 1:
            raise ConfigError(f"lora.dropout={lora.dropout}: a probability; use a number from 0 to below 1")
    freeze = config.training.freeze
    if len(set(freeze)) < len(freeze):
        raise ConfigError(f"training.freeze={freeze}: name each part once")
    switches = {"memory": config.memory.enabled, "cache": config.cache.enabled, "value_head": config.tree.enabled}
    for part in freeze:
        if not switches.get(part, True):
            section = "tree" if part == "value_head" else part
            raise ConfigError(f"training.freeze={freeze}: there is no {part} at {section}.enabled=false; take it out")
    trained = [part for part, exists in switches.items() if exists and part not in freeze]
    if "base" in frozen_parts(config) and not lora.enabled and not trained:
        raise ConfigError(
            f"training.freeze={freeze} leaves nothing to train; leave a part out, or enable memory, cache or lora"
        )


def check_verdicts(config: PretrainConfig) -> None:
    """Verdicts come with prepared rows alone.

    Raises:
        ConfigError: the value head would learn nothing.
    """
    tree = config.tree
    if tree.enabled and tree.value_signal == "verdicts" and not config.data.prepared_rows:
        raise ConfigError(
            "tree.value_signal=verdicts needs rows that have some: write them with"
            " vishwamai_mp.tree_of_thoughts.write_rollouts and set data.prepared_rows=true"
        )


def frozen_parts(config: PretrainConfig) -> frozenset[str]:
    """Parts of the model that are not trained: those of `training.freeze`, and with adapters the base.

    `base` includes `embedding`.
    """
    frozen = {*config.training.freeze, *(["base"] if config.lora.enabled else [])}
    return frozenset(frozen | ({"embedding"} if "base" in frozen else set()))
