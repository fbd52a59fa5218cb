"""What stays: eviction by importance × reads, and latents carried from row to row of long documents."""

import pytest
import torch
from torch import Tensor

from tests.cache_augmentation.builds import cache_module, hidden_states
from vishwamai_mp.cache_augmentation.eviction import survivors, worth
from vishwamai_mp.cache_augmentation.shared_list import SharedList

CARRY = ("cache.carry_state=true", "data.consecutive=true", "data.reset_attention_mask=true")


def test_the_least_important_times_read_go():
    bias = torch.tensor([[0.9, 0.1, 0.5, 0.5, 0.2]]).log()[..., None].expand(1, 5, 3)
    access = torch.tensor([[0.0, 9.0, 0.0, 1.0, 0.0]])
    torch.testing.assert_close(worth(bias, access), torch.tensor([[0.9, 1.0, 0.5, 1.0, 0.2]]))
    assert survivors(worth(bias, access), 3).tolist() == [[0, 1, 3]]
    nothing = torch.full((1, 1, 3), -torch.inf)
    assert survivors(worth(torch.cat((nothing, bias), 1), torch.zeros(1, 6)), 5).tolist() == [[1, 2, 3, 4, 5]]


def test_a_list_and_its_forks():
    first = SharedList([torch.arange(3.0)[None]])
    grown = first.append([torch.tensor([[3.0]])])
    one, other = grown.append([torch.tensor([[4.0]])]), grown.append([torch.tensor([[-4.0]])])
    further = one.append([torch.tensor([[5.0]])])
    assert [x.tensors[0].tolist()[0] for x in (first, grown, one, other, further)] == [
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, -4],
        [0, 1, 2, 3, 4, 5],
    ]
    assert one.tensors[0].data_ptr() == grown.tensors[0].data_ptr() == further.tensors[0].data_ptr()
    assert other.tensors[0].data_ptr() != grown.tensors[0].data_ptr()


def streamed(hidden: Tensor, cuts: list[int], documents: list[Tensor] | None, overrides: tuple[str, ...]):
    """Rows one after the other in training, and the module's state at the end."""
    module = cache_module(*CARRY, *overrides).train()
    out = []
    for number, piece in enumerate(hidden.split(cuts)):
        out.append(module(piece, None if documents is None else documents[number])[0])
    loss = out[-1].square().sum()
    loss.backward()
    assert not any(piece.isnan().any() for piece in out)
    return torch.cat(out).detach(), float(module.carried.fill(out[0]))


def whole(hidden: Tensor, documents: Tensor | None, overrides: tuple[str, ...]) -> Tensor:
    module = cache_module(*overrides)
    with torch.no_grad():
        return module(hidden, documents)[0]


@pytest.mark.parametrize("settings", [(), ("cache.retrieve_segments=2",)], ids=["all", "two-step"])
def test_rows_of_a_long_document_read_as_one(workers, settings):
    hidden = hidden_states(64, 2)
    out, fill = workers.run(streamed, 1, hidden, [16, 16, 32], None, settings)[0]
    torch.testing.assert_close(out, workers.run(whole, 1, hidden, None, settings)[0], rtol=0, atol=1e-12)
    assert fill == 16


def test_a_new_document_finds_nothing(workers):
    """Two rows: one goes on, one begins anew; then a document ends inside a row."""
    hidden = hidden_states(48, 2)
    zero, one = torch.zeros(16, dtype=torch.int), torch.ones(16, dtype=torch.int)
    ends = torch.tensor([0] * 8 + [1] * 8, dtype=torch.int)
    rows = [torch.stack(pair) for pair in ((one, one), (zero, one), (ends, zero))]
    out, _ = workers.run(streamed, 1, hidden, [16] * 3, rows, ())[0]
    ids = torch.tensor([[0] * 40 + [1] * 8, [0] * 16 + [1] * 32])
    torch.testing.assert_close(out, workers.run(whole, 1, hidden, ids, ())[0], rtol=0, atol=1e-12)


def test_capacity_is_kept(workers):
    """8 latents are 4 segments of each head; without the limit the last tokens read something else."""
    hidden = hidden_states(64, 1)
    out, fill = workers.run(streamed, 1, hidden, [16] * 4, None, ("cache.max_cache_length=8",))[0]
    full, _ = workers.run(streamed, 1, hidden, [16] * 4, None, ())[0]
    assert fill == 4
    torch.testing.assert_close(out[:32], full[:32])
    assert (out - full)[32:].abs().max() > 1e-3


def evicted_while_decoding() -> tuple[Tensor, Tensor, int]:
    """Worth of segments before and after the cache ran over, one head's."""
    module = cache_module("cache.max_cache_length=32")
    hidden = hidden_states(68, 1)
    with torch.no_grad():
        _, state = module(hidden[:64])
        before, held = worth(state.latents.bias, state.access), state.latents.keys
        _, after = module(hidden[64:], None, state)
    kept = (held[0, :, None] == after.latents.keys[0, None]).flatten(2).all(-1).any(1)
    return before[0], kept, after.segments


def test_decoding_evicts_the_least_worth(workers):
    before, kept, count = workers.run(evicted_while_decoding, 1)[0]
    assert count == 15, "16 fit; a sixteenth is freed at a time"
    assert kept[0], "the null segment stays"
    gone = before[1:][~kept[1:]]
    assert len(gone) >= 1
    assert gone.max() <= before[1:][kept[1:]].min() + 1.0, "what the last tokens read may have turned the order"


def reset() -> tuple[Tensor, Tensor]:
    module = cache_module(*CARRY).train()
    hidden = hidden_states(16, 1)
    with torch.no_grad():
        first = module(hidden)[0]
        module(hidden)
        module.reset_cache()
        return first, module(hidden)[0]


def test_reset_forgets(workers):
    first, again = workers.run(reset, 1)[0]
    assert torch.equal(first, again)
