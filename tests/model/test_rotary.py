"""Rotary angles against transformers' own."""

from dataclasses import replace

import pytest
import torch
from transformers import PhiConfig
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

from vishwamai_mp.config import ModelConfig, PretrainConfig, RopeScaling, load_config, resolve
from vishwamai_mp.conversion import rope_scaling
from vishwamai_mp.model.rotary import (
    RotaryEmbedding,
    angles_of_layer,
    attention_factors,
    inverse_frequencies,
    rotary_width,
)

_SHORT, _LONG = [1.0 + i / 8 for i in range(16)], [1.0 + i * i for i in range(16)]
_SCALINGS = {
    "default": None,
    "linear": RopeScaling("linear", factor=4.0),
    "llama3": RopeScaling("llama3", factor=8.0, original_max_position_embeddings=64),
    "llama3 narrow": RopeScaling("llama3", 3.0, 2.0, 5.0, original_max_position_embeddings=1024),
    "dynamic": RopeScaling("dynamic", 3.0, original_max_position_embeddings=64),
    "yarn": RopeScaling("yarn", 8.0, original_max_position_embeddings=64),
    "yarn, whole": RopeScaling(
        *("yarn", 4.0),
        beta_fast=16,
        beta_slow=2,
        truncate=False,
        attention_factor=1.5,
        original_max_position_embeddings=2048,
    ),
    "longrope": RopeScaling(
        "longrope", 16.0, short_factor=_SHORT, long_factor=_LONG, original_max_position_embeddings=64
    ),
}


def small_model(scaling: RopeScaling | None, theta: float = 10000.0, fraction: float = 1.0) -> ModelConfig:
    config = PretrainConfig(
        model=ModelConfig(
            hidden_size=128,
            num_attention_heads=4,
            head_dim=32,
            max_position_embeddings=32768,
            rope_theta=theta,
            rope_scaling=scaling,
            rotary_fraction=fraction,
        )
    )
    return resolve(config).model


def oracle(model: ModelConfig) -> PhiRotaryEmbedding:
    """transformers' embedding with the same settings, of a family that turns parts of heads too."""
    found = rope_scaling.to_hf(model)
    scaling = found.pop("rope_scaling") or {"rope_type": "default"}
    config = PhiConfig(
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        rope_parameters={**scaling, "partial_rotary_factor": model.rotary_fraction},
        pad_token_id=0,
        **found,
    )
    return PhiRotaryEmbedding(config)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", _SCALINGS)
def test_frequencies_and_angles_are_transformers_own(name, theta):
    """In texts of the original length and in longer ones, whichever come first."""
    model = small_model(_SCALINGS[name], theta)
    embedding = RotaryEmbedding(model)
    for length in (64, 8192, 65, 63, 100):
        theirs = oracle(model)
        positions = torch.arange(length)[None]
        cos, sin = theirs(torch.zeros(1), positions)
        torch.testing.assert_close(inverse_frequencies(model, length), theirs.inv_freq, rtol=1e-6, atol=0)
        assert attention_factors(model)[0] == pytest.approx(theirs.attention_scaling, rel=1e-12)
        angles = embedding(positions, length)
        assert angles.shape == (length, 1, 1, 32)
        # An angle of 8,000 radians has six digits before the point's third: its last bit is 5e-4.
        ours = angles[:, 0, 0].cos() * attention_factors(model)[0], angles[:, 0, 0].sin() * attention_factors(model)[0]
        torch.testing.assert_close(ours[0], cos[0], rtol=0, atol=3e-3)
        torch.testing.assert_close(ours[1][:3], sin[0, :3], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["default", "llama3", "dynamic", "yarn"])
def test_a_part_of_a_head_has_its_own_frequencies(name):
    model = small_model(_SCALINGS[name], fraction=0.75)
    theirs = oracle(model)
    _, sin = theirs(torch.zeros(1), torch.arange(200)[None])
    assert sin.shape[-1] == rotary_width(model) == 24
    torch.testing.assert_close(inverse_frequencies(model, 200), theirs.inv_freq, rtol=1e-6, atol=0)


def test_each_scaling_is_another():
    angles = [inverse_frequencies(small_model(scaling), 100) for scaling in _SCALINGS.values()]
    for i, one in enumerate(angles):
        assert all(not torch.allclose(one, other) for other in angles[i + 1 :])


def test_rows_have_positions_of_their_own():
    """Positions that start anew in each document give the angles of their numbers, wherever they stand."""
    embedding = RotaryEmbedding(small_model(None))
    straight = embedding(torch.arange(6), 6)
    reset = embedding(torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]), 6)
    assert straight.shape == (6, 1, 1, 32)
    assert reset.shape == (6, 2, 1, 32)
    assert torch.equal(reset[:, 1], straight[:, 0])
    assert torch.equal(reset[:3, 0], straight[:3, 0])
    assert torch.equal(reset[3:, 0], straight[:3, 0])


def test_layers_with_a_window_turn_in_a_way_of_their_own():
    scaling = RopeScaling("linear", 8.0)
    model = replace(small_model(scaling, 1e6), window_rope_theta=100.0)
    angles = RotaryEmbedding(model)(torch.arange(6), 6)
    assert angles.shape == (6, 1, 2, 32)
    for kind, alone in enumerate((small_model(scaling, 1e6), small_model(None, 100.0))):
        assert torch.equal(angles_of_layer(angles, kind), RotaryEmbedding(alone)(torch.arange(6), 6))


def test_frequencies_stay_out_of_checkpoints_and_casts():
    embedding = RotaryEmbedding(small_model(None)).to(torch.bfloat16)
    assert not embedding.state_dict()
    assert embedding(torch.arange(3), 3).dtype == torch.float32


def test_the_flagship_turns_its_slowest_pair_over_its_whole_context():
    """rope_theta fits 32,768 positions: the slowest pair has not come round at the last."""
    model = resolve(load_config("vishwamai-120l")).model
    slowest = float(inverse_frequencies(model)[-1])
    assert slowest * model.max_position_embeddings < torch.pi
