"""The table of tensors: complete, without overlap, at full size too."""

import math

import pytest
import torch

from vishwamai_mp.config import ModelConfig, PretrainConfig, load_config, preset_names, resolve
from vishwamai_mp.conversion.components import component_mapping
from vishwamai_mp.conversion.families import family_holding
from vishwamai_mp.conversion.mapping import Mapped, nearest, padded_rows, plain_mapping
from vishwamai_mp.model import build_model
from vishwamai_mp.planning import parameter_count
from vishwamai_mp.runtime import initialize, shutdown

_OPEN_MODELS = {
    "qwen3-8b": "Qwen3ForCausalLM",
    "gemma3-4b": "Gemma3ForCausalLM",
    "olmo2-7b": "Olmo2ForCausalLM",
}


def meta_tensors(preset: str, overrides: list[str]) -> dict[str, tuple[int, ...]]:
    """In one worker: the whole model's tensors as its checkpoints name them, from a build on the meta device."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    layout = "parallel={tensor_model_parallel_size: 1, pipeline_model_parallel_size: 1}"
    config = resolve(
        load_config(preset, [layout, "training.global_batch_size=1", "training.micro_batch_size=1", *overrides]), 1
    )
    runtime = initialize(config)
    with torch.device("meta"):
        (model,) = build_model(config, runtime, initialize=False)
    shapes = {}
    for entry in model.sharded_state_dict().values():
        for shard in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            assert isinstance(shard, ShardedTensor)
            shapes[shard.key] = tuple(shard.global_shape)
    shutdown(keep_world=True)
    return shapes


def resolved(preset: str) -> PretrainConfig:
    return resolve(load_config(preset))


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("tiny", []),
        ("tiny", ["memory={enabled: true, momentum: false, num_memory_layers: 1}", "cache={enabled: true}"]),
        ("vishwamai-120l", []),
        ("vishwamai-120l", ["memory.enabled=true", "cache.enabled=true", "tree.enabled=true"]),
    ],
)
def test_every_tensor_of_the_model_has_its_place_and_none_is_left(workers, preset, overrides):
    (shapes,) = workers.run(meta_tensors, 1, preset, overrides)
    config = resolve(load_config(preset, overrides))
    table = [*plain_mapping(config.model), *component_mapping(config, config.tree.enabled)]
    assert len(table) == len({mapped.name for mapped in table})
    assert shapes == {mapped.name: (padded_rows(mapped), *mapped.shape[1:]) for mapped in table}


@pytest.mark.parametrize("preset", preset_names())
def test_transformers_has_these_tensors_and_no_other(preset):
    import transformers

    from vishwamai_mp.conversion.model_config import to_hf

    model = resolved(preset).model
    family = family_holding(model)
    table = plain_mapping(model, family.weights)
    kind = getattr(transformers, _OPEN_MODELS.get(preset, "LlamaForCausalLM"))
    with torch.device("meta"):
        theirs = kind(kind.config_class.from_dict(to_hf(model, "bfloat16", {})))
    assert family.architecture == kind.__name__
    names = [part.name for mapped in table for part in mapped.parts]
    assert len(names) == len(set(names))
    assert {part.name: part.shape for mapped in table for part in mapped.parts} == {
        name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()
    }
    total = sum(math.prod(part.shape) for mapped in table for part in mapped.parts)
    assert total == parameter_count(model, model.vocab_size)


@pytest.mark.parametrize(
    "model",
    [
        {"num_attention_heads": 8, "num_key_value_heads": 8},
        {"num_attention_heads": 8, "num_key_value_heads": 2},
        {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 10},
        {"tie_word_embeddings": True},
    ],
)
def test_each_row_belongs_to_exactly_one_part(model):
    config = resolve(PretrainConfig(model=ModelConfig(hidden_size=240, **model)))
    for mapped in plain_mapping(config.model):
        assert sorted(rows_of(mapped)) == list(range(mapped.shape[0]))
        for part in mapped.parts:
            assert sum(last - first for first, last in part.rows) == part.shape[0]
            assert part.shape[1:] == mapped.shape[1:]


def rows_of(mapped: Mapped) -> list[int]:
    return [row for part in mapped.parts for first, last in part.rows for row in range(first, last)]


def test_queries_of_a_group_stand_before_its_key_and_value():
    """2 groups of 2 heads of 2 rows: megatron-core's order is q q k v | q q k v."""
    model = ModelConfig(hidden_size=8, num_layers=1, num_attention_heads=4, num_key_value_heads=2)
    table = {mapped.name: mapped for mapped in plain_mapping(resolve(PretrainConfig(model=model)).model)}
    q, k, v = table["decoder.layers.0.self_attention.linear_qkv.weight"].parts
    assert q.rows == ((0, 4), (8, 12))
    assert k.rows == ((4, 6), (12, 14))
    assert v.rows == ((6, 8), (14, 16))


def test_the_nearest_name_is_found():
    assert nearest("model.layers.0.mlp.up.weight", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"]) == (
        " (nearest: model.layers.0.mlp.up_proj.weight)"
    )
    assert nearest("transformer.h.0.attn", ["model.norm.weight"]) == ""
