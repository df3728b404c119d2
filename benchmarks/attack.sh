#!/usr/bin/env bash
# Attacks PER and steering on EmojiCanvas (8 pairs of object and style a seed), and its control of random prefixes:
# attack.sh WORK keeps the outcomes in WORK, continues where it was stopped, and prints the table of
# `python -m benchmarks.attack`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work="$1"
python="${VENV:-.venv}/bin/python"
for seed in 2 3 4; do # seeds 0 and 1 were looked at while --quick was designed
  for method in per steering; do
    for search in gradient random; do
      "$python" -m torch.distributed.run --standalone --nproc_per_node 2 -m lbdt attack --quick --seed "$seed" \
        --method "$method" --search "$search" --out "$work/$method-$search-$seed" --device cpu
    done
  done
done
exec "$python" -m benchmarks.attack "$work" --out benchmarks/results/attack.json
