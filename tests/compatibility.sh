#!/usr/bin/env bash
# The tests under several versions of Python and megatron-core, and checkpoints exchanged between them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/install.sh
source launch/install.sh

usage() {
    cat <<'TEXT'
usage: bash tests/compatibility.sh [PYTHON] [-- pytest's arguments]

For each line of the matrix whose Python is found (or is PYTHON's version): an environment of its own, the tests (all of
them, or what the arguments say), and a checkpoint of the first line that is resumed there and brought back, weights
compared bit by bit. Prints a table; ends with 1 if anything failed. Lines beyond what setup.py allows are tried all the
same: they say what keeps it from allowing more.

environment:
  FOLDER     where environments and logs are kept between calls (default: .compatibility; about 2 GB a line)
  MATRIX     other lines: "python=megatron-core …" (default: "3.11=0.16.1 3.12=0.16.1 3.12=0.17.1 3.12=0.19.2")

On Python 3.12 pip may take torch's CUDA build, some 5 GB more for the first such line.
TEXT
}

FOLDER="$(realpath -m "${FOLDER:-.compatibility}")"
MATRIX="${MATRIX:-3.11=0.16.1 3.12=0.16.1 3.12=0.17.1 3.12=0.19.2}"
ONLY=""
while (($#)); do
    case "$1" in
    -h | --help) usage && exit 0 ;;
    --) shift && break ;;
    *) ONLY="$1" && shift ;;
    esac
done
PYTEST=("$@")

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

# One environment a Python; a folder beside it for each further megatron-core, found first. Torch is installed once.
install_line() { # python, version of python, version of megatron-core
    local venv="$FOLDER/python$2"
    if [[ ! -e "$venv/installed" ]]; then
        "$1" -m venv "$venv"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
        touch "$venv/installed"
    fi
    install_transformer_engine "$venv" || echo "Transformer Engine's Python cannot be installed: its tests will skip" >&2
    [[ -d "$FOLDER/megatron$3-python$2" ]] ||
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
            --target "$FOLDER/megatron$3-python$2" "megatron-core==$3"
}

# Steps at a rate that changes no weight: what is saved then is what was loaded.
resume() { # from, to, last step
    in_line -m vishwamai_mp.pretrain --config tiny "${SETTINGS[@]}" "checkpoint.load=$1" training.output_dir="$2" \
        training.max_steps="$3" optimizer.learning_rate=1e-30 optimizer.min_learning_rate=0
}

digest() { # run
    in_line tools/convert_checkpoint.py to-hf --load "$1" --output "$1-hf" --tokenizer none >/dev/null || return 1
    cat "$1-hf"/model*.safetensors | sha256sum
}

exchange() { # line
    local first="$FOLDER/exchange/first" there="$FOLDER/exchange/$1" corpus
    rm -rf "$there" "$there-hf" "$there-back" "$there-back-hf"
    if [[ -z "$REFERENCE" ]]; then
        rm -rf "$FOLDER/exchange" && mkdir -p "$FOLDER/exchange"
        corpus="$(in_line -c "from tests.synthetic import tiny_corpus
print(tiny_corpus('$FOLDER/exchange', 256, 20000, seed=1))")" || return 1
        SETTINGS=("data.train=$corpus" model.vocab_size=256 model.num_layers=2 "data.split=100,0,0"
            training.evaluate_every=null training.sequence_length=64 memory.enabled=true cache.enabled=true
            "logging.report_to=[]")
        in_line -m vishwamai_mp.pretrain --config tiny "${SETTINGS[@]}" training.output_dir="$first" \
            training.max_steps=2 || return 1
        REFERENCE="$(digest "$first")" || return 1
        FIRST_LINE=("${LINE[@]}")
        return 0
    fi
    resume "$first/checkpoints/step_00000002" "$there" 3 || return 1
    [[ "$(digest "$there")" == "$REFERENCE" ]] || return 1
    LINE=("${FIRST_LINE[@]}") # and back
    resume "$there/checkpoints/step_00000003" "$there-back" 4 || return 1
    [[ "$(digest "$there-back")" == "$REFERENCE" ]]
}

in_line() { PYTHONPATH="$PWD:${LINE[1]}" "${LINE[0]}" "$@"; }

mkdir -p "$FOLDER"
REFERENCE="" FAILED=0 TABLE=() FIRST_LINE=() SETTINGS=() LINE=()
for entry in $MATRIX; do
    wanted="${entry%=*}" megatron="${entry#*=}" name="python$wanted-megatron$megatron"
    python="$(command -v "${ONLY:-python$wanted}" || true)"
    if [[ -z "$python" || "$(version_of "$python")" != "$wanted" ]]; then
        [[ -n "$ONLY" ]] || TABLE+=("$name: not run, no python$wanted found")
        continue
    fi
    echo "== $name" >&2
    install_line "$python" "$wanted" "$megatron"
    LINE=("$FOLDER/python$wanted/bin/python" "$FOLDER/megatron$megatron-python$wanted")
    log="$FOLDER/$name.log"
    if in_line -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -v "${PYTEST[@]}" >"$log" 2>&1; then
        tests="tests passed"
    else
        tests="tests FAILED" FAILED=1
    fi
    counts="$(grep -E '(passed|failed|error).* in [0-9]' "$log" | tail -n 1 | tr -d '=')"
    if exchange "$name" >"$FOLDER/$name-exchange.log" 2>&1; then
        exchanged="checkpoints interchangeable"
    else
        exchanged="checkpoints NOT interchangeable" FAILED=1
    fi
    TABLE+=("$name: $tests (${counts:-see $log}); $exchanged")
done
printf '%s\n' "${TABLE[@]}"
exit "$FAILED"
