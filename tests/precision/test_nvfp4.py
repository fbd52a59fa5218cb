"""NVFP4 operands: what stochastic rounding promises, where its random bits come from, what a rotation keeps."""

import types
from typing import Any

import pytest
import torch
from torch import Tensor

from vishwamai_mp.precision.formats import E2M1, round_stochastically_, round_to_format_
from vishwamai_mp.precision.linears import outputs_of
from vishwamai_mp.precision.nvfp4 import nvfp4_operand, rotate_tokens
from vishwamai_mp.precision.rounding_bits import GradientPlaces, RoundingBits, layer_key
from vishwamai_mp.precision.statistics import OperandStatistics
from vishwamai_mp.runtime.zigzag import local_positions

_GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def bits(rows: int, columns: int, key: int = 7) -> RoundingBits:
    return RoundingBits(key, torch.zeros(rows), torch.arange(rows), torch.arange(columns))


def test_the_grid_and_its_middles():
    """To the nearest, ties to the number whose last bit is 0."""
    x = torch.tensor([0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 7.0, -0.75, -9.0])
    expected = [0.0, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, -1.0, -6.0]
    assert round_to_format_(x, E2M1).tolist() == expected


def test_the_mean_of_stochastic_rounding_is_the_number():
    draws = 40000
    x = torch.tensor([0.1, -0.1, 0.26, 0.9, -1.6, 2.25, 3.9, -4.5, 5.99, 1e-3])
    rounded = round_stochastically_(x.repeat(draws, 1), E2M1, bits(draws, len(x)).of_rows(slice(0, draws)))
    above = torch.searchsorted(_GRID, x.abs())
    low, high = _GRID[above - 1], _GRID[above]
    assert ((rounded.abs() == low) | (rounded.abs() == high)).all()
    deviation = ((x.abs() - low) * (high - x.abs()) / draws).sqrt()
    assert ((rounded.mean(0) - x).abs() < 4 * deviation + 2.0**-16).all()
    # Numbers that the format has stay, and those beyond go to its end.
    there = torch.cat((_GRID, -_GRID, torch.tensor([7.0, -torch.inf]))).repeat(1000, 1)
    ours = round_stochastically_(there.clone(), E2M1, bits(there.shape[0], there.shape[1]).of_rows(slice(0, 1000)))
    assert torch.equal(ours, there.clamp(-6, 6))


def test_random_bits_are_even_and_unlike_their_neighbours():
    ours = bits(512, 512).of_rows(slice(0, 512))
    ones = torch.stack([(ours >> place) & 1 for place in range(16)]).double()
    assert (ones.mean((1, 2)) - 0.5).abs().max() < 5 * 0.5 / 512
    for one, other in ((ones[:, 1:], ones[:, :-1]), (ones[..., 1:], ones[..., :-1]), (ones[1:], ones[:-1])):
        assert ((one == other).double().mean((1, 2)) - 0.5).abs().max() < 5 * 0.5 / 512
    other = bits(512, 512, key=8).of_rows(slice(0, 512))
    assert (ours == other).double().mean() < 1e-4
    assert (
        len({layer_key(*place) for place in ((1, 0, "a", "x"), (0, 1, "a", "x"), (1, 0, "b", "x"), (1, 0, "a", "y"))})
        == 4
    )


def test_a_part_draws_what_it_would_inside_the_whole():
    """Whichever ranks have a token or an output, and in whatever order."""
    samples, positions, outputs = torch.arange(64) % 4, torch.arange(64) // 4, torch.arange(96)
    whole = RoundingBits(3, samples, positions, outputs).of_rows(slice(0, 64))
    rows, columns = torch.randperm(64), torch.randperm(96)[:40]
    part = RoundingBits(3, samples[rows], positions[rows], outputs[columns])
    assert torch.equal(part.of_rows(slice(16, 48)), whole[rows[16:48]][:, columns])


def group(rank: int, size: int) -> Any:
    return types.SimpleNamespace(rank=lambda: rank, size=lambda: size)


