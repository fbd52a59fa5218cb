"""Generation with shared key-value blocks against full passes, at every layout."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.model.builds import build
from vishwamai_mp.config import UserError
from vishwamai_mp.inference import Completion, Generator, SamplingOptions, reads
from vishwamai_mp.inference.blocks import KvSequence
from vishwamai_mp.inference.speculation import Pace, RepeatedText
from vishwamai_mp.model import VishwamAIModel
from vishwamai_mp.runtime import Runtime

_RANDOM = torch.Generator().manual_seed(2)
_PROMPTS = [torch.randint(1, 250, (length,), generator=_RANDOM).tolist() for length in (9, 1, 21, 16)]
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
    "memory and cache": [
        *("memory.enabled=true", "memory.memory_size=32", "memory.head_dim=8", "memory.layers=[0,2]"),
        *("memory.chunk_size=8", "memory.num_memory_layers=2"),
        *("cache.enabled=true", "cache.num_heads=4", "cache.segment_length=8", "cache.latents_per_segment=2"),
        "cache.layers=[1,2]",
    ],
}


def generator(*overrides: str, **options: Any) -> Generator:
    """Runs in a worker. As text, tokens are letters."""
    config, runtime, (model,) = build("training.global_batch_size=8", *overrides)
    awaken(model, runtime)
    return Generator(config, runtime, model, decode=lambda ids: "".join(chr(97 + i % 26) for i in ids), **options)


def awaken(model: VishwamAIModel, runtime: Runtime) -> None:
    """Fresh components add nothing; now they do, the same at every layout."""
    for layer in model.decoder.layers:
        for name in layer.component_names:
            output = getattr(layer, name).output
            ranks, (rows, columns) = runtime.groups.tp.size(), output.weight.shape
            whole = torch.randn(rows, columns * ranks, generator=torch.Generator().manual_seed(layer.layer_number)) / 4
            output.weight.data.copy_(whole.chunk(ranks, 1)[runtime.tensor_rank])


def gathered(ours: Generator, work: list, every_token: bool = True) -> Tensor:
    """Whole rows of logits, on all ranks."""
    output = ours.engine.run(work, every_token=every_token)
    vocabulary = torch.arange(250).expand(output.rows, -1)
    return ours.engine.decide(
        output, lambda shard, _: shard.log_probs(vocabulary) + shard.log_normaliser()[:, None], 250
    ).float()


in_both_ways = pytest.mark.parametrize("least", [0, 10**9], ids=["keys in place", "keys collected"])


def reading(least: int, logits: Callable[[list[str]], Any], overrides: list[str]) -> Any:
    """Runs in a worker: these logits, with keys read in place where there are at least so many."""
    with patch.object(reads, "_FEWEST_KEYS_IN_PLACE", least):
        return logits(overrides)


@in_both_ways
@pytest.mark.parametrize("variant", list(_VARIANTS))
def test_ragged_batches_have_the_logits_of_full_passes(workers, variant, least):
    parts, full = workers.run(reading, 1, least, ragged_logits, _VARIANTS[variant])[0]
    for ours, whole in zip(parts, full, strict=True):
        torch.testing.assert_close(ours, whole, rtol=0, atol=1e-5)
    for name, (processes, layout) in _LAYOUTS.items():
        if processes > 1:
            for found, _ in workers.run(reading, processes, least, ragged_logits, [*layout, *_VARIANTS[variant]]):
                for ours, whole in zip(found, full, strict=True):
                    torch.testing.assert_close(ours, whole, rtol=0, atol=1e-5, msg=f"{name} differs")


def ragged_logits(overrides: list[str]) -> tuple[list[Tensor], list[Tensor]]:
    """Runs in a worker: logits of four texts read in uneven pieces together, forks included.

    In one process also those of the model's own forward pass.
    """
    ours = generator(*overrides)
    texts = [prompt + list(range(30, 45)) for prompt in _PROMPTS]
    sequences = [KvSequence() for _ in texts]
    parts: list[list[Tensor]] = [[] for _ in texts]

    def read(*pieces: tuple[int, int]) -> None:
        work, owners = [], []
        for i, count in pieces:
            start = sequences[i].length
            work.append((sequences[i], texts[i][start : start + count]))
            owners += [i] * count
        for i, row in zip(owners, gathered(ours, work), strict=True):
            parts[i].append(row)

    read((0, 9), (1, 1), (2, 21), (3, 16))  # prompts
    for _ in range(6):
        read((3, 1), (0, 1), (2, 1), (1, 1))
    read((1, 1), (0, 4), (2, 1), (3, 2))  # some read one token, some several after others
    forks = [ours.engine.fork(sequence) for sequence in sequences]
    for sequence in sequences:  # what a fork's twin reads must not reach it
        gathered(ours, [(sequence, [7, 8])])
        ours.engine.release(sequence)
    sequences[:] = forks
    for i in range(4):
        read((i, len(texts[i]) - sequences[i].length))
    for sequence in sequences:
        ours.engine.release(sequence)
    assert ours.engine.pool.used_blocks == 0
    full = []
    if ours.engine.runtime.world_size == 1:
        with torch.no_grad():
            full = [ours.engine.model(torch.tensor([text]))[:, 0, :250] for text in texts]
    return [torch.stack(rows) for rows in parts], full


@in_both_ways
@pytest.mark.parametrize("variant", ["grouped", "window"])
@pytest.mark.parametrize("layout", ["one process", "TP2"])
def test_texts_that_begin_alike_read_their_beginning_together(workers, layout, variant, least):
    processes, overrides = _LAYOUTS[layout]
    for parts, full in workers.run(reading, processes, least, branched_logits, [*overrides, *_VARIANTS[variant]]):
        torch.testing.assert_close(parts, full, rtol=0, atol=1e-5)


@in_both_ways
def test_scores_are_multiplied_and_capped_wherever_their_keys_are_read(workers, least):
    overrides = ["model.attention_multiplier=2", "model.attention_softcap=0.5"]
    for logits in (ragged_logits, branched_logits):
        parts, full = workers.run(reading, 1, least, logits, overrides)[0]
        for ours, whole in zip(parts, full, strict=True):
            torch.testing.assert_close(ours, whole, rtol=0, atol=1e-5)


def branched_logits(overrides: list[str]) -> tuple[Tensor, Tensor]:
    """Runs in a worker: logits of texts of two families and of one of its own, read token by token in one batch.

    And the same of each text read at once.
    """
    ours = generator("model.max_position_embeddings=128", *overrides)
    beginnings = [[(7 * family + 3 * i) % 250 for i in range(length)] for family, length in ((1, 70), (2, 83), (3, 5))]
    owners = [0, 1, 0, 2, 1, 0]  # families lie in each other's way
    endings = [[11 + 5 * i, 20 + i, 90 - i] for i in range(len(owners))]
    roots = [KvSequence() for _ in beginnings]
    for root, beginning in zip(roots, beginnings, strict=True):
        gathered(ours, [(root, beginning)])
    branches = [ours.engine.fork(roots[owner]) for owner in owners]
    parts = [
        gathered(ours, [(branch, ending[i : i + 1]) for branch, ending in zip(branches, endings, strict=True)])
        for i in range(3)
    ]
    full = []
    for owner, ending in zip(owners, endings, strict=True):
        sequence = KvSequence()
        full.append(gathered(ours, [(sequence, beginnings[owner] + ending)])[-3:])
    return torch.stack(parts), torch.stack(full, 1)


def generated(overrides: list[str], options: Any, prompts: list[list[int]], **more: Any) -> list[Completion]:
    """Runs in a worker. Different options for each prompt may be given as a list."""
    ours = generator(*overrides, **more)
    given = options if isinstance(options, list) else [options] * len(prompts)
    completions = [ours.submit(prompt, each) for prompt, each in zip(prompts, given, strict=True)]
    while ours.busy:
        ours.step()
    assert ours.engine.pool.used_blocks == 0
    return completions


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.tokens for completion in completions]


def step_by_step(overrides: list[str], count: int) -> list[list[int]]:
    """Runs in one worker: greedy generation without a cache."""
    model = generator(*overrides).engine.model
    rows = []
    with torch.no_grad():
        for prompt in _PROMPTS:
            text = torch.tensor([prompt])
            for _ in range(count):
                text = torch.cat((text, model(text)[-1, :, :250].argmax(-1, keepdim=True)), 1)
            rows.append(text[0, len(prompt) :].tolist())
    return rows


@pytest.mark.parametrize("variant", ["grouped", "window"])
def test_greedy_takes_the_best_token_of_each_full_pass(workers, variant):
    ours = workers.run(generated, 1, _VARIANTS[variant], SamplingOptions(12), _PROMPTS)[0]
    assert tokens(ours) == workers.run(step_by_step, 1, _VARIANTS[variant], 12)[0]


_MIXED = [
    SamplingOptions(12),
    SamplingOptions(17, 0.8, top_k=20, seed=5),
    SamplingOptions(9, 1.0, repetition_penalty=1.3, log_probs=True),
    SamplingOptions(12, 1.2, top_p=0.9, min_p=0.01, seed=7),
]


@pytest.mark.parametrize("variant", ["grouped", "window", "memory and cache"])
def test_every_layout_writes_the_same(workers, variant):
    expected = workers.run(generated, 1, _VARIANTS[variant], _MIXED, _PROMPTS)[0]
    assert [len(row) for row in tokens(expected)] == [12, 17, 9, 12]
    assert all(max(row) < 250 for row in tokens(expected))
    for name in ("TP2", "TP4", "PP2", "TP2 PP2"):
        processes, layout = _LAYOUTS[name]
        for found in workers.run(generated, processes, [*layout, *_VARIANTS[variant]], _MIXED, _PROMPTS):
            assert tokens(found) == tokens(expected), name


def test_a_text_does_not_depend_on_what_else_is_generated(workers):
    """Nor on memory so small that requests wait for each other."""
    together = workers.run(generated, 1, [], _MIXED, _PROMPTS)[0]
    waiting = workers.run(generated, 1, [], _MIXED, _PROMPTS, kv_tokens=48, max_batch=2)[0]
    alone = [workers.run(generated, 1, [], [_MIXED[i]], [_PROMPTS[i]])[0][0] for i in range(4)]
    assert tokens(together) == tokens(waiting) == tokens(alone)


def guessed(overrides: list[str]) -> list[list[Completion]]:
    """Runs in a worker: texts without guesses, and with guesses of which each pass has up to 0 and 4 that are right."""
    ours = generator(*overrides)
    options = [replace(each, log_probs=True) for each in _MIXED]
    found: list[list[Completion]] = []

    def guess(_: RepeatedText, text: Sequence[int], count: int) -> list[int]:
        whole = next(each.text for each in found[0] if each.text[: len(text)] == text)
        known = whole[len(text) : len(text) + min(count, len(text) % ours.speculate)]
        return known + [(whole[-1] + 1 + i) % 250 for i in range(count - len(known))]

    with patch.object(RepeatedText, "guess", guess):
        for ours.speculate in (0, 1, 5):
            found.append([ours.submit(prompt, each) for prompt, each in zip(_PROMPTS, options, strict=True)])
            while ours.busy:
                ours.step()
            assert ours.engine.pool.used_blocks == 0
    return found


@pytest.mark.parametrize("layout", ["one process", "TP2 PP2"])
@pytest.mark.parametrize("variant", ["window", "memory and cache"])
def test_guesses_do_not_change_the_text(workers, variant, layout):
    """Whether wrong, right or both: greedy and sampled, filtered, penalised, across blocks of keys."""
    processes, overrides = _LAYOUTS[layout]
    for plain, *others in workers.run(guessed, processes, [*overrides, *_VARIANTS[variant]]):
        assert all((each.passes, each.guessed) == (len(each.tokens), 0) for each in plain)
        for right, ours in zip((0, 4), others, strict=True):
            assert tokens(ours) == tokens(plain)
            for each, without in zip(ours, plain, strict=True):
                torch.testing.assert_close(each.log_probs, without.log_probs, rtol=0, atol=1e-4)
                assert each.guessed > each.accepted >= right
                assert each.passes == len(each.tokens) - each.accepted


def test_repeated_text_is_guessed_from_its_newest_place():
    repeated = RepeatedText()
    assert repeated.guess([1, 2, 3], 4) == []
    assert repeated.guess([1, 2, 3, 9, 1, 2], 2) == [3, 9]
    assert repeated.guess([1, 2, 3, 9, 1, 2, 5, 0, 1, 2], 3) == [5, 0, 1]  # [0, 1, 2] has not occurred before
    assert repeated.guess([1, 2, 3, 9, 1, 2, 5, 0, 1, 2, 3, 9, 1, 2], 2) == [5, 0]  # nor has [2, 3, 9, 1, 2]
    assert RepeatedText().guess([7, 8, 7, 8], 5) == [7, 8, 7, 8, 7]


def test_the_pace_of_guesses_follows_what_came_of_them():
    pace = Pace(8)
    for guessed, right, count in (
        (8, 2, 3),
        (3, 3, 6),
        (0, 0, 6),
        (6, 0, 1),
        (1, 1, 2),
        (2, 2, 4),
        (4, 4, 8),
        (8, 8, 8),
    ):
        pace.judged(guessed, right)
        assert pace.count == count


def read_at_once(overrides: list[str]) -> Tensor:
    """Runs in a worker: logits of every token of a text."""
    return gathered(generator(*overrides), [(KvSequence(), _PROMPTS[2])])


def test_16_bit_models_generate_over_pipelines(workers):
    exact = workers.run(read_at_once, 1, [])[0]
    processes, layout = _LAYOUTS["TP2 PP2"]
    results = workers.run(read_at_once, processes, [*layout, "precision=bf16"])
    assert all(torch.equal(found, results[0]) for found in results)
    # A bf16 number has 8 significant bits; some tens of roundings add up over four layers.
    error = (results[0] - exact).norm() / exact.norm()
    assert 1e-4 < error < 8 * 2**-8


def test_seeds_and_samples_differ_and_repeat(workers):
    options = [SamplingOptions(12, 1.0, seed=seed, sample=number) for seed, number in ((1, 0), (1, 0), (2, 0), (1, 1))]
    first, again, other_seed, other_sample = tokens(workers.run(generated, 1, [], options, _PROMPTS[:1] * 4)[0])
    assert first == again
    assert len({tuple(first), tuple(other_seed), tuple(other_sample)}) == 3


def test_stops(workers):
    free = workers.run(generated, 1, [], SamplingOptions(12), _PROMPTS[:1])[0][0].tokens
    text = "".join(chr(97 + i % 26) for i in free)
    by_token, by_string, neither = workers.run(
        generated,
        1,
        [],
        [
            SamplingOptions(12, stop_tokens=(free[4], 251)),
            SamplingOptions(12, stop_strings=("!", text[3:6])),
            SamplingOptions(12, stop_strings=("!",)),
        ],
        _PROMPTS[:1] * 3,
    )[0]
    assert (by_token.tokens, by_token.finish) == (free[: free.index(free[4])], "stop")
    assert (by_string.finish, by_string.stop) == ("stop", text[3:6])
    assert len(by_string.tokens) == text.index(text[3:6]) + 3
    assert (neither.tokens, neither.finish) == (free, "length")


def test_log_probs_are_those_of_scoring(workers):
    for found in workers.run(generated_and_scored, 2, ["parallel.pipeline_model_parallel_size=2"]):
        completion, scores = found
        assert len(completion.log_probs) == 9
        torch.testing.assert_close(scores[-9:], completion.log_probs, rtol=0, atol=1e-5)


def generated_and_scored(overrides: list[str]) -> tuple[Completion, list[float]]:
    ours = generator(*overrides)
    (completion,) = ours.generate(_PROMPTS[:1], SamplingOptions(9, 0.9, top_k=9, repetition_penalty=2, log_probs=True))
    return completion, ours.score([completion.prompt + completion.tokens])[0]


def test_scores_are_the_models_log_probabilities(workers):
    scores, expected = workers.run(scored, 1)[0]
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


def scored() -> tuple[list[float], list[float]]:
    ours = generator()
    text = torch.tensor([_PROMPTS[2]])
    with torch.no_grad():
        log_probs = ours.engine.model(text)[:, 0, :250].log_softmax(-1)[:-1]
    return ours.score([_PROMPTS[2]])[0], log_probs.gather(1, text[0, 1:, None])[:, 0].tolist()


def test_the_likeliest_tokens_in_place_of_each(workers):
    """One text asks for two, one for none, in one batch; scoring tells the same."""
    for wants, none, scores in workers.run(likeliest, 2, ["parallel.tensor_model_parallel_size=2"]):
        assert none.top_log_probs == [[]] * 5
        for token, log_prob, top in zip(wants.tokens, wants.log_probs, wants.top_log_probs, strict=True):
            assert top[0] == (token, pytest.approx(log_prob, abs=1e-6))  # greedy
            assert len(top) == 2
            assert top[0][1] >= top[1][1]
        for top, (log_prob, scored) in zip(wants.top_log_probs, scores[-5:], strict=True):
            assert [token for token, _ in scored] == [token for token, _ in top]
            assert log_prob == pytest.approx(top[0][1], abs=1e-5)


def likeliest(overrides: list[str]) -> tuple[Completion, Completion, list]:
    ours = generator(*overrides)
    wants = ours.submit(_PROMPTS[0], SamplingOptions(5, log_probs=True, top_log_probs=2))
    none = ours.submit(_PROMPTS[1], SamplingOptions(5, log_probs=True))
    while ours.busy:
        ours.step()
    return wants, none, ours.score_tokens(wants.prompt + wants.tokens, 2)


def test_the_context_limits_what_is_added(workers):
    limit = ["model.max_position_embeddings=32"]
    ours = workers.run(generated, 1, limit, SamplingOptions(100), _PROMPTS)[0]
    assert [len(row) for row in tokens(ours)] == [32 - len(prompt) for prompt in _PROMPTS]


def test_cancelled_requests_free_their_memory(workers):
    assert workers.run(cancelled, 1)[0] == (["cancelled", "length", "cancelled"], 0)


def cancelled() -> tuple[list[str | None], int]:
    ours = generator(max_batch=2)
    requests = [ours.submit(prompt, SamplingOptions(6)) for prompt in _PROMPTS[:3]]
    ours.step()
    ours.cancel(requests[0])
    ours.cancel(requests[2])  # was still waiting
    while ours.busy:
        ours.step()
    return [request.finish for request in requests], ours.engine.pool.used_blocks


def refusal(prompts: list[list[int]], options: SamplingOptions, **more: Any) -> str:
    try:
        generator(**more).generate(prompts, options)
    except UserError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("prompts", "more", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([[1, 2], []], {}, "the prompt is empty"),
        ([[1] * 64], {}, "the prompt has 64 tokens, the model's context 64 (model.max_position_embeddings); shorten"),
        ([[1] * 70], {}, "the prompt has 70 tokens"),
        ([[1, 250]], {}, "outside the vocabulary of 250"),
        ([[1] * 30], {"kv_tokens": 32}, "more than the key-value pool of 32 tokens"),
    ],
)
def test_impossible_prompts_are_refused(workers, prompts, more, message):
    assert message in workers.run(refusal, 1, prompts, SamplingOptions(), **more)[0]


def test_a_damaged_model_is_reported_by_all_stages(workers):
    assert all("not finite" in text for text in workers.run(damaged, 2))


def damaged() -> str:
    ours = generator("parallel.pipeline_model_parallel_size=2")
    for parameter in ours.engine.model.parameters():
        parameter.data.fill_(torch.nan)
    try:
        ours.generate(_PROMPTS, SamplingOptions())
    except UserError as error:
        assert ours.engine.pool.used_blocks == 0
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature=-0\.1: use 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0: use 1 or more"),
        ({"top_k": 3}, "top_k=3 has no effect at temperature 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0: use a number above 0"),
        ({"temperature": 1.0, "min_p": 1.5}, "min_p=1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"seed": -1}, "seed=-1"),
        ({"stop_strings": ("",)}, "stop string is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"top_log_probs": 2}, "top_log_probs=2: use 0 or more, with log_probs"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        SamplingOptions(**options)


def grown(scaling: str) -> tuple[list[list[int]], list[list[int]]]:
    """Runs in a worker: greedy texts that outgrow the original context, and each token by a full pass."""
    ours = generator(f"model.rope_scaling={scaling}")
    completions = ours.generate(_PROMPTS, SamplingOptions(max_new_tokens=12, temperature=0))
    model, expected = ours.engine.model.eval(), []
    for prompt in _PROMPTS:
        text = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                text.append(int(model(torch.tensor([text]))[-1, 0, :250].argmax()))
        expected.append(text[len(prompt) :])
    return [completion.tokens for completion in completions], expected


_LONGROPE = (
    "{rope_type: longrope, factor: 4, original_max_position_embeddings: 18, short_factor: [1, 1], long_factor: [9, 9]}"
)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_texts_that_outgrow_the_original_context_are_read_again(workers, kind):
    dynamic = "{rope_type: dynamic, factor: 4, original_max_position_embeddings: 18}"
    ours, full = workers.run(grown, 1, _LONGROPE if kind == "longrope" else dynamic)[0]
    assert ours == full


def read_on(scaling: str) -> None:
    """Runs in a worker: a sequence grows past the original context by hand."""
    ours, sequence = generator(f"model.rope_scaling={scaling}"), KvSequence()
    ours.engine.run([(sequence, [1] * 18)])
    ours.engine.run([(sequence, [1])])


def test_other_readers_are_refused_by_name(workers):
    with pytest.raises(UserError, match=r"outgrows the 18 tokens.*rope_type=longrope"):
        workers.run(read_on, 1, _LONGROPE)
