#!/usr/bin/env python3
"""Run one training step of any rank of a job on a simulated accelerator: no GPU, no other ranks, no data.

examples:
  python tools/dry_run.py --config tiny --gpus 4 --rank 1 parallel.tensor_model_parallel_size=2
  python tools/dry_run.py --config recipe.yaml --gpus 8192 --rank 0 --json | jq .peak_bytes

The program that trains runs as it is, with tensors that have shapes but no values. Shown are the memory that the rank
needs (tensors only: not the allocator's slack, CUDA's libraries or NCCL's buffers) beside what planning predicts, the
floating point operations and kernels of the step, what it exchanges with which group, and where the host would wait for
the device. Sizes are bytes; in text, binary units (1 GiB = 2^30 B).

Layers are Transformer Engine's where its Python is; a double stands in for what it compiles. To put it there:
  pip install --no-deps --target .venv/transformer_engine transformer-engine==2.20.2  # .venv: the environment's folder
Without it, or with --torch-layers, they are torch's own, and FP8 and NVFP4 are simulated as bf16.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from vishwamai_mp.config import PretrainConfig, load_config, resolve
from vishwamai_mp.config.errors import UserError, run_program
from vishwamai_mp.config.wording import counted
from vishwamai_mp.observability.page import write_page
from vishwamai_mp.planning.hardware import find_gpu


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="R", help="a YAML file or the name of a preset")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks of the whole job")
    parser.add_argument("--rank", type=int, default=0, metavar="K", help="which of them to run (default 0)")
    parser.add_argument("--all-stages", action="store_true", help="run the first rank of each pipeline stage in turn")
    parser.add_argument(
        "--all-ranks", action="store_true", help="run no step: check that all ranks' shards make up the model"
    )
    parser.add_argument(
        "--gpu", metavar="KIND", help="say whether it fits such a GPU, by tools/plan.py's names; else exit 1"
    )
    parser.add_argument("--torch-layers", action="store_true", help="simulate a GPU without Transformer Engine")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text; sizes in bytes")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page too: memory in the course of the step")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if not 0 <= arguments.rank < arguments.gpus:
        last = arguments.gpus - 1
        raise UserError(f"--rank {arguments.rank}: a job of --gpus {arguments.gpus} has ranks 0 to {last}")
    config = resolve(load_config(arguments.config, arguments.overrides), arguments.gpus)
    gpu = find_gpu(arguments.gpu) if arguments.gpu else None
    if not arguments.torch_layers:
        from vishwamai_mp.runtime.simulated import transformer_engine_double

        transformer_engine_double.install()
    if arguments.all_ranks:
        check_all_ranks(config, arguments.gpus, arguments.json)
        return
    # The stack takes seconds to import; mistakes are told before.
    from vishwamai_mp.training.dry_run import dry_run, memory_verdict, render, render_stages

    stages = config.parallel.pipeline_model_parallel_size
    first = [stage * arguments.gpus // stages for stage in range(stages)]  # stages are farthest apart in the order
    runs = [dry_run(config, arguments.gpus, rank) for rank in (first if arguments.all_stages else [arguments.rank])]
    if arguments.json:
        found = [run.to_dict() for run in runs]
        print(json.dumps(found if arguments.all_stages else found[0], indent=1))
    else:
        print("\n\n".join([*map(render, runs), *([render_stages(runs)] if arguments.all_stages else [])]))
    if arguments.html:
        from vishwamai_mp.observability.dry_run_page import dry_run_page

        write_page(arguments.html, dry_run_page(arguments.config, [run.to_dict() for run in runs]), "--html")
    if gpu:
        told = memory_verdict(config, runs, gpu)
        print(told, file=sys.stderr if arguments.json else sys.stdout)


def check_all_ranks(config: PretrainConfig, gpus: int, as_json: bool) -> None:
    from vishwamai_mp.training.shard_tiling import check_tiling

    found = check_tiling(config, gpus, lambda rank: print(f"rank {rank} of {gpus} built", file=sys.stderr))
    if as_json:
        print(json.dumps(asdict(found), indent=1))
    else:
        tensors, ranks = counted(found.tensors, "tensor", ","), counted(found.ranks, "rank", ",")
        print(f"{tensors}, {found.numbers:,} numbers, on {ranks} that differ of {gpus:,}")
    if found.faults:
        raise UserError("the shards do not make up the model:", *(f"  {fault}" for fault in found.faults))
    if not as_json:
        print("every number is on one of them, and on one only")


if __name__ == "__main__":
    run_program(main)
