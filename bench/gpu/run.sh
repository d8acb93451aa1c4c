#!/usr/bin/env bash
# The GPU lane on a bare H100 machine without network, in one command: `bash bench/gpu/run.sh`, from the checkout's
# root. Expects the kit's parts in /tmp/kit, and $KIT/run in the checkout, and writes results to $OUT.
# Arguments go to `python3 -m bench $LANE`. See README.md beside this file.
set -uo pipefail
started=$(date +%s)
step() { echo "[$(($(date +%s) - started)) s] $*"; }
OUT=${OUT:-bench/out}
KIT=${KIT:-.kit}
LIMIT_S=${LIMIT_S:-470}      # the whole command, unpacking included
START_S=${START_S:-260}      # until all servers are up
LANE=${LANE:-gpu}
SHAPE=${SHAPE:-0.5B}         # of the random model: 0.5B or 3B
model=${MODEL:-/tmp/model-$SHAPE}
mkdir -p "$OUT"

step "unpacking"
. "$KIT/run/unpack.sh"
# What an editable install would write: SGLang finds this project's plugins through it.
python3 -c "from setuptools import setup; setup()" --quiet egg_info --egg-base "$SITE"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
python3 -c "from importlib.metadata import version; print({name: version(name) for name in ('torch', 'sglang', 'ai-dynamo')})"
nvidia-smi --query-gpu=name,driver_version,memory.used --format=csv,noheader
[ -f "$model/config.json" ] || python3 "$KIT/run/make_random_model.py" "$model" "$KIT/run/tokenizer" "$SHAPE" > "$OUT/model.log" 2>&1
ls "$model" > /dev/null || { tail -5 "$OUT/model.log"; exit 1; }

left=$((LIMIT_S - ($(date +%s) - started)))
step "measuring, $left s left"
timeout --signal=INT --kill-after=20 "$left" python3 -m bench "$LANE" --gpu --model "$model" --out /tmp/bench \
  --start-timeout "$START_S" --budget $((left - 35)) "$@" 2>&1 | tee "$OUT/run.log"
step "packing"
cp /tmp/bench/"$LANE".* "$OUT/" 2>/dev/null
tar -C /tmp/bench -czf "$OUT/logs.tar.gz" --exclude='nats' --exclude='etcd' --exclude='gpu.*' . 2>/dev/null
for log in /tmp/bench/logs-*/*/*.log; do
  if grep -qE '^(Traceback|error:)' "$log"; then echo "--- $log"; grep -vE '^\s*$' "$log" | tail -n 6 | cut -c1-300; fi
done
step "done"
