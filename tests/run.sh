#!/usr/bin/env bash
# From a bare checkout: environment in .venv, install, checks, all tests.
# usage: bash tests/run.sh [pytest arguments]   with arguments only pytest runs, and gets them
# PYTHON: the interpreter that makes .venv, 3.11 or later (default: the first found)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local name
    for name in ${PYTHON:+"$PYTHON"} python3.11 python3 python; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return 0
        fi
    done
    echo "error: no Python 3.11 or later found; install one or set PYTHON" >&2
    return 1
}

# Installed once, and again when what is to be installed has changed.
install() {
    local wanted stamp=.venv/installed
    wanted="$(cat setup.py constraints.txt | sha256sum)"
    [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]] && return 0
    local python
    python="$(find_python)"
    [[ -x .venv/bin/python ]] || "$python" -m venv .venv
    echo "installing into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
    echo "$wanted" >"$stamp"
}

install
if (($#)); then
    exec .venv/bin/python -m pytest "$@"
fi
PYTHON=.venv/bin/python bash tests/checks.sh
exec .venv/bin/python -m pytest
