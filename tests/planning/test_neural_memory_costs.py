"""The neural memory's formulae: by hand, and against the module that is built."""

from typing import Any

import pytest

from vishwamai_mp.config import load_config, padded_vocab_size, resolve
from vishwamai_mp.planning import parameter_count, total_parameters, training_flops_per_token
from vishwamai_mp.planning.neural_memory_costs import (
    heads,
    memory_forward_flops_per_token,
    memory_parameters,
    memory_state_bytes,
    rule_flops_per_token,
)


def flagship(*overrides: str) -> Any:
    return resolve(load_config("vishwamai-120l", ["memory.enabled=true", *overrides]))


def test_the_flagships_memory_by_hand():
    """16 heads of 128 in 15 layers: per level query, key, value and 3 gates; a read gate; the output."""
    memory = flagship().memory
    matrices = 8192 * 16 * (3 * 3 * 128 + 128 + 3 * 3) + 2048 * 8192
    vectors = 8192 + 16 * (9 * 128 * 4 + 9 + 128 + 3)
    assert memory_parameters(memory) == 15 * (matrices + vectors) == 15 * 185_813_184
    assert memory_state_bytes(memory) == 15 * 3 * 16 * 2 * 128 * 128 * 4


def test_the_flagships_memory_adds_less_than_3_percent_of_flops():
    for length, share in ((4096, 0.0285), (32768, 0.0224)):
        with_memory = training_flops_per_token(flagship(f"training.sequence_length={length}"))
        without = training_flops_per_token(
            resolve(load_config("vishwamai-120l", [f"training.sequence_length={length}"]))
        )
        assert with_memory / without - 1 == pytest.approx(share, abs=0.0005)


def test_no_memory_costs_nothing():
    config = resolve(load_config("tiny"))
    assert memory_parameters(config.memory) == memory_forward_flops_per_token(config.memory) == 0
    assert total_parameters(config) == parameter_count(config.model)


def built(overrides: list[str]) -> tuple[int, int, int]:
    """In a worker: parameters of the model, and FLOPs of the memory's forward pass over 3 rows of 64 tokens."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from tests.model.builds import build

    _, _, (model,) = build(*overrides)
    memory = model.decoder.layers[1].memory
    hidden = torch.randn(64, 3, 32)
    state = memory(hidden)[1]

    def added_in_place(_: Any, a: Any, b: Any, **__: Any) -> int:
        """FLOPs of `baddbmm_`, which torch's counter does not know."""
        return 2 * a[0] * a[1] * a[2] * b[2]

    with (
        torch.backends.mkldnn.flags(enabled=False),  # the counter does not know oneDNN's products
        FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: added_in_place}) as counter,
    ):
        memory(hidden)
    numbers = sum(level.memory[0].numel() for level in state.levels)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops(), numbers


@pytest.mark.parametrize(
    "overrides",
    [[], ["memory.momentum=false"], ["memory.num_memory_layers=1"], ["memory.chunk_size=32", "memory.layers=[0,1,3]"]],
)
def test_formulae_are_those_of_the_built_module(workers, overrides):
    from tests.model.builds import small_config
    from tests.neural_memory.builds import SETTINGS

    overrides = [*SETTINGS, *overrides]
    config = small_config(*overrides)
    parameters, flops, numbers = workers.run(built, 1, overrides)[0]
    modules = len(config.memory.layers or ())
    assert parameters == total_parameters(config, padded_vocab_size(config))
    assert flops == 64 * 3 * memory_forward_flops_per_token(config.memory) / modules
    assert 4 * numbers == memory_state_bytes(config.memory) / modules
    assert 0 < rule_flops_per_token(config.memory) < memory_forward_flops_per_token(config.memory)
    assert heads(config.memory) == 4
