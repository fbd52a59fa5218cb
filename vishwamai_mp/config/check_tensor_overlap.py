"""What `parallel.overlap_tensor_parallel` goes with."""

from typing import TYPE_CHECKING

from vishwamai_mp.config.errors import ConfigError

if TYPE_CHECKING:
    from vishwamai_mp.config.schema import PretrainConfig

_KEY = "parallel.overlap_tensor_parallel=true"
_STRIPS = 4  # of the product whose outputs are summed, as Transformer Engine cuts it
# A piece of a matrix of 8 bits, in numbers: 16 bytes at once, or the tiles that scales of MXFP8 lie in.
_PIECE = {"fp8_mx": 128}
_WHY_NOT = {
    "fp32": "its sums are bf16",
    "fp16": "its sums are bf16",
    "fp8_blockwise": "its buffers know no scales of blocks",
    "nvfp4": "its buffers know no scales of blocks",
}


def exchanged_tokens(config: "PretrainConfig") -> int:
    """Of a micro-batch, on all tensor parallel ranks of a context parallel rank."""
    training = config.training
    return training.micro_batch_size * training.sequence_length // config.parallel.context_parallel_size


def check_tensor_overlap(config: "PretrainConfig") -> None:
    """Refuse what Transformer Engine's overlap cannot do.

    Args:
        config: whose model is resolved.

    Raises:
        ConfigError: names the key, the value and the mend.
    """
    parallel, model = config.parallel, config.model
    if not parallel.overlap_tensor_parallel:
        return
    tensor = parallel.tensor_model_parallel_size
    if tensor == 1:
        raise ConfigError(f"{_KEY} has no effect at tensor_model_parallel_size=1; set it to false")
    if not parallel.sequence_parallel:
        raise ConfigError(
            f"{_KEY} with parallel.sequence_parallel=false: it gathers and scatters tokens; set"
            " parallel.sequence_parallel=true"
        )
    if reason := _WHY_NOT.get(config.precision):
        raise ConfigError(
            f"{_KEY} with precision={config.precision}: {reason}; use bf16, fp8_delayed, fp8_current or fp8_mx, or set"
            " it to false"
        )
    if config.training.deterministic:
        raise ConfigError(
            f"{_KEY} with training.deterministic=true: the order of its sums is not known to be the same each time; set"
            " one of them to false"
        )
    piece = _PIECE.get(config.precision, 16)
    if model.hidden_size % (_STRIPS * piece):
        raise ConfigError(
            f"{_KEY} with model.hidden_size={model.hidden_size}: outputs are cut into {_STRIPS} strips of whole"
            f" {piece}s; use a multiple of {_STRIPS * piece}, or set it to false"
        )
    if config.precision != "fp8_mx":
        return
    assert model.head_dim is not None
    assert model.intermediate_size is not None
    tokens = exchanged_tokens(config) // tensor
    for what, size in (
        (f"{tokens} tokens of a micro-batch on a rank", tokens),
        (f"model.intermediate_size={model.intermediate_size}", model.intermediate_size // tensor),
        (
            f"model.num_attention_heads={model.num_attention_heads} × head_dim={model.head_dim}",
            model.num_attention_heads * model.head_dim // tensor,
        ),
    ):
        if size % piece:
            raise ConfigError(
                f"{_KEY} with precision=fp8_mx: {what}: not a multiple of {piece} on each tensor parallel rank, which"
                " its buffers need; change it, or set it to false"
            )
