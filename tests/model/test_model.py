"""The whole model: transformers' Llama with the same weights, causality, packed documents."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from tests.model.builds import build, pieces, small_config, whole_model
from vishwamai_mp.config import ModelConfig
from vishwamai_mp.conversion import rope_scaling

_TOKENS = torch.randint(250, (2, 40), generator=torch.Generator().manual_seed(0))


def logits(tokens: Tensor, *overrides: str, **arguments: Tensor) -> Tensor:
    """Runs in a worker: (B, T, V), real tokens only."""
    config, _, (model,) = build(*overrides)
    with torch.no_grad():
        return model(tokens, **arguments).transpose(0, 1)[..., : config.model.vocab_size].clone()


def hugging_face(model: ModelConfig) -> Any:
    """transformers' model of the same shape: Llama, or Mistral for the sliding window that Llama lacks."""
    lengths = rope_scaling.to_hf(model)
    rope = lengths.pop("rope_scaling") or {"rope_type": "default"}
    shape: dict[str, Any] = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "rms_norm_eps": model.rms_norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings,
        "rope_parameters": rope,
        **lengths,
        "attn_implementation": "eager",
    }
    if model.attention_multiplier:
        llama = LlamaForCausalLM(LlamaConfig(**shape)).eval()
        for layer in llama.model.layers:
            layer.self_attn.scaling = model.attention_multiplier
        return llama
    if model.sliding_window:
        return MistralForCausalLM(MistralConfig(**shape, sliding_window=model.sliding_window)).eval()
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def hugging_face_names(weights: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Our whole parameters under transformers' names."""
    groups, width = model.num_key_value_heads or 0, model.head_dim or 0
    per_group = model.num_attention_heads // groups
    named = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
    }
    named["lm_head.weight"] = weights.get("output_layer.weight", named["model.embed_tokens.weight"])
    named["model.embed_tokens.weight"] = named["model.embed_tokens.weight"] * (model.embedding_multiplier or 1)
    for i in range(model.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        # Rows of a group: its queries' heads, then its key's, then its value's.
        fused = weights[ours + "self_attention.linear_qkv.weight"].view(groups, per_group + 2, width, -1)
        for name, part in zip("qkv", fused.split([per_group, 1, 1], dim=1), strict=True):
            named[f"{theirs}self_attn.{name}_proj.weight"] = part.flatten(0, 2)
        named[theirs + "self_attn.o_proj.weight"] = weights[ours + "self_attention.linear_proj.weight"]
        gate, up = weights[ours + "mlp.linear_fc1.weight"].chunk(2)
        named[theirs + "mlp.gate_proj.weight"], named[theirs + "mlp.up_proj.weight"] = gate, up
        named[theirs + "mlp.down_proj.weight"] = weights[ours + "mlp.linear_fc2.weight"]
        named[theirs + "input_layernorm.weight"] = weights[ours + "self_attention.linear_qkv.layer_norm_weight"]
        named[theirs + "post_attention_layernorm.weight"] = weights[ours + "mlp.linear_fc1.layer_norm_weight"]
    return named


_LLAMA3 = "{rope_type: llama3, factor: 8.0, original_max_position_embeddings: 16}"
_VARIANTS = {
    "grouped": [],
    "one head per group": ["model.num_key_value_heads=8"],
    "one group": ["model.num_key_value_heads=1"],
    "tied": ["model.tie_word_embeddings=true"],
    "wide heads": ["model.head_dim=10"],
    "linear": ["model.rope_scaling={rope_type: linear, factor: 4.0}", "model.rope_theta=500"],
    "llama3": [f"model.rope_scaling={_LLAMA3}"],
    "yarn": ["model.rope_scaling={rope_type: yarn, factor: 4.0, original_max_position_embeddings: 16}"],
    "longrope": [
        "model.rope_scaling={rope_type: longrope, factor: 4.0, original_max_position_embeddings: 16,"
        " short_factor: [1, 1], long_factor: [1, 8]}"
    ],
    "dynamic": ["model.rope_scaling={rope_type: dynamic, factor: 4.0, original_max_position_embeddings: 16}"],
    "window": ["model.sliding_window=7"],
    "multipliers": ["model.embedding_multiplier=5", "model.attention_multiplier=2"],
}


@pytest.fixture(scope="module")
def plain(workers):
    return workers.run(logits, 1, _TOKENS)[0]


@pytest.mark.parametrize("name", _VARIANTS)
def test_logits_are_transformers_own(workers, plain, name):
    overrides = _VARIANTS[name]
    model = small_config(*overrides).model
    theirs = hugging_face(model)
    theirs.load_state_dict(hugging_face_names(whole_model(workers.run(pieces, 1, *overrides)), model))
    with torch.no_grad():
        expected = theirs(_TOKENS).logits
    ours = workers.run(logits, 1, _TOKENS, *overrides)[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.05
    if overrides:
        assert (ours - plain).abs().max() > 1e-3  # the variant acts


@pytest.mark.parametrize("window", [[], ["model.sliding_window=7"]])
def test_a_token_changes_nothing_before_it(workers, window):
    before = workers.run(logits, 1, _TOKENS, *window)[0]
    for place in (1, 17, 39):
        changed = _TOKENS.clone()
        changed[:, place] = (changed[:, place] + 1) % 250
        after = workers.run(logits, 1, changed, *window)[0]
        assert torch.equal(after[:, :place], before[:, :place])
        assert (after[:, place] != before[:, place]).any()


_LENGTHS = (10, 7, 23)


@pytest.mark.parametrize(("reset", "roundings"), [(True, 12), (False, 24)], ids=["positions reset", "they run on"])
def test_a_packed_document_gives_what_it_gives_alone(workers, reset, roundings):
    """Rotary attention sees differences of positions only: where they start matters to the last bits of angles."""
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(_LENGTHS)]).expand(2, -1)
    positions = torch.cat([torch.arange(n) for n in _LENGTHS]).expand(2, -1)
    given = {"position_ids": positions} if reset else {}
    packed = workers.run(logits, 1, _TOKENS, document_ids=documents, **given)[0]
    together = workers.run(logits, 1, _TOKENS)[0]
    for part, tokens in zip(packed.split(_LENGTHS, 1), _TOKENS.split(_LENGTHS, 1), strict=True):
        alone = workers.run(logits, 1, tokens)[0]
        tolerance = roundings * torch.finfo(alone.dtype).eps * float(alone.abs().max())
        torch.testing.assert_close(part, alone, rtol=0, atol=tolerance)
    assert (packed - together).abs().max() > 1e-2


def test_rows_may_be_packed_differently(workers):
    documents = torch.stack((torch.arange(40) // 13, torch.arange(40) // 29))
    both = workers.run(logits, 1, _TOKENS, document_ids=documents)[0]
    for row in range(2):
        one = workers.run(logits, 1, _TOKENS[row : row + 1], document_ids=documents[row : row + 1])[0]
        torch.testing.assert_close(both[row], one[0], rtol=0, atol=1e-6)


def losses(tokens: Tensor, labels: Tensor, *overrides: str) -> Tensor:
    _, _, (model,) = build(*overrides)
    with torch.no_grad():
        return model(tokens, labels=labels).clone()


def test_losses_are_the_cross_entropy_of_the_logits(workers, plain):
    labels = _TOKENS.roll(-1, 1)
    ours = workers.run(losses, 1, _TOKENS, labels)[0]
    expected = torch.nn.functional.cross_entropy(plain.transpose(1, 2), labels, reduction="none")
    assert ours.shape == _TOKENS.shape
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
