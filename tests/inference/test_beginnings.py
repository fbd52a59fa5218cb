"""Texts that begin as earlier ones did are the same whether their beginning is read again or not."""

import contextlib
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.inference.test_generation import _LAYOUTS, _VARIANTS, generator
from tests.inference.test_one_pass import adapted
from vishwamai_mp.config import ModelConfig, UserError
from vishwamai_mp.inference import Completion, Generator, SamplingOptions, blocks
from vishwamai_mp.inference.beginnings import Beginnings
from vishwamai_mp.inference.blocks import BlockPool, mark_places
from vishwamai_mp.inference.speculation import RepeatedText
from vishwamai_mp.model.lora import Adapter

_LORA = ["lora.enabled=true", "lora.rank=4"]
_LONG = "model.max_position_embeddings=256"
_RANDOM = random.Random(5)
_SYSTEM = [_RANDOM.randrange(1, 250) for _ in range(70)]
_ENDINGS = [[_RANDOM.randrange(1, 250) for _ in range(length)] for length in (9, 5, 30)]
_OPTIONS = [SamplingOptions(12, log_probs=True), SamplingOptions(9, 0.8, top_k=20, seed=3, log_probs=True)]


def complete(ours: Generator, prompt: list[int], options: SamplingOptions) -> Completion:
    (done,) = ours.generate([prompt], options)
    return done


def again(first: Generator, **options: Any) -> Generator:
    """Another one of the same model."""
    engine = first.engine
    return Generator(engine.config, engine.runtime, engine.model, decode=first.decode, **options)


def conversations(ours: Generator) -> list[Completion]:
    """Runs in a worker: a system message with three questions, each twice; one that leaves it; an answer gone on."""
    found = [complete(ours, _SYSTEM + ending, options) for ending in _ENDINGS for options in _OPTIONS]
    turn = found[0].text + _ENDINGS[1]
    others = (_SYSTEM[:50] + _ENDINGS[2], turn, turn)
    return [*found, *(complete(ours, other, _OPTIONS[0]) for other in others)]


def with_and_without(overrides: list[str], speculate: int = 0) -> tuple[list[Completion], list[Completion], int]:
    """Runs in a worker: states of components are remembered every 32 tokens. Guesses are right for a while."""

    def guess(_: RepeatedText, text: list[int], count: int) -> list[int]:
        whole = next((one.text for one in plain if one.text[: len(text)] == text), text)
        right = whole[len(text) :][: len(text) % 4]
        return [*right, *[1] * (count - len(right))][:count]

    with patch.object(blocks, "_MARK_TOKENS", 32), patch.object(RepeatedText, "guess", guess):
        first = adapted(_LONG, *overrides)
        plain = conversations(first)
        ours = again(first, reuse_tokens=1000, speculate=speculate)
        found = conversations(ours)
    kept = ours.kept_tokens
    ours.forget_beginnings()
    assert (ours.kept_tokens, ours.engine.pool.used_blocks) == (0, 0)
    return plain, found, kept


@pytest.mark.parametrize("layout", ["one process", "TP2 PP2"])
@pytest.mark.parametrize("variant", ["grouped", "window", "memory and cache"])
def test_what_was_read_is_not_read_again_and_texts_stay_the_same(workers, variant, layout):
    processes, overrides = _LAYOUTS[layout]
    has_states = variant == "memory and cache"
    overrides = [*overrides, *_VARIANTS[variant], *(_LORA if has_states else [])]
    # Texts of 79, 75, 100, 80, 96 and 96 tokens, in blocks of 16; a text's last token is read anew. With components,
    # the text that leaves the others after 50 tokens begins after 32, where their states were remembered.
    expected = [0, 64, 64, 64, 64, 96, 32 if has_states else 48, 80, 80]
    for plain, found, kept in workers.run(with_and_without, processes, overrides):
        assert [one.reused for one in plain] == [0] * 9
        assert [one.reused for one in found] == expected
        assert kept >= 96
        same(found, plain)


@pytest.mark.parametrize("variant", ["grouped", "memory and cache"])
def test_guesses_behind_a_beginning_are_judged_as_behind_one_that_was_read(workers, variant):
    """And what was guessed wrong is no part of what is kept."""
    plain, found, _ = workers.run(with_and_without, 1, _VARIANTS[variant], 4)[0]
    assert sum(one.reused for one in found) > 400
    assert 0 < sum(one.accepted for one in found) < sum(one.guessed for one in found)
    same(found, plain)