def drawn(places: GradientPlaces, number: int, shape: tuple[int, ...]) -> Tensor:
    """Random bits of a gradient of this shape (T, B, O)."""
    bits = RoundingBits(9, *places.of_pass(number, torch.Size(shape)))
    return bits.of_rows(slice(0, shape[0] * shape[1])).view(shape)


def test_ranks_draw_their_parts_of_what_one_process_draws():
    """Four samples of 32 positions: in one micro-batch, in two, over replicas, and split by context parallelism."""
    alone, outputs = group(0, 1), torch.arange(16)
    whole = drawn(GradientPlaces(outputs, alone, alone), 0, (32, 4, 16))
    for number in range(2):
        assert torch.equal(
            drawn(GradientPlaces(outputs, alone, alone), number, (32, 2, 16)), whole[:, 2 * number :][:, :2]
        )
    for rank in range(2):
        replica = GradientPlaces(outputs, alone, group(rank, 2))
        for number in range(2):
            assert torch.equal(drawn(replica, number, (32, 1, 16)), whole[:, 2 * number + rank :][:, :1])
        context = GradientPlaces(outputs, group(rank, 2), alone)
        assert torch.equal(drawn(context, 0, (16, 4, 16)), whole[local_positions(32, rank, 2)])


def test_split_outputs_are_numbered_as_in_the_whole_model():
    linear = types.SimpleNamespace(weight=torch.zeros(4, 8))
    assert [outputs_of(linear, False, group(rank, 2)).tolist() for rank in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    # Gate and up of 4 each: a rank has a half of either.
    assert [outputs_of(linear, True, group(rank, 2)).tolist() for rank in range(2)] == [[0, 1, 4, 5], [2, 3, 6, 7]]


def gradient() -> Tensor:
    return (torch.randn(256, 64, generator=torch.Generator().manual_seed(3)) * 1e-6).bfloat16()


@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (16, 1)])
def test_gradients_are_rounded_without_a_bias(rows, columns):
    """The mean over many drawings comes close to the gradient, as one nearest number does not."""
    x = gradient()
    nearest = nvfp4_operand(x, rows, columns).dequantize()
    many = [nvfp4_operand(x, rows, columns, bits(x.shape[0], x.shape[1], key=key)).dequantize() for key in range(64)]
    error = (torch.stack(many).mean(0) - x.float()).norm() / (nearest - x.float()).norm()
    assert 0.1 < error < 0.35  # a drawing errs √2 as much as the nearest, the mean of 64 an eighth of that
    assert torch.equal(many[5], nvfp4_operand(x, rows, columns, bits(x.shape[0], x.shape[1], key=5)).dequantize())
    assert len({tuple(one.flatten().tolist()) for one in many}) == len(many)


def test_the_report_of_an_operand():
    x = torch.zeros(32, 32, dtype=torch.bfloat16)
    x[0, :16] = 6.0
    x[1, :16] = torch.tensor([1.0, *[0.02] * 15]).bfloat16()  # below a quarter of E2M1's step under the block's scale
    statistics = OperandStatistics("layers.0.a", "input")
    statistics.add(x, nvfp4_operand(x, 1, 16))
    found = statistics.numbers()
    assert (found["underflow"], found["overflow"], found["amax"]) == (15 / 32, 0.0, 6.0)
    assert (found["smallest_scale"], found["largest_scale"]) == (1.0, pytest.approx(6.0, rel=1 / 16))


def test_rotations_cancel_in_the_product():
    x, g = gradient().float(), torch.randn(256, 32, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(rotate_tokens(g).t() @ rotate_tokens(x), g.t() @ x)
    outlier = torch.zeros(16, 1)
    outlier[3] = 4.0
    assert torch.equal(rotate_tokens(outlier).abs(), torch.ones(16, 1))
    assert rotate_tokens(torch.ones(32, 1, dtype=torch.bfloat16)).dtype == torch.bfloat16
