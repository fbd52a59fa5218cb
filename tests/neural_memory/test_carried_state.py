"""State carried from micro-batch to micro-batch: data in order, and the memory over segments against whole rows."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.model.builds import small_config
from tests.neural_memory.builds import SETTINGS, drawn_outputs, hidden_states, memory_module
from tests.synthetic import random_documents, write_corpus
from tests.training.layouts import SMALL
from vishwamai_mp.config import ConfigError, UserError, load_config, resolve
from vishwamai_mp.data.batches import BatchStream, DocumentRules, make_batch
from vishwamai_mp.data.consecutive import ConsecutiveSegments

_CARRY = ["memory.carry_state=true", "data.consecutive=true", "data.reset_attention_mask=true"]


def corpus(folder: Path) -> tuple[Any, np.ndarray]:
    """200 documents, and the stream of all but the first and the last ten."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = random_documents(50, 12000, seed=0)
    prefix = write_corpus(folder / "corpus", documents)
    return IndexedDataset(prefix), np.concatenate(documents[10:-10])


def segments(folder: Path, rows: int = 3, length: int = 16) -> tuple[ConsecutiveSegments, np.ndarray]:
    indexed, stream = corpus(folder)
    made = ConsecutiveSegments(
        indexed, range(10, len(indexed) - 10), sequence_length=length, rows=rows, eod_id=0, name="corpus"
    )
    return made, stream


def test_each_row_reads_its_part_of_the_stream_from_start_to_end(tmp_path):
    made, stream = segments(tmp_path)
    part = len(stream) // 3
    count = made.samples_per_epoch // 3
    assert count * 16 + 1 <= part < (count + 1) * 16 + 1
    for row in range(3):
        found = [made[segment * 3 + row] for segment in range(count)]
        assert [int(text[0]) for text in found[:1]] == [0]
        read = torch.cat([text[1:-1] for text in found]).numpy()
        np.testing.assert_array_equal(read, stream[row * part : row * part + count * 16])
        for before, after in itertools.pairwise(found):
            assert int(before[-1]) == int(after[1]), "the label of one is the first token of the next"
            assert int(before[-2]) == int(after[0])
    assert torch.equal(made[count * 3 + 1], made[1]), "then the row begins anew"


@pytest.mark.parametrize(("micro_batch", "replicas"), [(3, 1), (1, 3)])
def test_micro_batches_continue_row_by_row(tmp_path, micro_batch, replicas):
    """Whatever the global batch, also from one step to the next."""
    made, stream = segments(tmp_path)
    part = len(stream) // 3
    for rank in range(replicas):
        batches = BatchStream(
            made,
            micro_batch_size=micro_batch,
            global_batch_size=6,
            data_rank=rank,
            data_parallel_size=replicas,
            rules=DocumentRules(0, reset_attention_mask=True, leading_token=True),
        )
        taken = list(itertools.islice(batches, 7))
        for row in range(micro_batch):
            start = part * (rank * micro_batch + row)
            read = torch.cat([batch.tokens[row] for batch in taken]).numpy()
            np.testing.assert_array_equal(read, stream[start : start + 7 * 16])
            for number, batch in enumerate(taken):
                place = start + 16 * number
                goes_on = number > 0 and stream[place - 1] != 0
                assert batch.document_ids is not None
                assert (int(batch.document_ids[row, 0]) == 0) == goes_on


def test_a_row_that_goes_on_begins_with_document_0():
    rules = DocumentRules(9, reset_attention_mask=True, leading_token=True)
    batch = make_batch(torch.tensor([[1, 2, 9, 3, 4], [9, 2, 9, 3, 4]]), rules)
    assert batch.document_ids is not None
    assert batch.document_ids.tolist() == [[0, 0, 1], [1, 1, 2]]
    assert batch.tokens.tolist() == [[2, 9, 3], [2, 9, 3]]
    assert batch.labels.tolist() == [[9, 3, 4], [9, 3, 4]]


def test_too_little_data_for_the_rows_is_said(tmp_path):
    with pytest.raises(UserError, match=r"less than one sequence of 4096 and its label for each of 8 rows"):
        segments(tmp_path, rows=8, length=4096)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["memory.carry_state=true"], r"memory.carry_state=true with data.consecutive=false: shuffled"),
        (["data.consecutive=true"], r"data.consecutive=true with data.reset_attention_mask=false"),
    ],
)
def test_shuffled_data_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        small_config(*SETTINGS, *overrides)


