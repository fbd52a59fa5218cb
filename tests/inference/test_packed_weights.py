"""Rounded weights: what is computed with them by packed products, by whole ones, and at every layout."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.inference.test_generation import gathered
from tests.inference.test_one_pass import _CACHE, _LAYOUTS, _LORA, _MEMORY, _TEXT, adapted
from vishwamai_mp.config import UserError
from vishwamai_mp.inference import packed_weights
from vishwamai_mp.inference.blocks import KvSequence
from vishwamai_mp.inference.engine import Engine
from vishwamai_mp.inference.packed_weights import PackedWeight, pack_weights

_ROUNDED = {"int8": 0.05, "int4": 0.3}  # of the logits, at most


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.01), ("int4", 0.1)])
def test_a_packed_product_is_that_of_the_rounded_weight(kind, error):
    random = torch.Generator().manual_seed(0)
    exact = torch.randn(48, 96, generator=random)
    exact[:, :32] *= 100  # scales of their own
    x = torch.randn(3, 96, generator=random).bfloat16()
    packed = PackedWeight(exact.bfloat16(), kind)
    whole = packed.whole.float()
    for part in (slice(32), slice(32, 96)) if kind == "int4" else (slice(96),):
        assert 0 < (whole - exact)[:, part].norm() < error * exact[:, part].norm()
    expected = x.float() @ whole.t()
    for found in (packed(x), packed.by_packed(x), packed.by_whole(x), packed.by_whole(x.expand(40, 3, 96)[:, 0])[:1]):
        bound = 2**-6 * expected.abs().max()
        assert (found.float() - expected[: len(found)]).abs().max() < bound


def logits(overrides: list[str], kind: Any) -> tuple[Tensor, Tensor, Tensor, int]:
    """Runs in a worker: of a text read in pieces, before and after rounding, and of the rounded text read at once.

    And how many products of the text in pieces were packed ones.
    """
    ours = adapted("precision=bf16", "training.global_batch_size=8", *overrides)
    exact = gathered(ours, [(KvSequence(), _TEXT)])
    pack_weights(ours.engine.model, ours.engine.config, ours.engine.runtime, kind)
    ours.engine = Engine(ours.engine.config, ours.engine.runtime, ours.engine.model)
    with patch.object(packed_weights, "_SOME", 0):
        whole = gathered(ours, [(KvSequence(), _TEXT)])
    sequence, rows, start = KvSequence(), [], 0
    with patch.object(PackedWeight, "by_packed", autospec=True, side_effect=PackedWeight.by_packed) as calls:
        for count in (8, 1, 1, 6, 8):
            rows.append(gathered(ours, [(sequence, _TEXT[start : start + count])]))
            start += count
    return exact, whole, torch.cat(rows), calls.call_count


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("layout", ["one process", "TP2", "PP2"])
def test_models_with_rounded_weights(workers, layout, kind):
    """By the shortcut, and with adapters and components, which stay exact, through the modules."""
    processes, overrides = _LAYOUTS[layout]
    for more in ([], [*_LORA, *_MEMORY, *_CACHE]):
        results = workers.run(logits, processes, [*overrides, *more], kind)
        for exact, whole, pieces, calls in results:
            norm = exact.norm()
            assert 1e-3 < (whole - exact).norm() / norm < _ROUNDED[kind]
            assert (pieces - whole).norm() / norm < 0.04  # as without: a bf16 number has 8 significant bits
            layers = 4 // (processes if layout == "PP2" else 1)
            assert calls in (5 * 4 * layers, 5 * (4 * layers + 1))  # the last stage has the output layer


def refused(overrides: list[str]) -> str:
    """Runs in a worker."""
    ours = adapted(*overrides)
    try:
        pack_weights(ours.engine.model, ours.engine.config, ours.engine.runtime, "int8")
    except UserError as error:
        return str(error)
    return "nothing"


def test_models_in_other_precisions_are_refused(workers):
    message = "weights=int8 multiplies in bf16, and the model computes in fp32; add precision=bf16"
    assert workers.run(refused, 1, [])[0] == message


def noted(kind: Any) -> list[str]:
    """Runs in a worker."""
    ours = adapted("precision=bf16", "model.tie_word_embeddings=true", "model.intermediate_size=40")
    return pack_weights(ours.engine.model, ours.engine.config, ours.engine.runtime, kind)


def test_what_is_rounded_otherwise_is_said(workers):
    *odd, tied = workers.run(noted, 1, "int4")[0]
    assert odd[0] == "layer 1's linear_fc2 is rounded to int8: 32 × 40 is no whole number of groups of 32"
    assert tied == "the output layer is the embedding, which is not rounded"
    assert len(odd) == 4