def stopped_at_a_wrong_guess() -> tuple[list[Completion], list[Completion]]:
    """Runs in a worker: a stop string ends a text with its 80th token, for which another was guessed; and one more."""
    first = generator(_LONG)
    free = complete(first, _SYSTEM, _OPTIONS[0])
    whole = [*free.text[:79], (free.text[79] + 1) % 250, *[1] * 20]
    options = replace(_OPTIONS[0], stop_strings=(first.text(free)[6:10],))
    found = []
    with patch.object(RepeatedText, "guess", lambda _, text, count: whole[len(text) : len(text) + count]):
        for ours in (first, again(first, reuse_tokens=1000, speculate=9)):
            one = complete(ours, _SYSTEM, options)
            found.append([one, complete(ours, one.text + _ENDINGS[0], _OPTIONS[0])])
    return found[0], found[1]


def test_a_token_that_was_guessed_wrong_is_not_kept_where_the_text_ends(workers):
    plain, found = workers.run(stopped_at_a_wrong_guess, 1)[0]
    assert (len(found[0].text), found[0].finish, found[0].accepted) == (80, "stop", 8)
    assert found[1].reused == 64
    same(found, plain)


def same(found: list[Completion], plain: list[Completion]) -> None:
    for one, without in zip(found, plain, strict=True):
        assert one.tokens == without.tokens
        torch.testing.assert_close(one.log_probs, without.log_probs, rtol=0, atol=2e-5)


def crowded(overrides: list[str], seed: int) -> tuple[list[Completion], list[Completion], int]:
    """Runs in a worker: many texts of few beginnings in a pool that is too small for them, some given up."""
    draw = random.Random(seed)
    stems = [[draw.randrange(1, 250) for _ in range(60)] for _ in range(3)]
    prompts = [[*draw.choice(stems)[: draw.randrange(1, 61)], *draw.choices(range(250), k=3)] for _ in range(40)]
    options = [SamplingOptions(draw.randrange(1, 24), draw.choice([0.0, 0.9]), seed=i) for i in range(40)]
    with patch.object(blocks, "_MARK_TOKENS", 16):
        first = adapted(_LONG, *overrides)
        plain = [first.submit(prompt, each) for prompt, each in zip(prompts, options, strict=True)]
        while first.busy:
            first.step()
        ours = again(first, reuse_tokens=draw.choice([64, 160, 10**6]), kv_tokens=208, max_batch=5)
        pool, found = ours.engine.pool, []
        for prompt, each in zip(prompts, options, strict=True):
            found.append(ours.submit(prompt, each))
            for _ in range(draw.randrange(4)):
                ours.step()
            if draw.random() < 0.2:
                ours.cancel(draw.choice(found))
            if draw.random() < 0.1:
                with contextlib.suppress(UserError):  # texts that run may fill the pool
                    ours.score([draw.choice(stems)])
        while ours.busy:
            ours.step()
    assert pool.used_blocks * 16 == ours.kept_tokens
    ours.forget_beginnings()
    assert pool.used_blocks == 0
    return plain, found, sum(one.reused for one in found)


@pytest.mark.parametrize("variant", ["grouped", "memory and cache"])
def test_what_is_kept_gives_way_to_running_texts(workers, variant):
    for seed in range(2):
        plain, found, reused = workers.run(crowded, 1, _VARIANTS[variant], seed)[0]
        assert reused > 300
        for one, without in zip(found, plain, strict=True):
            assert one.tokens == (without.tokens[: len(one.tokens)] if one.finish == "cancelled" else without.tokens)


def several_of_one(overrides: list[str]) -> tuple[list[int], int, list[int]]:
    """Runs in a worker: texts of one prompt and of another beside them; how much was read in passes."""
    ours = generator(_LONG, *overrides, reuse_tokens=1000)
    options = [SamplingOptions(2, 1.0, sample=i) for i in range(4)]
    texts = [ours.submit(_SYSTEM, each) for each in options]
    texts.append(ours.submit(_ENDINGS[0], options[0]))
    passes = []
    while ours.busy:
        before = ours.engine.computed_tokens
        ours.step()
        passes.append(ours.engine.computed_tokens - before)
    return [text.reused for text in texts], ours.kept_tokens, passes


@pytest.mark.parametrize("variant", ["grouped", "memory and cache"])
def test_several_texts_of_a_prompt_read_it_once(workers, variant):
    """The others wait for a pass, and then read the 6 tokens behind its whole blocks."""
    reused, kept, passes = workers.run(several_of_one, 1, _VARIANTS[variant])[0]
    assert reused == [0, 64, 64, 64, 0]
    assert kept == 64
    assert passes == [70, 1 + 3 * 6 + 9, 4]


