"""Layers as CUDA graphs compute what they compute without: the same losses and norms, bit for bit, at each layout."""

import pytest

from tests.runtime.test_simulated import MEMORY
from tests.training import graphed_training, layouts
from vishwamai_mp.config import load_config, resolve
from vishwamai_mp.training.graphed_layers import note_on_graphs

_FEW = "training.global_batch_size=4"
_CASES: dict[str, tuple[int, list[str]]] = {
    "windows of some layers, norms behind": (
        1,
        ["model.sliding_window=7", "model.layer_pattern=SF", "model.norm_position=post"],
    ),
    "memory in the second layer": (1, MEMORY),
    "sequence": (2, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
    "context, replicas": (4, ["parallel.context_parallel_size=2", "parallel.use_distributed_optimizer=true"]),
    "chunks": (
        2,
        ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
    ),
}


@pytest.mark.parametrize("name", _CASES)
def test_steps_are_those_without_graphs(workers, name):
    processes, settings = _CASES[name]
    expected = workers.run(layouts.train, processes, [*settings, _FEW], 3)
    found = workers.run(graphed_training.train, processes, [*settings, _FEW], 3)
    for (curve, replays, count), plain in zip(found, expected, strict=True):
        assert curve == plain
        assert count
        assert all(forward == backward for forward, backward in replays)
        assert {forward for forward, _ in replays} != {0}


def test_layers_that_are_not_captured_are_named():
    memory = ["training.cuda_graphs=true", "memory.enabled=true", "memory.layers=[1,3]"]
    cache = ["cache.enabled=true", "cache.layers=[0,3]"]
    config = resolve(load_config("tiny", [*memory, *cache, "model.num_layers=5"]), 1)
    assert note_on_graphs(config) == "training.cuda_graphs leaves out layers with memory or cache: 0, 1, 3"
    assert note_on_graphs(resolve(load_config("tiny", ["training.cuda_graphs=true"]), 1)) is None
    assert note_on_graphs(resolve(load_config("tiny", cache), 1)) is None
