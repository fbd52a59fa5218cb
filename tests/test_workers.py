"""The pool of gloo workers itself: results, errors, hangs, deaths, and what one run leaves for the next."""

import os
import signal
import time

import pytest

from tests.workers import RemoteTraceback, WorkerError, WorkerPool, WorkerTimeoutError
from vishwamai_mp.config import ConfigError


def _sum_of_ranks(factor, *, offset=0):
    import torch
    import torch.distributed as dist

    value = torch.tensor([dist.get_rank() * factor])
    dist.all_reduce(value)
    return int(value) + offset, int(os.environ["RANK"]), dist.get_world_size(), torch.get_num_threads(), os.getpid()


def _raise_on(rank):
    import torch
    import torch.distributed as dist

    if dist.get_rank() == rank:
        raise ConfigError(f"model.width=3 on rank {rank}")
    dist.all_reduce(torch.ones(1))  # never answered


class _UnpicklableError(Exception):
    def __init__(self, left, right):
        super().__init__(f"{left}-{right}")


def _raise_unpicklable():
    raise _UnpicklableError("a", "b")


def _hang():
    time.sleep(1000)


def _die(rank):
    import torch
    import torch.distributed as dist

    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def _exit():
    raise SystemExit(3)


def _leave_a_mess(tensor_parallel_size):
    import torch

    from vishwamai_mp.config import load_config
    from vishwamai_mp.runtime import initialize

    os.environ["LEFT_BEHIND"] = "1"
    torch.set_default_dtype(torch.float64)
    runtime = initialize(load_config({"parallel": {"tensor_model_parallel_size": tensor_parallel_size}}))
    return runtime.tensor_rank


def _look_for_a_mess():
    import torch
    from megatron.core import parallel_state

    return "LEFT_BEHIND" in os.environ, torch.get_default_dtype() == torch.float32, parallel_state.is_initialized()


def test_results_come_by_rank(workers: WorkerPool):
    results = workers.run(_sum_of_ranks, 3, 10, offset=5)
    assert [result[:4] for result in results] == [(35, rank, 3, 1) for rank in range(3)]


def test_processes_are_kept_between_runs(workers: WorkerPool):
    first = [result[-1] for result in workers.run(_sum_of_ranks, 2, 1)]
    second = [result[-1] for result in workers.run(_sum_of_ranks, 2, 1)]
    assert first == second
    assert os.getpid() not in first


def test_one_process_is_a_world_too(workers: WorkerPool):
    assert workers.run(_sum_of_ranks, 1, 7)[0][:4] == (0, 0, 1, 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_comes_back_with_its_type_and_traceback(workers: WorkerPool, rank):
    with pytest.raises(ConfigError, match=f"on rank {rank}") as caught:
        workers.run(_raise_on, 2, rank)
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert f"rank {rank}:" in str(caught.value.__cause__)
    assert "in _raise_on" in str(caught.value.__cause__)
    assert len(workers.run(_sum_of_ranks, 2, 1)) == 2


def test_an_exception_that_cannot_be_pickled_comes_back_as_text(workers: WorkerPool):
    with pytest.raises(WorkerError, match="_UnpicklableError: a-b"):
        workers.run(_raise_unpicklable, 1)


def test_a_hang_ends_with_the_stacks(workers: WorkerPool):
    start = time.monotonic()
    with pytest.raises(WorkerTimeoutError, match=r"ranks \[0, 1\](?s:.*)in _hang"):
        workers.run_within(4, _hang, 2)
    assert time.monotonic() - start < 15
    assert len(workers.run(_sum_of_ranks, 2, 1)) == 2


def test_a_death_is_named_and_the_worker_replaced(workers: WorkerPool):
    with pytest.raises(WorkerError, match=r"rank 1: .*exit code -9"):
        workers.run(_die, 2, 1)
    assert len(workers.run(_sum_of_ranks, 2, 1)) == 2


def test_an_exit_does_not_end_the_worker_silently(workers: WorkerPool):
    with pytest.raises(SystemExit):
        workers.run(_exit, 1)


def test_nothing_is_left_behind(workers: WorkerPool):
    assert workers.run(_leave_a_mess, 2, 2) == [0, 1]
    assert workers.run(_look_for_a_mess, 2) == [(False, True, False)] * 2
    assert workers.run(_leave_a_mess, 2, 1) == [0, 0]


def test_a_world_beyond_the_pool_is_refused(workers: WorkerPool):
    with pytest.raises(ValueError, match="1 to 8"):
        workers.run(_sum_of_ranks, 9, 1)
