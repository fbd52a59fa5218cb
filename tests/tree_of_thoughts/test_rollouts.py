"""Rollouts: which thoughts of a tree are judged, and rows to train on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vishwamai_mp.config import UserError
from vishwamai_mp.data.batches import DocumentRules, make_batch
from vishwamai_mp.tree_of_thoughts import Node, Rollout, SearchResult, rollout_rows, rollouts_of, write_rollouts
from vishwamai_mp.tree_of_thoughts.result import Status

_GOOD = 90


def tree() -> SearchResult:
    """The prompt 1 2 and, by depth: nodes 1, 2 (pruned), 3; of 1: 4, 5 (dropped); of 3: 6 (it ended), 7 (pruned)."""
    shape: list[tuple[int, int, Status]]
    shape = [(1, 0, "expanded"), (2, 0, "pruned"), (3, 0, "expanded"), (4, 1, "complete"), (5, 1, "dropped")]
    shape += [(6, 3, "complete"), (7, 3, "pruned")]
    nodes = [Node(0, None, 0, [1, 2])]
    for number, parent, status in shape:
        tokens = [10 * number, 10 * number + 1]
        ending = "end" if number == 6 else "stop"
        nodes.append(Node(number, parent, nodes[parent].depth + 1, tokens, ending=ending, status=status))
    nodes[5].tokens = [_GOOD]
    return SearchResult(nodes)


def test_thoughts_are_judged_by_what_was_found_below_them():
    rollouts = rollouts_of(tree(), lambda answer: answer[-1] == _GOOD)
    assert rollouts == [
        Rollout([1, 2, 10, 11, 40, 41], {3: True, 5: False}),
        Rollout([1, 2, 10, 11, _GOOD], {4: True}),  # node 1 was judged above
        Rollout([1, 2, 30, 31, 60, 61], {3: False, 5: False}),
        Rollout([1, 2, 30, 31, 70, 71], {5: False}),
    ]


def test_a_thought_that_no_ended_text_goes_through_is_not_judged():
    result = tree()
    result.nodes += [Node(8, 4, 3, [5], status="complete")]  # then 5 and 7 are no last thoughts
    rollouts = rollouts_of(result, lambda answer: answer[-1] == _GOOD)
    assert [rollout.tokens[-1] for rollout in rollouts] == [61, 5]
    assert rollouts[1].verdicts == {3: False, 5: False, 6: False}


def test_a_search_that_ended_early_does_not_judge_what_it_left_open():
    result = tree()
    for node in result.nodes[4:]:
        node.status = "open" if node.status == "complete" else node.status
    assert [rollout.tokens[-1] for rollout in rollouts_of(result, lambda answer: False)] == [61]


def test_nothing_is_said_of_thoughts_where_the_budget_ended():
    result = tree()
    result.nodes[7].status, result.nodes[7].ending = "unfinished", "budget"  # under 3, beside 6
    found = {rollout.tokens[-1]: rollout.verdicts for rollout in rollouts_of(result, lambda answer: False)}
    assert found == {41: {3: False, 5: False}, _GOOD: {4: False}, 61: {5: False}}
    solved = {rollout.tokens[-1]: rollout.verdicts for rollout in rollouts_of(result, lambda answer: answer[-1] == 61)}
    assert solved[61] == {3: True, 5: True}


rollouts_strategy = st.lists(
    st.lists(st.integers(1, 99), min_size=1, max_size=16).flatmap(
        lambda tokens: st.builds(
            Rollout,
            st.just(tokens),
            st.dictionaries(st.integers(0, len(tokens) - 1), st.booleans()),
        )
    ),
    min_size=1,
    max_size=12,
)


@given(rollouts_strategy)
@settings(max_examples=100, deadline=None)
def test_rows_hold_every_rollout_once_as_a_document_of_its_own(rollouts):
    rows = torch.from_numpy(rollout_rows(rollouts, 16, padding=100))
    batch = make_batch(rows, DocumentRules(marked=True, reset_attention_mask=True))
    assert float(batch.loss_mask.sum()) == 0
    assert batch.document_ids is not None
    assert batch.verdicts is not None
    found = []
    for tokens, documents, verdicts in zip(batch.tokens, batch.document_ids, batch.verdicts, strict=True):
        for document in documents.unique():
            inside = documents == document
            known = {i: bool(v) for i, v in enumerate(verdicts[inside].tolist()) if v == v}
            found.append((tokens[inside].tolist(), known))
    found = [(tokens, known) for tokens, known in found if set(tokens) != {100}]
    key = json.dumps
    expected = [(list(rollout.tokens), dict(sorted(rollout.verdicts.items()))) for rollout in rollouts]
    assert sorted(map(key, found)) == sorted(map(key, expected))


def test_rows_that_cannot_be_made_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="1 rollout of up to 9 tokens for rows of 8"):
        rollout_rows([Rollout([1] * 9, {})], 8)
    with pytest.raises(UserError, match="0 rollouts"):
        write_rollouts(tmp_path / "rows", [], sequence_length=8, vocab_size=50)
    assert not list(tmp_path.iterdir())


def judged_texts(count: int) -> list[Rollout]:
    """Texts whose verdict a token far before its place tells."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(count):
        text = random.integers(50, 99, 14)
        text[3] = random.integers(10, 50)
        made.append(Rollout(text.tolist(), {13: bool(text[3] % 2)}))
    return made


def pretrain(arguments: list[str]) -> None:
    """Runs in the workers."""
    from vishwamai_mp.pretrain import main

    main(["--config", "tiny", *arguments])


def values_after(workers, folder: Path, layout: list[str], *more: str) -> list[dict]:
    settings = [
        *("model.hidden_size=32", "model.num_layers=2", "model.num_attention_heads=4", "model.vocab_size=100"),
        *("training.sequence_length=32", "training.micro_batch_size=8", "training.global_batch_size=16"),
        *("training.max_steps=60", "training.evaluate_every=null", "checkpoint.save_every=null"),
        *("logging.progress_bar=false", "logging.log_every=1", "data.split=100,0,0", "data.prepared_rows=true"),
        *("optimizer.learning_rate=0.01", f"data.train={folder / 'rows'}", "precision=fp32"),
        "tree={enabled: true, value_signal: verdicts, value_gradient: true, value_loss_weight: 1.0}",
    ]
    run = folder / f"run{len(list(folder.iterdir()))}"
    workers.run(pretrain, 2 if layout else 1, [*settings, *layout, *more, f"training.output_dir={run}"])
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_command_line_trains_values_and_layers_on_written_rollouts(workers, tmp_path: Path):
    rows = write_rollouts(tmp_path / "rows", judged_texts(400), sequence_length=32, vocab_size=100)
    assert rows == 200
    learnt = values_after(workers, tmp_path, [])
    assert learnt[0]["value_cross_entropy"] == pytest.approx(0.693, abs=0.01)
    assert sum(row["value_auc"] for row in learnt[-5:]) / 5 > 0.85  # how fast it learns depends on rounding
    assert all(row["lm_loss"] == 0 for row in learnt)
    alone = values_after(workers, tmp_path, [], "tree.value_gradient=false")
    assert sum(row["value_auc"] for row in alone[-5:]) / 5 < 0.75  # the head by itself cannot tell
    split = values_after(workers, tmp_path, ["parallel.pipeline_model_parallel_size=2"])
    for one, two in zip(learnt[:5], split[:5], strict=True):
        assert one["value_cross_entropy"] == pytest.approx(two["value_cross_entropy"], abs=1e-5)
