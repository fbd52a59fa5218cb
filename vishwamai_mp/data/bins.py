"""Packing: pieces of given lengths into as few bins of one capacity as best-fit decreasing finds."""

from collections.abc import Sequence

import numpy as np


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Place pieces, longest first, each into the fullest bin that has room for it.

    At most 11/9 of the fewest possible bins and 6/9 of one more (D. S. Johnson 1974; bound by Dósa 2007).

    Args:
        lengths: from 1 to `capacity`.
        capacity: of each bin.

    Returns:
        the pieces (numbers into `lengths`, ascending) of each bin; bins in the order of their first pieces. The same
        for the same lengths, always.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by the room that is left in them
    some = 0  # bit r: there is a bin with room r
    for piece in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        length = int(lengths[piece])
        assert 1 <= length <= capacity
        rooms = some >> length
        if rooms:
            room = length + (rooms & -rooms).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                some ^= 1 << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(piece)
        left = room - length
        with_room[left].append(chosen)
        some |= 1 << left
    for pieces in bins:
        pieces.sort()
    return sorted(bins)
