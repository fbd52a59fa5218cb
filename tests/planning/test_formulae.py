"""Parameter and FLOP formulae: by hand, and against the model that is built."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from vishwamai_mp.config import ModelConfig, RopeScaling, load_config, padded_vocab_size, resolve
from vishwamai_mp.planning import flops_per_token, parameter_count, total_parameters, training_flops_per_token
from vishwamai_mp.planning.flops import forward_flops_per_token

_ROOT = Path(__file__).resolve().parents[2]


def preset(name: str) -> ModelConfig:
    return resolve(load_config(name)).model


def test_7b_by_hand():
    """4096 wide, 32 layers, 32 heads of 128 with 8 for keys and values, SwiGLU of 11008, 64000 tokens."""
    attention = 4096 * 128 * (32 + 8 + 8 + 32)
    assert attention == 41_943_040
    mlp = 3 * 4096 * 11008
    assert mlp == 135_266_304
    layers = 32 * (attention + mlp + 2 * 4096)
    assert parameter_count(preset("7b")) == layers + 2 * 64000 * 4096 + 4096 == 6_195_253_248


def test_7b_flops_by_hand():
    matrices = 2 * (41_943_040 + 135_266_304)
    scores_and_values = 2 * (2 * 4096) * 4096.5  # 4096 query channels against (1 + … + 8192) / 8192 keys, twice
    forward = 32 * (matrices + scores_and_values) + 2 * 4096 * 64000
    assert forward == 14_013_431_808
    assert forward_flops_per_token(preset("7b"), 8192) == forward
    assert flops_per_token(preset("7b"), 8192) == 3 * forward


def test_the_flagship_has_99_billion_parameters():
    layer = 4 * 8192 * 8192 + 3 * 8192 * 22016 + 2 * 8192
    assert parameter_count(preset("vishwamai-120l")) == 120 * layer + 2 * 64000 * 8192 + 8192
    assert 98e9 < parameter_count(preset("vishwamai-120l")) < 99.5e9


@pytest.mark.parametrize(
    ("name", "published", "beside_tables"),
    [("llama3-8b", 8.03, 6.98), ("qwen3-8b", 8.19, 6.95), ("gemma3-4b", 3.88, 3.21), ("olmo2-7b", 7.30, 6.48)],
)
def test_presets_of_open_models_have_the_published_size(name, published, beside_tables):
    """Billions of parameters as the model cards and reports say, to their last digit."""
    model = preset(name)
    tables = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    assert round(parameter_count(model) / 1e9, 2) == published
    assert round((parameter_count(model) - tables) / 1e9, 2) == beside_tables


def test_tying_saves_one_table_and_no_flops():
    model = preset("7b")
    tied = replace(model, tie_word_embeddings=True)
    assert parameter_count(model) - parameter_count(tied) == 64000 * 4096
    assert parameter_count(tied, 64128) - parameter_count(tied) == 128 * 4096
    assert flops_per_token(model, 512) == flops_per_token(tied, 512)


@pytest.mark.parametrize("window", [None, 1, 5, 16, 40])
def test_attention_counts_the_pairs_that_the_mask_allows(window):
    from vishwamai_mp.model.masks import attention_mask

    length = 16
    model = replace(preset("125m"), sliding_window=window)
    pairs = int(attention_mask(torch.arange(length), torch.arange(length), window).sum())
    without = 2 * (parameter_count(model) - (2 * model.num_layers + 1) * model.hidden_size)  # all but …
    without -= 2 * model.vocab_size * model.hidden_size  # … the norms and the input embedding, which is looked up
    per_pair = 4 * model.num_layers * model.num_attention_heads * (model.head_dim or 0)
    assert forward_flops_per_token(model, length) * length == without * length + per_pair * pairs


_VARIANTS = {
    "biases, norms of queries and keys": ["model.attention_bias=true", "model.qk_norm=head"],
    "norms of all heads together, on both sides": [
        *("model.norm_position=sandwich", "model.qk_norm=full", "model.norm_zero_centered=true"),
        "model.activation=geglu",
    ],
    "grouped": [],
    "tied": ["model.tie_word_embeddings=true"],
    "one group": ["model.num_key_value_heads=1"],
    "wide heads": ["model.head_dim=10"],
}


def count(overrides: list[str]) -> tuple[int, int, int]:
    """Runs in a worker: parameters, and FLOPs of matrix products in one forward and one backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    from tests.model.builds import build
    from vishwamai_mp.model import blocked_attention

    _, _, (model,) = build(*overrides)
    tokens = torch.arange(2 * 16).view(2, 16)
    with (
        mock.patch.object(blocked_attention, "_BLOCK", 16),
        torch.backends.mkldnn.flags(enabled=False),  # the counter does not know oneDNN's products
    ):
        with FlopCounterMode(display=False) as forward:
            losses = model(tokens, labels=tokens)
        with FlopCounterMode(display=False) as backward:
            losses.sum().backward()
    return sum(p.numel() for p in model.parameters()), forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("name", _VARIANTS)
def test_formulae_are_those_of_the_built_model(workers, name):
    from tests.model.builds import small_config

    config = small_config(*_VARIANTS[name])
    parameters, forward, backward = workers.run(count, 1, _VARIANTS[name])[0]
    assert parameters == parameter_count(config.model, padded_vocab_size(config))
    # Beyond what the model needs, a block of attention multiplies the masked half of its scores, and the output layer
    # the vocabulary's padding.
    model, length = replace(config.model, vocab_size=padded_vocab_size(config)), 16
    masked = length - (length + 1) / 2
    wasted = 4 * model.num_layers * model.num_attention_heads * (model.head_dim or 0) * masked
    assert forward == 2 * length * (forward_flops_per_token(model, length) + wasted)
    assert backward == 2 * forward


def test_formulae_of_a_model_with_adapters(workers):
    """What is multiplied less: the frozen first layer's input needs no gradient, which the formula leaves out."""
    from tests.model.builds import small_config

    overrides = ["lora.enabled=true", "lora.rank=4", "training.sequence_length=16"]
    config = small_config(*overrides)
    parameters, forward, backward = workers.run(count, 1, overrides)[0]
    padded = replace(config, model=replace(config.model, vocab_size=padded_vocab_size(config)))
    assert parameters == total_parameters(config, padded_vocab_size(config))
    expected = training_flops_per_token(padded) * 2 * 16
    assert 0.9 < (forward + backward) / expected < 1.1
    assert training_flops_per_token(padded) < 0.85 * flops_per_token(padded.model, 16)


def test_rope_scaling_costs_nothing():
    model = preset("7b")
    scaled = replace(model, rope_scaling=RopeScaling("linear", 2.0))
    assert (parameter_count(scaled), flops_per_token(scaled, 512)) == (
        parameter_count(model),
        flops_per_token(model, 512),
    )


def test_planning_imports_no_torch():
    code = "import sys, vishwamai_mp.planning; sys.exit(any(m.partition('.')[0] == 'torch' for m in sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(_ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=False).returncode == 0
