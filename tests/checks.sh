#!/usr/bin/env bash
# Lint, format, types, shell scripts: all that is checked without running the program.
# usage: bash tests/checks.sh   (PYTHON: the interpreter of the environment; default .venv's)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-.venv/bin/python}"

folders=()
for folder in vishwamai_mp tools examples tests docs setup.py; do
    # mypy refuses a folder without Python files
    [[ -n "$(find "$folder" -name '*.py' -print -quit 2>/dev/null)" ]] && folders+=("$folder")
done

"$PYTHON" -m ruff check "${folders[@]}"
"$PYTHON" -m ruff format --check "${folders[@]}"
"$PYTHON" -m mypy "${folders[@]}"
mapfile -t scripts < <(find launch tests tools examples -name '*.sh' 2>/dev/null | sort)
"$(dirname "$PYTHON")/shellcheck" --external-sources "${scripts[@]}" .ci/run
echo "checks passed: ruff, mypy, shellcheck"
