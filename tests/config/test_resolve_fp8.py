"""The section `fp8`: defaults and refusals."""

import pytest

from tests.model.builds import small_config
from vishwamai_mp.config import ConfigError
from vishwamai_mp.config.resolve_fp8 import MULTIPLE

_FITTING = [
    "model.hidden_size=256",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.intermediate_size=256",
    "model.max_position_embeddings=128",
    "training.sequence_length=128",
    "training.micro_batch_size=1",
]


def resolved(precision: str, *overrides: str):
    return small_config(*_FITTING, f"precision={precision}", *overrides)


def test_delayed_scaling_remembers_1024_passes():
    options = resolved("fp8_delayed").fp8
    assert (options.amax_history_length, options.amax_algorithm) == (1024, "max")
    options = resolved("fp8_delayed", "fp8.amax_history_length=16", "fp8.amax_algorithm=most_recent").fp8
    assert (options.amax_history_length, options.amax_algorithm) == (16, "most_recent")


@pytest.mark.parametrize("precision", MULTIPLE)
def test_fitting_sizes_pass(precision):
    assert resolved(precision, "parallel.tensor_model_parallel_size=2").precision == precision


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "option",
    ["amax_history_length=4", "amax_algorithm=max", "bf16_layers_at_start=1", "bf16_layers_at_end=1", "report_every=5"],
)
def test_options_without_effect_are_refused(precision, option):
    with pytest.raises(
        ConfigError,
        match=rf"fp8\.{option} has no effect at precision={precision}; use an fp8 precision, nvfp4, or leave",
    ):
        resolved(precision, f"fp8.{option}")


@pytest.mark.parametrize("precision", ["fp8_current", "fp8_blockwise", "fp8_mx", "nvfp4"])
@pytest.mark.parametrize("option", ["amax_history_length=4", "amax_algorithm=max"])
def test_only_delayed_scaling_has_a_history(precision, option):
    with pytest.raises(ConfigError, match=rf"fp8\.{option} has no effect at precision={precision}.*fp8_delayed"):
        resolved(precision, f"fp8.{option}")


@pytest.mark.parametrize("name", ["bf16_layers_at_start", "bf16_layers_at_end"])
def test_delayed_scaling_takes_all_layers(name):
    with pytest.raises(ConfigError, match=rf"fp8\.{name}=1: .*use 0 or another precision"):
        resolved("fp8_delayed", f"fp8.{name}=1")
    assert getattr(resolved("fp8_mx", f"fp8.{name}=1").fp8, name) == 1


def test_some_layer_must_be_left():
    with pytest.raises(ConfigError, match="leave none of the 4 layers in fp8_mx"):
        resolved("fp8_mx", "fp8.bf16_layers_at_start=3", "fp8.bf16_layers_at_end=1")
    with pytest.raises(ConfigError, match=r"bf16_layers_at_start=3 exceeds the 2 layers of a pipeline stage"):
        resolved("fp8_mx", "fp8.bf16_layers_at_start=3", "parallel.pipeline_model_parallel_size=2")


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["model.hidden_size=264", "model.head_dim=64"], r"model\.hidden_size=264"),
        (["model.head_dim=42"], r"model\.num_attention_heads=4 × head_dim=42: 168"),
        (["model.num_key_value_heads=1", "model.head_dim=20"], r"model\.num_attention_heads=4 "),
        (["model.intermediate_size=250"], r"model\.intermediate_size=250: 250"),
        (["training.sequence_length=72"], r"training\.micro_batch_size=1 × sequence_length=72"),
    ],
)
@pytest.mark.parametrize("precision", MULTIPLE)
def test_sizes_that_are_no_whole_blocks(precision, overrides, what):
    message = f"{what}.* is not a multiple of {MULTIPLE[precision]}, which precision={precision} needs"
    with pytest.raises(ConfigError, match=message):
        resolved(precision, *overrides)


def test_shards_must_be_whole_blocks():
    resolved("fp8_blockwise", "parallel.tensor_model_parallel_size=2")
    split = ["parallel.tensor_model_parallel_size=2", "model.intermediate_size=384"]
    assert resolved("fp8_mx", *split)
    with pytest.raises(ConfigError, match=r"intermediate_size=384: 192 per rank at .*tensor_model_parallel_size=2"):
        resolved("fp8_blockwise", *split)
    with pytest.raises(ConfigError, match=r"context_parallel_size=2 tokens is not a multiple of 128"):
        resolved("fp8_blockwise", "parallel.context_parallel_size=2")
