"""Datasets of every kind train through the façade, at any layout, and resume exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.runs import VOCAB, pretrainer
from tests.workers import WorkerPool
from vishwamai_mp.config import UserError


def items(count: int = 20) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, VOCAB, (count, 33), generator=generator).tolist()


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from items()


class Mapped(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(items())

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(items()[index])


def made(kind: str) -> Any:
    import datasets

    whole = datasets.Dataset.from_dict({"input_ids": items(), "labels": items()})
    kinds = {
        "list": items,
        "torch": Mapped,
        "hugging face": lambda: whole,
        "hugging face, streamed": whole.to_iterable_dataset,
        "stream": Stream,
    }
    return kinds[kind]()


def losses(folder: Path, kind: str, **options: Any) -> list[float]:
    ours = pretrainer(folder, made(kind), **{"max_steps": 6, "learning_rate": 1e-3, **options})
    ours.train()
    return [record["lm_loss"] for record in ours.history]


def all_losses(folder: Path, kinds: list[str], **options: Any) -> dict[str, list[float]]:
    return {kind: losses(folder / kind, kind, **options) for kind in kinds}


def test_the_same_items_give_the_same_losses_in_every_kind_of_dataset(workers: WorkerPool, tmp_path):
    [found] = workers.run(
        all_losses, 1, tmp_path, ["list", "torch", "hugging face", "hugging face, streamed", "stream"]
    )
    assert found["list"] == found["torch"] == found["hugging face"]
    assert found["stream"] == found["hugging face, streamed"]  # in their own order
    assert found["stream"] != found["list"]
    assert len(set(found["stream"])) == 6


@pytest.mark.parametrize(("workers_per_rank", "kinds"), [(0, ["list", "stream"]), (2, ["stream"])])
def test_two_replicas_read_what_one_reads(workers: WorkerPool, tmp_path, workers_per_rank, kinds):
    options = {"dataloader_num_workers": workers_per_rank, "dataloader_prefetch_factor": 3}
    [one] = workers.run(all_losses, 1, tmp_path / "one", kinds, gradient_accumulation_steps=2)
    two = workers.run(all_losses, 2, tmp_path / "two", kinds, **options)
    for kind in kinds:
        assert two[0][kind] == two[1][kind] == pytest.approx(one[kind], abs=1e-6)


def resumed(folder: Path, kind: str) -> list[float]:
    """Losses of a run that is stopped after three steps and continued."""
    first = losses(folder, kind, max_steps=3, lr_scheduler_type="constant")
    return [*first, *losses(folder, kind, lr_scheduler_type="constant")]


@pytest.mark.parametrize("kind", ["list", "stream"])
def test_a_resumed_run_reads_on_where_it_was(workers: WorkerPool, tmp_path, kind):
    [whole] = workers.run(losses, 1, tmp_path / "whole", kind, lr_scheduler_type="constant")
    [parts] = workers.run(resumed, 1, tmp_path / "parts", kind)
    assert parts == whole


def short_epochs(folder: Path) -> list[dict[str, float]]:
    """Five items and batches of two times two: the second step of an epoch has one item."""
    ours = pretrainer(folder, items(5), eval_dataset=items(5), num_train_epochs=2, gradient_accumulation_steps=2)
    before = ours.evaluate()
    ours.train()
    by_hand = pretrainer(folder / "one", items(1), eval_dataset=items(5), max_steps=1)
    return [before, *ours.history, by_hand.evaluate()]


def test_the_rest_of_an_epoch_is_a_step_of_its_own(workers: WorkerPool, tmp_path):
    [[before, *steps, fresh]] = workers.run(short_epochs, 1, tmp_path)
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    # One pass over all items, the rate still being that of a barely changed model: 4 of 5 and 1 of 5.
    assert (4 * steps[0]["lm_loss"] + steps[1]["lm_loss"]) / 5 == pytest.approx(before["eval_loss"], abs=2e-3)
    assert before == fresh, "an evaluation is of all items, whatever the batches"


def message(folder: Path, train: Any, valid: Any, options: dict[str, Any]) -> str:
    try:
        pretrainer(folder, train, eval_dataset=valid, **options)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("train", "valid", "options", "parts"),
    [
        (Stream(), None, {}, ["train_dataset has no length", "set max_steps"]),
        ([[1, 2]], "prefix", {}, ["train_dataset=list", "eval_dataset=str"]),
        ([[1, 2]], None, {"eval_strategy": "epoch"}, ["evaluate", "eval_dataset"]),
        ([[1, 2], [3, VOCAB]], None, {}, [f"train_dataset[1] holds token {VOCAB}"]),
        (["text"], None, {}, ["train_dataset[0] is a text", "data.tokenizer"]),
    ],
)
def test_bad_datasets_are_one_line(workers: WorkerPool, tmp_path, train, valid, options, parts):
    [said] = workers.run(message, 1, tmp_path, train, valid, options)
    assert said
    assert "\n" not in said
    for part in parts:
        assert part in said


class Counted(Mapped):
    def __init__(self) -> None:
        self.read = 0

    def __getitem__(self, index: int) -> torch.Tensor:
        self.read += 1
        return super().__getitem__(index)


def looks(folder: Path) -> int:
    """Runs in a worker: how often items were read before training."""
    given = Counted()
    pretrainer(folder, given, num_train_epochs=2)
    return given.read


def test_a_dataset_is_looked_through_once(workers: WorkerPool, tmp_path: Path) -> None:
    """Its 20 items twice: to recognise it on resume, and to tell how long they are."""
    assert workers.run(looks, 1, tmp_path)[0] == 40
