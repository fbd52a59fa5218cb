"""Rotary angles against transformers' own."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vishwamai_mp.config import ModelConfig, RopeScaling, load_config, resolve
from vishwamai_mp.model.rotary import RotaryEmbedding, inverse_frequencies

_SCALINGS = {
    "default": None,
    "linear": RopeScaling("linear", factor=4.0),
    "llama3": RopeScaling("llama3", factor=8.0, original_max_position_embeddings=64),
    "llama3 narrow": RopeScaling("llama3", 3.0, 2.0, 5.0, original_max_position_embeddings=1024),
}


def small_model(scaling: RopeScaling | None, theta: float = 10000.0) -> ModelConfig:
    return ModelConfig(hidden_size=128, num_attention_heads=4, head_dim=32, rope_theta=theta, rope_scaling=scaling)


def oracle(model: ModelConfig) -> LlamaRotaryEmbedding:
    """transformers' embedding with the same settings."""
    parameters = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling:
        parameters |= {key: value for key, value in vars(model.rope_scaling).items() if not key.startswith("_")}
    config = LlamaConfig(
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        head_dim=model.head_dim,
        max_position_embeddings=32768,
        rope_parameters=parameters,
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", _SCALINGS)
def test_frequencies_and_angles_are_transformers_own(name, theta):
    model = small_model(_SCALINGS[name], theta)
    theirs = oracle(model)
    assert theirs.attention_scaling == 1.0
    torch.testing.assert_close(inverse_frequencies(model), theirs.inv_freq, rtol=1e-6, atol=0)
    positions = torch.tensor([[0, 1, 2, 63, 64, 1000, 8191]])
    cos, sin = theirs(torch.zeros(1), positions)
    angles = RotaryEmbedding(model)(positions)
    assert angles.shape == (7, 1, 1, 32)
    # An angle of 8,000 radians has six digits before the point's third: its last bit is 5e-4.
    torch.testing.assert_close(angles[:, 0, 0].cos(), cos[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(angles[:3, 0, 0].sin(), sin[0, :3], rtol=0, atol=1e-6)


def test_each_scaling_is_another():
    angles = [inverse_frequencies(small_model(scaling)) for scaling in _SCALINGS.values()]
    for i, one in enumerate(angles):
        assert all(not torch.allclose(one, other) for other in angles[i + 1 :])


def test_rows_have_positions_of_their_own():
    """Positions that start anew in each document give the angles of their numbers, wherever they stand."""
    embedding = RotaryEmbedding(small_model(None))
    straight = embedding(torch.arange(6))
    reset = embedding(torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]))
    assert straight.shape == (6, 1, 1, 32)
    assert reset.shape == (6, 2, 1, 32)
    assert torch.equal(reset[:, 1], straight[:, 0])
    assert torch.equal(reset[:3, 0], straight[:3, 0])
    assert torch.equal(reset[3:, 0], straight[:3, 0])


def test_frequencies_stay_out_of_checkpoints_and_casts():
    embedding = RotaryEmbedding(small_model(None)).to(torch.bfloat16)
    assert not embedding.state_dict()
    assert embedding.frequencies.dtype == torch.float32


def test_the_flagship_turns_its_slowest_pair_over_its_whole_context():
    """rope_theta fits 32,768 positions: the slowest pair has not come round at the last."""
    model = resolve(load_config("vishwamai-120l")).model
    slowest = float(inverse_frequencies(model)[-1])
    assert slowest * model.max_position_embeddings < torch.pi
