"""Hugging Face's Llama with the weights of one of our plain models, mapped by hand: an oracle of its own."""

from typing import Any

import torch

from vishwamai_mp.config import PretrainConfig
from vishwamai_mp.model import VishwamAIModel


@torch.no_grad()
def as_llama(config: PretrainConfig, model: VishwamAIModel) -> Any:
    """The same function as a `LlamaForCausalLM`; the model is whole (one process)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = config.model
    heads, groups, width = ours.num_attention_heads, ours.num_key_value_heads, ours.head_dim
    assert groups is not None
    assert width is not None
    assert ours.intermediate_size is not None
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=ours.hidden_size,
            num_hidden_layers=ours.num_layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=width,
            intermediate_size=ours.intermediate_size,
            vocab_size=ours.vocab_size,
            max_position_embeddings=ours.max_position_embeddings,
            rms_norm_eps=ours.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
    llama.model.embed_tokens.weight.copy_(model.embedding.word_embeddings.weight[: ours.vocab_size])
    llama.lm_head.weight.copy_(model.output_layer.weight[: ours.vocab_size])
    llama.model.norm.weight.copy_(model.decoder.final_layernorm.weight)
    for theirs, layer in zip(llama.model.layers, model.decoder.layers, strict=True):
        attention = theirs.self_attn
        fused = layer.self_attention.linear_qkv.weight.view(groups, heads // groups + 2, width, -1)
        attention.q_proj.weight.copy_(fused[:, :-2].reshape(heads * width, -1))
        attention.k_proj.weight.copy_(fused[:, -2].reshape(groups * width, -1))
        attention.v_proj.weight.copy_(fused[:, -1].reshape(groups * width, -1))
        attention.o_proj.weight.copy_(layer.self_attention.linear_proj.weight)
        gate, up = layer.mlp.linear_fc1.weight.chunk(2)
        theirs.mlp.gate_proj.weight.copy_(gate)
        theirs.mlp.up_proj.weight.copy_(up)
        theirs.mlp.down_proj.weight.copy_(layer.mlp.linear_fc2.weight)
        theirs.input_layernorm.weight.copy_(layer.input_layernorm.weight)
        theirs.post_attention_layernorm.weight.copy_(layer.pre_mlp_layernorm.weight)
    return llama.eval()
