# shellcheck shell=bash
# What the launchers share: messages, checks of this machine, and the command that starts the processes. Sourced, never run.

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    echo "error: $*" >&2
    exit 1
}

# The Python of the active environment, else of the repository's .venv, else the system's.
find_python() {
    if [[ -n "${PYTHON:-}" ]]; then
        command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON: no such program; unset it or give a Python 3.11"
    elif [[ -n "${VIRTUAL_ENV:-}" && -x "$VIRTUAL_ENV/bin/python" ]]; then
        PYTHON="$VIRTUAL_ENV/bin/python"
    elif [[ -x "$HERE/.venv/bin/python" ]]; then
        PYTHON="$HERE/.venv/bin/python"
    else
        PYTHON="$(command -v python3 || true)"
        [[ -n "$PYTHON" ]] || fail "no Python found; install Python 3.11 or set PYTHON"
    fi
}

check_package() {
    export PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}"
    local module
    for module in torch megatron.core vishwamai_mp; do
        "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)" 2>/dev/null ||
            fail "$PYTHON cannot import $module; run: pip install -c constraints.txt -e . (or set PYTHON)"
    done
}

# The package reads the recipe (or preset) without torch, in a moment, and says what does not fit this many processes.
check_config() { # processes in all
    [[ -n "$CONFIG" ]] || fail "--config is missing; give a recipe such as my_run.yaml, or a preset such as tiny"
    "$PYTHON" - "$1" "$CONFIG" "${OVERRIDES[@]}" <<'PY' || exit 1
import sys
from vishwamai_mp.config import load_config, resolve, run_program
run_program(lambda: resolve(load_config(sys.argv[2], sys.argv[3:]), int(sys.argv[1])) and 0)
PY
}

check_number() { # name, value, least, most
    if ! [[ "$2" =~ ^[0-9]{1,6}$ ]] || ((10#$2 < $3 || 10#$2 > $4)); then
        fail "$1=$2: use a number from $3 to $4"
    fi
}

gpus_visible() {
    # Without a driver there is nothing to ask torch, whose import takes seconds.
    if ! command -v nvidia-smi >/dev/null && ! compgen -G '/dev/nvidia[0-9]*' >/dev/null && [[ ! -e /dev/dxg ]]; then
        echo 0
        return 0
    fi
    "$PYTHON" -W ignore -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)'
}

# Sets GPUS, those visible, and NPROC, the processes on this machine: as asked, else one per GPU, else one.
choose_processes() {
    local requested="${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}"
    GPUS="$(gpus_visible)" || fail "$PYTHON cannot ask torch for GPUs; try: $PYTHON -c 'import torch'"
    if [[ -z "${NPROC:-}" && -n "$requested" ]]; then
        check_number GPUS_PER_NODE "$requested" 1 1024
        ((GPUS == requested)) ||
            fail "$requested GPUs requested, $GPUS visible; set GPUS_PER_NODE=$GPUS or CUDA_VISIBLE_DEVICES, or NPROC on a CPU"
    fi
    NPROC="${NPROC:-$((GPUS > 0 ? GPUS : 1))}"
    check_number NPROC "$NPROC" 1 1024
    ((GPUS == 0 || GPUS == NPROC)) || fail "NPROC=$NPROC, $GPUS GPUs visible; set NPROC=$GPUS or CUDA_VISIBLE_DEVICES"
}

check_port_free() {
    "$PYTHON" - "$1" <<'PY' || fail "port $1 is taken on this machine; set MASTER_PORT to a free one"
import socket, sys
with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind(("", int(sys.argv[1])))
    except OSError:
        sys.exit(1)
PY
}

check_resolvable() {
    "$PYTHON" -c 'import socket, sys; socket.getaddrinfo(sys.argv[1], None)' "$1" 2>/dev/null ||
        fail "MASTER_ADDR=$1 does not resolve on $(hostname); give an address that every machine reaches"
}

# Settings that training relies on; what the user has set stays.
set_environment() {
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the program shares the cores itself
    export PYTHONUNBUFFERED=1
    ((GPUS > 0)) || return 0
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
    export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}" # a dead peer ends the job
    export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}" # less fragmentation
}

# Start, or print with --dry-run: launch <torchrun's flags for where and how many>
launch() {
    local command=("$PYTHON" -m vishwamai_mp.launch "$@"
        --nproc-per-node "$NPROC" --max-restarts "$MAX_RESTARTS"
        --log-dir "$LOG_DIR" --redirects 3 --tee 3)
    if [[ "$LINKS" == 1 ]]; then
        command+=(-m vishwamai_mp.launch.preflight --links)
    else
        command+=(-m vishwamai_mp.pretrain --config "$CONFIG" "${OVERRIDES[@]}")
    fi
    if [[ "$DRY_RUN" == 1 ]]; then
        printf '%q ' "${command[@]}"
        echo
        return 0
    fi
    mkdir -p "$LOG_DIR" || fail "LOG_DIR=$LOG_DIR cannot be made; set another"
    exec "${command[@]}"
}

# Reads the flags that both launchers have into CONFIG, OVERRIDES, DRY_RUN, LINKS, LOG_DIR, MAX_RESTARTS.
parse_arguments() {
    CONFIG="" DRY_RUN=0 LINKS=0 OVERRIDES=()
    LOG_DIR="${LOG_DIR:-logs}" MAX_RESTARTS="${MAX_RESTARTS:-0}"
    while (($#)); do
        case "$1" in
        -h | --help) usage && exit 0 ;;
        --dry-run) DRY_RUN=1 ;;
        --links) LINKS=1 MAX_RESTARTS=0 ;;
        --config=*) CONFIG="${1#*=}" ;;
        --config)
            (($# > 1)) || fail "--config needs a recipe or a preset's name"
            CONFIG="$2" && shift
            ;;
        -*) fail "unknown option $1; see --help" ;;
        *.*=*) OVERRIDES+=("$1") ;;
        precision=*) OVERRIDES+=("$1") ;;
        *) fail "unexpected '$1'; overrides are written section.key=value" ;;
        esac
        shift
    done
    check_number MAX_RESTARTS "$MAX_RESTARTS" 0 1000
}
