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
# Two run at a time: were each to share its work among threads, these would spin, waiting for one another's cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

install_environment dev '.[dev]'
install_transformer_engine .venv || echo "Transformer Engine's Python cannot be installed: its tests will skip" >&2
if (($#)); then
    exec .venv/bin/python -m pytest "$@"
fi
PYTHON=.venv/bin/python bash tests/checks.sh
# Two at a time: one alone leaves a second core idle for almost half of the time. A file's tests share what it sets up.
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
