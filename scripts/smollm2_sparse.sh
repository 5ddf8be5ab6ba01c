#!/bin/bash
# How smollm2-sparse and smollm2-few-heads were made: three legs at T = 1024 from results/smollm2/run, each with its dense
# control, every number, the package's forms. (What ships as few-heads went on from the int8 form of sparser.)
#
#   TRAIN=train.txt.xz VALID=valid.txt WIKI=wikitext2 PAIRS=blimp-20x200.jsonl SEED=0 bash scripts/smollm2_sparse.sh OUT
#
# WIKI is the folder of wikitext2-valid.txt (4 % of the mixture) and wikitext2-test.txt (measured). Needs a GPU; each leg takes
# five minutes of one H200. The same command again resumes. To see it run on a CPU, with small texts:
#   DEVICE=cpu ASSETS=/tmp/assets MEASURE="--max-tokens 300 --prompts 4 --lengths 64 --context-length 64" EXTRA="steps=2 batch_size=1 \
#   context_length=64 kernel=reference compiled=false graph=false precision=fp32" bash scripts/smollm2_sparse.sh OUT
set -euo pipefail
out=$1
seed=${SEED:-0} device=${DEVICE:-cuda} EXTRA=${EXTRA:-} MEASURE=${MEASURE:-}
mkdir -p "$out"
[ -f "$out/mixed.txt" ] || python scripts/mix_data.py "$TRAIN" "$WIKI/wikitext2-valid.txt:4" --out "$out/mixed.txt"

train() { # what start name settings...
    local what=$1 start=$2 name=$3
    shift 3
    python scripts/train_pair.py "$what" "$start" --recipe recipes/smollm2-1024.yaml --data "$out/mixed.txt" \
        --device "$device" --out "$out/$name" --set "seed=$seed" "$@" $EXTRA
}
measure() { # name
    python scripts/headline.py "$out/$1" --data "$VALID" --wikitext2 "$WIKI/wikitext2-test.txt" --pairs "$PAIRS" \
        --device "$device" --out "$out/$1.json" $MEASURE
}

train control results/smollm2/run "headline"
train sparse results/smollm2/run "headline"
measure headline
for what in control sparse; do
    train "$what" "$out/headline" "sparser" steps=5000 target_edges=0.72 multiplier_start=0.055 multiplier_rate=0.004
done
measure sparser
python scripts/ship.py "$out/sparser" --results "$out/sparser.json" --out "${ASSETS:-src/fewedges/assets}/smollm2-sparse"
for what in control sparse; do
    train "$what" "$out/sparser" "few-heads" steps=5000 target_edges=1.36 head_closing=1.0 multiplier_start=0.055 \
        multiplier_rate=0.002
done
measure few-heads
python scripts/ship.py "$out/few-heads" --results "$out/few-heads.json" --out "${ASSETS:-src/fewedges/assets}/smollm2-few-heads"
