"""Training with `tree.enabled`: the value head learns, and evaluations search."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.synthetic import write_corpus
from tests.workers import WorkerPool
from vishwamai_mp.config import ConfigError
from vishwamai_mp.data.tokenizer import Tokenizer
from vishwamai_mp.data.tokenizer_training import train_tokenizer
from vishwamai_mp.training.callbacks.search_samples import Search
from vishwamai_mp.tree_of_thoughts.result import Node, SearchResult

_TEXT = "1 + 1 = 2[STEP]2 + 2 = 4[STEP]so 4"
_SETTINGS = [
    *("model.hidden_size=32", "model.num_layers=2", "model.num_attention_heads=4", "model.num_key_value_heads=2"),
    *("model.intermediate_size=64", "model.vocab_size=380", "model.max_position_embeddings=64"),
    *("training.sequence_length=32", "training.micro_batch_size=4", "training.global_batch_size=8"),
    *("training.max_steps=6", "training.evaluate_every=3", "training.evaluate_batches=1"),
    *(
        "schedule.warmup_steps=0",
        "checkpoint.save_every=null",
        "logging.progress_bar=false",
        "logging.log_every=1",
        "data.split=70,30,0",
    ),
    *("tree.enabled=true", "tree.max_thought_tokens=6", "tree.beam_width=2", "tree.max_depth=2"),
]


def pretrain(arguments: list[str]) -> str:
    """Runs in the workers."""
    from vishwamai_mp.pretrain import main

    try:
        main(["--config", "tiny", *_SETTINGS, *arguments])
    except ConfigError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("search")
    tokenizer = train_tokenizer([_TEXT, "the quick brown fox jumps over the lazy dog"] * 20, 380, folder / "spm")
    corpus = write_corpus(folder / "corpus", [[*tokenizer.encode(_TEXT), tokenizer.eod_id]] * 200)
    return [f"data.train={corpus}", f"data.tokenizer={tokenizer.path}"]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("layout", [[], ["tensor", "sequence", "memory", "cache"], ["pipeline"]])
def test_evaluations_search_and_change_nothing_else(
    workers: WorkerPool, data: list[str], tmp_path: Path, layout: list[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("1 + 1\t4\n2 + 2\t2\n")
    named = {
        "tensor": "parallel.tensor_model_parallel_size=2",
        "pipeline": "parallel.pipeline_model_parallel_size=2",
        "sequence": "parallel.sequence_parallel=true",
        "memory": "memory.enabled=true memory.memory_size=32 memory.head_dim=8",
        "cache": "cache.enabled=true cache.num_heads=4 cache.segment_length=8",
    }
    processes = 2 if layout else 1
    arguments = [*data, *(setting for kind in layout for setting in named[kind].split())]
    for folder, more in (("plain", []), ("searching", [f"tree.prompts={prompts}"])):
        assert not any(
            workers.run(pretrain, processes, [*arguments, *more, f"training.output_dir={tmp_path / folder}"])
        )
    plain, searching = rows(tmp_path / "plain"), rows(tmp_path / "searching")
    assert [row["lm_loss"] for row in plain] == [row["lm_loss"] for row in searching]
    for row in searching:
        assert row["value_cross_entropy"] > 0
        assert ("search_score" in row) == ("validation_loss" in row) == (row["step"] in (3, 6))
    assert 0 < searching[5]["search_score"] < 1
    assert searching[5]["search_solve_rate"] >= 0
    assert searching[5]["search_tokens"] > 8
    assert "search_score" not in plain[5]
    assert (tmp_path / "searching/search/step_00000006.html").read_text().count("<svg") == 2
    assert logged_text(tmp_path / "searching/tensorboard").startswith("    >")


def test_the_solve_rate_is_of_answers_that_contain_what_is_right(data: list[str], monkeypatch: pytest.MonkeyPatch):
    tokenizer = Tokenizer(data[1].partition("=")[2])
    nodes = [Node(0, None, 0, [1]), Node(1, 0, 1, tokenizer.encode("so 4"))]
    found = [SearchResult(nodes, best=1, texts=["1 + 1", "so 4"]) for _ in range(4)]
    search = Search([f"1 + 1\t{right}" for right in ("4", "so", "5", "4")], tokenizer)
    monkeypatch.setattr(search, "_search", lambda trainer: found)
    record = {"validation_loss": 1.0}
    trainer: Any = SimpleNamespace(runtime=SimpleNamespace(reports=False))
    search.on_step_end(trainer, record)
    assert record["search_solve_rate"] == 0.75


def logged_text(folder: Path) -> str:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return events.Tensors("search/text_summary")[-1].tensor_proto.string_val[0].decode()


def test_the_step_token_is_the_tokenizers(workers: WorkerPool, data: list[str], tmp_path: Path) -> None:
    import yaml

    workers.run(pretrain, 1, [*data, f"training.output_dir={tmp_path}"])
    recipe = yaml.safe_load((tmp_path / "config.yaml").read_text())
    tokenizer = Tokenizer(data[1].partition("=")[2])
    assert recipe["tree"]["step_token"] == tokenizer.special_ids["[STEP]"]


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (None, [], "cannot be read"),
        ("\n\n", [], "has no prompts"),
        ("a\tb\nc\n", [], "some lines have an answer"),
        ("a\tb\rc\td\r", [], "carriage returns alone end its lines"),
        ("a\n", ["data.tokenizer=null"], "tree.prompts needs a tokenizer"),
        ("a\n", ["parallel.context_parallel_size=2"], "cannot be searched in this layout"),
    ],
)
def test_impossible_prompts_are_refused(
    workers: WorkerPool, data: list[str], tmp_path: Path, content: str | None, more: list[str], message: str
) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_text(content, newline="")
    arguments = [*data, f"tree.prompts={path}", f"training.output_dir={tmp_path / 'run'}", *more]
    processes = 2 if "context" in " ".join(more) else 1
    assert all(message in said for said in workers.run(pretrain, processes, arguments))
