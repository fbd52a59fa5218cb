# shellcheck shell=bash
# Makes .venv from a bare checkout and installs the package into it. Sourced from the repository's root, never run.
# PYTHON: the interpreter that makes .venv, 3.11 or later (default: the first found)

bootstrap_python() {
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

# Python compiles what is imported, and keeps it: a fraction of the files, and half of the time that pip would need for
# all. Where Python is told to keep nothing, pip has to.
pip_install() { # the interpreter, arguments
    local python="$1" compile=--no-compile
    [[ -n "${PYTHONDONTWRITEBYTECODE:-}" ]] && compile=--compile
    "$python" -m pip install --quiet --disable-pip-version-check "$compile" "${@:2}"
}

# install_environment NAME TARGET: once, and again when what is to be installed has changed.
install_environment() {
    local stamp=".venv/installed-$1" target="$2" wanted python
    wanted="$(cat setup.py constraints.txt | sha256sum)"
    [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]] && return 0
    python="$(bootstrap_python)"
    [[ -x .venv/bin/python ]] || "$python" -m venv .venv
    echo "installing into .venv (some minutes the first time)"
    pip_install .venv/bin/python -c constraints.txt -e "$target"
    echo "$wanted" >"$stamp"
}

# Transformer Engine's Python without its compiled part, in a folder of its own: vishwamai_mp/runtime/fused_layers.py.
install_transformer_engine() { # the environment's folder
    local folder="$1/transformer_engine" version
    version="$(sed -n 's/^transformer-engine==//p' constraints.txt)"
    [[ -d "$folder/transformer_engine-$version.dist-info" ]] && return 0
    rm -rf "$folder"
    pip_install "$1/bin/python" --no-deps --target "$folder" "transformer-engine==$version"
}
