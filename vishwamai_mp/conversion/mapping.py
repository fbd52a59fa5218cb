"""Which rows of which checkpoint tensor are which Hugging Face tensor. Both directions read this one table.

Every Hugging Face tensor is a choice of rows of one checkpoint tensor: a whole matrix, one half of the fused SwiGLU
projection, or the rows of `linear_qkv`, which megatron-core orders by key-value group: the queries of a group, its
key, its value. Rotary embeddings turn the two halves of a head on both sides, so no row moves within a head.
Needs no torch.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vishwamai_mp.config import ModelConfig

Rows = tuple[tuple[int, int], ...]  # first and last (exclusive) of each run of rows

_FIRST_ROWS = 128  # the vocabulary's padding is a multiple of this


@dataclass(frozen=True)
class Part:
    """A Hugging Face tensor: these rows, in this order, of a checkpoint tensor."""

    name: str
    shape: tuple[int, ...]
    rows: Rows


@dataclass(frozen=True)
class Mapped:
    """A checkpoint tensor and the Hugging Face tensors that its rows make up, each row in exactly one of them.

    Attributes:
        name: in the checkpoint.
        shape: there, without the padding of the vocabulary.
        parts: in the order in which Hugging Face's model has them.
        is_vocabulary: the checkpoint may hold rows beyond `shape`, which belong to no token.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    is_vocabulary: bool = False


def plain_mapping(model: ModelConfig) -> list[Mapped]:
    """All tensors of a model without components, in the order of Hugging Face's.

    Args:
        model: resolved.
    """
    vocabulary = (model.vocab_size, model.hidden_size)
    mapping = [whole("embedding.word_embeddings.weight", "model.embed_tokens.weight", vocabulary, True)]
    for number in range(model.num_layers):
        mapping += _layer(model, f"decoder.layers.{number}.", f"model.layers.{number}.")
    mapping.append(whole("decoder.final_layernorm.weight", "model.norm.weight", (model.hidden_size,)))
    if not model.tie_word_embeddings:
        mapping.append(whole("output_layer.weight", "lm_head.weight", vocabulary, True))
    return mapping


def whole(ours: str, theirs: str, shape: tuple[int, ...], is_vocabulary: bool = False) -> Mapped:
    """A tensor that both sides lay out alike."""
    rows = shape[0] if shape else 1
    return Mapped(ours, shape, (Part(theirs, shape, ((0, rows),)),), is_vocabulary)


def padded_rows(mapped: Mapped) -> int:
    """Rows that an imported tensor gets; loading pads further where a layout needs more."""
    rows = mapped.shape[0]
    return -(-rows // _FIRST_ROWS) * _FIRST_ROWS if mapped.is_vocabulary else rows


def nearest(name: str, names: Iterable[str]) -> str:
    """` (nearest: …)`, or nothing where no name is like it. A layer's number counts less than what it is in it."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.8)
    return f" (nearest: {found[0]})" if found else ""


def _layer(model: ModelConfig, ours: str, theirs: str) -> list[Mapped]:
    width, inner = model.hidden_size, model.intermediate_size
    heads, groups, head = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    assert inner is not None
    assert groups is not None
    assert head is not None
    queries, keys, values = _fused_rows(heads // groups * head, head, groups)
    fused, names = f"{ours}self_attention.linear_qkv", [f"{theirs}self_attn.{letter}_proj" for letter in "qkv"]
    sizes, rows = (heads * head, groups * head, groups * head), (queries, keys, values)
    biases = [Part(f"{name}.bias", (size,), row) for name, size, row in zip(names, sizes, rows, strict=True)]
    norms = [
        whole(f"{ours}self_attention.{letter}_layernorm.weight", f"{theirs}self_attn.{letter}_norm.weight", (head,))
        for letter in "qk"
    ]
    return [
        whole(f"{ours}self_attention.linear_qkv.layer_norm_weight", f"{theirs}input_layernorm.weight", (width,)),
        Mapped(
            f"{ours}self_attention.linear_qkv.weight",
            ((heads + 2 * groups) * head, width),
            (
                Part(f"{theirs}self_attn.q_proj.weight", (heads * head, width), queries),
                Part(f"{theirs}self_attn.k_proj.weight", (groups * head, width), keys),
                Part(f"{theirs}self_attn.v_proj.weight", (groups * head, width), values),
            ),
        ),
        *([Mapped(f"{fused}.bias", (sum(sizes),), tuple(biases))] if model.attention_bias else []),
        *(norms if model.qk_norm == "head" else []),
        whole(f"{ours}self_attention.linear_proj.weight", f"{theirs}self_attn.o_proj.weight", (width, heads * head)),
        whole(f"{ours}mlp.linear_fc1.layer_norm_weight", f"{theirs}post_attention_layernorm.weight", (width,)),
        Mapped(
            f"{ours}mlp.linear_fc1.weight",
            (2 * inner, width),
            (
                Part(f"{theirs}mlp.gate_proj.weight", (inner, width), ((0, inner),)),
                Part(f"{theirs}mlp.up_proj.weight", (inner, width), ((inner, 2 * inner),)),
            ),
        ),
        whole(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.down_proj.weight", (width, inner)),
    ]


def _fused_rows(queries: int, head: int, groups: int) -> Sequence[Rows]:
    """Rows of queries, keys and values in `linear_qkv`; `queries` rows per group."""
    starts = range(0, groups * (queries + 2 * head), queries + 2 * head)
    return (
        tuple((start, start + queries) for start in starts),
        tuple((start + queries, start + queries + head) for start in starts),
        tuple((start + queries + head, start + queries + 2 * head) for start in starts),
    )
