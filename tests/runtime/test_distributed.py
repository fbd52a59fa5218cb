"""Process groups and seeds, in real processes."""

import os
from pathlib import Path

import pytest
import torch

from tests.workers import WorkerPool
from vishwamai_mp.config import ConfigError, load_config


def _initialize(layout):
    from vishwamai_mp.runtime import initialize

    return initialize(load_config({"parallel": layout, "training": {"seed": 7, "threads": 1}}))


def _place(layout):
    runtime = _initialize(layout)
    place = (runtime.tensor_rank, runtime.pipeline_rank, runtime.context_rank, runtime.data_rank)
    assert runtime.describe().startswith(f"rank {runtime.rank} (tensor {runtime.tensor_rank}, ")
    assert runtime.device == torch.device("cpu")
    return place, (runtime.is_first_stage, runtime.is_last_stage, runtime.reports), runtime.data_parallel_size


def _alone():
    """As without torchrun: no environment, no group."""
    import torch.distributed as dist

    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    runtime = _initialize({})
    return runtime.rank, runtime.world_size, dist.get_backend()


def _session():
    import torch.distributed as dist

    from vishwamai_mp.runtime import distributed_session

    config = load_config({"training": {"threads": 1}})
    with distributed_session(config) as runtime:
        total = torch.ones(1)
        dist.all_reduce(total, group=runtime.groups.dp)
    return int(total), dist.is_initialized()


def _keep_world():
    import torch.distributed as dist

    from vishwamai_mp.runtime import shutdown

    sizes = []
    for tensor in (2, 1):
        sizes.append(_initialize({"tensor_model_parallel_size": tensor}).groups.tp.size())
        shutdown(keep_world=True)
    return sizes, dist.is_initialized()


def _draws(layout):
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from vishwamai_mp.runtime import seed_step

    runtime = _initialize(layout)
    draws = []
    for step in (3, 4, 3):
        seed_step(7, step, runtime.groups)
        replicated = torch.rand(2).tolist()
        with get_cuda_rng_tracker().fork():
            sharded = torch.rand(2).tolist()
        draws.append((replicated, sharded))
    return draws


def test_ranks_are_laid_out_tensor_first_then_context_data_pipeline(workers: WorkerPool):
    results = workers.run(_place, 4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2})
    assert [place for place, _, _ in results] == [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (1, 1, 0, 0)]
    assert [flags[:2] for _, flags, _ in results] == [(True, False)] * 2 + [(False, True)] * 2
    assert [flags[2] for _, flags, _ in results] == [True, False, False, False]


def test_data_parallelism_is_what_is_left(workers: WorkerPool):
    results = workers.run(_place, 4, {"context_parallel_size": 2})
    assert [place[2:] for place, _, _ in results] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert {size for _, _, size in results} == {2}


@pytest.mark.parametrize("layout", [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}])
def test_a_world_that_does_not_fit_is_refused(workers: WorkerPool, layout):
    with pytest.raises(ConfigError, match=r"3 processes cannot hold .* = 2 ranks .* multiple of 2"):
        workers.run(_place, 3, layout)


def test_without_torchrun_a_process_is_alone(workers: WorkerPool):
    assert workers.run(_alone, 1) == [(0, 1, "gloo")]


def test_a_session_ends_its_groups(workers: WorkerPool):
    assert workers.run(_session, 2) == [(2, False)] * 2


def test_groups_can_be_made_again_in_the_same_world(workers: WorkerPool):
    assert workers.run(_keep_world, 2) == [([2, 1], True)] * 2


def _threads_that_poll():
    def names():
        return [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]

    _initialize({"tensor_model_parallel_size": 2})
    groups = [group for group in torch.distributed.distributed_c10d._world.pg_map if group.size() > 1]
    for group in groups:
        torch.distributed.all_reduce(torch.ones(1), group=group)
    return len(groups), names().count("gloo_tcp_loop")


def test_all_groups_of_a_process_share_the_thread_that_looks_for_messages(workers: WorkerPool):
    for groups, threads in workers.run(_threads_that_poll, 2):
        assert groups > 2
        assert threads == 1


def test_a_step_has_its_own_numbers_on_every_rank(workers: WorkerPool):
    (left, right) = workers.run(_draws, 2, {"tensor_model_parallel_size": 2})
    for draws in (left, right):
        assert draws[0] == draws[2]  # a function of seed and step
        assert draws[0][0] != draws[1][0]
        assert draws[0][1] != draws[1][1]
    assert left[0][0] == right[0][0]  # replicated regions agree,
    assert left[0][1] != right[0][1]  # sharded ones do not


@pytest.mark.parametrize("layout", [{}, {"context_parallel_size": 2}, {"pipeline_model_parallel_size": 2}])
def test_ranks_that_see_other_tokens_or_are_other_layers_draw_other_numbers(workers: WorkerPool, layout):
    (left, right) = workers.run(_draws, 2, layout)
    for own, other in zip(left[0], right[0], strict=True):
        assert own != other


def _tracker_stays():
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from vishwamai_mp.runtime import seed_step

    runtime = _initialize({})
    before = get_cuda_rng_tracker()
    seed_step(7, 3, runtime.groups)
    return get_cuda_rng_tracker() is before


def test_the_tracker_that_layers_were_built_with_is_seeded(workers: WorkerPool):
    assert workers.run(_tracker_stays, 1) == [True]


def _waits_in_vain(allowed):
    """Seconds until a collective that rank 1 does not join fails; before, and once the limit is past, it waits."""
    import time

    import torch.distributed as dist

    from vishwamai_mp.runtime import distributed

    runtime = _initialize({})
    group = runtime.groups.dp_cp
    with distributed.collectives_within(allowed / 60, load_config({}).parallel):
        pass
    if runtime.rank == 1:
        time.sleep(2 * allowed)
    dist.all_reduce(torch.ones(1), group=group)
    if runtime.rank == 1:
        time.sleep(4 * allowed)
        return 0.0
    start = time.monotonic()
    with (
        distributed.collectives_within(allowed / 60, load_config({}).parallel),
        pytest.raises(RuntimeError, match="Timed out"),
    ):
        dist.all_reduce(torch.ones(1), group=group)
    return time.monotonic() - start


def test_a_step_may_wait_for_less_long_than_the_job(workers: WorkerPool):
    waited, _ = workers.run(_waits_in_vain, 2, 1.0)
    assert 0.9 < waited < 3.5


def test_communicators_options_are_what_megatron_core_reads(monkeypatch):
    from types import SimpleNamespace

    import torch.distributed as dist
    import yaml

    from vishwamai_mp.runtime import distributed  # before megatron.core

    # isort: split
    from megatron.core import parallel_state

    config = load_config({"parallel": {"nccl": {"dp_cp": {"max_ctas": 8, "min_ctas": 2}, "tp": {}}}})

    def options(is_high_priority_stream):
        return SimpleNamespace(is_high_priority_stream=is_high_priority_stream, config=SimpleNamespace())

    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=options), raising=False)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda", 0))
    with distributed._nccl_file(config.parallel) as path, open(str(path)) as file:
        read = yaml.safe_load(file)
    made = parallel_state.get_nccl_options("dp_cp", read)
    assert vars(made.config) == {"max_ctas": 8, "min_ctas": 2}
    assert not parallel_state.get_nccl_options("tp", read).is_high_priority_stream
