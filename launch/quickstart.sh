#!/usr/bin/env bash
# From a bare checkout to a trained model: environment, corpus, tokenizer, two-process pretraining that is killed and
# resumed, a look at the held-out loss, generated text.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/install.sh
source launch/install.sh

usage() {
    cat <<'TEXT'
Train a small model on this machine's CPU with two processes (tensor and sequence parallel), from nothing.

usage: bash launch/quickstart.sh [--work-dir DIR] [--minutes M]

  --work-dir DIR   where corpus, tokenizer and run go (default: quickstart)
  --minutes M      of training (default: 6)

Takes under ten minutes on two cores, after an installation of some minutes. Run again, it trains further.
TEXT
}

WORK=quickstart MINUTES=6
while (($#)); do
    case "$1" in
    -h | --help) usage && exit 0 ;;
    --work-dir=*) WORK="${1#*=}" ;;
    --minutes=*) MINUTES="${1#*=}" ;;
    --work-dir | --minutes)
        (($# > 1)) || { echo "error: $1 needs a value; see --help" >&2 && exit 1; }
        [[ "$1" == --work-dir ]] && WORK="$2" || MINUTES="$2"
        shift
        ;;
    *) echo "error: unknown option $1; see --help" >&2 && exit 1 ;;
    esac
    shift
done
[[ "$MINUTES" =~ ^[0-9]+(\.[0-9]+)?$ ]] || { echo "error: --minutes $MINUTES: use a number" >&2 && exit 1; }
RUN="$WORK/run"

title() { printf '\n== %s\n' "$*"; }

# train MINUTES: the same command starts and resumes; it saves and ends when its minutes are over.
train() {
    NPROC=2 LOG_DIR="$WORK/logs" bash launch/torchrun_single_node.sh --config tiny \
        parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true \
        data.train="$WORK/train_text_document" data.valid="$WORK/held_out_text_document" \
        data.tokenizer="$WORK/tokenizer.model" training.output_dir="$RUN" training.exit_after_minutes="$1"
}

title "environment"
install_environment base .
source .venv/bin/activate
SECONDS=0

title "corpus: the Python installation's own sources and language reference"
python examples/quickstart/corpus.py "$WORK"

title "tokenizer and token files"
[[ -f "$WORK/tokenizer.model" ]] ||
    python tools/train_tokenizer.py --input "$WORK/train.jsonl" --vocab-size 8192 --output-prefix "$WORK/tokenizer"
for part in train held_out; do
    python tools/preprocess_data.py --input "$WORK/$part.jsonl" --tokenizer "$WORK/tokenizer.model" --append-eod \
        --workers 2 --output-prefix "$WORK/$part"
done

title "pretraining with two processes, killed on the way"
before="$(find "$RUN/checkpoints" -maxdepth 1 -name 'step_*' 2>/dev/null | wc -l)"
set -m # the job gets a process group of its own, so that it can be killed whole
train "$MINUTES" &
job=$!
# Without mercy, once a checkpoint is there and some steps after it are not saved yet.
until (($(find "$RUN/checkpoints" -maxdepth 1 -name 'step_????????' 2>/dev/null | wc -l) > before)); do
    kill -0 "$job" 2>/dev/null || { echo "error: training ended before its first checkpoint" >&2 && exit 1; }
    sleep 1
done
sleep 3
kill -KILL -- "-$job"
wait "$job" 2>/dev/null || true
set +m
echo "killed (SIGKILL) after $SECONDS seconds in all; the same command resumes"

title "the same command again"
train "$MINUTES"

title "what it learned"
python examples/quickstart/compare.py --run "$RUN" --held-out "$WORK/held_out_text_document" \
    --text "$WORK/held_out.jsonl"

title "generation, on two processes as well"
python -m torch.distributed.run --nproc-per-node 2 tools/generate.py --load "$RUN" --strategy sample --top-k 40 \
    --temperature 0.7 --max-new-tokens 60 --prompt 'class ' --prompt 'The "try" statement' \
    parallel.tensor_model_parallel_size=2

title "done in $((SECONDS / 60)) min $((SECONDS % 60)) s after installation"
echo "run folder: $RUN (metrics.jsonl, tensorboard/, checkpoints/); curves: tensorboard --logdir $RUN"
