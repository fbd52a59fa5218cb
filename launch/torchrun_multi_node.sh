#!/usr/bin/env bash
# Pretraining on several machines: run it on each, with the same arguments, MASTER_ADDR and MASTER_PORT.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'TEXT'
Pretrain on several machines. Run it once on each (under Slurm: srun --ntasks-per-node=1).

usage: bash launch/torchrun_multi_node.sh --config R.yaml [--dry-run] [--links] [section.key=value ...]

  --config R      recipe (.yaml, .json) or preset's name; on every machine
  --dry-run       check everything, print the command, start nothing
  --links         measure the links between all ranks instead of training (vishwamai_mp/launch/preflight.py)

environment, with Slurm's own as fallbacks:
  NNODES          machines (SLURM_NNODES)
  NODE_RANK       this machine's number from 0 (SLURM_NODEID); machine 0 holds the rendezvous
  MASTER_ADDR     machine 0, as the others reach it (first of SLURM_JOB_NODELIST)
  MASTER_PORT     free port on it (default 29500)
  NPROC           processes per machine; default: one per visible GPU, 1 on the CPU
  GPUS_PER_NODE   GPUs that must be visible on each (SLURM_GPUS_ON_NODE)
  JOB_ID          name of the rendezvous, equal on all machines (SLURM_JOB_ID; default: vishwamai)
  MAX_RESTARTS    restarts of all processes after a failure; training resumes from its last checkpoint (default 3).
                  A mistake in the settings and a lack of memory are not retried
  LOG_DIR         a folder per machine below it, with one file per rank (default logs)
  PYTHON          default: the active virtual environment's, then .venv's
  NCCL_*          handed on, for example NCCL_SOCKET_IFNAME, NCCL_IB_HCA

example: NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash launch/torchrun_multi_node.sh --config 7b
TEXT
}

# First machine of Slurm's list; scontrol expands names such as node[01-16].
first_slurm_node() {
    [[ -n "${SLURM_JOB_NODELIST:-}" ]] || return 0
    if command -v scontrol >/dev/null; then
        scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1
    fi
}

read_environment() {
    NNODES="${NNODES:-${SLURM_NNODES:-}}"
    NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-}}"
    MASTER_ADDR="${MASTER_ADDR:-$(first_slurm_node)}"
    MASTER_PORT="${MASTER_PORT:-29500}"
    JOB_ID="${JOB_ID:-${SLURM_JOB_ID:-vishwamai}}"
    [[ -n "$NNODES" ]] || fail "NNODES is not set; give the number of machines"
    [[ -n "$NODE_RANK" ]] || fail "NODE_RANK is not set; give this machine's number, 0 to NNODES-1"
    check_number NNODES "$NNODES" 1 100000
    check_number NODE_RANK "$NODE_RANK" 0 $((10#$NNODES - 1))
    export NODE_RANK # a launcher that waits names the machines that are missing
    check_number MASTER_PORT "$MASTER_PORT" 1024 65535
    [[ -n "$MASTER_ADDR" ]] || fail "MASTER_ADDR is not set; give machine 0's address"
}

MAX_RESTARTS="${MAX_RESTARTS:-3}"
parse_arguments "$@"
read_environment
find_python
check_package
choose_processes
check_config $((10#$NNODES * 10#$NPROC))
check_resolvable "$MASTER_ADDR"
if ((10#$NODE_RANK == 0)); then
    check_port_free "$MASTER_PORT"
elif [[ "$MASTER_ADDR" == localhost || "$MASTER_ADDR" == 127.* ]]; then
    echo "warning: MASTER_ADDR=$MASTER_ADDR is this machine, and NODE_RANK=$NODE_RANK is not machine 0" >&2
fi
set_environment
LOG_DIR="$LOG_DIR/node_$NODE_RANK"
launch --nnodes "$NNODES" --rdzv-backend c10d \
    --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$JOB_ID" \
    --rdzv-conf "is_host=$((10#$NODE_RANK == 0)),join_timeout=900"
