#!/usr/bin/env bash
# From a bare checkout: environment in .venv, install, checks, all tests.
# usage: bash tests/run.sh [pytest arguments]   with arguments only pytest runs, and gets them
# PYTHON: the interpreter that makes .venv, 3.11 or later (default: the first found)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/install.sh
source launch/install.sh
# Tests start hundreds of processes, each of which would compile the same files.
unset PYTHONDONTWRITEBYTECODE
# Several run at a time: were each to share its work among threads, these would spin, waiting for one another's cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

install_environment dev '.[dev]'
install_transformer_engine .venv || echo "Transformer Engine's Python cannot be installed: its tests will skip" >&2
if (($#)); then
    exec .venv/bin/python -m pytest "$@"
fi
# mypy takes a minute from a bare checkout: beside the tests, which leave the cores idle at times. Its word comes last.
said="$(mktemp)"
PYTHON=.venv/bin/python bash tests/checks.sh >"$said" 2>&1 &
checks=$!
trap 'kill "$checks" 2>/dev/null || true; rm -f "$said"' EXIT
status=0
# Three at a time: two leave two cores idle for a fifth of the time, as tests wait for processes, signals and time-outs. A
# file's tests share what it sets up.
.venv/bin/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder || status=$?
wait "$checks" || { status=1 && echo "the checks failed, tests/checks.sh:" >&2; }
cat "$said"
exit "$status"
