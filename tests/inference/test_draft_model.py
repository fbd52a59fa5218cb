"""Guesses of a smaller model: they are its own, they do not change the text, and as many stand as the formula says."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.inference.test_generation import _LAYOUTS, _MIXED, _PROMPTS, _VARIANTS, awaken
from tests.inference.test_one_pass import adapted
from tests.model.builds import small_config
from vishwamai_mp.config import UserError
from vishwamai_mp.inference import Completion, Engine, Generator, SamplingOptions
from vishwamai_mp.inference.blocks import KvSequence
from vishwamai_mp.inference.draft_model import DraftModel
from vishwamai_mp.inference.speculation import Asked
from vishwamai_mp.model import build_model

_LORA = ["lora.enabled=true", "lora.rank=4"]
_DYNAMIC = "model.rope_scaling={rope_type: dynamic, factor: 2, original_max_position_embeddings: 24}"
_FIRST_LAYERS = "model.num_layers=2"


def drafted(first: Generator, overrides: list[str], kv_tokens: int | None = None) -> Engine:
    """Runs in a worker: a smaller model beside another: its embedding, output layer and first layers."""
    runtime = first.engine.runtime
    config = small_config("training.global_batch_size=8", *overrides, world_size=runtime.world_size)
    (model,) = build_model(config, runtime)
    awaken(model, runtime)
    return Engine(config, runtime, model.eval(), kv_tokens)


def again(first: Generator, **options: Any) -> Generator:
    engine = first.engine
    return Generator(engine.config, engine.runtime, engine.model, decode=first.decode, **options)


def run(ours: Generator, prompts: list[list[int]], options: list[SamplingOptions]) -> list[Completion]:
    completions = [ours.submit(prompt, each) for prompt, each in zip(prompts, options, strict=True)]
    while ours.busy:
        ours.step()
    return completions


def compared(
    overrides: list[str], draft_overrides: list[str], kv_tokens: int | None = None, reuse_tokens: int = 0
) -> dict[str, Any]:
    """Runs in a worker: texts without and with a draft model, its guesses, and what it writes itself instead."""
    first = adapted(*overrides)
    engine = drafted(first, [*overrides, *draft_overrides], kv_tokens)
    options = [replace(each, log_probs=True) for each in _MIXED]
    asked: list[tuple[list[int], SamplingOptions, list[int]]] = []
    guess = DraftModel.guess

    def noted(self: DraftModel, requests: list[Asked]) -> list[list[int]]:
        found = guess(self, requests)
        asked.extend((one.text, one.options, guesses) for one, guesses in zip(requests, found, strict=True))
        return found

    ours = again(first, speculate=4, draft=engine, reuse_tokens=reuse_tokens)
    with patch.object(DraftModel, "guess", noted):
        found = run(ours, _PROMPTS, options)
        if reuse_tokens:
            found = run(ours, _PROMPTS, options)
    left = engine.pool.used_blocks, ours.engine.pool.used_blocks - ours.kept_tokens // 16
    alone = Generator(engine.config, engine.runtime, engine.model)
    own = [
        run(alone, [text], [replace(each, max_new_tokens=len(guesses), log_probs=False)])[0].tokens if guesses else []
        for text, each, guesses in asked
    ]
    plain = run(first, _PROMPTS, options)
    return {"plain": plain, "found": found, "guesses": [one[2] for one in asked], "own": own, "left": left}


def check(result: dict[str, Any]) -> None:
    for one, plain in zip(result["found"], result["plain"], strict=True):
        assert one.tokens == plain.tokens
        torch.testing.assert_close(one.log_probs, plain.log_probs, rtol=0, atol=1e-4)
        assert one.passes == len(one.tokens) - one.accepted
    assert result["guesses"] == result["own"]
    assert result["left"] == (0, 0)


@pytest.mark.parametrize("layout", ["one process", "TP2 PP2"])
@pytest.mark.parametrize("variant", ["window", "memory and cache"])
def test_a_draft_model_guesses_and_the_text_is_the_same(workers, variant, layout):
    """Greedy, sampled, filtered and penalised; with adapters, and components in both models."""
    processes, overrides = _LAYOUTS[layout]
    draft = [_FIRST_LAYERS, *(["memory.layers=[0]", "cache.layers=[1]"] if variant == "memory and cache" else [])]
    for result in workers.run(compared, processes, [*overrides, *_VARIANTS[variant], *_LORA], draft):
        check(result)
        guessed, accepted = (sum(getattr(one, name) for one in result["found"]) for name in ("guessed", "accepted"))
        assert 0 < accepted < guessed


def test_a_draft_model_with_components_guesses_for_one_without(workers):
    """And behind beginnings that the larger model does not read again."""
    components = [*_VARIANTS["memory and cache"], "memory.layers=[0]", "cache.layers=[1]", _FIRST_LAYERS]
    result = workers.run(compared, 1, [], components, None, 1000)[0]
    check(result)
    assert [one.reused for one in result["found"]] == [0, 0, 16, 0]
    assert sum(one.accepted for one in result["found"]) > 0


@pytest.mark.parametrize(
    ("draft", "kv_tokens"),
    [(["model.max_position_embeddings=24", "training.sequence_length=16"], None), ([], 64), ([_DYNAMIC], None)],
    ids=["shorter context", "small pool", "frequencies that change"],
)
def test_where_the_draft_model_cannot_go_on_there_are_no_guesses(workers, draft, kv_tokens):
    result = workers.run(compared, 1, [], [_FIRST_LAYERS, *draft], kv_tokens)[0]
    check(result)
    lengths = [len(guesses) for guesses in result["guesses"]]
    assert max(lengths) == 4
    assert (min(lengths) == 0) == (draft != [_DYNAMIC])


def guessed_after_want_of_room() -> tuple[list[int], list[int], int]:
    """Runs in a worker: guesses of a model with states, asked for in vain in between; those of a text anew; what
    was read between."""
    first = adapted()
    engine = drafted(first, [*_VARIANTS["memory and cache"]], kv_tokens=64)
    ours, options, text = DraftModel(engine, first.engine.config), SamplingOptions(), list(range(5, 11))
    state = ours.begin()
    (found,) = ours.guess([Asked(state, text, 4, options)])
    text += [found[0], found[1], (found[2] + 1) % 64]  # the third was wrong
    other = KvSequence()
    engine.pool.extend(other, 48)
    assert ours.guess([Asked(state, text, 9, options)]) == [[]]
    engine.release(other)
    read = state.sequence.length
    (again_,) = ours.guess([Asked(state, text, 6, options)])
    (anew,) = ours.guess([Asked(ours.begin(), text, 6, options)])
    return again_, anew, read


def test_a_draft_model_guesses_on_where_it_had_no_room(workers):
    after, anew, read = workers.run(guessed_after_want_of_room, 1)[0]
    assert read == 8
    assert after == anew


def test_a_model_guesses_all_of_its_own_text(workers):
    result = workers.run(compared, 1, _VARIANTS["memory and cache"], [])[0]
    check(result)
    assert all(one.accepted == one.guessed > 0 for one in result["found"])


_SAMPLES, _TEMPERATURE = 8192, 0.5


def sampled() -> tuple[Tensor, float, Tensor, float, float]:
    """Runs in a worker: how often each pair of second and third tokens was written, and the share of guesses accepted.

    And the pairs' probabilities, the share that a Gumbel coupling accepts, and what rejection sampling would.
    """
    tiny = ["model.vocab_size=8", "model.initializer_range=0.3"]
    first, prompt = adapted(*tiny), [1, 5, 2]
    engine = drafted(first, [*tiny, _FIRST_LAYERS])
    ours = again(first, speculate=1, draft=engine, max_batch=512)
    options = [SamplingOptions(3, _TEMPERATURE, sample=i) for i in range(_SAMPLES)]
    texts = run(ours, [prompt] * _SAMPLES, options)
    counts = torch.zeros(8, 8)
    for text in texts:
        counts[text.tokens[1], text.tokens[2]] += 1
    after = [prompt, *([*prompt, token] for token in range(8))]
    p, q = (probabilities(each, after) for each in (first.engine, engine))
    third = probabilities(first.engine, [[*text, token] for text in after[1:] for token in range(8)]).view(8, 8, 8)
    pairs = torch.einsum("a,ab,abc->bc", p[0], p[1:], third)
    same = 1 / torch.maximum(p[1:, None] / p[1:, :, None], q[1:, None] / q[1:, :, None]).sum(-1)
    coupled = float(p[0] @ same.sum(-1))
    rejecting = float(p[0] @ torch.minimum(p[1:], q[1:]).sum(-1))
    share = sum(text.accepted for text in texts) / sum(text.guessed for text in texts)
    return counts, share, pairs, coupled, rejecting


def probabilities(engine: Engine, texts: list[list[int]]) -> Tensor:
    output = engine.run([(KvSequence(), text) for text in texts])
    ids = torch.arange(8).expand(len(texts), -1)
    log_probs = engine.decide(output, lambda shard, _: shard.log_probs(ids), 8)
    return (log_probs / _TEMPERATURE).softmax(-1)


def test_sampled_texts_have_the_larger_models_distribution(workers):
    """Pearson's test over 64 pairs, a token that was guessed and the next: 0.1 % of all such tests exceed 103.4."""
    counts, share, expected, coupled, rejecting = workers.run(sampled, 1)[0]
    assert int(counts.sum()) == _SAMPLES
    expected = expected * _SAMPLES
    assert float(((counts - expected) ** 2 / expected).sum()) < 103.4
    deviation = (coupled * (1 - coupled) / _SAMPLES) ** 0.5
    assert share == pytest.approx(coupled, abs=4 * deviation)
    assert 0.2 < coupled < rejecting < 0.95


def refused(draft: list[str], speculate: int) -> str:
    first = adapted()
    with pytest.raises(UserError) as error:
        again(first, draft=drafted(first, draft), speculate=speculate)
    return str(error.value)


@pytest.mark.parametrize(
    ("draft", "speculate", "message"),
    [
        (["model.vocab_size=240"], 4, "the draft model has a vocabulary of 240 tokens, the model 250"),
        ([], 0, "a draft model needs speculate=N"),
    ],
)
def test_a_draft_model_that_cannot_guess_is_refused(workers, draft, speculate, message):
    assert message in workers.run(refused, 1, draft, speculate)[0]
