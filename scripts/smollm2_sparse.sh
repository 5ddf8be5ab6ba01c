#!/bin/bash
# How smollm2-sparse was made: two legs at T = 1024 from results/smollm2/run, the dense control, every number, the package's form.
#
#   TRAIN=train.txt.xz VALID=valid.txt WIKI=wikitext2 PAIRS=blimp-20x200.jsonl SEED=0 bash scripts/smollm2_sparse.sh OUT
#
# WIKI is the folder of wikitext2-valid.txt (4 % of the mixture) and wikitext2-test.txt (measured). Needs a GPU; each leg takes
# five minutes of one H200. The same command again resumes.
set -euo pipefail
out=$1
seed=${SEED:-0}
mkdir -p "$out"
[ -f "$out/mixed.txt" ] || python scripts/mix_data.py "$TRAIN" "$WIKI/wikitext2-valid.txt:4" --out "$out/mixed.txt"

train() { # what start name settings...
    local what=$1 start=$2 name=$3
    shift 3
    python scripts/train_pair.py "$what" "$start" --recipe recipes/smollm2-1024.yaml --data "$out/mixed.txt" \
        --out "$out/$name" --set "seed=$seed" "$@"
}
measure() { # name
    python scripts/headline.py "$out/$1" --data "$VALID" --wikitext2 "$WIKI/wikitext2-test.txt" --pairs "$PAIRS" \
        --device cuda --out "$out/$1.json"
}

train control results/smollm2/run "headline"
train sparse results/smollm2/run "headline"
measure headline
train sparse "$out/headline" "sparser" steps=5000 target_edges=0.72 multiplier_start=0.055 multiplier_rate=0.004
cp -r "$out/headline/control" "$out/sparser/" # it did the first leg's steps, not the second's
measure sparser
python scripts/ship.py "$out/sparser"
