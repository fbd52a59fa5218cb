"""The section `fp8`: what its options default to, and what FP8 and NVFP4 cannot do."""

from dataclasses import fields, replace

from vishwamai_mp.config.errors import ConfigError, leave_out
from vishwamai_mp.config.finetuning import frozen_parts
from vishwamai_mp.config.schema import Fp8Config, PretrainConfig
from vishwamai_mp.config.wording import counted

# Widths and token counts must be multiples of this: of a block of numbers that share a scale, or of the 16 bytes that
# a GPU's product reads at once: 32 numbers of NVFP4, two of its blocks.
MULTIPLE = {"fp8_delayed": 16, "fp8_current": 16, "fp8_blockwise": 128, "fp8_mx": 32, "nvfp4": 32}
# Buffers of a linear layer under delayed scaling: amaxes of its operands in past passes, and their scales.
SCALING_STATE = ("fp8_amax_history", "fp8_scale")
# Why weights do not stay as they were rounded. Those that do have scales that follow from themselves, so that a
# checkpoint needs nothing but their numbers in bf16.
_ROUNDED_ANEW = {
    "fp8_delayed": "reading a checkpoint would put the amax of a rounded weight in the place of the weight's own, from"
    " which later scales follow",
    "fp8_mx": "the copies of a weight for its two products have scales of their own, and neither follows from the"
    " other: replicas would have to gather both",
    "nvfp4": "only weights in FP8 stay so",
}
_DELAYED_ONLY = ("amax_history_length", "amax_algorithm")


def rounds_operands(precision: str) -> bool:
    """Whether linear layers multiply operands of 8 or 4 bits."""
    return precision in MULTIPLE


def resolve_fp8(config: PretrainConfig) -> PretrainConfig:
    """Fill in the section `fp8` of a configuration whose model and layout are resolved.

    Raises:
        ConfigError: an option without effect, or sizes that the recipe cannot take.
    """
    options = config.fp8
    if not rounds_operands(config.precision):
        for option in fields(Fp8Config):
            if getattr(options, option.name) != option.default:
                raise ConfigError(
                    f"fp8.{option.name}={getattr(options, option.name)} has no effect at precision={config.precision};"
                    f" use an fp8 precision, nvfp4, or {leave_out(f'fp8.{option.name}')}"
                )
        return config
    _check_layers(config)
    _check_sizes(config)
    _check_parameters(config)
    if config.precision == "fp8_delayed":
        length, algorithm = options.amax_history_length or 1024, options.amax_algorithm or "max"
        return replace(config, fp8=replace(options, amax_history_length=length, amax_algorithm=algorithm))
    for name in _DELAYED_ONLY:
        if getattr(options, name) is not None:
            raise ConfigError(
                f"fp8.{name}={getattr(options, name)} has no effect at precision={config.precision}, which remembers"
                f" nothing; use precision=fp8_delayed or {leave_out(f'fp8.{name}')}"
            )
    return config


def _check_parameters(config: PretrainConfig) -> None:
    """Refuse what weights cannot stay in FP8 with."""
    if not config.fp8.params:
        return
    if config.precision in _ROUNDED_ANEW:
        raise ConfigError(
            f"fp8.params=true with precision={config.precision}: {_ROUNDED_ANEW[config.precision]}; use"
            " precision=fp8_current or fp8_blockwise, or set it to false"
        )
    if not config.parallel.use_distributed_optimizer:
        raise ConfigError(
            "fp8.params=true with parallel.use_distributed_optimizer=false: only the distributed optimizer keeps fp32"
            " copies of such weights; set parallel.use_distributed_optimizer=true, or fp8.params=false"
        )
    if config.lora.enabled or "base" in frozen_parts(config):
        key = "lora.enabled=true" if config.lora.enabled else "a frozen base (training.freeze)"
        raise ConfigError(f"fp8.params=true with {key}: frozen weights stay in bf16; set fp8.params=false")


def _check_layers(config: PretrainConfig) -> None:
    layers, options = config.model.num_layers, config.fp8
    per_stage = layers // config.parallel.pipeline_model_parallel_size
    for name in ("bf16_layers_at_start", "bf16_layers_at_end"):
        count = getattr(options, name)
        if count and config.precision == "fp8_delayed":
            raise ConfigError(
                f"fp8.{name}={count}: delayed scaling counts whole passes, so it takes all layers; use 0 or another"
                " precision"
            )
        if count > per_stage:
            raise ConfigError(
                f"fp8.{name}={count} exceeds the {counted(per_stage, 'layer')} of a pipeline stage; use at most"
                f" {per_stage}"
            )
    if options.bf16_layers_at_start + options.bf16_layers_at_end >= layers:
        raise ConfigError(
            f"fp8.bf16_layers_at_start={options.bf16_layers_at_start} and"
            f" bf16_layers_at_end={options.bf16_layers_at_end} leave none of the {counted(layers, 'layer')} in"
            f" {config.precision}; lower them"
        )


def _check_sizes(config: PretrainConfig) -> None:
    """All that products of 8 or 4 bits read or write, per rank, must be whole blocks."""
    model, training, parallel = config.model, config.training, config.parallel
    multiple, tensor = MULTIPLE[config.precision], parallel.tensor_model_parallel_size
    assert model.head_dim is not None
    assert model.num_key_value_heads is not None
    assert model.intermediate_size is not None
    heads, head_dim = model.num_attention_heads // tensor, model.head_dim
    groups = model.num_key_value_heads // tensor
    shard = f" per rank at parallel.tensor_model_parallel_size={tensor}" if tensor > 1 else ""
    sizes = {
        f"model.hidden_size={model.hidden_size}": model.hidden_size,
        f"model.num_attention_heads={model.num_attention_heads} × head_dim={head_dim}: {heads * head_dim}{shard}": (
            heads * head_dim
        ),
        f"model.num_attention_heads={model.num_attention_heads} + 2 × num_key_value_heads={model.num_key_value_heads},"
        f" × head_dim={head_dim}: {(heads + 2 * groups) * head_dim}{shard}": (heads + 2 * groups) * head_dim,
        f"model.intermediate_size={model.intermediate_size}: {model.intermediate_size // tensor}{shard}": (
            model.intermediate_size // tensor
        ),
        f"training.micro_batch_size={training.micro_batch_size} × sequence_length={training.sequence_length}"
        f" / parallel.context_parallel_size={parallel.context_parallel_size} tokens": (
            training.micro_batch_size * training.sequence_length // parallel.context_parallel_size
        ),
    }
    for what, size in sizes.items():
        if size % multiple:
            raise ConfigError(
                f"{what} is not a multiple of {multiple}, which precision={config.precision} needs;"
                " change it or use precision=bf16"
            )
