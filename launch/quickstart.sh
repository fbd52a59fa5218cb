#!/usr/bin/env bash
# From a bare checkout to a trained model: environment, corpus, tokenizer, two-process pretraining with neural memory and
# cache, killed and resumed, a look at the held-out loss, generated text, a tree of thoughts, a Hugging Face folder
# proved by its logits.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/install.sh
source launch/install.sh

usage() {
    cat <<'TEXT'
Train a small model with neural memory and cache on this machine's CPU with two processes (tensor and sequence
parallel), from nothing.

usage: bash launch/quickstart.sh [--work-dir DIR] [--steps N] [--overwrite]

  --work-dir DIR   where corpus, tokenizer and run go (default: quickstart)
  --overwrite      delete the run and the export that an earlier quickstart left there; without it they are kept, and the
                   quickstart refuses to start
  --steps N        training steps of 4,096 tokens (default: 330; training stops after 7 minutes at the latest)

Takes under ten minutes on two cores, after an installation of some minutes.
TEXT
}

fail() {
    echo "error: $*" >&2
    exit 1
}

WORK=quickstart STEPS=330 OVERWRITE=0
while (($#)); do
    case "$1" in
    -h | --help) usage && exit 0 ;;
    --overwrite) OVERWRITE=1 ;;
    --work-dir=*) WORK="${1#*=}" ;;
    --steps=*) STEPS="${1#*=}" ;;
    --work-dir | --steps)
        (($# > 1)) || fail "$1 needs a value; see --help"
        if [[ "$1" == --work-dir ]]; then WORK="$2"; else STEPS="$2"; fi
        shift
        ;;
    *) fail "unknown option $1; see --help" ;;
    esac
    shift
done
if ! [[ "$STEPS" =~ ^[0-9]{1,7}$ ]] || ((10#$STEPS < 40)); then
    fail "--steps $STEPS: use a number from 40"
fi
RUN="$WORK/run"
for folder in "$RUN" "$WORK/hf"; do
    if [[ -e "$folder" && "$OVERWRITE" == 0 ]]; then
        fail "$folder exists, from an earlier quickstart; --overwrite deletes it, --work-dir names another place"
    fi
done

title() { printf '\n== %s\n' "$*"; }

# The same command starts and resumes.
train() {
    NPROC=2 LOG_DIR="$WORK/logs" bash launch/torchrun_single_node.sh --config tiny \
        parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true \
        memory.enabled=true memory.memory_size=128 memory.head_dim=32 memory.num_memory_layers=2 memory.dropout=0 \
        cache.enabled=true cache.num_heads=4 cache.segment_length=32 cache.latents_per_segment=4 cache.dropout=0 \
        data.train="$WORK/train_text_document" data.valid="$WORK/held_out_text_document" \
        data.tokenizer="$WORK/tokenizer.model" training.output_dir="$RUN" training.max_steps="$STEPS" \
        training.evaluate_every="$((STEPS / 3))" checkpoint.save_every="$((STEPS / 3))" \
        training.micro_batch_size=16 training.exit_after_minutes=7
}

title "environment"
install_environment base '.[hf]'
# shellcheck source=/dev/null
source .venv/bin/activate
SECONDS=0

title "corpus: the Python installation's own sources and language reference"
python examples/quickstart/corpus.py "$WORK"

title "tokenizer and token files"
[[ -f "$WORK/tokenizer.model" ]] ||
    python tools/train_tokenizer.py --input "$WORK/train.jsonl" --vocab-size 8192 --output-prefix "$WORK/tokenizer"
for part in train held_out; do
    python tools/preprocess_data.py --input "$WORK/$part.jsonl" --tokenizer "$WORK/tokenizer.model" --append-eod \
        --workers 2 --restart --output-prefix "$WORK/$part"
done

title "pretraining with two processes, killed on the way"
rm -rf "$RUN" # there is none, or --overwrite was given
train &
job=$!
until [[ -f "$RUN/checkpoints/latest" ]]; do
    kill -0 "$job" 2>/dev/null || fail "training ended before its first checkpoint"
    sleep 1
done
sleep 3 # some steps further, which no checkpoint has
if python - "$job" <<'PY'; then
import contextlib, psutil, sys
try:
    job = psutil.Process(int(sys.argv[1]))
    processes = [*job.children(recursive=True), job]
except psutil.NoSuchProcess:
    sys.exit(1)
for process in processes:
    with contextlib.suppress(psutil.NoSuchProcess):  # workers end with their launcher
        process.kill()
PY
    how="killed (SIGKILL)"
else
    how="its minutes were over before it could be killed,"
fi
wait "$job" 2>/dev/null || true
echo "$how at $SECONDS s; the same command goes on from the last checkpoint"

title "the same command again"
train

title "what it learned"
python examples/quickstart/compare.py --run "$RUN" --held-out "$WORK/held_out_text_document" \
    --text "$WORK/held_out.jsonl"

title "generation, on two processes as well"
python -m torch.distributed.run --nproc-per-node 2 tools/generate.py --load "$RUN" --strategy sample --top-k 40 \
    --temperature 0.7 --max-new-tokens 60 --prompt 'class ' --prompt 'The "try" statement' \
    parallel.tensor_model_parallel_size=2

title "a tree of thoughts: a search over continuations, and its picture"
python tools/generate.py --load "$RUN" --strategy tree --html "$WORK/tree.html" --prompt 'def ' \
    tree.max_thought_tokens=12 tree.logprob_weight=1 tree.value_weight=0

title "export to Hugging Face, logits compared"
rm -rf "$WORK/hf"
python tools/convert_checkpoint.py to-hf --load "$RUN" --output "$WORK/hf" --verify

title "done in $((SECONDS / 60)) min $((SECONDS % 60)) s after installation"
echo "run folder: $RUN (metrics.jsonl, tensorboard/, checkpoints/); curves: tensorboard --logdir $RUN"
echo "the search: $WORK/tree.html; for transformers and its kin: $WORK/hf"
