"""A program: simulated steps with and without CUDA graphs, and what a capture refuses, in one process of its own.

usage: graph_rules.py [--transformer-engine] < CASES > RESULTS

CASES is a JSON object by name of [world size, rank, [section.key=value ...]]; RESULTS has for each what was counted
without graphs and with them, and "refusals": by what was tried, the error or "".
With the option layers are Transformer Engine's.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    if "--transformer-engine" in sys.argv:
        from vishwamai_mp.runtime.simulated import transformer_engine_double

        assert transformer_engine_double.install()
    import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

    results: dict[str, Any] = {
        name: {key: counted(ranks, rank, [*settings, f"training.cuda_graphs={key}"]) for key in ("false", "true")}
        for name, (ranks, rank, settings) in json.load(sys.stdin).items()
    }
    print(json.dumps({**results, "refusals": refusals(), "pool": pool()}))


def counted(world_size: int, rank: int, settings: list[str]) -> dict[str, Any]:
    """Of a step: kernels with those in graphs, FLOPs, exchanges, waits, launches, graphs and bytes at the peak."""
    from tests.training.layouts import SMALL
    from vishwamai_mp.config import load_config, resolve
    from vishwamai_mp.runtime.simulated import simulated_job
    from vishwamai_mp.training.dry_run import empty_batches, training_step

    config = resolve(load_config(SMALL, settings), world_size)
    with simulated_job(config, world_size, rank) as job, training_step(config, job) as step:
        batches, recorder = empty_batches(config, job), job.recorder
        for number in range(2):
            step.capture()
            recorder.restart()
            result = step.train(batches, number, 1e-3, float("inf"))
        found = {
            "updated": result.updated,
            "kernels": dict(recorder.launches + recorder.replayed),
            "flops": sum(recorder.flops.values()),
            "exchanges": [[one.operation, one.group, one.count, one.bytes] for one in recorder.communications],
            "waits": dict(recorder.waits),
            "launches": sum(recorder.launches.values()),
            "graphs": recorder.launches["graph"],
            "peak": recorder.memory.peak,
            "state": sorted(step.chunks[0].module.state_dict()),
        }
        recorder.restart()
        step.evaluate(batches)
        return {**found, "graphs in evaluation": recorder.launches["graph"]}


def refusals() -> dict[str, str]:
    import torch

    from vishwamai_mp.model.masks import document_bounds

    tried: dict[str, Callable[[torch.Tensor, Any], Any]] = {
        "a number read": lambda x, _: x.sum().item(),
        "a list": lambda x, _: x.tolist(),
        "places of what is not zero": lambda x, _: x.nonzero(),
        "a copy to the host": lambda x, _: x.cpu(),
        "a copy from the host": lambda x, _: x + torch.ones(4).to(x.device),
        "synchronize": lambda _, on: on.synchronize(),
        "the state of random numbers": lambda _, on: on.set_rng_state(torch.empty(0)),
        "another capture": lambda _, on: on.graph(on.CUDAGraph()).__enter__(),
        "a replay": lambda _, on: _empty_graph(on).replay(),
        "documents, by a line of ours": lambda x, _: document_bounds(x[None].int(), 0, 1),
        "a sum": lambda x, _: x.sum(),
    }
    with _job() as (on, device, recorder):
        found = {}
        for name, attempt in tried.items():
            x, error = torch.ones(4, device=device), ""
            waits = recorder.waits.total()
            try:
                with on.graph(on.CUDAGraph()):
                    attempt(x, on)
            except RuntimeError as raised:
                error = str(raised)
            assert not on.is_current_stream_capturing()
            assert recorder.waits.total() == waits
            found[name] = error
        return found


def _empty_graph(on: Any) -> Any:
    from vishwamai_mp.runtime.simulated.recorder import Captured

    graph = on.CUDAGraph()
    graph.captured = Captured()
    return graph


def pool() -> dict[str, int]:
    """Bytes in use, less those before: two graphs of one pool, each with a MiB for the while; then an ordinary MiB."""
    import torch

    with _job() as (on, device, recorder):
        before, handle, seen = recorder.memory.now, on.graph_pool_handle(), {}
        for name in ("one graph", "two graphs"):
            graph = on.CUDAGraph()
            with on.graph(graph, pool=handle):
                torch.empty(2**20, dtype=torch.uint8, device=device).fill_(1)
            seen[name] = recorder.memory.now - before
        launches = recorder.launches.total()
        graph.replay()
        seen["launches of a replay"] = recorder.launches.total() - launches
        seen["kernels in it"] = recorder.replayed.total()
        kept = torch.empty(2**20, dtype=torch.uint8, device=device)
        seen["and a tensor"] = recorder.memory.now - before
        del kept
        seen["without it"] = recorder.memory.now - before
        return seen


def _job() -> Any:
    from contextlib import contextmanager

    import torch

    from tests.training.layouts import SMALL
    from vishwamai_mp.config import load_config, resolve
    from vishwamai_mp.runtime.simulated import simulated_job

    @contextmanager
    def opened() -> Any:
        with simulated_job(resolve(load_config(SMALL, []), 1), 1, 0) as job:
            yield torch.get_device_module("simulated"), job.runtime.device, job.recorder

    return opened()


if __name__ == "__main__":
    main()
