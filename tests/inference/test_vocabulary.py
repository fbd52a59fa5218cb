"""Choices over vocabulary-parallel logits against the same on gathered logits."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vishwamai_mp.inference.noise import NoiseNames, philox
from vishwamai_mp.inference.vocabulary import Shard, penalise_repetition, sample, sample_among, sample_distinct

_ROWS = 6


def logits(vocab_size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """bf16 has few values between −9 and 9, so most rows have ties, at the largest value too."""
    values = torch.randn(_ROWS, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 3
    values[0, 5] = values[0, 7] = values[0, vocab_size - 1] = 20
    values[1, 3], values[1, 4] = 0.0, -0.0
    return values.to(dtype)


def names(rows: int = _ROWS, position: int = 9) -> NoiseNames:
    return NoiseNames.of([(3 + 2**40, row, position) for row in range(rows)], torch.device("cpu"))


def own_shard(whole: Tensor) -> Shard:
    """This rank's columns of the logits, padded as the model pads them, with padding that would win."""
    group = dist.group.WORLD
    assert group is not None
    size = -(-whole.shape[1] // (128 * group.size())) * 128
    padded = torch.nn.functional.pad(whole, (0, size * group.size() - whole.shape[1]), value=100.0)
    return Shard.of(padded[:, group.rank() * size :][:, :size], whole.shape[1], group)


def choices(vocab_size: int) -> dict[str, Tensor]:
    """Runs in the workers."""
    shard = own_shard(logits(vocab_size))
    values, ids = shard.top(8)
    penalised = penalise_repetition(shard, torch.tensor([[5, 7, -1]] * _ROWS), torch.full((_ROWS,), 1.5))
    return {
        "greedy": shard.best()[1],
        "top values": values,
        "top ids": ids,
        "log Z": shard.log_normaliser(),
        "log p": shard.log_probs(ids),
        "sampled": sample(shard, 0.7, names()),
        "distinct": sample_distinct(shard, 0.7, names(), 5),
        "top-k": sample_among(shard, 0.7, names(), top_k=40),
        "top-p": sample_among(shard, 1.3, names(), top_p=0.9),
        "top-k, top-p": sample_among(shard, 1.0, names(), top_k=50, top_p=0.8),
        "min-p": sample_among(shard, 1.0, names(), min_p=0.02),
        "all": sample_among(shard, 1.0, names(), top_k=50, top_p=0.8, min_p=0.05),
        "penalised": penalised.best()[1],
    }


@pytest.mark.parametrize("vocab_size", [64000, 250])
def test_every_tensor_parallel_size_chooses_the_same_bits(workers, vocab_size):
    expected = workers.run(choices, 1, vocab_size)[0]
    for size in (2, 4, 8):
        for found in workers.run(choices, size, vocab_size):
            for what, tensor in expected.items():
                assert torch.equal(found[what], tensor), (what, size)


@pytest.mark.parametrize("vocab_size", [64000, 250])
def test_the_choices_are_those_of_torch_on_gathered_logits(workers, vocab_size):
    found = workers.run(choices, 2, vocab_size)[0]
    whole = logits(vocab_size)
    values, ids = whole.float().sort(dim=-1, descending=True, stable=True)
    assert (values[:, :8] == values[:, 1:9]).any()  # there are ties to break
    assert torch.equal(found["top ids"], ids[:, :8])
    assert torch.equal(found["top values"], values[:, :8])
    assert torch.equal(found["greedy"], ids[:, 0])
    exact = torch.logsumexp(whole.double(), -1)
    torch.testing.assert_close(found["log Z"].double(), exact, rtol=0, atol=2e-6)
    torch.testing.assert_close(found["log p"].double(), values[:, :8].double() - exact[:, None], rtol=0, atol=4e-6)


def test_filters_keep_what_they_say(workers):
    for found in workers.run(kept_by_filters, 2):
        assert found == {"top-k": 3, "top-p": 2, "top-p of top-k": 1, "min-p": 3, "distinct": 6}


def kept_by_filters() -> dict[str, int]:
    """Runs in the workers: how many ids ever come out, of probabilities 0.4, 0.3, 0.2, 0.06, 0.03, 0.01."""
    rows = 4000
    shard = own_shard(torch.tensor([0.4, 0.3, 0.2, 0.06, 0.03, 0.01]).log().repeat(rows, 1))
    drawn = {
        "top-k": sample_among(shard, 1.0, names(rows), top_k=3),
        "top-p": sample_among(shard, 1.0, names(rows), top_p=0.7 - 1e-6),
        "top-p of top-k": sample_among(shard, 1.0, names(rows), top_k=2, top_p=0.57),  # 0.4 of 0.7
        "min-p": sample_among(shard, 1.0, names(rows), min_p=0.16),
        "distinct": sample_distinct(shard, 1.0, names(rows), 6).sort(dim=-1)[0][0],
    }
    return {what: len(ids.unique()) for what, ids in drawn.items()}


def test_top_p_reads_on_until_it_has_enough():
    flat = Shard.of(torch.zeros(3000, 1024), 1000, alone())
    drawn = sample_among(flat, 1.0, names(3000), top_p=0.5).unique()
    assert drawn.max() == 499  # of equals the lower ids
    assert len(drawn) > 490


def chi_square_p_value(observed: Tensor, expected: Tensor) -> float:
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((observed.numel() - 1) / 2).double(), statistic / 2))


