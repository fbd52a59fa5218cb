"""Formulae for the cache: by hand, and against the module and the state that are built."""

import pytest
import torch

from tests.cache_augmentation.builds import SETTINGS, cache_module, hidden_states
from tests.model.builds import build, small_config
from vishwamai_mp.config import load_config, resolve
from vishwamai_mp.planning import flops_per_token, parameter_count, total_parameters, training_flops_per_token
from vishwamai_mp.planning.cache_costs import cache_forward_flops_per_token, cache_parameters, cache_state_bytes


def flagship(*overrides: str):
    return resolve(load_config("vishwamai-120l", ["cache.enabled=true", *overrides]))


def test_a_module_of_the_flagship_by_hand():
    config = flagship("cache.layers=[7]")
    matrices = 4 * 8192 * 8192 + 8192 * 8 * (8 + 8)
    vectors = 8192 + 8 * (8 * 64 + 8 + 1 + 1024)
    assert cache_parameters(config.cache) == matrices + vectors == 269_504_584
    assert total_parameters(config) - parameter_count(config.model) == 269_504_584


@pytest.mark.parametrize("length", [4096, 32768])
def test_the_default_placement_costs_the_flagship_less_than_a_twentieth(length):
    config = flagship(f"training.sequence_length={length}")
    assert config.cache.layers == list(range(4, 120, 8))
    share = training_flops_per_token(config) / flops_per_token(config.model, length) - 1
    assert share == pytest.approx({4096: 0.0404, 32768: 0.0323}[length], abs=1e-4)


def test_flops_by_counting_reads():
    """64 tokens in segments of 4: a loop over tokens, with and without a limit on what may be read."""
    for limit in (3, 64):
        config = small_config(*SETTINGS, f"cache.retrieve_segments={limit}")
        total = 0.0
        for before in (token // 4 for token in range(64)):
            read = before if before <= limit else limit + 1
            matrices = 2 * (4 * 32 * 32 + 32 * 8 * (8 + 2))
            pooling = 2 * 2 * (2 * 32 + 8 * 8)
            total += matrices + pooling + 4 * 32 * (1 + 2 * read) + (2 * 32 * before if limit == 3 else 0)
        assert cache_forward_flops_per_token(config.cache, 64) * 64 == pytest.approx(total)


def built_parameters() -> tuple[int, int]:
    config, _, (model,) = build(*SETTINGS)
    return sum(p.numel() for p in model.decoder.layers[1].cache.parameters()), cache_parameters(config.cache)


def test_parameters_of_the_built_module(workers):
    built, formula = workers.run(built_parameters, 1)[0]
    assert built == formula


def state_bytes(tokens: int) -> tuple[int, int]:
    module = cache_module("cache.max_cache_length=16")
    with torch.no_grad():
        state = module(hidden_states(tokens, 1))[1]
        for token in hidden_states(6, 1):
            _, state = module(token[None], None, state)
    kept = [*state.written.tensors, state.access, state.content, state.scores]
    return sum(x.numel() for x in kept), cache_state_bytes(module.cache_config, tokens + 6, 4)


@pytest.mark.parametrize("tokens", [9, 20, 200])
def test_memory_of_the_state(workers, tokens):
    """The formula counts bytes of numbers of four; here all are fp64."""
    numbers, formula = workers.run(state_bytes, 1, tokens)[0]
    assert numbers == formula // 4


def test_a_full_cache_of_the_flagship_is_two_gibibytes():
    cache = flagship("cache.layers=[7]").cache
    assert cache_state_bytes(cache, 10**6, 2) / 2**30 == pytest.approx(2.0, rel=0.07)
    assert cache_state_bytes(cache, 10**9, 2) - cache_state_bytes(cache, 10**6, 2) == 0
