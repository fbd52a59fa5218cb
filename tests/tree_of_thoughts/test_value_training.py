"""Fitting the value head to verdicts."""

import pytest
import torch

from tests.tree_of_thoughts.test_search import trees
from vishwamai_mp.config import TreeConfig, UserError
from vishwamai_mp.tree_of_thoughts import Rollout
from vishwamai_mp.tree_of_thoughts.value_training import ValueReport, fit_value_head

_TREE = TreeConfig(enabled=True, branching=4)


def rollouts(count: int) -> list[Rollout]:
    """Random texts; some tokens at the marked places and before them tell the verdict."""
    random = torch.Generator().manual_seed(4)
    made = []
    for i in range(count):
        text = torch.randint(1, 250, (12,), generator=random)
        text[[4, 5, 10, 11]] = text[[4, 5, 10, 11]] % 9 + 100 * (i % 2)
        made.append(Rollout(text.tolist(), dict.fromkeys((5, 11), i % 2 == 0)))
    return made


def fitted(overrides: list[str], count: int) -> tuple[ValueReport, list[float] | None, int]:
    """Runs in a worker: the report, the head's parameters, blocks left in use."""
    engine = trees(_TREE, *overrides).engine
    report = fit_value_head(engine, rollouts(count))
    head = engine.model.value_head
    return report, None if head is None else [*head.weight.tolist(), *head.bias.tolist()], engine.pool.used_blocks


def test_the_head_learns_verdicts_and_says_how_well(workers):
    report, _, blocks = workers.run(fitted, 1, [], 120)[0]
    assert report.auc > 0.8
    assert report.loss < 0.5
    assert abs(report.calibration) < 0.15
    assert blocks == 0


def test_every_layout_fits_the_same(workers):
    expected = workers.run(fitted, 1, [], 60)[0]
    for layout in ("tensor", "pipeline"):
        for report, parameters, _ in workers.run(fitted, 2, [f"parallel.{layout}_model_parallel_size=2"], 60):
            assert vars(report) == pytest.approx(vars(expected[0]), abs=5e-3)
            assert parameters is None or parameters == pytest.approx(expected[1], abs=0.05)


def refused(kind: str) -> str:
    made = rollouts(4)
    overrides = ["tree.enabled=false"] if kind == "no head" else []
    tree = TreeConfig(branching=4, value_weight=0.0, logprob_weight=1.0)
    try:
        fit_value_head(trees(tree, *overrides).engine, made[:1] if kind == "one verdict" else made)
    except UserError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(("kind", "message"), [("no head", "has no value head"), ("one verdict", "the same verdict")])
def test_what_cannot_be_learnt_is_refused(workers, kind, message):
    assert message in workers.run(refused, 1, kind)[0]
