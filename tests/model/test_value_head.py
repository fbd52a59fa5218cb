"""The value head: its targets by hand, its training signal at every layout, its measures."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.training.layouts import SMALL, RandomSamples, train
from vishwamai_mp.config import ConfigError, load_config, resolve
from vishwamai_mp.model.value_head import marked_tokens, probability_per_token

_ON = ["tree.enabled=true", "tree.step_token=3", "tree.max_thought_tokens=7", "tree.value_loss_weight=0.5"]
_LAYOUTS = {
    "DP2": (2, []),
    "TP2": (2, ["parallel.tensor_model_parallel_size=2"]),
    "TP2 SP": (2, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
    "PP2": (2, ["parallel.pipeline_model_parallel_size=2"]),
    "PP2x2": (2, ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]),
    "CP2": (2, ["parallel.context_parallel_size=2"]),
}


@pytest.mark.parametrize("with_documents", [False, True])
def test_targets_look_ahead_within_their_document(with_documents):
    random = torch.Generator().manual_seed(0)
    losses = torch.rand(3, 20, generator=random) * 4
    documents = torch.randint(0, 3, (3, 20), generator=random).sort(-1)[0] if with_documents else None
    found = probability_per_token(losses, documents, 6)
    for row, place in itertools.product(range(3), range(20)):
        ahead = []
        for other in range(place, min(place + 6, 20)):
            if documents is not None and documents[row, other] != documents[row, place]:
                break
            ahead.append(float(losses[row, other]))
        assert float(found[row, place]) == pytest.approx(math.exp(-sum(ahead) / len(ahead)), rel=1e-5)


def test_values_are_learnt_where_documents_and_steps_begin():
    tokens = torch.tensor([[9, 3, 5, 5, 3, 5], [3, 5, 5, 5, 5, 5]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2]])
    expected = [[1, 1, 0, 1, 1, 0], [1, 0, 1, 0, 1, 0]]
    assert marked_tokens(tokens, documents, 3).int().tolist() == expected
    assert marked_tokens(tokens, None, None).int().tolist() == [[1, 0, 0, 0, 0, 0]] * 2


@pytest.mark.parametrize(
    "variant",
    [
        [],
        ["tree.value_gradient=true", "data.reset_attention_mask=true"],
        ["tree.value_gradient=true", "data.prepared_rows=true", "tree.value_signal=verdicts"],
    ],
)
def test_every_layout_trains_the_same(workers, variant):
    expected = workers.run(train, 1, [*_ON, *variant], 4)[0]
    without = workers.run(train, 1, variant[1:2], 4)[0]
    assert expected[0][0] == pytest.approx(without[0][0], abs=1e-6)
    assert expected[0][1] > without[0][1]  # there is a gradient more
    for name, (processes, layout) in _LAYOUTS.items():
        for found in workers.run(train, processes, [*_ON, *variant, *layout], 4):
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-5, msg=f"{name}: {found} is not {expected}")


def measured(overrides: list[str], steps: int) -> list[dict[str, float]]:
    """Runs in a worker: the measures of each step."""
    from vishwamai_mp.data.batches import BatchStream, DocumentRules
    from vishwamai_mp.model import build_model
    from vishwamai_mp.runtime import initialize
    from vishwamai_mp.training.optimizer import build_optimizer, wrap_data_parallel
    from vishwamai_mp.training.step import TrainStep

    config = resolve(load_config(SMALL, [*_ON, "optimizer.learning_rate=0.01", *overrides]), dist.get_world_size())
    runtime = initialize(config)
    chunks = wrap_data_parallel(config, runtime, build_model(config, runtime))
    step = TrainStep(config, runtime, chunks, build_optimizer(config, runtime, chunks))
    options: dict[str, Any] = {"micro_batch_size": 2, "global_batch_size": 8, "rules": DocumentRules(0)}
    stream = BatchStream(
        RandomSamples(250, 32), data_rank=runtime.data_rank, data_parallel_size=runtime.data_parallel_size, **options
    )
    rows = []
    for number in range(steps):
        batches = list(itertools.islice(stream, stream.micro_batches_per_step))
        rows.append(dict(step.train(batches, number, 0.003, math.inf).measures))
    return rows


def test_measures_tell_how_good_the_values_are(workers):
    alone = workers.run(measured, 1, [], 30)[0]
    first, last = alone[0], alone[-1]
    assert first["value_cross_entropy"] == pytest.approx(math.log(2), abs=1e-4)  # a fresh head says 0.5
    assert first["value_auc"] == 0.5
    assert last["value_cross_entropy"] < 0.95 * first["value_cross_entropy"]
    assert 0 < last["value_calibration"] < 0.8 * first["value_calibration"]
    assert sum(row["value_auc"] for row in alone[-10:]) > 6  # few pairs a step
    assert 0 < last["value_loss"] < first["value_loss"]
    for layout in (
        ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
        ["parallel.context_parallel_size=2"],
    ):
        for name in ("value_loss", "value_cross_entropy", "value_calibration"):
            found = workers.run(measured, 2, layout, 3)[0]
            assert [row[name] for row in found] == pytest.approx([row[name] for row in alone[:3]], abs=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tree.pruning_threshold=1.5"], "tree.pruning_threshold=1.5: a share of the best"),
        (["tree.value_weight=0"], "tree.value_weight=0 and tree.logprob_weight=0 leave no score"),
        (["tree.value_gradient=true", "tree.value_loss_weight=0"], "tree.value_gradient=true has no effect"),
        (["tree.enabled=true", "tree.value_signal=verdicts"], "set data.prepared_rows=true"),
    ],
)
def test_impossible_settings_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        resolve(load_config(SMALL, overrides))