def carried(recompute: str) -> None:
    """Segments one after the other against the whole rows; then after a reset, and in evaluation."""
    module = memory_module(*_CARRY, f"training.recompute={recompute}")
    hidden = hidden_states(48, 2)
    documents = torch.ones(2, 48, dtype=torch.int32)
    documents[0, 20:] += 1
    documents[1, 16:] += 1
    with torch.no_grad():
        whole, _ = module(hidden, documents)
        module.train()
        for attempt in range(2):
            for part, span in zip(whole.split(16), (slice(0, 16), slice(16, 32), slice(32, 48)), strict=True):
                ids = documents[:, span].clone()
                goes_on = torch.tensor([span.start > 0, span.start == 32])
                ids[goes_on] -= ids[goes_on, :1]
                out, _ = module(hidden[span], ids)
                torch.testing.assert_close(out, part, rtol=0, atol=1e-12)
            if attempt == 0:
                module.reset_memory()
        alone = torch.zeros(2, 16, dtype=torch.int32)
        following, _ = module(hidden[:16], alone)
        assert float((following - whole[:16]).abs().max()) > 1e-3, "a row that goes on remembers"
        module.eval()
        torch.testing.assert_close(module(hidden[:16], alone)[0], whole[:16], rtol=0, atol=1e-12)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_segments_in_turn_equal_the_whole_rows(workers, recompute):
    workers.run(carried, 1, recompute)


def one_bad_row() -> None:
    """What a step with numbers that are not finite leaves behind is dropped, row by row."""
    module, hidden = memory_module(*_CARRY).train(), hidden_states(16, 2)
    goes_on = torch.zeros(2, 16, dtype=torch.int32)
    with torch.no_grad():
        module(hidden, goes_on)
        expected, _ = module(hidden, goes_on)
        module.reset_memory()
        broken = hidden.clone()
        broken[3, 1] = float("nan")
        module(broken, goes_on)
        found, _ = module(hidden, goes_on)
        fresh, _ = module.eval()(hidden, goes_on)
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[:, 1], fresh[:, 1], rtol=0, atol=1e-12)


def test_a_row_that_is_not_finite_starts_empty(workers):
    workers.run(one_bad_row, 1)


def curve(folder: Path, overrides: list[str]) -> list[tuple[float, float]]:
    """Losses and gradient norms over consecutive data."""
    import torch.distributed as dist

    from vishwamai_mp.model import build_model
    from vishwamai_mp.runtime import initialize, shutdown
    from vishwamai_mp.training.optimizer import build_optimizer, wrap_data_parallel
    from vishwamai_mp.training.step import TrainStep

    config = resolve(load_config(SMALL, [*SETTINGS, *_CARRY, *overrides]), dist.get_world_size())
    runtime = initialize(config)
    with drawn_outputs():
        chunks = wrap_data_parallel(config, runtime, build_model(config, runtime))
    step = TrainStep(config, runtime, chunks, build_optimizer(config, runtime, chunks))
    training = config.training
    rows = training.micro_batch_size * runtime.data_parallel_size
    made, _ = segments(folder / f"rank{runtime.rank}", rows=rows, length=training.sequence_length)
    stream = BatchStream(
        made,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        data_rank=runtime.data_rank,
        data_parallel_size=runtime.data_parallel_size,
        rules=DocumentRules(0, reset_attention_mask=True, leading_token=True),
    )
    found = []
    for number in range(3):
        batches = list(itertools.islice(stream, stream.micro_batches_per_step))
        result = step.train(batches, number, 1e-3, float("inf"))
        found.append((result.lm_loss, result.grad_norm))
    shutdown(keep_world=True)
    return found


_PIPELINE = "parallel.pipeline_model_parallel_size=2"


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (1, ["training.recompute=full", "training.recompute_layers=2"]),
        (2, [_PIPELINE]),
        (2, [_PIPELINE, "training.recompute=full"]),
        (2, [_PIPELINE, "parallel.virtual_pipeline_model_parallel_size=2"]),
        (2, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
        (2, ["parallel.context_parallel_size=2"]),
    ],
)
def test_layouts_carry_the_same_state(workers, tmp_path, processes, layout):
    """Also in pipelines, whose passes are intertwined, and where passes run again."""
    ours = workers.run(curve, processes, tmp_path / "ours", layout)[0]
    theirs = workers.run(curve, 1, tmp_path / "theirs", [])[0]
    assert max(abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)) < 5e-6


def test_the_carried_state_is_felt(workers, tmp_path):
    carrying = workers.run(curve, 1, tmp_path / "a", [])[0]
    without = workers.run(curve, 1, tmp_path / "b", ["memory.carry_state=false"])[0]
    assert max(abs(a[0] - b[0]) for a, b in zip(carrying, without, strict=True)) > 1e-5
