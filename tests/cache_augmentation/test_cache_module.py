"""The module against its definition, and the gates that every component has to pass."""

import pytest
import torch
from torch import Tensor

from tests.cache_augmentation.builds import SETTINGS, cache_module, hidden_states
from tests.cache_augmentation.oracle import cache
from tests.model.builds import build

# Documents of a row of 23 tokens: whole, packed, shorter than a segment, one token long.
ROWS = [[0] * 23, [0] * 9 + [1] * 14, [0] * 3 + [1] * 4 + [2] + [3] * 2 + [4] * 13]
TWO_STEP = "cache.retrieve_segments=2"


def outputs(hidden: Tensor, documents: Tensor | None, overrides: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    module = cache_module(*overrides)
    with torch.no_grad():
        return module(hidden, documents)[0], {name: value.detach() for name, value in module.named_parameters()}


@pytest.mark.parametrize("packed", [False, True])
def test_output_is_that_of_the_definition(workers, packed):
    documents = torch.tensor(ROWS if packed else ROWS[:1] * 3)
    hidden = hidden_states(23, 3)
    out, weights = workers.run(outputs, 1, hidden, documents if packed else None, ())[0]
    for row in range(3):
        wanted = cache(hidden[:, row], documents[row].tolist(), weights, length=4, latents=2, heads=8)
        torch.testing.assert_close(out[:, row], wanted, rtol=0, atol=1e-12)
    assert (out - hidden).abs().max() > 0.1


def test_retrieval_factor_scales_what_is_read(workers):
    hidden = hidden_states(12, 1)
    once, _ = workers.run(outputs, 1, hidden, None, ())[0]
    twice, _ = workers.run(outputs, 1, hidden, None, ("cache.retrieval_factor=2.0",))[0]
    torch.testing.assert_close(twice - hidden, 2 * (once - hidden))


@pytest.mark.parametrize("settings", [(), (TWO_STEP,)], ids=["all", "two-step"])
@pytest.mark.parametrize("packed", [False, True])
def test_causal(workers, settings, packed):
    """A token changes nothing before it, bit for bit."""
    documents = torch.tensor([[0] * 9 + [1] * 31]) if packed else None
    hidden = hidden_states(40, 1)
    before = workers.run(outputs, 1, hidden, documents, settings)[0][0]
    for token in (5, 16, 17, 31):
        other = hidden.clone()
        other[token] += 1
        after = workers.run(outputs, 1, other, documents, settings)[0][0]
        assert torch.equal(after[:token], before[:token])
        assert (after - before)[token:].abs().amax((1, 2)).ne(0).sum() > 1, "it reads no earlier token"


@pytest.mark.parametrize("settings", [(), (TWO_STEP,)], ids=["all", "two-step"])
def test_a_packed_document_gives_what_it_gives_alone(workers, settings):
    lengths = (9, 26, 1, 14, 30)
    documents = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])[None]
    hidden = hidden_states(sum(lengths), 1)
    packed = workers.run(outputs, 1, hidden, documents, settings)[0][0]
    first = 0
    for length in lengths:
        own = slice(first, first + length)
        alone = workers.run(outputs, 1, hidden[own], None, settings)[0][0]
        torch.testing.assert_close(packed[own], alone, rtol=0, atol=1e-12)
        first += length


