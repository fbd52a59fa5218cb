"""NVFP4 operands: what stochastic rounding promises, where its random bits come from, what a rotation keeps."""

import pytest
import torch
from torch import Tensor

from vishwamai_mp.precision.formats import E2M1, round_stochastically_, round_to_format_
from vishwamai_mp.precision.nvfp4 import nvfp4_operand, rotate_tokens
from vishwamai_mp.precision.rounding_bits import RoundingBits, layer_key

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
    drawn = bits(512, 512).of_rows(slice(0, 512))
    ones = torch.stack([(drawn >> place) & 1 for place in range(16)]).double()
    assert (ones.mean((1, 2)) - 0.5).abs().max() < 5 * 0.5 / 512
    for one, other in ((ones[:, 1:], ones[:, :-1]), (ones[..., 1:], ones[..., :-1]), (ones[1:], ones[:-1])):
        assert ((one == other).double().mean((1, 2)) - 0.5).abs().max() < 5 * 0.5 / 512
    other = bits(512, 512, key=8).of_rows(slice(0, 512))
    assert (drawn == other).double().mean() < 1e-4
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


def gradient() -> Tensor:
    return (torch.randn(256, 64, generator=torch.Generator().manual_seed(3)) * 1e-6).bfloat16()


@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (16, 1)])
def test_gradients_are_rounded_without_a_bias(rows, columns):
    """The mean over many drawings comes close to the gradient, as one nearest number does not."""
    x = gradient()
    nearest = nvfp4_operand(x, rows, columns).dequantize()
    drawn = [nvfp4_operand(x, rows, columns, bits(x.shape[0], x.shape[1], key=key)).dequantize() for key in range(64)]
    error = (torch.stack(drawn).mean(0) - x.float()).norm() / (nearest - x.float()).norm()
    assert 0.1 < error < 0.35  # a drawing errs √2 as much as the nearest, the mean of 64 an eighth of that
    assert torch.equal(drawn[5], nvfp4_operand(x, rows, columns, bits(x.shape[0], x.shape[1], key=5)).dequantize())
    assert len({tuple(one.flatten().tolist()) for one in drawn}) == len(drawn)


def test_rotations_cancel_in_the_product():
    x, g = gradient().float(), torch.randn(256, 32, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(rotate_tokens(g).t() @ rotate_tokens(x), g.t() @ x)
    outlier = torch.zeros(16, 1)
    outlier[3] = 4.0
    assert torch.equal(rotate_tokens(outlier).abs(), torch.ones(16, 1))
    assert rotate_tokens(torch.ones(32, 1, dtype=torch.bfloat16)).dtype == torch.bfloat16
