"""The transformer layer: what order its parts stand in."""

import pytest
import torch

from tests.model.builds import build

_MEMORY = ["memory.enabled=true", "memory.layers=[0]"]
_CACHE = ["cache.enabled=true", "cache.segment_length=8", "cache.layers=[0]"]


def _registered_and_run(*overrides: str) -> tuple[list[str], list[str]]:
    """Runs in a worker: names of the first layer's parts that have parameters, and the order they run in."""
    _, _, (model,) = build(*overrides)
    layer, ran = model.decoder.layers[0], []
    parts = {name: part for name, part in layer.named_children() if any(True for _ in part.parameters())}
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        model(torch.arange(40)[None])
    return list(parts), ran


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [*_MEMORY, *_CACHE],
        [*_MEMORY, "model.norm_position=sandwich"],
        [*_CACHE, "model.norm_position=post"],
    ],
    ids=["plain", "components", "norms on both sides", "norms behind"],
)
def test_parts_stand_in_the_order_they_run_in(workers, overrides):
    """As buckets of the distributed optimizer are gathered; megatron-core warns where one is needed before its turn."""
    (registered, ran), *_ = workers.run(_registered_and_run, 1, *overrides)
    assert len(ran) >= 4
    assert registered == ran