def changed_weights() -> list[list[int]]:
    """Runs in a worker: a text of a model with adapters, of the model without, and again after forgetting."""
    ours = adapted(_LONG, *_LORA, reuse_tokens=1000)
    prompt, options = _SYSTEM + _ENDINGS[0], _OPTIONS[0]
    found = [complete(ours, prompt, options).tokens]
    for part in ours.engine.model.modules():
        if isinstance(part, Adapter):
            torch.nn.init.zeros_(part.b)
    ours.forget_beginnings()
    done = complete(ours, prompt, options)
    assert done.reused == 0
    return [*found, done.tokens, complete(again(ours), prompt, options).tokens]


def test_nothing_of_a_model_that_has_changed_is_used(workers):
    adapted_text, after, fresh = workers.run(changed_weights, 1)[0]
    assert after == fresh != adapted_text


def stretched(scaling: str) -> tuple[list[Completion], list[Completion]]:
    """Runs in a worker: texts that stay below, cross and begin beyond the length at which frequencies change."""
    first = generator(_LONG, f"model.rope_scaling={scaling}")
    ours = again(first, reuse_tokens=1000, kv_tokens=192)
    lengths = ((40, 4), (48, 8), (40, 20), (50, 9), (60, 9), (62, 5), (36, 3))
    return tuple(  # type: ignore[return-value]
        [complete(each, _SYSTEM[:length], SamplingOptions(new, log_probs=True)) for length, new in lengths]
        for each in (ours, first)
    )


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_keys_of_other_rotary_frequencies_are_not_used(workers, kind):
    more = "short_factor: [1, 2], long_factor: [3, 4], " if kind == "longrope" else ""
    scaling = f"{{rope_type: {kind}, {more}factor: 4, original_max_position_embeddings: 56}}"
    found, plain = workers.run(stretched, 1, scaling)[0]
    same(found, plain)
    # Dynamic frequencies are of one length each; those of long texts are one kind.
    assert [one.reused for one in found] == [0, 32, 0, 0, 0, 48 if kind == "longrope" else 0, 32]


def kept_beginnings(tokens: int) -> tuple[BlockPool, Beginnings, Callable[[list[int]], None]]:
    settings = ModelConfig(max_position_embeddings=1024)
    pool = BlockPool(640, 1, 1, 1, torch.float32, torch.device("cpu"))
    beginnings = Beginnings(pool, settings, tokens, has_states=False)

    def read(text: list[int]) -> None:
        sequence = beginnings.begin(text)
        pool.extend(sequence, len(text) - sequence.length)
        sequence.length = len(text)
        beginnings.keep(sequence, text)
        pool.release(sequence)

    return pool, beginnings, read


def test_what_was_used_least_recently_is_forgotten_first():
    pool, beginnings, read = kept_beginnings(96)

    def known(text: list[int]) -> int:
        sequence = beginnings.begin([*text, 0])
        length = sequence.length
        pool.release(sequence)
        return length

    one, two = [1] * 32, [2] * 32
    read(one)
    read(two)
    read([*one, *[3] * 32])  # 96 tokens are kept: one and its two endings' blocks, and two
    assert pool.used_blocks == 6
    assert beginnings.tokens == 96
    read([4] * 16)  # the oldest block is the end of two
    assert known(two) == 16
    read([5] * 32)
    assert known([*one, *[3] * 32]) > 0
    assert known(two) == 16  # it was used last
    read([6] * 96)
    assert (known(one), known(two), known([6] * 96)) == (0, 0, 96)
    read([7] * 200)
    assert known([7] * 200) == 96  # as much of the beginning as may be kept
    beginnings.forget()
    assert pool.used_blocks == 0


def test_room_is_made_only_where_that_is_enough():
    pool, beginnings, read = kept_beginnings(400)
    read([1] * 320)
    running = beginnings.begin([1] * 170)
    assert (running.length, pool.free_blocks) == (160, 20)
    assert not beginnings.make_room(31)
    assert beginnings.tokens == 320
    assert beginnings.make_room(24)
    assert (pool.free_blocks, beginnings.tokens) == (24, 256)
    assert beginnings.make_room(30)
    assert pool.free_blocks == 30


def test_places_to_begin_at_are_few():
    assert mark_places(0, 900) == [256, 512, 768, 896]
    assert mark_places(0, 896) == [256, 512, 768, 880, 896]
    assert mark_places(256, 300) == [288]
    assert mark_places(895, 896) == [896]
    assert mark_places(896, 897) == []
    assert len(mark_places(0, 100_000)) <= 18


def reuse_refused(tokens: int) -> str:
    with pytest.raises(UserError) as error:
        generator(reuse_tokens=tokens)
    return str(error.value)


def test_a_negative_bound_is_refused(workers):
    assert workers.run(reuse_refused, 1, -1)[0] == "reuse_tokens=-1: use 0 (nothing is kept) or more"
