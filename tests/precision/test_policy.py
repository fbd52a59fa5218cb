"""What follows from the setting `precision`."""

import dataclasses
import io
import logging
import types
from typing import Any
from unittest import mock

import pytest
import torch

from tests.model.builds import build, small_config
from vishwamai_mp.config import ConfigError, Fp8Config
from vishwamai_mp.model.transformer_config import transformer_config
from vishwamai_mp.precision import PrecisionPolicy, check_fp8_hardware, lacking_hardware, use_transformer_engine
from vishwamai_mp.precision.linears import parallel_linears
from vishwamai_mp.precision.policy import HARDWARE_CHECKS
from vishwamai_mp.precision.statistics import named_fp8_linears

_RECIPES = {
    "fp8_delayed": ("delayed", "hybrid"),
    "fp8_current": ("tensorwise", "hybrid"),
    "fp8_blockwise": ("blockwise", "e4m3"),
    "fp8_mx": ("mxfp8", "e4m3"),
    "nvfp4": ("nvfp4", "e2m1"),
}
_SIZES = ["model.hidden_size=128", "model.intermediate_size=256", "model.num_key_value_heads=8"]
_TOKENS = ["model.max_position_embeddings=128", "training.sequence_length=128"]


def fp8_config(precision: str, *overrides: str):
    return small_config(*_SIZES, *_TOKENS, f"precision={precision}", *overrides)


def as_if_on_a_gpu(engine: bool = True) -> mock._patch:
    """`device()` and whether the package is there, as the policy sees them."""
    return mock.patch.multiple(
        "vishwamai_mp.precision.policy",
        device=mock.Mock(return_value=torch.device("cuda")),
        has_transformer_engine=mock.Mock(return_value=engine),
    )


@pytest.mark.parametrize("precision", _RECIPES)
def test_megatron_core_is_told_everything(precision):
    """None of its fields is left to its defaults, some of which are not Transformer Engine's."""
    config = fp8_config(precision)
    policy = PrecisionPolicy.of(precision, config.fp8)
    assert policy.fp8 is not None
    assert policy.compute == torch.bfloat16
    fields = policy.fp8.megatron_fields()
    kind = "fp4" if precision == "nvfp4" else "fp8"
    megatron = transformer_config(config)
    theirs = {field.name for field in dataclasses.fields(megatron) if field.name.startswith(kind)}
    ignored = {"fp8": {"fp8_quantizer_factory", "fp8_interval"}, "fp4": {"fp4_quantizer_factory"}}[
        kind
    ]  # of custom recipes
    assert theirs - set(fields) - {"fp8_output_proj"} == ignored
    assert not getattr(megatron, "fp8_output_proj", False)  # from 0.19 on; the output layer stays in bf16
    assert (fields[f"{kind}_recipe"], fields[kind]) == _RECIPES[precision]
    if kind == "fp4":
        return
    assert fields["fp8_amax_history_len"] == (1024 if precision == "fp8_delayed" else 1)
    assert fields["fp8_amax_compute_algo"] == "max"
    assert fields["fp8_wgrad"]  # Transformer Engine drops False without a word


def test_on_transformer_engine_the_fields_are_set():
    with mock.patch("vishwamai_mp.model.transformer_config.use_transformer_engine", return_value=True):
        megatron = transformer_config(fp8_config("nvfp4", "data.reset_position_ids=true"))
    assert (megatron.fp4, megatron.fp4_recipe, megatron.fp8) == ("e2m1", "nvfp4", None)
    layers = ["fp8.bf16_layers_at_start=1", "fp8.bf16_layers_at_end=2"]
    config = fp8_config("fp8_current", *layers, "data.reset_position_ids=true")  # with which it fuses no rotation
    with mock.patch("vishwamai_mp.model.transformer_config.use_transformer_engine", return_value=True):
        megatron = transformer_config(config)
    assert (megatron.fp8, megatron.fp8_recipe, megatron.fp8_param) == ("hybrid", "tensorwise", False)
    assert megatron.first_last_layers_bf16
    assert (megatron.num_layers_at_start_in_bf16, megatron.num_layers_at_end_in_bf16) == (1, 2)
    assert transformer_config(config).fp8 is None  # the emulation is not megatron-core's


@pytest.mark.parametrize("precision", _RECIPES)
def test_fp8_on_a_gpu_without_transformer_engine_is_refused(precision):
    policy = PrecisionPolicy.of(precision)
    check_fp8_hardware(policy)  # a CPU emulates all
    with as_if_on_a_gpu(engine=False), pytest.raises(ConfigError, match=rf"precision={precision} .*\[te\]"):
        check_fp8_hardware(policy)
    with as_if_on_a_gpu(engine=False):
        check_fp8_hardware(PrecisionPolicy.of("bf16"))


