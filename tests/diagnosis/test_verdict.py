"""Who is found to be at fault, from what ranks are known to do."""

from dataclasses import replace
from typing import Any

from vishwamai_mp.diagnosis.hang_report import to_dict, to_text
from vishwamai_mp.diagnosis.state import Membership, RankState, Wait
from vishwamai_mp.diagnosis.verdict import judge, ranks_text


def rank(number: int, *collectives: tuple[str, int], waits: bool = True, group: str = "0", **known: Any) -> RankState:
    """One of four ranks in a group of all; it did these collectives, and waits in the last of them."""
    last = collectives[-1] if collectives else ("barrier", 0)
    recent = [(i + 1, *collective) for i, collective in enumerate(collectives)]
    state = RankState(
        *(number, f"host{number // 2}", 100 + number, "sleeping", 0.1, 0.0, "none", "backward passes", 9.0, 5.0, 7, 1),
        waiting=Wait(last[0], group, len(recent), -1, last[1], 8.0) if waits else None,
        groups={group: Membership("world", [0, 1, 2, 3], len(recent), recent)},
    )
    return replace(state, **known)


def ranks(*states: RankState) -> dict[int, RankState]:
    return {state.rank: state for state in states}


SUM, SMALL_SUM, GATHER = ("all_reduce", 8), ("all_reduce", 4), ("all_gather", 8)


def test_nothing_is_wrong_as_long_as_nobody_is_late():
    assert judge(2, ranks(rank(0, SUM, seconds=1.0), rank(1, waits=False, seconds=1.0))) is None


def test_the_rank_that_has_not_come_is_named_and_what_the_others_wait_in():
    states = ranks(rank(0, SUM, SUM), rank(1, SUM, SUM), rank(2, SUM, waits=False, phase="saving"), rank(3, SUM, SUM))
    found = judge(4, states)
    assert found is not None
    assert (found.ranks, found.why, found.waiting) == ([2], "busy for too long: saving", [0, 1, 3])
    assert found.operation == "all_reduce, number 2 of world (ranks 0-3), 8 bytes"


def test_what_may_take_as_long_is_no_hang():
    states = ranks(rank(0, SUM, SUM), rank(1, SUM, waits=False, phase="saving", limit=60.0))
    assert judge(2, states) is None


def test_the_end_of_a_chain_of_waiting_ranks_is_named():
    """0 and 3 wait in a collective for 1 and 2; 1 for a message of 2, which computes."""
    first = rank(0, SUM, SUM)
    second = replace(rank(1, SUM), waiting=Wait("receive", "0", 0, 2, 64, 8.0))
    found = judge(4, ranks(first, second, rank(2, SUM, waits=False), rank(3, SUM, SUM)))
    assert found is not None
    assert found.ranks == [2]
    assert found.operation == "all_reduce, number 2 of world (ranks 0-3), 8 bytes"
    assert found.waiting == [0, 1, 3]


def test_dead_silent_and_stopped_ranks_are_named_before_those_that_are_late():
    healthy = [rank(0, SUM, SUM), rank(1, SUM, SUM)]
    late = rank(2, SUM, waits=False)
    for state, why in ((rank(3, SUM, process="dead"), "dead"), (rank(3, SUM, process="stopped"), "stopped")):
        found = judge(4, ranks(*healthy, late, state))
        assert found is not None
        assert found.ranks == [3]
        assert found.why.startswith(why)
        assert found.is_ending == (why == "dead")
    found = judge(4, ranks(*healthy, late))
    assert found is not None
    assert (found.ranks, found.why.split(":")[0]) == ([3], "silent")


def test_a_rank_that_stopped_within_a_collective_is_waited_for():
    found = judge(4, ranks(rank(0, SUM), rank(1, SUM), rank(2, SUM), rank(3, SUM, process="stopped", waits=False)))
    assert found is not None
    assert found.operation == "all_reduce, number 1 of world (ranks 0-3), 8 bytes"


def test_an_error_of_a_rank_is_its_own_explanation():
    assert judge(2, ranks(rank(0, SUM, SUM, ending="deserted"), rank(1, SUM, ending="failed"))) is None


def test_the_rank_that_left_out_a_collective_is_named_where_it_did():
    states = ranks(*(rank(i, GATHER, SUM, SMALL_SUM) for i in (0, 1, 3)), rank(2, GATHER, SMALL_SUM, GATHER))
    found = judge(4, states)
    assert found is not None
    assert found.ranks == [2]
    assert found.operation == (
        "number 2 of world (ranks 0-3): all_reduce of 4 bytes on rank 2; all_reduce of 8 bytes on the others"
    )


def test_two_ranks_that_differ_are_judged_by_groups_like_theirs():
    """Tensor parallel pairs (0, 1) and (2, 3): only rank 2 is unlike three others."""
    pairs = {0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]}
    states = {}
    for number, members in pairs.items():
        done = [SMALL_SUM] if number == 2 else [SUM]
        state = rank(number, *done, group=str(members[0]))
        described = replace(state.groups[str(members[0])], description="tensor", ranks=members)
        states[number] = replace(
            state, groups={str(members[0]): described}, waiting=state.waiting if number > 1 else None
        )
    found = judge(4, states)
    assert found is not None
    assert found.ranks == [2]
    del states[0], states[1]
    found = judge(2, {0: replace(states[2], rank=0), 1: replace(states[3], rank=1)})
    assert found is not None
    assert found.ranks == [0, 1]  # undecided: both are named, with what each did


def test_a_circle_names_the_rank_that_most_wait_for():
    """Rank 2 is one collective behind in the group of all, and waits in one of its own that nobody else is in."""
    behind = rank(2, SUM)
    lost = {**behind.groups, "9": Membership("pair", [1, 2], 1, [(1, "barrier", 0)])}
    behind = replace(behind, groups=lost, waiting=Wait("barrier", "9", 1, -1, 0, 8.0))
    found = judge(4, ranks(*(rank(i, SUM, SUM) for i in (0, 1, 3)), behind))
    assert found is not None
    assert found.ranks == [2]


def test_where_all_wait_in_the_same_place_the_network_is_named():
    found = judge(4, ranks(*(rank(i, SUM) for i in range(4))))
    assert found is not None
    assert found.ranks == []
    assert "network" in found.why
    assert found.operation == "all_reduce, number 1 of world (ranks 0-3), 8 bytes"


def test_states_survive_the_way_between_machines_and_the_report_is_bounded(tmp_path):
    states = ranks(*(rank(i, *[SUM] * 100, stacks=[["a.py:1 f"] * 50]) for i in range(3)), rank(3, SUM, waits=False))
    assert {i: RankState.from_dict(state.to_dict()) for i, state in states.items()} == states
    found = judge(4, states)
    assert found is not None
    text = to_text(found, states, tmp_path)
    assert text.startswith("the job hangs: rank 3 (host1, process 103): busy for too long: backward passes\n")
    assert "ranks wait: 0-2" in text
    assert (
        "rank 0 on host0: step 7, backward passes, micro-batch 1 for 9 s (at most 5), waits 8 s in all_reduce" in text
    )
    assert len(to_dict(found, states)["ranks"][0]["groups"]["0"]["recent"]) == 8


def test_runs_of_ranks_are_short():
    assert ranks_text([3, 0, 1, 2, 9]) == "0-3, 9"
    assert ranks_text(range(0, 80, 2)).endswith(", 22 and 28 more")
