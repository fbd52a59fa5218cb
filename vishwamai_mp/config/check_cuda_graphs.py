"""What `training.cuda_graphs` goes with."""

from typing import TYPE_CHECKING

from vishwamai_mp.config.errors import ConfigError, leave_out
from vishwamai_mp.config.resolve_fp8 import rounds_operands

if TYPE_CHECKING:
    from vishwamai_mp.config.schema import PretrainConfig

_KEY = "training.cuda_graphs"
_ALL_TRAINED = "a layer is captured with the gradients of all its weights"
_DROPOUT = "a replay would not draw by the step's seed"


def check_cuda_graphs(config: "PretrainConfig") -> None:
    """Refuse what graphs of layers cannot hold.

    Args:
        config: whose components are resolved.

    Raises:
        ConfigError: names the key, the value and the mend.
    """
    model, parallel, data, training = config.model, config.parallel, config.data, config.training
    if not training.cuda_graphs:
        return
    refused = (
        (
            rounds_operands(config.precision),
            f"precision={config.precision}",
            "scales, and weights that are rounded once a step, are brought up to date between a layer's passes",
            "set precision=bf16",
        ),
        (
            data.reset_attention_mask,
            "data.reset_attention_mask=true",
            "lengths of packed documents differ from micro-batch to micro-batch, and sizes in a graph cannot",
            "set data.reset_attention_mask=false",
        ),
        (
            data.reset_position_ids,
            "data.reset_position_ids=true",
            "a graph turns all rows by the positions that it was captured with",
            "set data.reset_position_ids=false",
        ),
        (
            model.attention_dropout,
            f"model.attention_dropout={model.attention_dropout}",
            _DROPOUT,
            "set model.attention_dropout=0",
        ),
        (model.hidden_dropout, f"model.hidden_dropout={model.hidden_dropout}", _DROPOUT, "set model.hidden_dropout=0"),
        (
            training.recompute != "none",
            f"training.recompute={training.recompute}",
            "what is computed again sets the state of random numbers back, which a graph cannot",
            "set training.recompute=none",
        ),
        (
            training.offload_layers,
            f"training.offload_layers={training.offload_layers}",
            "the host decides when activations come back",
            leave_out("training.offload_layers"),
        ),
        (
            parallel.fully_sharded,
            "parallel.fully_sharded=true",
            "gathered weights lie elsewhere in each pass",
            "set parallel.fully_sharded=false",
        ),
        (
            parallel.overlap_tensor_parallel,
            "parallel.overlap_tensor_parallel=true",
            "its buffers are shared with what is not captured",
            "set parallel.overlap_tensor_parallel=false",
        ),
        (config.lora.enabled, "lora.enabled=true", _ALL_TRAINED, "set lora.enabled=false"),
        (
            training.freeze,
            f"training.freeze=[{', '.join(training.freeze)}]",
            _ALL_TRAINED,
            leave_out("training.freeze"),
        ),
    )
    for applies, what, why, instead in refused:
        if applies:
            raise ConfigError(f"{_KEY}=true with {what}: {why}; {instead}, or set {_KEY}=false")
    if len(layers_outside_graphs(config)) == model.num_layers:
        raise ConfigError(
            f"{_KEY}=true has no effect: every layer has memory or cache, which are not captured; set it to false"
        )


def layers_outside_graphs(config: "PretrainConfig") -> list[int]:
    """Layers, from 0, that are never captured: memory and cache hold state, and the host decides in them."""
    carrying = (options.layers or () for options in (config.memory, config.cache) if options.enabled)
    return sorted({layer for layers in carrying for layer in layers})
