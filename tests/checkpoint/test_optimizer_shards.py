"""Stretches of a tensor's numbers as boxes."""

import math

import pytest
import torch

from vishwamai_mp.checkpoint.optimizer_shards import boxes


@pytest.mark.parametrize("shape", [(7,), (5, 3), (3, 1), (1, 6), (2, 3, 4), (3, 2, 2, 2)])
def test_boxes_are_the_stretch(shape):
    """Each number once, in its place; and of a matrix never more than three boxes."""
    whole = torch.arange(math.prod(shape)).view(shape)
    for low in range(whole.numel()):
        for high in range(low + 1, whole.numel() + 1):
            stretch, found = whole.flatten()[low:high], torch.full(shape, -1)
            cut = list(boxes(shape, low, high))
            for offsets, sizes, before in cut:
                place = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
                assert (found[place] == -1).all()
                found[place] = stretch[before : before + math.prod(sizes)].view(sizes)
            assert found[found >= 0].tolist() == stretch.tolist()
            assert torch.equal(found[found >= 0], whole[found >= 0])
            assert len(shape) > 2 or len(cut) <= 3
