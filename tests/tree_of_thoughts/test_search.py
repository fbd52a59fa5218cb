"""Tree of thoughts: what it computes, keeps, prunes and returns, at every layout."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.model.builds import build
from vishwamai_mp.config import TreeConfig, UserError
from vishwamai_mp.inference import Engine
from vishwamai_mp.inference.blocks import KvSequence
from vishwamai_mp.tree_of_thoughts import SearchResult, Thought, TreeOfThoughts

_RANDOM = torch.Generator().manual_seed(5)
_PROMPTS = [torch.randint(1, 250, (length,), generator=_RANDOM).tolist() for length in (7, 19, 3)]
_STOPS = tuple(range(0, 250, 5))
_TREE = TreeConfig(enabled=True, branching=4, max_thought_tokens=6, temperature=1.0, pruning_threshold=0.5)
_LAYOUTS = {
    "TP2": ["parallel.tensor_model_parallel_size=2"],
    "TP4": ["parallel.tensor_model_parallel_size=4"],
    "PP2": ["parallel.pipeline_model_parallel_size=2"],
    "TP2 PP2": ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"],
}


def trees(tree: TreeConfig, *overrides: str, **options: Any) -> TreeOfThoughts:
    """Runs in a worker. The value head is given weights, since fresh it says 0.5 everywhere."""
    config, runtime, (model,) = build("training.global_batch_size=8", "tree.enabled=true", *overrides)
    if model.value_head is not None:
        model.value_head.weight.data.copy_(torch.randn(32, generator=torch.Generator().manual_seed(1)))
    return TreeOfThoughts(Engine(config, runtime, model), tree, **{"stop_tokens": _STOPS, "end_token": 3, **options})


def searched(overrides: list[str], tree: TreeConfig, prompts: list[list[int]], **budget: Any) -> tuple[list, int, int]:
    """Runs in a worker: the results, tokens computed, blocks left in use."""
    ours = trees(tree, *overrides)
    results = ours.search(prompts, **budget)
    return results, ours.engine.computed_tokens, ours.engine.pool.used_blocks


@pytest.fixture(scope="module")
def results(workers) -> dict[str, list[SearchResult]]:
    """Of each strategy, in one process."""
    return {
        strategy: workers.run(searched, 1, [], replace(_TREE, strategy=strategy), _PROMPTS)[0][0]
        for strategy in ("beam", "best-first", "dfs")
    }


@pytest.mark.parametrize("strategy", ["beam", "best-first", "dfs"])
def test_every_layout_returns_the_same_bytes(workers, results, strategy):
    expected = [result.to_json() for result in results[strategy]]
    for name, layout in _LAYOUTS.items():
        processes = 4 if name in ("TP4", "TP2 PP2") else 2
        for found, _, _ in workers.run(searched, processes, layout, replace(_TREE, strategy=strategy), _PROMPTS):
            assert [result.to_json() for result in found] == expected, name


def test_a_tree_does_not_depend_on_its_neighbours(workers, results):
    for prompt, expected in zip(_PROMPTS, results["beam"], strict=True):
        assert workers.run(searched, 1, [], _TREE, [prompt])[0][0][0].to_json() == expected.to_json()


def test_no_token_is_computed_twice(workers):
    """Depth 3, width 4, branching 4: computed / distinct is 1, and nothing stays in memory."""
    tree = replace(_TREE, pruning_threshold=0.0)
    found, computed, blocks = workers.run(searched, 1, [], tree, _PROMPTS)[0]
    distinct = sum(len(node.tokens) for result in found for node in result.nodes)
    assert computed / distinct == 1.0
    assert blocks == 0
    assert all(len(result.nodes) >= 1 + 4 + 16 for result in found)


@pytest.mark.parametrize("strategy", ["beam", "best-first", "dfs"])
def test_nodes_are_what_they_should_be(workers, results, strategy):
    for prompt, result in zip(_PROMPTS, results[strategy], strict=True):
        root, *others = result.nodes
        assert root.tokens == prompt
        assert [node.id for node in result.nodes] == list(range(len(result.nodes)))
        for node in others:
            assert node.depth == result.nodes[node.parent].depth + 1 <= 3
            assert 1 <= len(node.tokens) <= 6
            assert not any(token in _STOPS or token == 3 for token in node.tokens[:-1])
            expected = "end" if node.tokens[-1] == 3 else "stop" if node.tokens[-1] in _STOPS else "cap"
            assert node.ending == expected
            assert (node.status == "complete") <= (node.depth == 3 or node.ending == "end")
        for node in result.nodes:
            children = result.children(node.id)
            assert bool(children) == (node.status == "expanded")
            assert len({child.tokens[0] for child in children}) == len(children)  # different from the first token on
            best = max((child.score for child in children), default=0)
            assert all((child.status == "pruned") == (child.score < 0.5 * best) for child in children)
        assert result.path[0] == 0
        assert result.path[-1] == result.best
        assert result.nodes[result.best].status == "complete"
    if strategy == "beam":
        for result in results["beam"]:
            for depth in (1, 2, 3):
                level = [node for node in result.nodes if node.depth == depth]
                kept = [node for node in level if node.status in ("expanded", "complete")]
                dropped = [node for node in level if node.status == "dropped"]
                assert len(kept) == 4 or not dropped
                assert min(node.score for node in kept) >= max((node.score for node in dropped), default=0)


def test_some_nodes_were_pruned(results):
    statuses = {node.status for found in results.values() for result in found for node in result.nodes}
    assert {"pruned", "dropped", "expanded", "complete"} <= statuses


def test_scores_are_those_of_full_passes(workers, results):
    rescored = workers.run(scored_again, 1, results["beam"])[0]
    for result, rows in zip(results["beam"], rescored, strict=True):
        for node, (value, log_prob) in zip(result.nodes[1:], rows, strict=True):
            assert node.value == pytest.approx(value, abs=1e-5)
            assert node.score == node.value  # the weights' default
            assert node.log_prob == pytest.approx(log_prob, abs=1e-4)


def scored_again(found: list[SearchResult]) -> list[list[tuple[float, float]]]:
    """Runs in a worker: value and log-probability of every node below the root by a pass over its whole path."""
    ours = trees(_TREE)
    model = ours.engine.model
    captured: list[torch.Tensor] = []
    model.decoder.final_layernorm.register_forward_hook(lambda _, __, output: captured.append(output))
    head = model.value_head
    assert head is not None
    rows: list[list[tuple[float, float]]] = []
    for result in found:
        rows.append([])
        for node in result.nodes[1:]:
            text = result.nodes[0].tokens + result.answer_to(node.id)
            with torch.no_grad():
                log_probs = model(torch.tensor([text]))[:, 0, :250].log_softmax(-1)
                value = float(head(captured[-1])[-1, 0])
            start = len(text) - len(node.tokens)
            rows[-1].append((value, sum(float(log_probs[start - 1 + i, t]) for i, t in enumerate(node.tokens))))
    return rows


def test_log_probability_can_take_part(workers):
    tree = replace(_TREE, value_weight=1.0, logprob_weight=3.0)
    for result in workers.run(searched, 1, [], tree, _PROMPTS)[0][0]:
        for node in result.nodes[1:]:
            likelihood = torch.tensor(node.mean_log_prob).exp().item()
            assert node.score == pytest.approx((node.value + 3 * likelihood) / 4)


def with_judges(judge: str, tree: TreeConfig) -> list[SearchResult] | str:
    """Runs in a worker."""
    scorers: dict[str, Callable[[Thought], float]] = {
        "longest": lambda thought: len(thought.text),
        "raises": lambda thought: 1 / 0,
        "NaN": lambda thought: float("nan"),
        "negative": lambda thought: -1.0,
        "even": lambda thought: thought.tokens[-1] % 2 == 0,
    }
    options: dict[str, Any] = {"verifier": scorers["even"]} if judge == "even" else {"scorer": scorers[judge]}
    ours = trees(tree, decode=lambda tokens: "x" * len(tokens), **options)
    try:
        return ours.search(_PROMPTS)
    except UserError as error:
        assert ours.engine.pool.used_blocks == 0
        return str(error)


def test_a_scorer_takes_the_place_of_the_value(workers):
    for result in workers.run(with_judges, 1, "longest", replace(_TREE, pruning_threshold=0.0))[0]:
        for node in result.nodes[1:]:
            assert node.score == node.path_tokens == len(result.answer_to(node.id))
        assert result.texts[result.best] == "x" * len(result.nodes[result.best].tokens)


@pytest.mark.parametrize("strategy", ["beam", "best-first", "dfs"])
def test_a_verifier_ends_the_search(workers, strategy):
    for result in workers.run(with_judges, 1, "even", replace(_TREE, strategy=strategy))[0]:
        asked = [node for node in result.nodes if node.solved is not None]
        assert all(node.status == "complete" and node.solved == (node.tokens[-1] % 2 == 0) for node in asked)
        assert (result.reason == "solved") == any(node.solved for node in asked)
        assert result.reason != "solved" or result.nodes[result.best].solved


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("raises", "the scorer failed on node 1: ZeroDivisionError: division by zero"),
        ("NaN", "the scorer gave nan for node 1"),
        ("negative", "the scorer gave -1.0 for node 1"),
    ],
)
def test_a_scorer_that_fails_is_named(workers, judge, message):
    assert message in workers.run(with_judges, 1, judge, _TREE)[0]


@pytest.mark.parametrize("strategy", ["beam", "best-first", "dfs"])
def test_a_budget_of_tokens_is_kept(workers, results, strategy):
    found = workers.run(searched, 1, [], replace(_TREE, strategy=strategy), _PROMPTS, max_tokens=40)[0]
    assert found[2] == 0
    for result, free in zip(found[0], results[strategy], strict=True):
        assert result.within_budget == (free.generated_tokens <= 40)
        assert result.generated_tokens <= 40 + 16  # the first tokens of one more generation of children
        assert result.within_budget or result.reason == "tokens"
        assert result.nodes[result.best].status != "unfinished"
        assert result.best > 0


def test_a_budget_of_time_is_kept(workers):
    for found, _, blocks in workers.run(searched, 2, _LAYOUTS["TP2"], _TREE, _PROMPTS, max_seconds=1e-6):
        assert [result.reason for result in found] == ["time"] * 3
        assert blocks == 0


def test_the_context_limits_thoughts(workers):
    found, _, _ = workers.run(searched, 1, ["model.max_position_embeddings=36"], _TREE, [[5] * 32])[0]
    assert {node.ending for node in found[0].nodes[1:]} >= {"context"}
    assert max(32 + node.path_tokens for node in found[0].nodes) == 36


def test_a_thousand_searches_leak_nothing(workers):
    assert workers.run(many_searches, 1, 1000)[0] == (0, True)


def many_searches(count: int) -> tuple[int, bool]:
    tree = replace(_TREE, beam_width=2, branching=2, max_depth=2, max_thought_tokens=1)
    ours = trees(tree, "model.num_layers=1")
    most = []
    for _ in range(count):
        ours.search([[4, 9]])
        most.append(ours.engine.pool._touched)
    return ours.engine.pool.used_blocks, most[0] == most[-1]


def test_memory_in_use_is_what_the_formula_says(workers):
    for used, expected in workers.run(bytes_in_use, 2):
        assert used == expected


def bytes_in_use() -> tuple[int, int]:
    engine = trees(_TREE, *_LAYOUTS["TP2"]).engine
    sequence = KvSequence()
    engine.run([(sequence, [1] * 33)])  # 3 blocks
    twin = engine.fork(sequence)
    engine.run([(twin, [2])])  # copies the last, shares two
    layers, heads, width, fp32 = 4, 4 // 2, 4, 4
    return engine.pool.used_bytes, 4 * 16 * 2 * layers * heads * width * fp32


def test_json_tells_the_tree(results):
    result = results["beam"][0]
    told = json.loads(result.to_json())
    assert told["path"] == result.path
    assert told["generated_tokens"] == result.generated_tokens == sum(len(n["tokens"]) for n in told["nodes"][1:])
    assert [node["parent"] for node in told["nodes"]] == [node.parent for node in result.nodes]
    assert "time" not in result.to_json()


def refusal(tree: TreeConfig, prompts: list, overrides: list[str], **budget: Any) -> str:
    """Runs in a worker."""
    try:
        trees(tree, *overrides).search(prompts, **budget)
    except UserError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("prompts", "overrides", "budget", "message"),
    [
        ([], [], {}, "the prompt is empty"),
        ([[]], [], {}, "the prompt is empty"),
        ([[1] * 64], [], {}, "the prompt has 64 tokens, the model's context 64"),
        ([[250]], [], {}, "outside the vocabulary of 250"),
        ([[1]], [], {"max_tokens": 0}, "max_tokens=0: use a positive number"),
        ([[1]], [], {"max_seconds": -1.0}, "max_seconds=-1.0: use a positive number"),
        ([[1]], ["tree.enabled=false"], {}, "tree.value_weight=1.0: the model has no value head"),
    ],
)
def test_impossible_searches_are_refused(workers, prompts, overrides, budget, message):
    assert message in workers.run(refusal, 1, _TREE, prompts, overrides, **budget)[0]
