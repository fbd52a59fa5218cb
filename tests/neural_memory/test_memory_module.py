"""The memory inside a layer, in one process: causal, identity at first, the same trained and decoded."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.builds import build, small_config
from tests.neural_memory.builds import SETTINGS, drawn_outputs, hidden_states, memory_module
from vishwamai_mp.config import ConfigError, load_config, resolve


def logits(overrides: list[str], tokens: Tensor) -> Tensor:
    _, _, (model,) = build(*overrides)
    with torch.no_grad():
        return model(tokens)


def test_fresh_model_equals_the_plain_one_bitwise(workers):
    tokens = torch.arange(1, 65).view(2, 32)
    plain, with_memory = (workers.run(logits, 1, settings, tokens)[0] for settings in ([], SETTINGS))
    assert torch.equal(plain, with_memory)


def causal(momentum: str) -> list[tuple[int, bool, bool]]:
    module, hidden = memory_module(f"memory.momentum={momentum}").float(), hidden_states(32, 2).float()
    with torch.no_grad():
        before, _ = module(hidden)
        found = []
        for place in (0, 7, 8, 20, 31):
            changed = hidden.clone()
            changed[place] += 1
            after, _ = module(changed)
            early, late = torch.equal(after[:place], before[:place]), torch.equal(after[place:], before[place:])
            found.append((place, early, late))
    return found


@pytest.mark.parametrize("momentum", ["true", "false"])
def test_a_changed_token_leaves_all_before_it_bitwise_alone(workers, momentum):
    assert all(early and not late for _, early, late in workers.run(causal, 1, momentum)[0])


def decode(overrides: list[str], parts: list[int]) -> tuple[Tensor, Tensor, int]:
    """Whole rows at once, and in parts that hand their state on; numbers in the final state."""
    module, hidden = memory_module(*overrides), hidden_states(sum(parts), 3)
    with torch.no_grad():
        whole, _ = module(hidden)
        state: Any = None
        outputs = []
        for part in hidden.split(parts):
            out, state = module(part, None, state)
            outputs.append(out)
    return whole, torch.cat(outputs), sum(level.memory.numel() for level in state.levels)


@pytest.mark.parametrize("parts", [[1] * 24, [1, 1, 20, 1, 1], [9, 2, 1, 12]])
@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("momentum", ["true", "false"])
def test_decoding_equals_training(workers, parts, levels, momentum):
    overrides = [f"memory.num_memory_layers={levels}", f"memory.momentum={momentum}"]
    whole, parted, numbers = workers.run(decode, 1, overrides, parts)[0]
    assert float((whole - parted).abs().max()) < 1e-12
    assert numbers == 3 * levels * 4 * 8 * 8 * (2 if momentum == "true" else 1)


def decoding_flops(contexts: list[int]) -> list[int]:
    """Of one token after so many others."""
    from torch.utils.flop_counter import FlopCounterMode

    module, counts = memory_module(), []
    with torch.no_grad():
        for context in contexts:
            _, state = module(hidden_states(context, 1))
            # The counter does not know oneDNN's products.
            with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
                module(hidden_states(1, 1), None, state)
            counts.append(counter.get_total_flops())
    return counts


def test_decoding_costs_the_same_after_any_context(workers):
    first, *others = workers.run(decoding_flops, 1, [1, 10, 400])[0]
    assert first > 0
    assert others == [first, first]


def snapshots() -> None:
    """A state is a value: what continues from it twice gives the same twice, whatever ran in between."""
    module, hidden = memory_module(), hidden_states(12, 1)
    with torch.no_grad():
        _, kept = module(hidden[:6])
        first, _ = module(hidden[6:], None, kept)
        module(hidden[:5] * 2, None, kept)
        for token in hidden[:3]:
            module(token[None], None, kept)
        second, _ = module(hidden[6:], None, kept)
    assert torch.equal(first, second)


def test_a_state_restored_is_a_state_kept(workers):
    workers.run(snapshots, 1)


def packed(overrides: list[str]) -> None:
    """Two rows of documents of all kinds of lengths, against each document on its own."""
    module, hidden = memory_module(*overrides), hidden_states(40, 2)
    lengths = [[3, 8, 1, 13, 15], [20, 1, 1, 2, 16]]
    documents = torch.stack([torch.arange(5).repeat_interleave(torch.tensor(row)) for row in lengths])
    with torch.no_grad():
        together, state = module(hidden, documents)
        for row, parts in enumerate(lengths):
            for found, alone in zip(together[:, row].split(parts), hidden[:, row].split(parts), strict=True):
                torch.testing.assert_close(found, module(alone[:, None])[0][:, 0], rtol=0, atol=1e-12)
        _, last = module(hidden[-15:, :1])
        torch.testing.assert_close(state.levels[0].memory[:1], last.levels[0].memory, rtol=0, atol=1e-12)
        torch.testing.assert_close(state.recent[:, :1], last.recent, rtol=0, atol=1e-12)
        assert float((together - module(hidden)[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("overrides", [[], ["memory.momentum=false", "memory.num_memory_layers=1"]])
def test_a_packed_document_gives_what_it_gives_alone(workers, overrides):
    workers.run(packed, 1, overrides)


def any_batch() -> None:
    module, hidden = memory_module(), hidden_states(20, 4)
    with torch.no_grad():
        four, _ = module(hidden)
        one, _ = module(hidden[:, 2:3])
        module.reset_memory()
        two, _ = module(hidden[:7, :2])
        again, _ = module(hidden)
    torch.testing.assert_close(one[:, 0], four[:, 2], rtol=0, atol=1e-12)
    torch.testing.assert_close(two, four[:7, :2], rtol=0, atol=1e-12)
    assert torch.equal(again, four)


def test_any_batch_size_after_any_other(workers):
    workers.run(any_batch, 1)


def chunk_sizes() -> None:
    outputs = []
    for chunk_size in (1, 16, 32, 64, 128):
        with torch.no_grad():
            outputs.append(memory_module(f"memory.chunk_size={chunk_size}")(hidden_states(100, 2))[0])
        from vishwamai_mp.runtime import shutdown

        shutdown(keep_world=True)
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=0, atol=1e-12)


def test_chunk_size_is_a_performance_knob_only(workers):
    workers.run(chunk_sizes, 1)


def gradients_after_two_steps(overrides: list[str]) -> dict[str, float]:
    """Largest gradient of each of the memory's parameters."""
    _, _, (model,) = build(*SETTINGS, *overrides)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    tokens = torch.randint(1, 250, (2, 32), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, labels=tokens.roll(-1, 1)).mean().backward()
        optimizer.step()
    memory = model.decoder.layers[1].memory
    return {
        f"{name}[{part}]": float(piece.abs().min() if name == "level_mix" else piece.abs().max())
        for name, parameter in memory.named_parameters()
        for part, piece in enumerate(_by_kind(name, parameter.grad, memory))
    }


