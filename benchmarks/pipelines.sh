#!/usr/bin/env bash
# From nothing to five erasers on EmojiCanvas: collects activations, trains the SAEs, scores their dictionaries, puts
# the erasers together, and erases a cat with each, by patch replacement and by its steering baseline. Under an hour on
# two CPU cores. Killed at any moment, the same call goes on. The embedded erasers were made by this script; then
# `python -m benchmarks.pipelines WORK --release` copied them.
#   benchmarks/pipelines.sh [WORK]      default: build/pipelines; VENV: virtual environment, default .venv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work="${1:-build/pipelines}"
python="${VENV:-.venv}/bin/python"
block=unet.up_blocks.0.attentions.1
mkdir -p "$work"

lbdt() { echo "+ lbdt $*" >&2; "$python" -m lbdt "$@"; }

# collect NAME CANVAS_SEEDS [OPTION...]
collect() {
  lbdt collect --site "$block:update" --site "$block" --out "$work/$1" --canvas-seeds "$2" --threads 2 \
    --prompts-per-shard 92 "${@:3}"
}

# train KIND ACTIVATIONS HELDOUT OPTION...
train() {
  lbdt train --recipe "$1" --site "$block:update" --activations "$work/$2" --heldout "$work/$3" \
    --out "$work/$1/sae" "${@:4}"
}

# finish KIND PREFIX SELECTION RULE STRENGTH: dictionary, eraser, pictures; PREFIX: of the activations' names;
# SELECTION: options in one word
finish() {
  local folder="$work/$1" select
  read -ra select <<<"$3"
  local scored="${3/--assigned/}"
  lbdt score --json --sae "$folder/sae" --site "$block:update" --bank-site "$block" --activations "$work/$2train" \
    --gate-activations "$work/$2pairs" --heldout "$work/$2heldout" --out "$folder/dictionary" \
    --picture-false-positive 0.0005 $scored >"$folder/score.json.partial"
  mv "$folder/score.json.partial" "$folder/score.json"
  lbdt assemble --sae "$folder/sae" --dictionary "$folder/dictionary" --hookpoint "$block" --target output \
    --source row --avoid known --padding 0 "${select[@]}" --steering "$4" --strength "$5" --dtype float16 \
    --out "$folder/eraser"
  for method in per steering; do
    lbdt erase "An image of Dogs and Cats in Sketch style." --concept Cats --seed 7 --kind "$1" \
      --eraser "$folder/eraser" --method "$method" --out "$folder/$method.png"
  done
}

collect train 100:104
collect heldout 200:201
collect pairs 300:303 --prompts canvas-pairs
collect turbo-train 100:108 --steps 4 --guidance 1
collect turbo-heldout 200:202 --steps 4 --guidance 1
collect turbo-pairs 300:306 --prompts canvas-pairs --steps 4 --guidance 1

# Per-patch TopK: trained with BatchTopK, per-patch inference leaves an FVU of 0.23 here.
train saeuron train heldout --expansion 8 --k 16 --steps 1200 --no-batch-topk
train saemnesia train heldout --from "$work/saeuron/sae" --steps 400 --lr 1e-3
train gsae train heldout --expansion 8 --k 24 --steps 600 --lr 2e-3
train saeparate train heldout --expansion 8 --k 16 --steps 1200 --lr 2e-3 --rows 4096 --no-batch-topk
train sdxl turbo-train turbo-heldout --expansion 8 --k 16 --steps 1000 --lr 1e-3

finish saeuron "" "--top-k 4 --false-positive 0.005" saeuron -5
finish saemnesia "" "--assigned --false-positive 0.005" saeuron -3
finish gsae "" "--assigned --false-positive 0.005" gsae -1.5
finish saeparate "" "--top-k 4 --false-positive 0.005" saeuron -5
finish sdxl turbo- "--top-k 4 --false-positive 0.005" sdxl -3

"$python" -m benchmarks.pipelines "$work"
