"""Beam search against Hugging Face's on the same model, and at every layout."""

import itertools
from typing import Any, Literal

import pytest
import torch

from tests.inference.llama import as_llama
from tests.model.builds import build
from vishwamai_mp.config import UserError
from vishwamai_mp.inference import BeamCompletion, BeamOptions, Engine, beam_search

_RANDOM = torch.Generator().manual_seed(3)
_PROMPTS = [torch.randint(1, 250, (length,), generator=_RANDOM).tolist() for length in (7, 3, 12)]
_STOPS = tuple(range(3, 250, 12))  # many, so that texts end early and at different lengths
_EARLY: tuple[bool | Literal["never"], ...] = (False, True, "never")
_OPTIONS = [
    BeamOptions(4, 16, length_penalty, early_stopping, stops)
    for early_stopping in _EARLY
    for length_penalty, stops in itertools.product((0.0, 1.0, 2.0, -0.5), ((), _STOPS[:1], _STOPS))
]


def both(options: list[BeamOptions]) -> list[tuple[list[list[BeamCompletion]], list[list[tuple[list[int], float]]]]]:
    """Runs in a worker: ours and Hugging Face's four best texts of each prompt, with scores."""
    config, runtime, (model,) = build("training.global_batch_size=8")
    engine, llama = Engine(config, runtime, model), as_llama(config, model)
    return [
        (beam_search(engine, _PROMPTS, each), [theirs(llama, prompt, each) for prompt in _PROMPTS]) for each in options
    ]


def theirs(llama: Any, prompt: list[int], options: BeamOptions) -> list[tuple[list[int], float]]:
    found = llama.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_beams=options.num_beams,
        num_return_sequences=options.num_beams,
        do_sample=False,
        max_new_tokens=options.max_new_tokens,
        length_penalty=options.length_penalty,
        early_stopping=options.early_stopping,
        eos_token_id=list(options.stop_tokens) or None,
        pad_token_id=251,
        output_scores=True,
        return_dict_in_generate=True,
    )
    texts = []
    for row, score in zip(found.sequences.tolist(), found.sequences_scores.tolist(), strict=True):
        new = [token for token in row[len(prompt) :] if token != 251]
        texts.append((new[:-1] if new[-1] in options.stop_tokens else new, score))
    return texts


def test_texts_and_scores_are_hugging_faces(workers):
    lengths = set()
    for options, (ours, llamas) in zip(_OPTIONS, workers.run(both, 1, _OPTIONS)[0], strict=True):
        for mine, other in zip(ours, llamas, strict=True):
            assert [text.tokens for text in mine] == [tokens for tokens, _ in other], options
            torch.testing.assert_close([text.score for text in mine], [score for _, score in other], rtol=0, atol=1e-4)
            lengths |= {len(text.tokens) for text in mine}
    assert len(lengths) > 4


def searched(overrides: list[str], options: BeamOptions) -> tuple[list[list[list[int]]], int, int]:
    config, runtime, (model,) = build("training.global_batch_size=8", *overrides)
    engine = Engine(config, runtime, model)
    found = beam_search(engine, _PROMPTS, options)
    return [[text.tokens for text in texts] for texts in found], engine.pool.used_blocks, engine.computed_tokens


def test_every_layout_finds_the_same_and_frees_its_memory(workers):
    options = BeamOptions(3, 20, stop_tokens=_STOPS)
    expected = workers.run(searched, 1, [], options)[0]
    assert expected[1] == 0
    for layout in (["tensor"], ["pipeline"], ["tensor", "pipeline"]):
        overrides = [f"parallel.{kind}_model_parallel_size=2" for kind in layout]
        for found in workers.run(searched, 2 ** len(layout), overrides, options):
            assert found == expected, layout


def test_one_beam_is_greedy(workers):
    from tests.inference.test_generation import generated
    from vishwamai_mp.inference import SamplingOptions

    beams = workers.run(searched, 1, [], BeamOptions(1, 12))[0][0]
    greedy = workers.run(generated, 1, [], SamplingOptions(12), _PROMPTS)[0]
    assert [[completion.tokens] for completion in greedy] == beams


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams=0: use 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"length_penalty": float("nan")}, "length_penalty=nan"),
        ({"early_stopping": "often"}, "early_stopping='often'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        BeamOptions(**options)
