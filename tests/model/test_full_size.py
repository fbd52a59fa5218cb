"""The flagship, every rank of it, on the meta device: no memory, no peers.

In other layouts than the preset's, the first and the last tensor parallel rank of each stage stand for those between.
"""

import resource
from collections import Counter

import pytest
import torch
import torch.distributed as dist

from vishwamai_mp.config import layers_per_stage, load_config, padded_vocab_size, resolve
from vishwamai_mp.model import build_model
from vishwamai_mp.planning import parameter_count
from vishwamai_mp.runtime import initialize, shutdown

_UNEVEN = [
    "parallel.pipeline_model_parallel_size=16",
    "parallel.virtual_pipeline_model_parallel_size=null",
    "parallel.num_layers_in_first_pipeline_stage=4",
    "parallel.num_layers_in_last_pipeline_stage=4",
]
_EVERY, _OUTER = tuple(range(8)), (0, 7)  # tensor parallel ranks that are built
_LAYOUTS = {
    "TP8 PP8x5": (64, [], _EVERY),  # as the preset lays it out, interleaved
    "TP8 PP8": (64, ["parallel.virtual_pipeline_model_parallel_size=null"], _OUTER),
    "TP8 PP16, 4 + 14·8 + 4": (128, _UNEVEN, _OUTER),
}
Rank = tuple[int, int, list[int], int, int]  # tensor rank, stage, layers (numbers), sharded and replicated parameters


def build_ranks(world_size: int, overrides: list[str], tensor_ranks: tuple[int, ...]) -> tuple[list[Rank], int]:
    """Runs in two workers: every other rank, one after the other, each in a job whose peers are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config = resolve(load_config("vishwamai-120l", overrides), world_size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    built: list[Rank] = []
    ranks = [rank for rank in range(world_size) if rank % 8 in tensor_ranks][dist.get_rank() :: dist.get_world_size()]
    dist.destroy_process_group()
    for rank in ranks:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        runtime = initialize(config)
        with torch.device("meta"):
            models = build_model(config, runtime, initialize=False)
        layers, counts = [], Counter({True: 0, False: 0})
        for model in models:
            layers += [layer.layer_number - 1 for layer in model.decoder.layers]
            for parameter in model.parameters():
                assert parameter.is_meta
                counts[bool(getattr(parameter, "tensor_model_parallel", False))] += parameter.numel()
        built.append((runtime.tensor_rank, runtime.pipeline_rank, layers, counts[True], counts[False]))
        shutdown()
    return built, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


@pytest.mark.parametrize("name", _LAYOUTS)
def test_every_rank_builds_and_parameters_sum_to_the_formula(workers, name):
    world_size, overrides, tensor_ranks = _LAYOUTS[name]
    results = workers.run(build_ranks, 2, world_size, overrides, tensor_ranks)
    ranks = [rank for built, _ in results for rank in built]
    assert all(grown < 2**20 for _, grown in results)  # KiB: of 99 billion parameters, none is held

    config = resolve(load_config("vishwamai-120l", overrides), world_size)
    assert config.parallel.tensor_model_parallel_size == len(_EVERY)
    stages = config.parallel.pipeline_model_parallel_size
    assert sorted((t, p) for t, p, *_ in ranks) == [(t, p) for t in tensor_ranks for p in range(stages)]
    for stage in range(stages):
        assert len({(split, whole) for _, p, _, split, whole in ranks if p == stage}) == 1
    # Norms are replicated over the tensor parallel ranks: they count once.
    sharded, replicated = (sum(rank[i] for rank in ranks if rank[0] == 0) for i in (3, 4))
    total = sharded * len(_EVERY) + replicated
    assert total == parameter_count(config.model, padded_vocab_size(config))
    assert total > 98e9

    first_of_stage = {stage: layers for t, stage, layers, *_ in ranks if t == 0}
    assert [len(first_of_stage[stage]) for stage in range(stages)] == layers_per_stage(config)
    assert sorted(layer for layers in first_of_stage.values() for layer in layers) == list(range(120))
    for _, stage, layers, *_ in ranks:
        assert layers == first_of_stage[stage]


def test_the_uneven_split_is_the_one_that_was_asked_for():
    config = resolve(load_config("vishwamai-120l", _UNEVEN), 128)
    assert layers_per_stage(config) == [4, *[8] * 14, 4]
