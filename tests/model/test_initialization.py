"""The initial model is one function of the seed, whatever the layout."""

import math

import pytest
import torch

from tests.model.builds import build, pieces, small_config, whole_model
from tests.workers import WorkerPool

_TENSOR = "parallel.tensor_model_parallel_size="
_PIPELINE = "parallel.pipeline_model_parallel_size="
_LAYOUTS = {
    "TP2": (2, [_TENSOR + "2"]),
    "TP4": (4, [_TENSOR + "4"]),  # pads the vocabulary to 512 rows in place of 256
    "PP2": (2, [_PIPELINE + "2"]),
    "PP2x2": (2, [_PIPELINE + "2", "parallel.virtual_pipeline_model_parallel_size=2"]),
    "PP2 3+1": (2, [_PIPELINE + "2", "parallel.num_layers_in_first_pipeline_stage=3"]),
    "TP2 PP2": (4, [_TENSOR + "2", _PIPELINE + "2"]),
}
_TIED = "model.tie_word_embeddings=true"


def whole(workers: WorkerPool, processes: int, *overrides: str) -> dict[str, torch.Tensor]:
    return whole_model(workers.run(pieces, processes, *overrides))


@pytest.fixture(scope="module")
def one_process(workers):
    return {tied: whole(workers, 1, f"model.tie_word_embeddings={tied}") for tied in ("true", "false")}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("name", _LAYOUTS)
def test_every_layout_starts_from_the_same_model(workers, one_process, name):
    processes, layout = _LAYOUTS[name]
    assert_same(whole(workers, processes, *layout), one_process["false"])


@pytest.mark.parametrize("name", ["TP2", "PP2", "PP2x2", "TP2 PP2"])
def test_tied_embeddings_too(workers, one_process, name):
    processes, layout = _LAYOUTS[name]
    assert "output_layer.weight" not in one_process["true"]
    assert_same(whole(workers, processes, *layout, _TIED), one_process["true"])


def tied_weights(*overrides: str) -> torch.Tensor | None:
    """Runs in a worker: what this rank's first or last chunk multiplies with."""
    _, _, models = build(*overrides)
    ends = [model for model in models if model.pre_process or model.post_process]
    return ends[0].shared_embedding_or_output_weight().detach().clone() if ends else None


def test_both_ends_of_the_pipeline_hold_the_tied_matrix(workers):
    first, last = workers.run(tied_weights, 2, _PIPELINE + "2", _TIED)
    assert torch.equal(first, last)
    assert first.std() > 0


def test_values_are_distributed_as_asked(one_process):
    config = small_config()
    narrow = config.model.initializer_range / math.sqrt(2 * config.model.num_layers)
    drawn = 0
    for key, values in one_process["false"].items():
        if "norm" in key:
            assert torch.equal(values, torch.ones_like(values)), key
            continue
        std = narrow if "linear_proj" in key or "linear_fc2" in key else config.model.initializer_range
        count = values.numel()
        assert abs(float(values.std()) / std - 1) < 4 / math.sqrt(2 * count), key
        assert abs(float(values.mean())) < 4 * std / math.sqrt(count), key
        assert len(values.unique(dim=0)) == len(values), f"{key}: rows repeat"
        drawn += 1
    assert drawn == 2 + 4 * config.model.num_layers


def test_matrices_of_one_shape_differ(one_process):
    model = one_process["false"]
    key = "decoder.layers.{}.self_attention.linear_qkv.weight"
    assert not torch.equal(model[key.format(0)], model[key.format(1)])
    assert not torch.equal(model["embedding.word_embeddings.weight"], model["output_layer.weight"])


def test_another_seed_is_another_model(workers, one_process):
    other = whole(workers, 1, "training.seed=1235")
    for key, values in one_process["false"].items():
        assert torch.equal(values, other[key]) == ("norm" in key), key


def test_16_bit_models_are_the_rounded_one(workers, one_process):
    rounded = whole(workers, 2, _TENSOR + "2", "precision=bf16")
    assert_same(rounded, {key: value.bfloat16().float() for key, value in one_process["false"].items()})
