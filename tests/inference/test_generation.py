"""Generation with a key-value cache against full passes, at every layout."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.builds import build, small_config
from vishwamai_mp.config import UserError
from vishwamai_mp.inference.generation import Generator, SamplingOptions

_PROMPTS = torch.randint(1, 250, (2, 9), generator=torch.Generator().manual_seed(2)).tolist()
_LAYOUTS = {
    "one process": (1, []),
    "TP2": (2, ["parallel.tensor_model_parallel_size=2"]),
    "TP4": (4, ["parallel.tensor_model_parallel_size=4"]),
    "PP2": (2, ["parallel.pipeline_model_parallel_size=2"]),
    "TP2 PP2": (4, ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]),
}
_VARIANTS = {
    "grouped": [],
    "window": ["model.sliding_window=5"],
    "tied, one head per group": ["model.tie_word_embeddings=true", "model.num_key_value_heads=8"],
}


def generator(*overrides: str) -> Generator:
    """Runs in a worker."""
    config, runtime, (model,) = build("training.global_batch_size=8", *overrides)
    return Generator(config, runtime, model)


def cached_and_full(overrides: list[str]) -> tuple[Tensor, Tensor] | None:
    """Runs in a worker: logits (T, B, V local) of a prompt and ten more tokens, with the cache and in one pass."""
    from megatron.core.inference.contexts import StaticInferenceContext

    ours = generator(*overrides)
    tokens = torch.cat((torch.tensor(_PROMPTS), torch.arange(20).view(2, 10)), 1)
    context = StaticInferenceContext(2, tokens.shape[1])
    parts = []
    with torch.no_grad():
        full = ours._run_stage(tokens, None)
        for start, end in [(0, 9), *((i, i + 1) for i in range(9, 19))]:
            parts.append(ours._run_stage(tokens[:, start:end], context))
            context.sequence_len_offset += end - start
            context.enable_decode_mode()
    return (torch.cat(parts), full) if ours.runtime.is_last_stage else None


@pytest.mark.parametrize("variant", ["grouped", "window", "tied, one head per group"])
@pytest.mark.parametrize("name", _LAYOUTS)
def test_the_cache_changes_nothing(workers, name, variant):
    processes, layout = _LAYOUTS[name]
    results = [r for r in workers.run(cached_and_full, processes, [*layout, *_VARIANTS[variant]]) if r is not None]
    cached, full = (torch.cat(shards, -1)[..., :250] for shards in zip(*results, strict=True))
    alone = workers.run(cached_and_full, 1, _VARIANTS[variant])[0][1][..., :250]
    assert cached.shape == (19, 2, 250)
    torch.testing.assert_close(cached, full, rtol=0, atol=1e-5)
    torch.testing.assert_close(full, alone, rtol=0, atol=1e-5)


def generated(
    overrides: list[str], options: SamplingOptions, prompts: list[list[int]], eod: int = -1
) -> list[list[int]]:
    """Runs in a worker."""
    return generator(*overrides).generate(prompts, options, eod)


def step_by_step(overrides: list[str], count: int) -> list[list[int]]:
    """Runs in one worker: greedy generation without a cache."""
    ours = generator(*overrides)
    tokens = torch.tensor(_PROMPTS)
    with torch.no_grad():
        for _ in range(count):
            logits = ours.model(tokens)[-1, :, :250]
            tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), 1)
    return tokens[:, 9:].tolist()


@pytest.mark.parametrize("variant", ["grouped", "window"])
def test_greedy_takes_the_best_token_of_each_full_pass(workers, variant):
    ours = workers.run(generated, 1, _VARIANTS[variant], SamplingOptions(12), _PROMPTS)[0]
    assert ours == workers.run(step_by_step, 1, _VARIANTS[variant], 12)[0]


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("grouped", SamplingOptions(12)),
        ("grouped", SamplingOptions(12, 0.8, 20, seed=5)),
        ("window", SamplingOptions(12, 1.0)),
    ],
    ids=["greedy", "top-k", "window, sampled"],
)
def test_every_layout_writes_the_same(workers, variant, options):
    expected = workers.run(generated, 1, _VARIANTS[variant], options, _PROMPTS)[0]
    assert all(len(row) == 12 and max(row) < 250 for row in expected)
    for name in ("TP2", "TP4", "PP2", "TP2 PP2"):
        processes, layout = _LAYOUTS[name]
        for tokens in workers.run(generated, processes, [*layout, *_VARIANTS[variant]], options, _PROMPTS):
            assert tokens == expected, name


def test_16_bit_models_generate_over_pipelines(workers):
    processes, layout = _LAYOUTS["TP2 PP2"]
    results = workers.run(generated, processes, [*layout, "precision=bf16"], SamplingOptions(5), _PROMPTS)
    assert all(tokens == results[0] for tokens in results)


def test_seeds_differ_and_repeat(workers):
    first, again, other = (
        workers.run(generated, 1, [], SamplingOptions(12, 1.0, seed=seed), _PROMPTS)[0] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_rows_do_not_meet(workers):
    both = workers.run(generated, 1, [], SamplingOptions(8), _PROMPTS)[0]
    for row in range(2):
        assert workers.run(generated, 1, [], SamplingOptions(8), _PROMPTS[row : row + 1])[0] == [both[row]]


def test_a_row_ends_at_the_end_of_document(workers):
    free = workers.run(generated, 1, [], SamplingOptions(12), _PROMPTS)[0]
    eod = free[0][4]
    ended = workers.run(generated, 1, [], SamplingOptions(12), _PROMPTS, eod)[0]
    assert ended == [row[: row.index(eod)] if eod in row else row for row in free]
    assert len(ended[0]) < 12


def test_the_context_limits_what_is_added(workers):
    limit = ["model.max_position_embeddings=32"]
    ours = workers.run(generated, 1, limit, SamplingOptions(100), _PROMPTS)[0]
    assert [len(row) for row in ours] == [32 - 9, 32 - 9]


def idle_generator() -> Generator:
    model: Any = SimpleNamespace(eval=lambda: None)
    runtime: Any = None
    return Generator(small_config(), runtime, model)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "the prompt is empty"),
        ([[]], "the prompt is empty"),
        ([[1, 2], []], "the prompt is empty"),
        ([[1, 2], [1]], "prompts of 1 to 2 tokens"),
        ([[1] * 64], r"the prompt has 64 tokens, the model's context 64 \(model\.max_position_embeddings\); shorten"),
        ([[1] * 70], "the prompt has 70 tokens"),
    ],
)
def test_impossible_prompts_are_refused(prompts, message):
    with pytest.raises(UserError, match=message):
        idle_generator().generate(prompts, SamplingOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature=-0\.1: use 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0: use 1 or more"),
        ({"top_k": -3}, "top_k=-3"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        SamplingOptions(**options)
