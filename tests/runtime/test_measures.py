"""Measures of components: summed over a step, its modules and its ranks; and losses attached to an output."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from vishwamai_mp.runtime.measures import (
    Measures,
    all_names,
    mean_measures,
    measures_of,
    summed_measures,
)


class Measured(nn.Module):
    def __init__(self, *names):
        super().__init__()
        self.measures = Measures(*names)


def test_a_name_that_was_not_announced_is_refused():
    with pytest.raises(AssertionError, match="gate is not among"):
        Measures("surprise").add("gate", torch.tensor(1.0), 1)


def _mean_over_two_ranks():
    rank = dist.get_rank()
    # rank 1 has a module that rank 0 lacks, as the stages of a pipeline do
    model = nn.Sequential(Measured("a", "never"), nn.Linear(1, 1), *([Measured("b")] if rank else []))
    kept = measures_of([model])
    names = all_names(kept)
    kept[0].add("a", torch.tensor(1.0 + rank), 2)
    kept[0].add("a", torch.tensor(3.0), 4 - 2 * rank)
    if rank:
        kept[1].add("b", torch.tensor(5.0), torch.tensor(10))
    first, second = (summed_measures(kept, names, torch.device("cpu")).tolist() for _ in range(2))
    return names, mean_measures(names, first), mean_measures(names, second)


def test_means_weigh_all_ranks_modules_and_calls(workers):
    for names, first, second in workers.run(_mean_over_two_ranks, 2):
        assert names == ["a", "b", "never"]
        assert first == {"a": pytest.approx((1 + 3 + 2 + 3) / (2 + 4 + 2 + 2)), "b": 0.5}
        assert second == {}  # taken


@pytest.mark.parametrize("scale", [1.0, 8.0, torch.tensor(8.0)])
def test_an_attached_loss_adds_its_gradient(scale):
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    measures, other = Measures(), Measures()
    measures.loss_scale = scale
    other.loss_scale = 100.0  # of another model in this process
    output = measures.attach_loss(weight * 5, (weight**2).sum())
    assert torch.equal(output, weight * 5)
    output.sum().mul(scale).backward()
    torch.testing.assert_close(weight.grad, scale * (5 + 2 * weight.detach()))


def test_a_table_holds_totals_and_weights():
    measures = Measures("a", "b")
    for _ in range(2):
        measures.add_table(["a", "b"], torch.tensor([[1.0, 2.0], [4.0, 8.0]]))
    measures.add("a", torch.tensor(3.0), 2)
    assert measures.take() == {"a": (5.0, 10.0), "b": (4.0, 16.0)}
    assert measures.take() == {}
    with pytest.raises(AssertionError, match="c is not among"):
        measures.add_table(["c"], torch.zeros(2, 1))