@pytest.mark.parametrize(
    ("precision", "check"),
    [
        ("fp8_delayed", "check_fp8_support"),
        ("fp8_current", "check_fp8_support"),
        ("fp8_blockwise", "check_fp8_block_scaling_support"),
        ("fp8_mx", "check_mxfp8_support"),
        ("nvfp4", "check_nvfp4_support"),
    ],
)
def test_a_gpu_that_lacks_the_recipe_has_layers_that_emulate_it(precision, check):
    names = ("check_fp8_support", "check_fp8_block_scaling_support", "check_mxfp8_support", "check_nvfp4_support")
    answers = {name: (lambda name=name: (name != check, "Needs another." if name == check else "")) for name in names}
    modules: dict[str, Any] = {"transformer_engine": types.ModuleType("transformer_engine")}
    modules["transformer_engine.pytorch"] = types.SimpleNamespace(fp8=types.SimpleNamespace(**answers))
    with as_if_on_a_gpu(), mock.patch.dict("sys.modules", modules):
        for policy in map(PrecisionPolicy.of, ("bf16", *_RECIPES)):
            lacks = policy.fp8 is not None and HARDWARE_CHECKS.get(policy.fp8.recipe, "check_fp8_support") == check
            assert lacking_hardware(policy) == ("Needs another" if lacks else "")
            assert use_transformer_engine(policy) is not lacks
        assert lacking_hardware(PrecisionPolicy.of(precision))
        check_fp8_hardware(PrecisionPolicy.of(precision))  # and so it is not refused


def test_an_environment_that_changes_nvfp4_is_refused(monkeypatch):
    modules: dict[str, Any] = {"transformer_engine": types.ModuleType("transformer_engine")}
    fp8 = types.SimpleNamespace(check_nvfp4_support=lambda: (True, ""), check_mxfp8_support=lambda: (True, ""))
    modules["transformer_engine.pytorch"] = types.SimpleNamespace(fp8=fp8)
    with as_if_on_a_gpu(), mock.patch.dict("sys.modules", modules):
        check_fp8_hardware(PrecisionPolicy.of("nvfp4"))
        monkeypatch.setenv("NVTE_NVFP4_DISABLE_RHT", "1")
        check_fp8_hardware(PrecisionPolicy.of("fp8_mx"))
        with pytest.raises(ConfigError, match=r"precision=nvfp4: NVTE_NVFP4_DISABLE_RHT=1 .*unset it"):
            check_fp8_hardware(PrecisionPolicy.of("nvfp4"))


def emulated(*overrides: str) -> list[str]:
    """Runs in a worker: FP8 linear layers of this rank's model, by number in the whole model."""
    _, _, models = build(*_SIZES, *_TOKENS, *overrides)
    found = []
    for model in models:
        everywhere = [linear for linear in parallel_linears(model) if hasattr(linear, "fp8_scaling")]
        inside = [
            (layer.layer_number - 1, linear)
            for layer in model.decoder.layers
            for linear in parallel_linears(layer)
            if hasattr(linear, "fp8_scaling")
        ]
        assert len(inside) == len(everywhere)  # embedding and output layer are not among them
        found += [number for number, _ in inside]
    return [f"{number}" for number in found]


@pytest.mark.parametrize("precision", _RECIPES)
def test_linear_layers_of_the_decoder_are_emulated(workers, precision):
    [layers] = workers.run(emulated, 1, f"precision={precision}")
    assert layers == [str(number) for number in range(4) for _ in range(4)]


def test_first_and_last_layers_in_bf16_are_counted_over_all_stages(workers):
    options = ["precision=fp8_mx", "fp8.bf16_layers_at_start=1", "fp8.bf16_layers_at_end=2"]
    assert workers.run(emulated, 1, *options)[0] == ["1"] * 4
    first, second = workers.run(emulated, 2, *options, "parallel.pipeline_model_parallel_size=2")
    assert (first, second) == (["1"] * 4, [])


def test_options_without_a_section_are_the_defaults():
    assert PrecisionPolicy.of("fp8_current") == PrecisionPolicy.of("fp8_current", Fp8Config())
    assert PrecisionPolicy.of("bf16").fp8 is None


def left_in_bf16(*overrides: str) -> tuple[list[str], str]:
    """Runs in a worker: FP8 linear layers of the memory, and what was logged."""
    logger = logging.getLogger("vishwamai_mp.precision.linears")
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logger.addHandler(handler)
    try:
        _, _, models = build(*_SIZES, *_TOKENS, "memory.enabled=true", "memory.layers=[1]", *overrides)
    finally:
        logger.removeHandler(handler)
    memory = [name for name, _ in named_fp8_linears(models) if ".memory." in name]
    return memory, said.getvalue()


def test_widths_that_are_no_whole_blocks_stay_in_bf16_and_it_is_said(workers):
    size = ["precision=fp8_current", "memory.memory_size=128"]
    memory, said = workers.run(left_in_bf16, 1, *size, "memory.head_dim=8")[0]
    assert memory == ["layers.1.memory.projection", "layers.1.memory.output"]
    assert said == ""
    memory, said = workers.run(left_in_bf16, 1, *size, "memory.head_dim=16")[0]
    assert memory == ["layers.1.memory.output"]
    assert said.startswith("precision=fp8_current: widths that are not multiples of 16 stay in bf16: layers.1.memory")
