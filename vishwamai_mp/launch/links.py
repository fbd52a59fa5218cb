"""Links between the processes of a job, for `preflight`: bandwidth of each, and clocks that disagree.

Ranks are taken in a ring, as a collective's traffic runs: link i joins rank i and its neighbour i + 1. Links that share
no rank are measured at the same time, so each link is loaded alone and all are done in two rounds (three where the
number of ranks is odd).
"""

import os
import socket
import statistics
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from vishwamai_mp.config.wording import counted
from vishwamai_mp.launch.checks import Finding, judge

_BYTES = {"nccl": 256 << 20, "gloo": 16 << 20}
_REPEATS, _ROUNDS = 5, 20
_SLOW = 0.5  # of what the table says, or of the median of like links
# NVLink, GB/s in one direction, by a part of the GPU's name: NVIDIA's data sheets, half of the total they state.
_NVLINK_GB_S = {"V100-SXM": 150, "A100": 300, "H100 80GB HBM3": 450, "H200": 450, "B200": 900, "GB200": 900}


def check_links(network_gb_s: float | None, skew_seconds: float) -> list[Finding]:
    """Measure every link of the ring; a collective over all ranks of a launched job.

    Args:
        network_gb_s: what a link between machines should carry, GB/s; None: only compared with its like.
        skew_seconds: by how much clocks may disagree.

    Returns:
        the findings on rank 0, and nothing on the others.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=5))
    try:
        hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(hosts, socket.gethostname())
        speeds, offsets = measure(cuda)
        if dist.get_rank() != 0:
            return []
        name = torch.cuda.get_device_name() if cuda else ""
        return judge_links(hosts, speeds, name, network_gb_s) + judge_clocks(hosts, offsets, skew_seconds)
    finally:
        dist.destroy_process_group()


def measure(cuda: bool) -> tuple[list[float], list[float]]:
    """GB/s of each link, and the seconds by which each rank's clock is ahead of rank 0's (on rank 0)."""
    return _measure_links(cuda), _clock_offsets()


def judge_links(hosts: list[str], speeds: list[float], gpu: str, network_gb_s: float | None) -> list[Finding]:
    """Faults of links by their speed in GB/s; `hosts` is by rank, `speeds[i]` that of rank i and its neighbour."""
    world = len(hosts)
    ends = [(rank, (rank + 1) % world) for rank in range(len(speeds))]
    inside = [hosts[a] == hosts[b] for a, b in ends]
    nvlink = next((speed for part, speed in _NVLINK_GB_S.items() if part in gpu), None)
    faults, lines = [], []
    for (a, b), speed, local in zip(ends, speeds, inside, strict=True):
        link = f"rank {a} ({hosts[a]}) – rank {b} ({hosts[b]})"
        alike = [other for other, same in zip(speeds, inside, strict=True) if same == local]
        table = nvlink if local else network_gb_s
        lines.append(f"{link}: {speed:.2f} GB/s")
        if table is not None and speed < table * _SLOW:
            faults.append(f"{link}: {speed:.2f} GB/s, {table:g} GB/s by the table")
        elif speed < statistics.median(alike) * _SLOW:
            faults.append(f"{link}: {speed:.2f} GB/s, the median of such links is {statistics.median(alike):.2f} GB/s")
    fine = f"{counted(len(speeds), 'link')}, {min(speeds, default=0):.2f} to {max(speeds, default=0):.2f} GB/s"
    return judge("links", faults, fine, links=lines)


def judge_clocks(hosts: list[str], offsets: list[float], allowed: float) -> list[Finding]:
    """Faults of clocks; `offsets` are seconds by which a rank's clock is ahead of rank 0's."""
    ahead = dict(zip(hosts, offsets, strict=True))
    faults = [
        f"the clock of {host} is {abs(offset):.3f} s {'ahead of' if offset > 0 else 'behind'} {hosts[0]}'s; run chrony"
        for host, offset in ahead.items()
        if abs(offset) > allowed
    ]
    worst = max(map(abs, offsets))
    return judge("clocks of machines", faults, f"within {worst:.4f} s", seconds_ahead=ahead)


def _measure_links(cuda: bool) -> list[float]:
    """GB/s of every link, on all ranks. For two ranks, an all-reduce moves its bytes once each way."""
    world, rank = dist.get_world_size(), dist.get_rank()
    count = world if world > 2 else world - 1  # two ranks have one link
    pairs = [(a, (a + 1) % world) for a in range(count)]
    groups = [dist.new_group(sorted(pair)) for pair in pairs]
    values = torch.zeros(_BYTES["nccl" if cuda else "gloo"] // 4, device="cuda" if cuda else "cpu")
    seconds = torch.zeros(count, dtype=torch.float64, device=values.device)
    for turn in _turns(count):
        dist.barrier()
        for link in turn:
            if rank in pairs[link]:
                seconds[link] = _time_all_reduce(values, groups[link])
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return [values.numel() * 4 / 1e9 / second for second in seconds.tolist()]


def _turns(count: int) -> list[list[int]]:
    """Links in groups of which no two share a rank."""
    last = [count - 1] if count % 2 and count > 1 else []
    return [turn for turn in (list(range(0, count - len(last), 2)), list(range(1, count, 2)), last) if turn]


def _time_all_reduce(values: torch.Tensor, group: dist.ProcessGroup) -> float:
    """Seconds of an all-reduce, the median of some after a first one that connects."""
    times = []
    for _ in range(_REPEATS + 1):
        begin = time.perf_counter()
        dist.all_reduce(values, group=group)
        if values.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def _clock_offsets() -> list[float]:
    """Seconds by which each rank's clock is ahead of rank 0's, on rank 0; zeros elsewhere.

    Rank 0 asks, and takes the answer as of the middle of the wait, from the quickest of some rounds (as NTP does).
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    gloo = dist.new_group(backend="gloo")
    offsets = [0.0] * world
    clock = torch.zeros(1, dtype=torch.float64)
    for peer in range(1, world):
        best = float("inf")
        for _ in range(_ROUNDS):
            if rank == 0:
                begin = time.time()
                dist.send(clock, peer, group=gloo)
                dist.recv(clock, peer, group=gloo)
                end = time.time()
                if end - begin < best:
                    best, offsets[peer] = end - begin, clock.item() - (begin + end) / 2
            elif rank == peer:
                dist.recv(clock, 0, group=gloo)
                clock[0] = time.time()
                dist.send(clock, 0, group=gloo)
    return offsets
