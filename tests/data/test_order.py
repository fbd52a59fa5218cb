"""Which sample comes when: permutations of an epoch, the interleaving of sources."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vishwamai_mp.data.order import Interleaving, permute


@given(st.integers(1, 600), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_permutations_reach_every_place_once(size, key):
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permutations_differ_and_leave_hardly_anything_in_place():
    size = 1000
    orders = [[permute(i, size, key) for i in range(size)] for key in range(20)]
    assert len({tuple(order) for order in orders}) == 20
    assert np.mean([order[i] == i for order in orders for i in range(size)]) < 0.005
    neighbours = np.mean([abs(order[i] - order[i + 1]) for order in orders for i in range(size - 1)])
    assert abs(neighbours - size / 3) < 0.02 * size  # of two independent places


def test_weights_are_kept_at_every_point_of_a_run_and_each_source_is_read_in_order():
    weights = [0.6, 0.3, 0.1]
    interleaving = Interleaving(weights, [10, 20, 30])
    seen: Counter[int] = Counter()
    for n in range(5000):
        source, sample = interleaving(n)
        assert sample == seen[source]
        seen[source] += 1
        assert all(abs(seen[k] - weights[k] * (n + 1)) <= 1.5 for k in range(3))


def test_the_interleaving_goes_on_over_its_block():
    interleaving = Interleaving([2.0, 1.0], [5, 5])
    block = int(interleaving.counts.sum())
    for n in range(50):
        (source, sample), (later_source, later_sample) = interleaving(n), interleaving(n + 3 * block)
        assert (later_source, later_sample) == (source, sample + 3 * int(interleaving.counts[source]))


def test_without_weights_all_sources_end_their_epochs_together():
    interleaving = Interleaving(None, [7, 2, 4])
    assert Counter(interleaving(n) for n in range(13)) == Counter(
        (source, sample) for source, size in enumerate([7, 2, 4]) for sample in range(size)
    )


def test_a_source_of_hardly_any_weight_still_appears():
    interleaving = Interleaving([1.0, 1e-12], [5, 5])
    assert interleaving.counts.tolist()[1] == 1
