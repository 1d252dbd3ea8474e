#!/usr/bin/env bash
# Every benchmark once: a tiny Pilot and Copilot, a few rounds, λ in {0, 0.3, 1}, and one table of all results.
# It shows that each set trains and is scored; models of this size learn the answer format at best.
#   scripts/all_benchmarks.sh <folder with the twelve sets> [output folder] [overrides for every run …]
set -euo pipefail
data=${1:?usage: scripts/all_benchmarks.sh <folder with piqa/, boolq/, …> [output folder] [overrides …]}
out=${2:-runs/all_benchmarks}
python=${PYTHON:-.venv/bin/python}
shift $(($# < 2 ? $# : 2))
cd "$(dirname "$0")/.."

reasoning=(piqa winogrande hellaswag boolq siqa openbookqa aqua gsm8k mawps svamp)
common=(pilot=tiny_llama rounds=30 "fusion.weight=[0,0.3,1]" "data.path=$data")
for name in "${reasoning[@]}"; do
  "$python" train.py "${common[@]}" data="$name" data.max_eval_rows=200 \
    "evaluation.modes=[generation,likelihood]" paths.run_dir="$out/$name" "$@"
done
for name in beauty lastfm; do
  "$python" train.py "${common[@]}" data="$name" data.max_train_rows=2000 data.max_eval_rows=20 \
    data.benchmarks.$name.history=5 evaluation.ranking=exhaustive paths.run_dir="$out/$name" "$@"
done
"$(dirname "$python")/tcopilot-table" "$out" --markdown "$out/table.md"
