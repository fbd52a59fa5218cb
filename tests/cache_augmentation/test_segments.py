"""Where segments lie, against a loop over tokens."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vishwamai_mp.cache_augmentation.segments import locate
from vishwamai_mp.cache_augmentation.write import cut_into_segments

CPU = torch.device("cpu")


def by_loop(documents: list[int], length: int) -> list[tuple[int, int]]:
    """(last token, end of its document) of each segment."""
    found, inside = [], 0
    for place, document in enumerate(documents):
        inside = 0 if place == 0 or document != documents[place - 1] else inside
        inside += 1
        if inside == length:
            end = next((i for i in range(place, len(documents)) if documents[i] != document), len(documents))
            found.append((place, end))
            inside = 0
    return found


@given(st.lists(st.lists(st.integers(0, 1), min_size=19, max_size=19), min_size=1, max_size=3), st.integers(1, 6))
def test_documents_in_rows(steps, length):
    documents = torch.tensor(steps).cumsum(1)
    segments = locate(length, 19, documents, CPU)
    assert segments.last.shape == segments.until.shape == (len(steps), 19 // length)
    for row, ids in enumerate(documents.tolist()):
        wanted = by_loop(ids, length)
        empty = 19 // length - len(wanted)
        assert segments.last[row].tolist() == [last for last, _ in wanted] + [19] * empty
        assert segments.until[row].tolist() == [end for _, end in wanted] + [0] * empty
    x = torch.arange(19)[:, None].expand(19, len(steps))
    cut = cut_into_segments(x, segments)
    for row, ids in enumerate(documents.tolist()):
        for place, (last, _) in enumerate(by_loop(ids, length)):
            assert cut[row, place].tolist() == list(range(last - length + 1, last + 1))


def test_whole_rows_are_rows_of_one_document():
    plain, packed = locate(4, 19, None, CPU), locate(4, 19, torch.zeros(2, 19, dtype=torch.int), CPU)
    assert plain.within is None
    assert plain.last.tolist() == packed.last[:1].tolist() == packed.last[1:].tolist() == [[3, 7, 11, 15]]
    assert plain.until.tolist() == packed.until[:1].tolist() == [[19] * 4]
    x = torch.randn(19, 2, 3)
    assert torch.equal(cut_into_segments(x, plain), cut_into_segments(x, packed))