def both_forms(hidden: Tensor, pieces: list[int], overrides: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    module = cache_module(*overrides)
    state, out = None, []
    with torch.no_grad():
        whole = module(hidden)[0]
        for piece in hidden.split(pieces):
            read, state = module(piece, None, state)
            out.append(read)
    return whole, torch.cat(out)


@pytest.mark.parametrize("settings", [(), (TWO_STEP,)], ids=["all", "two-step"])
@pytest.mark.parametrize("pieces", [[1] * 39, [22, *[1] * 17], [3, 7, 14, 15], [33, 6]], ids=str)
def test_decoding_gives_what_training_gives(workers, pieces, settings):
    whole, pieced = workers.run(both_forms, 1, hidden_states(39, 2), pieces, settings)[0]
    torch.testing.assert_close(pieced, whole, rtol=0, atol=1e-12)


def forks(hidden: Tensor) -> tuple[list[Tensor], bool]:
    """Two continuations of one state, interleaved, and each again alone; and whether memory was shared."""
    module = cache_module()
    with torch.no_grad():
        _, start = module(hidden[14:18], None, module(hidden[:14])[1])
        paths = [hidden[18:34], -hidden[18:34]]
        states, out = [start, start], ([], [])  # type: tuple[list, tuple[list[Tensor], list[Tensor]]]
        for tokens in zip(*paths, strict=True):
            for i in range(2):
                read, states[i] = module(tokens[i][None], None, states[i])
                out[i].append(read)
        again = [module(path, None, start)[0] for path in paths]
        shared = len({state.written.tensors[0].data_ptr() for state in (start, states[0])}) == 1
    return [torch.cat(out[0]) - again[0], torch.cat(out[1]) - again[1], again[0] - again[1]], shared


def test_forks_share_the_past_and_part_ways(workers):
    (first, second, apart), shared = workers.run(forks, 1, hidden_states(34, 1))[0]
    assert max(first.abs().max(), second.abs().max()) < 1e-12
    assert apart[4:].abs().max() > 0.1
    assert shared


def logits(overrides: tuple[str, ...], rows: int) -> Tensor:
    tokens = torch.arange(rows * 32).view(rows, 32) % 250
    _, _, (model,) = build(*overrides)
    with torch.no_grad():
        return model(tokens)


@pytest.mark.parametrize("rows", [1, 3])
def test_identity_at_initialisation(workers, rows):
    """Bitwise; twice with one worker, so that a batch comes after one of another size."""
    plain = workers.run(logits, 1, (), rows)[0]
    assert torch.equal(workers.run(logits, 1, SETTINGS, rows)[0], plain)


_MEMORY = ("memory.enabled=true", "memory.memory_size=32", "memory.head_dim=4", "memory.layers=[1,2]")


def order_and_logits(overrides: tuple[str, ...]) -> tuple[tuple[str, ...], Tensor]:
    """Components of the layer that has both, and logits once their outputs are not zero."""
    _, _, (model,) = build(*SETTINGS, *_MEMORY, *overrides)
    with torch.no_grad():
        for component in (model.decoder.layers[1].memory, model.decoder.layers[1].cache):
            component.output.weight.copy_(torch.eye(32))
        return model.decoder.layers[1].component_names, model(torch.arange(32)[None])


def test_beside_the_memory_in_either_order(workers):
    plain = workers.run(logits, 1, (), 2)[0]
    assert torch.equal(workers.run(logits, 1, (*SETTINGS, *_MEMORY), 2)[0], plain)
    first, one = workers.run(order_and_logits, 1, ())[0]
    second, other = workers.run(order_and_logits, 1, ("cache.before_memory=true",))[0]
    assert (first, second) == (("memory", "cache"), ("cache", "memory"))
    assert (one - other).abs().max() > 1e-4


def gradients_after_two_steps() -> dict[str, float]:
    _, _, (model,) = build(*SETTINGS)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(64).view(2, 32) % 7
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, labels=tokens.roll(-1, 1)).mean().backward()
        if _ < 2:
            optimizer.step()
    module = model.decoder.layers[1].cache
    return {name: float(parameter.grad.abs().max()) for name, parameter in module.named_parameters()}


def test_every_parameter_has_a_gradient_after_two_steps(workers):
    found = workers.run(gradients_after_two_steps, 1)[0]
    assert {"null_key", "importance_weight", "importance_bias", "position_bias"} <= set(found)
    assert {name: size for name, size in found.items() if size < 1e-9} == {}


def other_sizes_between() -> tuple[Tensor, Tensor]:
    module = cache_module()
    hidden = hidden_states(20, 2)
    with torch.no_grad():
        first = module(hidden)[0]
        module(hidden_states(33, 5))
        module(hidden_states(3, 1))
        module.reset_cache()
        return first, module(hidden)[0]


def test_any_batch_after_any_other(workers):
    first, again = workers.run(other_sizes_between, 1)[0]
    assert torch.equal(first, again)


def dropped(training: bool) -> Tensor:
    module = cache_module("cache.dropout=0.5").train(training)
    hidden = hidden_states(40, 4)
    with torch.no_grad():
        return module(hidden)[0] - hidden


def test_dropout_in_training_only(workers):
    assert (workers.run(dropped, 1, False)[0][8:] == 0).sum() == 0
    share = (workers.run(dropped, 1, True)[0][8:] == 0).double().mean()
    assert 0.45 < share < 0.55
