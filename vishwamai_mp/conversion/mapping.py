"""Which rows of which checkpoint tensor are which Hugging Face tensor. Both directions read this one table.

Every Hugging Face tensor is a choice of rows of one checkpoint tensor: a whole matrix, one half of the fused gated
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


@dataclass(frozen=True)
class WeightNames:
    """What a family calls its tensors, a Llama where nothing is said; without `.weight`, `.bias` behind.

    Those of a layer stand behind `layer`. Parts of a fused matrix of ours that have one name here are one matrix there
    too, with their rows in the order of these attributes.
    """

    embedding: str = "model.embed_tokens"
    layer: str = "model.layers.{}."
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    queries: str = "self_attn.q_proj"
    keys: str = "self_attn.k_proj"
    values: str = "self_attn.v_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    attention_output: str = "self_attn.o_proj"
    attention_output_norm: str = "post_attention_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    mlp_output_norm: str = "post_feedforward_layernorm"


LLAMA_NAMES = WeightNames()


def plain_mapping(model: ModelConfig, names: WeightNames = LLAMA_NAMES) -> list[Mapped]:
    """All tensors of a model without components, in the order of Hugging Face's.

    Args:
        model: resolved.
        names: of the folder's tensors.
    """
    vocabulary = (model.vocab_size, model.hidden_size)
    mapping = [whole("embedding.word_embeddings.weight", f"{names.embedding}.weight", vocabulary, True)]
    for number in range(model.num_layers):
        mapping += _layer(model, f"decoder.layers.{number}.", names.layer.format(number), names)
    mapping.append(whole("decoder.final_layernorm.weight", f"{names.final_norm}.weight", (model.hidden_size,)))
    if not model.tie_word_embeddings:
        mapping.append(whole("output_layer.weight", f"{names.head}.weight", vocabulary, True))
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


def _layer(model: ModelConfig, ours: str, theirs: str, names: WeightNames) -> list[Mapped]:
    width, inner = model.hidden_size, model.intermediate_size
    heads, groups, head = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    assert inner is not None
    assert groups is not None
    assert head is not None
    attention, mlp = f"{ours}self_attention.", f"{ours}mlp."
    projections = [f"{theirs}{name}" for name in (names.queries, names.keys, names.values)]
    rows = _fused_rows(heads // groups * head, head, groups)

    def norm(name: str, called: str, size: int) -> Mapped:
        return whole(name, f"{theirs}{called}.weight", (size,))

    norms_inputs, norms_outputs = model.norm_position != "post", model.norm_position != "pre"
    mapping = [norm(f"{attention}linear_qkv.layer_norm_weight", names.attention_norm, width)] if norms_inputs else []
    mapping.append(_joined(f"{attention}linear_qkv.weight", projections, rows, (width,)))
    if model.attention_bias:
        mapping.append(_joined(f"{attention}linear_qkv.bias", projections, rows, ()))
    if model.qk_norm != "none":
        counts = (heads, groups) if model.qk_norm == "full" else (1, 1)
        mapping.append(norm(f"{attention}q_layernorm.weight", names.query_norm, counts[0] * head))
        mapping.append(norm(f"{attention}k_layernorm.weight", names.key_norm, counts[1] * head))
    output = f"{theirs}{names.attention_output}.weight"
    mapping.append(whole(f"{attention}linear_proj.weight", output, (width, heads * head)))
    if norms_outputs:
        mapping.append(norm(f"{ours}self_attn_output_norm.weight", names.attention_output_norm, width))
    if norms_inputs:
        mapping.append(norm(f"{mlp}linear_fc1.layer_norm_weight", names.mlp_norm, width))
    gated = [f"{theirs}{names.gate}", f"{theirs}{names.up}"]
    return [
        *mapping,
        _joined(f"{mlp}linear_fc1.weight", gated, [((0, inner),), ((inner, 2 * inner),)], (width,)),
        whole(f"{mlp}linear_fc2.weight", f"{theirs}{names.down}.weight", (width, inner)),
        *([norm(f"{ours}mlp_output_norm.weight", names.mlp_output_norm, width)] if norms_outputs else []),
    ]


def _joined(ours: str, theirs: Sequence[str], rows: Sequence[Rows], width: tuple[int, ...]) -> Mapped:
    """A fused matrix (with its input `width`) or bias of ours: `rows` of it are those of the tensor named beside."""
    ending = ours[ours.rindex(".") :]
    taken: dict[str, Rows] = {}
    for name, own in zip(theirs, rows, strict=True):
        taken[f"{name}{ending}"] = (*taken.get(f"{name}{ending}", ()), *own)
    counts = {name: sum(last - first for first, last in own) for name, own in taken.items()}
    parts = tuple(Part(name, (counts[name], *width), own) for name, own in taken.items())
    return Mapped(ours, (sum(counts.values()), *width), parts)


def _fused_rows(queries: int, head: int, groups: int) -> Sequence[Rows]:
    """Rows of queries, keys and values in `linear_qkv`; `queries` rows per group."""
    starts = range(0, groups * (queries + 2 * head), queries + 2 * head)
    return (
        tuple((start, start + queries) for start in starts),
        tuple((start + queries, start + queries + head) for start in starts),
        tuple((start + queries + head, start + queries + 2 * head) for start in starts),
    )
