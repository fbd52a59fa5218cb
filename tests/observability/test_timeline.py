"""Timelines of many ranks stay bounded, and host names are no markup."""

from vishwamai_mp.diagnosis import shared
from vishwamai_mp.diagnosis.shared import Group, Kind, Operation, Phase, Word, pack_event, pack_place
from vishwamai_mp.observability.gantt import drawn_ranks, gantt
from vishwamai_mp.observability.timeline import (
    WAITING,
    RankTimes,
    counters,
    rank_times,
    read_timeline,
    stragglers,
    timeline_of,
)


def ranks(count: int, slow: int) -> list[RankTimes]:
    return [
        RankTimes(
            *(
                rank,
                f"<b>{rank}",
                {"forward pass": 2.0 if rank == slow else 1.0, WAITING: 0.1 if rank == slow else 1.1},
            ),
            spans=[
                (1_000_000, 1000 + rank, Phase.FORWARD, "micro-batch 1"),
                (1_002_000, 500, -1, "all_reduce, tensor"),
            ],
            dropped=3,
        )
        for rank in range(count)
    ]


def test_of_many_ranks_those_that_others_wait_for_are_drawn(tmp_path):
    timeline = timeline_of(100, 50, ranks(200, slow=150))
    assert timeline.slow[0].slowest[0] == (150, "<b>150", 2.0)
    assert len(timeline.slow[0].slowest) == 8
    assert stragglers(timeline) == [
        "rank 150 on <b>150 is slow: forward pass takes it 2 s a step, the median rank 1 s (over 50 steps)"
    ]
    assert 150 in [rank.rank for rank in drawn_ranks(timeline)]
    page = str(gantt(timeline))
    assert page.count("<rect ") == 128
    assert "Of 200 ranks the 64 that wait least" in page
    assert "192 of the shortest bars are left out." in page
    assert "Rows of different machines" in page
    assert "<b>150" not in page
    assert "&lt;b&gt;150" in page
    timeline.write(tmp_path)
    assert read_timeline(tmp_path) == timeline
    assert stragglers(timeline_of(100, 50, ranks(200, slow=999))) == []


def test_a_rank_tells_its_longest_spans_and_its_own_time():
    words = memoryview(bytearray(8 * shared.WORDS)).cast("q")
    before = counters(words)
    words[shared.SECONDS + Phase.FORWARD], words[shared.WAITED + Phase.FORWARD] = 3_000_000_000, 1_000_000_000
    for number in range(1000):
        at = shared.RING + 4 * number
        kind, code = (Kind.WAITED, Operation.receive) if number == 7 else (Kind.PHASE, Phase.FORWARD)
        words[at] = 10**9 + number * 10**6
        words[at + 1] = pack_event(kind, code, 0, 5, 2)
        words[at + 2] = pack_place(0, 3)
        words[at + 3] = 10**6 if number == 7 else 1000 * number
    words[Word.EVENT_COUNT] = 1000
    told = rank_times(2, "h", words, [Group("0", "pipeline", [2, 3])], before, 10, 5, world=4, offset=5 * 10**9)
    assert told.seconds["forward pass"] == 0.2
    assert told.seconds[WAITING] == 0.1
    assert (len(told.spans), told.dropped) == (400, 600)
    assert told.spans[0] == (6_006_000, 1000, -1, "receive rank 3, pipeline")
    assert told.spans[-1] == (6_998_001, 999, Phase.FORWARD, "micro-batch 2")
