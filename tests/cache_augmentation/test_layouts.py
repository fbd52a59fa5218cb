"""The model with caches trains alike in every layout, and its checkpoints move between them."""

import pytest
import torch
import torch.distributed as dist

from tests.model.builds import build, pieces, whole_model
from tests.training.layouts import train
from tests.training.test_layouts import FEW, Curve, assert_equal, curve

_CACHE = [
    FEW,
    "cache.enabled=true",
    "cache.num_heads=8",
    "cache.layers=[0,2]",
    "cache.segment_length=4",
    "cache.latents_per_segment=2",
    "cache.dropout=0.0",
]
_TENSOR, _CONTEXT = "parallel.tensor_model_parallel_size=", "parallel.context_parallel_size="
_SEQUENCE, _PIPELINE = "parallel.sequence_parallel=true", "parallel.pipeline_model_parallel_size=2"
LAYOUTS = {
    "TP2": (2, [_TENSOR + "2"]),
    "TP2 SP": (2, [_TENSOR + "2", _SEQUENCE]),
    "TP4": (4, [_TENSOR + "4"]),
    "PP2": (2, [_PIPELINE]),
    "CP2": (2, [_CONTEXT + "2"]),
    "DP2": (2, ["parallel.use_distributed_optimizer=true"]),
    "recompute": (1, ["training.recompute=full"]),
}
_MANY = "training.global_batch_size=8"
_CARRIED = [_MANY, "cache.carry_state=true", "data.consecutive=true", "data.reset_attention_mask=true"]
# name: settings under which layouts must agree too
VARIANTS = {
    "two-step": ["cache.retrieve_segments=2"],
    "packed": ["data.reset_attention_mask=true"],
    "segments across the ranks' borders": ["cache.segment_length=6", "cache.latents_per_segment=4"],
    "carried": [*_CARRIED, "cache.max_cache_length=40"],
}


@pytest.fixture(scope="module")
def one_process(workers):
    known: dict[tuple[str, ...], Curve] = {}

    def get(*overrides: str) -> Curve:
        if overrides not in known:
            known[overrides] = curve(workers, 1, [*_CACHE, *overrides])
        return known[overrides]

    return get


@pytest.mark.parametrize("name", LAYOUTS)
def test_fp32_layout_equals_one_process(workers, one_process, name):
    processes, layout = LAYOUTS[name]
    assert_equal(curve(workers, processes, [*_CACHE, *layout]), one_process())


def test_eight_tensor_parallel_ranks(workers, one_process):
    processes, layout = 8, [_TENSOR + "8", "model.num_key_value_heads=8"]
    ours = curve(workers, processes, [*_CACHE, *layout], steps=3)
    assert_equal(ours, one_process("model.num_key_value_heads=8")[:3])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["TP2 SP", "CP2", "recompute"])
def test_layouts_agree_in_variants(workers, one_process, name, variant):
    processes, layout = LAYOUTS[name]
    settings = VARIANTS[variant]
    assert_equal(curve(workers, processes, [*_CACHE, *layout, *settings]), one_process(*settings))
    assert one_process(*settings) != one_process(*({_MANY} & {*settings}))


def test_the_cache_changes_training(workers, one_process):
    assert one_process() != curve(workers, 1, [FEW])


@pytest.mark.parametrize("name", ["TP2 SP", "CP2"])
def test_bf16_layout_equals_one_process(workers, one_process, name):
    processes, layout = LAYOUTS[name]
    settings = [_MANY, "precision=bf16", "model.initializer_range=0.04"]
    ours = curve(workers, processes, [*_CACHE, *layout, *settings])
    assert_equal(ours, one_process(*settings), loss=5e-4, norm=1e-3)


def test_dropout_and_recompute(workers):
    """Recomputed layers see the masks that the first pass saw."""
    settings = [*_CACHE, "cache.dropout=0.3", _TENSOR + "2", _SEQUENCE]
    plain = curve(workers, 2, settings, steps=3)
    assert_equal(curve(workers, 2, [*settings, "training.recompute=full"], steps=3), plain)


def test_initial_parameters_are_those_of_one_process(workers):
    one = whole_model(workers.run(pieces, 1, *_CACHE))
    assert {key for key in one if ".cache." in key}
    for layout in ([_TENSOR + "2"], [_PIPELINE]):
        other = whole_model(workers.run(pieces, 2, *_CACHE, *layout))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def saved_and_loaded(folder: str, layout: list[str], save: bool) -> torch.Tensor:
    """Logits of this rank's model; saved, or loaded into another initial model."""
    from megatron.core import dist_checkpointing

    config, runtime, (model,) = build(*_CACHE, *layout, *([] if save else ["training.seed=5"]))
    metadata = {"dp_cp_group": runtime.groups.dp_cp}
    if save:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        dist_checkpointing.save(model.sharded_state_dict(metadata=metadata), folder)
    else:
        model.load_state_dict(
            dist_checkpointing.load(model.sharded_state_dict(metadata=metadata), folder), strict=False
        )
    tokens = torch.arange(64).view(2, 32)
    with torch.no_grad():
        logits = model(tokens)
    gathered = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, logits.contiguous())
    return torch.cat(gathered, -1)[..., : config.model.vocab_size]


@pytest.mark.parametrize("ways", [(1, 2), (2, 1), (2, 4)], ids=str)
def test_a_checkpoint_loads_at_another_tensor_parallel_size(workers, tmp_path, ways):
    results = [
        workers.run(saved_and_loaded, size, str(tmp_path), [f"{_TENSOR}{size}"], save)[0]
        for size, save in zip(ways, (True, False), strict=True)
    ]
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


def measures(steps: int) -> dict[str, float]:
    """What training steps log of the cache, at the last step."""
    from unittest import mock

    from vishwamai_mp.runtime import measures as module

    found: dict[str, float] = {}
    original = module.mean_measures

    def spy(*args):
        found.update(original(*args))
        return dict(found)

    with mock.patch("vishwamai_mp.training.step.mean_measures", spy):
        train([*_CACHE, *_CARRIED, "cache.max_cache_length=4"], steps)
    return found


def test_measures(workers):
    """4 micro-batches of rows that go on; 2 segments of each head may be kept, so some are evicted."""
    found = workers.run(measures, 1, 3)[0]
    assert 0 < found["cache_fill"] <= 1
    assert found["cache_evictions"] > 0
    assert 0 < found["cache_null_share"] < 1
    assert 0 < found["cache_entropy"] < 3.1  # ln of 1 + 2 × (8 + 2) latents
    assert found["cache_importance"] ** 2 <= found["cache_importance_square"] < found["cache_importance"] < 1
