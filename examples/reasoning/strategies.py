"""Ways to solve puzzles with one model, and what each of them finds at what cost."""

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from countdown import END, STEP, Puzzle, verify

from vishwamai_mp.config import TreeConfig
from vishwamai_mp.inference import BeamOptions, Engine, Generator, SamplingOptions, beam_search
from vishwamai_mp.inference.blocks import KvSequence
from vishwamai_mp.tree_of_thoughts import SearchResult, Thought, TreeOfThoughts

LONGEST = 48  # tokens of an answer
_AT_ONCE = 20  # puzzles


@dataclass(frozen=True)
class Outcome:
    """Of one puzzle: whether the chosen text is right, whether any of the texts is, and tokens generated."""

    chosen: bool
    any: bool
    tokens: int


def examine(generator: Generator, tree: TreeConfig, asked: Sequence[Puzzle], seed: int) -> dict[str, dict[str, float]]:
    """Means over all puzzles, by strategy. The tree with values goes first: its cost is the budget of the others."""
    engine, values = generator.engine, ValuesByDepth()
    found = {"tree, values": solve_by_tree(engine, tree, asked, watch=values.add)}
    shuffled = values.shuffled(random.Random(seed))
    found["tree, shuffled values"] = solve_by_tree(engine, tree, asked, scorer=shuffled)
    found["tree, values, unpruned"] = solve_by_tree(engine, replace(tree, pruning_threshold=0.0), asked)
    found["tree, values, best-first"] = solve_by_tree(engine, replace(tree, strategy="best-first"), asked)
    found["tree, values and log-probability"] = solve_by_tree(engine, replace(tree, logprob_weight=0.5), asked)
    likely = replace(tree, value_weight=0.0, logprob_weight=1.0)
    found["tree, log-probability"] = solve_by_tree(engine, likely, asked)
    found["greedy"] = solve_greedily(generator, asked)
    # A model that has learnt little may end at once; a solution has more than 8 tokens.
    length = max(8.0, statistics.mean(outcome.tokens for outcome in found["greedy"]))
    count = max(1, round(statistics.mean(outcome.tokens for outcome in found["tree, values"]) / length))
    found["beam"] = solve_by_beams(engine, asked, count)
    found["best of N"], found["best of N, values"] = solve_by_samples(generator, tree, asked, count, seed)
    return {
        name: {
            "chosen": statistics.mean(outcome.chosen for outcome in outcomes),
            "any": statistics.mean(outcome.any for outcome in outcomes),
            "tokens": statistics.mean(outcome.tokens for outcome in outcomes),
        }
        for name, outcomes in found.items()
    }


def searched(search: TreeOfThoughts, asked: Sequence[Puzzle]) -> Iterator[tuple[Puzzle, SearchResult]]:
    """Puzzles and their trees, some puzzles at a time."""
    for first in range(0, len(asked), _AT_ONCE):
        batch = asked[first : first + _AT_ONCE]
        yield from zip(batch, search.search([puzzle.prompt for puzzle in batch]), strict=True)


def tree_search(engine: Engine, tree: TreeConfig, scorer: Callable[[Thought], float] | None = None) -> TreeOfThoughts:
    return TreeOfThoughts(engine, tree, stop_tokens=(STEP,), end_token=END, scorer=scorer)


class ValuesByDepth:
    """The values of many trees' nodes, and a scorer that gives them out anew by chance, depth by depth."""

    def __init__(self) -> None:
        self._values: dict[int, list[float]] = {}

    def add(self, result: SearchResult) -> None:
        for node in result.nodes[1:]:
            self._values.setdefault(node.depth, []).append(node.score)

    def shuffled(self, rng: random.Random) -> Callable[[Thought], float]:
        deepest = max(self._values)
        return lambda thought: rng.choice(self._values[min(max(thought.tokens.count(STEP), 1), deepest)])


def solve_by_tree(
    engine: Engine,
    tree: TreeConfig,
    asked: Sequence[Puzzle],
    scorer: Callable[[Thought], float] | None = None,
    watch: Callable[[SearchResult], None] = lambda _: None,
) -> list[Outcome]:
    """Any: of the complete paths that the search kept."""
    outcomes = []
    for puzzle, result in searched(tree_search(engine, tree, scorer), asked):
        watch(result)
        ends = [node.id for node in result.nodes if node.status == "complete"]
        some = any(verify(puzzle, result.answer_to(end)) for end in ends)
        outcomes.append(Outcome(verify(puzzle, result.answer), some, result.generated_tokens))
    return outcomes


def solve_greedily(generator: Generator, asked: Sequence[Puzzle]) -> list[Outcome]:
    options = SamplingOptions(LONGEST, stop_tokens=(END,))
    completions = generator.generate([puzzle.prompt for puzzle in asked], options)
    right = [verify(puzzle, completion.tokens) for puzzle, completion in zip(asked, completions, strict=True)]
    return [Outcome(r, r, len(c.tokens)) for r, c in zip(right, completions, strict=True)]


def solve_by_beams(engine: Engine, asked: Sequence[Puzzle], count: int) -> list[Outcome]:
    """The likeliest of `count` beams."""
    outcomes = []
    options = BeamOptions(count, LONGEST, stop_tokens=(END,))
    for first in range(0, len(asked), _AT_ONCE):
        batch = asked[first : first + _AT_ONCE]
        for puzzle, texts in zip(batch, beam_search(engine, [puzzle.prompt for puzzle in batch], options), strict=True):
            right = [verify(puzzle, beam.tokens) for beam in texts]
            outcomes.append(Outcome(right[0], any(right), sum(len(beam.tokens) for beam in texts)))
    return outcomes


def solve_by_samples(
    generator: Generator, tree: TreeConfig, asked: Sequence[Puzzle], count: int, seed: int
) -> tuple[list[Outcome], list[Outcome]]:
    """Of `count` samples at the tree's temperature the one with the highest probability per token, or value."""
    drawn = []
    for number in range(count):
        options = SamplingOptions(
            LONGEST, tree.temperature, seed=seed, sample=number, stop_tokens=(END,), log_probs=True
        )
        drawn.append(generator.generate([puzzle.prompt for puzzle in asked], options))
    likeliest: list[Outcome] = []
    most_valued: list[Outcome] = []
    for puzzle, *completions in zip(asked, *drawn, strict=True):
        right = [verify(puzzle, completion.tokens) for completion in completions]
        cost = sum(len(completion.tokens) for completion in completions)
        mean_log_probs = [sum(c.log_probs) / max(len(c.tokens), 1) for c in completions]
        values = values_of(generator.engine, [puzzle.prompt + c.tokens for c in completions])
        for outcomes, scores in ((likeliest, mean_log_probs), (most_valued, values)):
            outcomes.append(Outcome(right[scores.index(max(scores))], any(right), cost))
    return likeliest, most_valued


def values_of(engine: Engine, texts: Sequence[list[int]]) -> list[float]:
    """Values at the last `[STEP]` of texts, or at their end where they have none."""
    work = []
    for tokens in texts:
        steps = [place for place, token in enumerate(tokens) if token == STEP]
        work.append((KvSequence(), tokens[: steps[-1] + 1] if steps else tokens))
    output = engine.run(work)
    for sequence, _ in work:
        engine.release(sequence)
    head = engine.model.value_head
    assert head is not None
    return engine.decide(output, lambda _, hidden: head(hidden)[:, None], 1)[:, 0].tolist()
