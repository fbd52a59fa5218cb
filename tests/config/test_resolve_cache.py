"""The cache's section: what is derived, and what is refused with key, value and mend."""

import pytest

from vishwamai_mp.config import ConfigError, load_config, resolve

_ON = "cache.enabled=true"
_CONTEXT, _PACKED = "parallel.context_parallel_size=2", "data.reset_attention_mask=true"


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [(1, [0]), (2, [1]), (8, [4]), (12, [4]), (32, [4, 12, 20, 28]), (120, list(range(4, 120, 8)))],
)
def test_one_layer_in_eight_by_default(layers, chosen):
    cache = resolve(load_config({}, [_ON, f"model.num_layers={layers}"])).cache
    assert (cache.layers, cache.hidden_size) == (chosen, 512)


def test_resolving_again_changes_nothing():
    once = resolve(load_config({}, [_ON]))
    assert resolve(once) == once


def test_a_cache_that_is_off_is_not_looked_at():
    assert resolve(load_config({}, ["cache.num_heads=7", "cache.layers=[99]"])).cache.layers == [99]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["cache.hidden_size=256"],
            [
                "cache.hidden_size=256",
                "model.hidden_size=512",
                "use 512 or leave it out (cache.hidden_size=null undoes a recipe's)",
            ],
        ),
        (["cache.dropout=1"], ["cache.dropout=1.0", "from 0 to below 1"]),
        (["cache.max_cache_length=4"], ["cache.max_cache_length=4", "cache.latents_per_segment=8", "use a multiple"]),
        (["cache.layers=[8]"], ["cache.layers=[8]", "model.num_layers=8", "from 0 to 7"]),
        (["cache.layers=[1,1]"], ["cache.layers=[1, 1]", "once"]),
        (["cache.layers=[]"], ["cache.layers=[]", "leave it out"]),
        (["training.sequence_length=32"], ["sequence_length=32", "cache.segment_length=64", "shorten segments"]),
        (
            ["cache.carry_state=true", "training.sequence_length=96"],
            ["training.sequence_length=96", "cache.segment_length=64", "change one"],
        ),
        (
            [_CONTEXT, _PACKED, "cache.retrieve_segments=2"],
            ["reset_attention_mask=true", "context_parallel_size=2", "cache.retrieve_segments to 8"],
        ),
        (
            [_CONTEXT, _PACKED, "data.consecutive=true", "cache.carry_state=true"],
            ["context_parallel_size=2", "cache.retrieve_segments to 8200"],
        ),
        (
            [_CONTEXT, "training.sequence_length=384", "cache.retrieve_segments=2"],
            ["training.sequence_length=384", "cache.segment_length 64", "cache.retrieve_segments to 6"],
        ),
    ],
)
def test_refused(overrides, parts):
    with pytest.raises(ConfigError) as error:
        resolve(load_config({}, [_ON, *overrides]))
    assert all(part in str(error.value) for part in parts), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("overrides", [[_CONTEXT, _PACKED], [_CONTEXT, "cache.retrieve_segments=2"]])
def test_accepted(overrides):
    resolve(load_config({}, [_ON, *overrides]))
