#!/usr/bin/env bash
# Pretraining on this machine: one process per GPU, or NPROC processes on the CPU.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'TEXT'
Pretrain on this machine: one process per GPU, or on the CPU over gloo.

usage: bash launch/torchrun_single_node.sh --config R.yaml [--dry-run] [--links] [section.key=value ...]

  --config R      recipe (.yaml, .json) or preset's name
  --dry-run       check everything, print the command, start nothing
  --links         measure the links between all ranks instead of training (vishwamai_mp/launch/preflight.py)

environment:
  NPROC           processes; default: one per visible GPU, 1 on the CPU
  GPUS_PER_NODE   GPUs that must be visible (SLURM_GPUS_ON_NODE)
  MAX_RESTARTS    restarts of all processes after a failure; training resumes from its last checkpoint (default 0).
                  A mistake in the settings and a lack of memory are not retried
  LOG_DIR         one file per rank below it (default logs)
  PYTHON          default: the active virtual environment's, then .venv's

example: NPROC=2 bash launch/torchrun_single_node.sh --config tiny parallel.tensor_model_parallel_size=2
TEXT
}

parse_arguments "$@"
find_python
check_package
choose_processes
check_config "$NPROC"
set_environment
# The rendezvous takes a free port by itself: jobs side by side do not collide.
launch --nnodes 1 --rdzv-backend c10d --rdzv-endpoint localhost:0 --rdzv-id "single-$$"