def test_sampled_frequencies_follow_softmax():
    rows, temperature = 40000, 0.7
    values = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, 0.3])
    shard = Shard.of(torch.nn.functional.pad(values, (0, 122)).repeat(rows, 1), 6, alone())
    expected = (values / temperature).softmax(-1).double() * rows
    for ids in (sample(shard, temperature, names(rows)), sample_among(shard, temperature, names(rows, 10), top_k=6)):
        observed = torch.bincount(ids, minlength=6).double()
        assert chi_square_p_value(observed, expected) > 1e-3
    pairs = sample_distinct(shard, temperature, names(rows, 11), 2)
    p = (values / temperature).softmax(-1).double()
    joint = p[:, None] * p / (1 - p)[:, None] * rows  # then another of the rest
    seen = torch.zeros(6, 6, dtype=torch.double).index_put_(
        (pairs[:, 0], pairs[:, 1]), torch.tensor(1.0).double(), accumulate=True
    )
    others = ~torch.eye(6, dtype=torch.bool)
    assert seen.diagonal().sum() == 0
    assert chi_square_p_value(seen[others], joint[others]) > 1e-3


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 5e-324])
def test_the_smallest_temperatures_take_the_likeliest(temperature):
    """Where fp32 has no reciprocal of them."""
    values = torch.tensor([[1.0, 3.0, 2.0, -4.0] + [0.0] * 124, [-3.0, -2.0, -1.0, -1.001] + [0.0] * 124])
    shard = Shard.of(values, 4, alone())
    for ids in (
        sample(shard, temperature, names(2)),
        sample_among(shard, temperature, names(2), top_k=3),
        sample_among(shard, temperature, names(2), top_p=0.9),
        sample_among(shard, temperature, names(2), min_p=0.1),
    ):
        assert ids.tolist() == [1, 2]


def test_names_do_not_collide():
    draws = [
        NoiseNames.of([(seed, stream, position)], torch.device("cpu")).over_range(0, 64)
        for seed in (0, 1, 2**40)
        for stream in (0, 1, 2**33)
        for position in (0, 1)
    ]
    assert len({tuple(draw[0].tolist()) for draw in draws}) == len(draws)
    torch.testing.assert_close(draws[3][:, 8:40], draws[3][:, :40].roll(0, 1)[:, 8:])
    some = NoiseNames.of([(0, 1, 1)], torch.device("cpu"))
    ids = torch.tensor([[7, 40, 3, 3]])
    torch.testing.assert_close(some.at(ids), some.over_range(0, 64)[:, ids[0]])


def test_philox_is_philox():
    """Known answers of the authors' library, Random123: counters and keys of zeros, of ones."""
    for word, answer in (
        (0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (0xFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ):
        x = torch.tensor([word])
        assert [int(part) for part in philox([x] * 4, [x] * 2)] == answer


@pytest.mark.parametrize("what", ["greedy", "top-k", "top-p", "sampled", "distinct", "log p"])
def test_what_travels_does_not_grow_with_the_vocabulary(workers, what):
    small, large = (workers.run(sent, 2, what, vocab_size)[0] for vocab_size in (2560, 64000))
    assert small == large
    assert 0 < small <= 24 * _ROWS * 64  # at most 64 candidates, each as a key of 8 bytes


def sent(what: str, vocab_size: int) -> int:
    """Runs in the workers: bytes that this rank gives to collectives for one choice."""
    shard = own_shard(logits(vocab_size, torch.float32) * torch.where(torch.arange(vocab_size) < 30, 2.0, 0.1))
    count = 0

    def counting(function: Any, position: int) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            tensor = arguments[position]
            count += tensor.numel() * tensor.element_size()
            return function(*arguments, **options)

        return call

    with (
        mock.patch.object(dist, "all_reduce", counting(dist.all_reduce, 0)),
        mock.patch.object(dist, "all_gather", counting(dist.all_gather, 1)),
    ):
        {
            "greedy": lambda: shard.best(),
            "top-k": lambda: sample_among(shard, 0.7, names(), top_k=40),
            "top-p": lambda: sample_among(shard, 0.2, names(), top_p=0.5),
            "sampled": lambda: sample(shard, 0.7, names()),
            "distinct": lambda: sample_distinct(shard, 0.7, names(), 4),
            "log p": lambda: shard.log_probs(torch.zeros(_ROWS, 1, dtype=torch.int64)),
        }[what]()
    return count


def alone() -> Any:
    return mock.Mock(rank=lambda: 0, size=lambda: 1)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("temperature", [1e-300, 1e39, 1e300])
def test_at_any_temperature_what_is_never_generated_stays_so(
    workers: Any, temperature: float, options: dict[str, Any]
) -> None:
    assert workers.run(_never, 1, temperature, options) == [True]


def _never(temperature: float, options: dict[str, Any]) -> bool:
    """In a worker."""
    values = logits(250, torch.float32)
    values[:, 200:] = -torch.inf  # as rows beyond a tokenizer's tokens
    draw = sample_among if options else sample
    ids = draw(own_shard(values), temperature, names(), **options)
    endless = penalise_repetition(
        own_shard(values.clamp(max=0)), torch.tensor([[5, 7]] * _ROWS), torch.full((_ROWS,), torch.inf)
    )
    return bool((ids < 200).all()) and not bool(endless.values.isnan().any())
