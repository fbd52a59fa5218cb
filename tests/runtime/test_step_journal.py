"""What a rank writes down of itself: phases, steps, and every collective, wherever it comes from."""

import time
from typing import Any

import pytest

from tests.workers import WorkerPool
from vishwamai_mp.diagnosis import shared
from vishwamai_mp.diagnosis.shared import Ending, Event, Kind, Operation, Phase, Word
from vishwamai_mp.runtime.step_journal import Journal, journal_open, phase, step


def begun(journal: Journal) -> list[Event]:
    return [event for event in shared.events(journal.words) if event.kind is Kind.BEGINS]


def test_phases_take_turns_and_add_up():
    before = time.monotonic_ns()
    with journal_open(Journal()) as journal:
        time.sleep(0.02)
        with phase(Phase.SAVE):
            time.sleep(0.03)
            assert journal.words[Word.PHASE] == Phase.SAVE
        for number in (1, 2):
            with step(number):
                assert journal.words[Word.PHASE] == Phase.BACKWARD
                for _ in range(2):
                    with phase(Phase.FORWARD):
                        time.sleep(0.01)
                assert journal.words[Word.PASSES] == 2
        with phase(Phase.EVALUATION), phase(Phase.FORWARD):
            assert journal.words[Word.PHASE] == Phase.EVALUATION
    after = time.monotonic_ns()
    words = journal.words
    seconds = {which: words[shared.SECONDS + which] / 1e9 for which in Phase}
    assert seconds[Phase.STARTING] >= 0.02
    assert seconds[Phase.SAVE] >= 0.03
    assert seconds[Phase.FORWARD] >= 0.04
    assert sum(seconds.values()) == pytest.approx((after - before) / 1e9, abs=0.01)
    assert (words[Word.STEP], words[Word.STEPS], words[Word.ENDING]) == (2, 2, Ending.DONE)
    assert all(0.02e9 <= took < 1e9 for took in words[shared.LENGTHS : shared.LENGTHS + 2])
    first = next(e for e in shared.events(words) if e.kind is Kind.PHASE and e.code == Phase.FORWARD)
    assert (first.step, first.passes) == (1, 1)
    assert first.size >= 0.01e9


def test_an_error_is_written_down_where_it_happened():
    journal = Journal()
    with pytest.raises(OSError, match="full"), journal_open(journal), phase(Phase.SAVE):
        raise OSError("full")
    assert (journal.words[Word.PHASE], journal.words[Word.ENDING]) == (Phase.SAVE, Ending.FAILED)


def test_without_a_journal_nothing_is_noted():
    with step(1), phase(Phase.FORWARD):
        pass


def test_old_events_make_room_for_new_ones():
    with journal_open(Journal()) as journal:
        for _ in range(shared.EVENTS):
            with phase(Phase.SAVE):
                pass
        assert journal.words[Word.EVENT_COUNT] == 2 * shared.EVENTS
        assert len(list(shared.events(journal.words))) == shared.EVENTS


def _collectives() -> dict[str, Any]:
    """On two ranks: functions of torch and its object collectives, synchronous or not, messages, groups of one."""
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import ProcessGroup, Work

    functions = ProcessGroup.allreduce, Work.wait
    rank = dist.get_rank()
    alone = dist.new_group([rank], use_local_synchronization=True)
    pair = dist.new_group([0, 1])
    with journal_open(Journal()) as journal:
        dist.all_reduce(torch.ones(3))
        if rank:
            time.sleep(0.1)
        work = dist.all_gather([torch.ones(2), torch.ones(2)], torch.ones(2), group=pair, async_op=True)
        waits_for = journal.words[Word.WAITS_FOR]
        work.wait()
        dist.all_reduce(torch.ones(1), group=alone)
        dist.broadcast_object_list([rank], src=0)
        if rank:
            dist.send(torch.ones(4), 0)
        else:
            dist.recv(torch.ones(4), 1)
        dist.barrier(pair)
    found = [(Operation(e.code).name, journal.groups[e.group].ranks, e.number, e.peer, e.size) for e in begun(journal)]
    waited = [e for e in shared.events(journal.words) if e.kind is Kind.WAITED and e.code == Operation.all_gather]
    return {
        "found": found,
        "waits_for": (waits_for, journal.words[Word.WAITS_FOR]),
        "restored": functions == (ProcessGroup.allreduce, Work.wait),
        "waited": sum(e.size for e in waited) / 1e9,
    }


def test_every_collective_is_seen_at_one_place(workers: WorkerPool):
    for rank, told in enumerate(workers.run(_collectives, 2)):
        assert told["found"] == [
            ("all_reduce", [0, 1], 1, -1, 12),
            ("all_gather", [0, 1], 1, -1, 16),  # of the other group
            ("broadcast", [0, 1], 2, -1, 8),  # of an object: its size, and itself
            ("broadcast", [0, 1], 3, -1, told["found"][3][4]),
            ("send", [0, 1], 0, 0, 16) if rank else ("receive", [0, 1], 0, 1, 16),
            ("barrier", [0, 1], 2, -1, 0),
        ]
        assert told["waits_for"] == (0, 0)
        assert told["restored"]
        if rank == 0:
            assert told["waited"] > 0.05


def _deserted() -> int:
    import torch
    import torch.distributed as dist

    journal = Journal()
    try:
        with journal_open(journal):
            if dist.get_rank():
                raise ValueError("mine")
            dist.all_reduce(torch.ones(1))
    except (ValueError, RuntimeError):
        dist.destroy_process_group()
    return journal.words[Word.ENDING]


def test_an_error_while_waiting_for_others_is_told_from_ones_own(workers: WorkerPool):
    assert workers.run(_deserted, 2) == [Ending.DESERTED, Ending.FAILED]