def _by_kind(name: str, grad: Tensor, memory: Any) -> list[Tensor]:
    """Rows of the projection and entries of vectors apart where they do different things."""
    by_head = grad.view(memory.heads, -1, *grad.shape[1:]) if name.startswith(("projection", "taps")) else None
    if name.startswith("projection"):
        assert by_head is not None
        parts = [memory.head_dim] * (3 * memory.levels + 1) + [1] * memory.levels * memory.gates
        return list(by_head.split(parts, 1))
    if name == "taps":
        return list(grad.view(memory.heads, 3 * memory.levels, memory.head_dim, -1).permute(1, 3, 0, 2).flatten(0, 1))
    if name == "gate_bias":
        return list(grad.view(memory.heads, -1).t())
    return [grad]


@pytest.mark.parametrize("overrides", [[], ["memory.num_memory_layers=1", "memory.momentum=false"]])
def test_every_parameter_learns_after_two_steps(workers, overrides):
    largest = workers.run(gradients_after_two_steps, 1, overrides)[0]
    assert len(largest) > 20
    assert [name for name, value in largest.items() if not value > 0] == []


def losses_with(overrides: list[str]) -> tuple[float, float]:
    with drawn_outputs():
        _, _, (model,) = build(*SETTINGS, *overrides)
    tokens = torch.randint(1, 250, (2, 32), generator=torch.Generator().manual_seed(0))
    model.train()
    torch.manual_seed(0)
    first = float(model(tokens, labels=tokens).detach().mean())
    model.eval()
    return first, float(model(tokens, labels=tokens).detach().mean())


def test_dropout_acts_in_training_only(workers):
    off, on = (workers.run(losses_with, 1, [f"memory.dropout={p}"])[0] for p in (0.0, 0.5))
    assert on[0] != off[0]
    assert on[1] == off[1] == off[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["memory.memory_size=36"], r"memory.memory_size=36 is not a multiple of memory.head_dim=8"),
        (["memory.hidden_size=64"], r"memory.hidden_size=64 is not model.hidden_size=32"),
        (
            ["parallel.tensor_model_parallel_size=8", "model.num_key_value_heads=8"],
            r"makes 4 heads .*_size=8 does not divide",
        ),
        (
            ["parallel.tensor_model_parallel_size=4", "parallel.context_parallel_size=2"],
            r"1 on each tensor parallel rank, which parallel.context_parallel_size=2 does not divide",
        ),
        (["memory.layers=[4]"], r"memory.layers=\[4\]: model.num_layers=4; use numbers from 0 to 3"),
        (["memory.layers=[1,1]"], r"memory.layers=\[1, 1\]: name each layer"),
        (["memory.dropout=1.0"], r"memory.dropout=1.0: a probability"),
        (["memory.num_memory_layers=1", "memory.loss_weight=0.1"], r"memory.loss_weight=0.1 has no effect"),
    ],
)
def test_impossible_settings_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        small_config(*SETTINGS, *overrides)


def test_one_layer_in_eight_carries_a_memory_by_default():
    assert resolve(load_config("vishwamai-120l", ["memory.enabled=true"])).memory.layers == list(range(3, 120, 8))
