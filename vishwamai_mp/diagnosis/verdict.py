"""Who waits for whom, and which rank is at fault."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from vishwamai_mp.diagnosis.shared import Operation
from vishwamai_mp.diagnosis.state import DEAD, STOPPED, TRACED, Membership, RankState, Wait

_Kind = tuple[str, int]  # of a collective: operation, and bytes where all ranks must bring as many


@dataclass(frozen=True)
class Verdict:
    """Of a job that does not go on.

    Attributes:
        ranks: at fault; empty where all wait in the same place, so that the network is.
        why: what is the matter with them.
        operation: what the others wait in, or what the ranks at fault do otherwise than they; may be empty.
        waiting: the ranks that wait, directly or through others.
        is_ending: the job ends by itself: a rank is dead, or others have given up waiting.
    """

    ranks: list[int]
    why: str
    operation: str
    waiting: list[int]
    is_ending: bool = False


def judge(world_size: int, states: Mapping[int, RankState]) -> Verdict | None:
    """What is known when a rank is late, dead or deserted; None: nothing is wrong yet, or an error has said it already.

    A rank that waits in a collective waits for the ranks of the group that have not begun as many as it has; in a
    message, for the other rank. Whoever does not wait, and is waited for, holds up the rest. In that order: dead ranks,
    silent ones, stopped ones, ranks that did another collective than their peers, and those that are not there yet.

    Args:
        world_size: ranks of the job.
        states: by rank. Those that are not there did not answer.
    """
    if any(state.ending == "failed" for state in states.values()):
        return None
    deserted = any(state.ending == "deserted" for state in states.values())
    dead = [rank for rank, state in states.items() if state.process == DEAD and state.ending == "none"]
    if not dead and not deserted and not any(state.is_late for state in states.values()):
        return None
    found = _judge(world_size, states, dead, deserted)
    return None if found is None else replace(found, is_ending=bool(dead) or deserted)


def _judge(world_size: int, states: Mapping[int, RankState], dead: list[int], deserted: bool) -> Verdict | None:
    blockers = {rank: _blockers(rank, states) for rank in states}
    silent = sorted(set(range(world_size)) - set(states))
    stopped = [rank for rank, state in states.items() if state.process in (STOPPED, TRACED)]
    odd = _odd_one(states, blockers)
    if odd is not None and set(odd.ranks) & set(dead):  # gloo ends a process that gets more than it expects
        return replace(odd, why=f"{odd.why}; its process is dead of it")
    for ranks, why in (
        (dead, "dead: its process was killed or crashed"),
        (silent, "silent: its machine, or what watches there, gives no answer"),
        (stopped, "stopped: its process was sent SIGSTOP, or a debugger holds it"),
    ):
        if ranks:
            return _verdict(ranks, why, states, blockers)
    return odd or _missing_one(states, blockers, deserted)


def _blockers(rank: int, states: Mapping[int, RankState]) -> set[int]:
    """The ranks that a rank waits for itself."""
    wait = states[rank].waiting
    if wait is None or wait.group not in states[rank].groups:
        return set()
    if wait.peer >= 0:
        return {wait.peer}
    members = [member for member in states[rank].groups[wait.group].ranks if member != rank]
    behind = {member for member in members if _begun(states.get(member), wait.group) < wait.number}
    return behind or {m for m in members if m in states and states[m].process in (DEAD, STOPPED, TRACED)}


def _begun(state: RankState | None, group: str) -> int:
    return state.groups[group].count if state is not None and group in state.groups else 0


def _verdict(
    ranks: Iterable[int],
    why: str,
    states: Mapping[int, RankState],
    blockers: Mapping[int, set[int]],
    operation: str = "",
) -> Verdict:
    ranks = sorted(ranks)
    direct = [rank for rank, found in blockers.items() if found & set(ranks) and rank not in ranks]
    waits = Counter(describe_wait(wait, states[rank]) for rank in direct if (wait := states[rank].waiting))
    waiting = [rank for rank, state in states.items() if state.waiting is not None and rank not in ranks]
    return Verdict(ranks, why, operation or (waits.most_common(1)[0][0] if waits else ""), sorted(waiting))


def _odd_one(states: Mapping[int, RankState], blockers: Mapping[int, set[int]]) -> Verdict | None:
    """Ranks whose collective of some number in a group is not that of the others: one was left out, or another done."""
    waited = {state.waiting.group for state in states.values() if state.waiting is not None}
    for name in sorted(waited):
        members = {rank: state.groups[name] for rank, state in states.items() if name in state.groups}
        if not members:
            continue
        group = next(iter(members.values()))
        for number, done in sorted(_done(members).items()):
            if len(set(done.values())) < 2:
                continue
            odd = _minority(done, _elsewhere(states, group.description, name, number))
            texts = [f"{_kind_text(*done[rank])} on rank {rank}" for rank in odd]
            usual = {kind for rank, kind in done.items() if rank not in odd}
            texts += [f"{_kind_text(*kind)} on the others" for kind in usual]
            operation = f"number {number} of {_group_text(group.description, group.ranks)}: {'; '.join(texts)}"
            why = "not where its peers are: it left out a collective, or did another"
            return _verdict(odd, why, states, blockers, operation)
    return None


def _done(members: Mapping[int, Membership]) -> dict[int, dict[int, _Kind]]:
    """By number and rank, what was done."""
    done: dict[int, dict[int, _Kind]] = {}
    for rank, group in members.items():
        for number, operation, size in group.recent:
            done.setdefault(number, {})[rank] = (operation, size if Operation[operation].has_one_size else 0)
    return done


def _minority(done: Mapping[int, _Kind], elsewhere: Counter[_Kind]) -> list[int]:
    """The ranks that did what fewer did; where that is undecided in the group, what fewer did in groups like it."""
    kinds = Counter(done.values())
    most = max(kinds.values())
    usual = [kind for kind, count in kinds.items() if count == most]
    if len(usual) > 1:
        seen = max(elsewhere[kind] for kind in usual)
        usual = [kind for kind in usual if elsewhere[kind] == seen]
    return sorted(rank for rank, kind in done.items() if len(usual) > 1 or kind != usual[0])


def _elsewhere(states: Mapping[int, RankState], description: str, name: str, number: int) -> Counter[_Kind]:
    """What ranks did as their collective of this number in the other groups of this description."""
    others = [
        {rank: group}
        for rank, state in states.items()
        for other, group in state.groups.items()
        if other != name and group.description == description
    ]
    return Counter(kind for members in others for kind in _done(members).get(number, {}).values())


def _missing_one(states: Mapping[int, RankState], blockers: Mapping[int, set[int]], deserted: bool) -> Verdict | None:
    """The ranks that wait for nobody and hold up others; where all wait for each other, the one most wait for."""
    votes = Counter(rank for found in blockers.values() for rank in found)
    free = [rank for rank, state in states.items() if state.waiting is None and state.ending in ("none", "done")]
    late = [
        rank for rank in free if states[rank].is_late or deserted or (rank in votes and states[rank].ending == "done")
    ]
    guilty = [rank for rank in late if rank in votes] or late
    if guilty:
        first = states[guilty[0]]
        doing = "its training has ended" if first.ending == "done" else f"busy for too long: {first.phase}"
        return _verdict(guilty, doing, states, blockers)
    if any(rank in votes for rank in free):
        return None  # what holds the others up may take as long as this
    if votes:
        guilty = [rank for rank, count in votes.items() if count == max(votes.values())]
        return _verdict(guilty, "waiting elsewhere, for ranks that wait for it", states, blockers)
    return _verdict(
        [], "all ranks wait in the same place: the network between them", states, blockers, _any_wait(states)
    )


def _any_wait(states: Mapping[int, RankState]) -> str:
    return next((describe_wait(state.waiting, state) for state in states.values() if state.waiting), "")


def describe_wait(wait: Wait, state: RankState) -> str:
    """An operation in words."""
    if wait.group not in state.groups:
        return wait.operation
    group = state.groups[wait.group]
    size = f", {wait.size:,} bytes" if wait.size else ""
    if wait.peer >= 0:
        way = "to" if wait.operation == Operation.send.name else "from"
        return f"{wait.operation} {way} rank {wait.peer} in {_group_text(group.description, group.ranks)}"
    return f"{wait.operation}, number {wait.number} of {_group_text(group.description, group.ranks)}{size}"


def _kind_text(operation: str, size: int) -> str:
    return f"{operation} of {size:,} bytes" if size else operation


def _group_text(description: str, ranks: Sequence[int]) -> str:
    return f"{description} (ranks {ranks_text(ranks)})"


def ranks_text(ranks: Sequence[int]) -> str:
    """Ranks in words, runs of them as 0-7."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(texts[:12]) + (f" and {len(texts) - 12} more" if len(texts) > 12 else "")
