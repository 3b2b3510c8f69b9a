#!/usr/bin/env bash
# Guess: a matrix product in bfloat16 on a CPU uses one kernel per shape of the weight; the number of tokens is an argument of it. So
# running the experts of a layer takes the memory of weights and activations, and as long with 250 to 262 tokens as with 256.
#
# Seen with torch 2.13.0 (oneDNN inside) on a CPU with AMX: oneDNN compiles a kernel for every number of rows that it has not met of late, and
# keeps the last 1024. grouped_mm over 64 experts of 1024 x 512, whose numbers of tokens differ in every call as a router makes them,
# compiles for half of its products, and the process grows by 943 MiB; with the numbers rounded up to multiples of 32 it compiles for 3 % and grows by
# 123 MiB. Whoever runs mixture-of-experts models in bfloat16 on CPUs should pad the experts' tokens.
set -euo pipefail
grep -q amx_bf16 /proc/cpuinfo || { echo "skipped: this CPU has no AMX for bfloat16"; exit 0; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 2>/dev/null
cat >"$work/run.py" <<'PY'
import sys

import torch
from torch.nn.functional import grouped_mm

torch.set_num_threads(1)
torch.manual_seed(0)
multiple = int(sys.argv[1])
weights = [torch.randn(64, n, k).bfloat16() for n, k in ((1024, 512), (512, 1024))]


def resident() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * 4096 // 2**20


before = 0
for call in range(8):
    tokens = [-(-int(n) // multiple) * multiple for n in (torch.randn(64) * 80 + 256).clamp(16)]
    ends = torch.tensor(tokens).cumsum(0).int()
    rows = [torch.ones(sum(tokens), w.shape[2]).bfloat16() for w in weights]
    before = before or resident()
    for row, weight in zip(rows, weights):
        for w in (weight.mT, weight):
            grouped_mm(row if row.shape[1] == w.shape[1] else rows[row is rows[0]], w, offs=ends)
print("grown", resident() - before)
PY
for multiple in 1 32; do
  ONEDNN_VERBOSE=profile_create "$work/venv/bin/python" "$work/run.py" $multiple >"$work/$multiple.txt" 2>/dev/null
  products=$(grep -c ',create' "$work/$multiple.txt")
  compiled=$(grep -c 'create:cache_miss' "$work/$multiple.txt")
  grown=$(grep grown "$work/$multiple.txt" | cut -d' ' -f2)
  echo "multiples of $multiple: $compiled of $products products compile a kernel, $grown MiB grown"
  eval "share_$multiple=$((100 * compiled / products)) grown_$multiple=$grown"
done
[ "$share_1" -ge 40 ]
[ "$share_32" -le 10 ]
[ "$grown_1" -ge $((3 * grown_32)) ]
echo "as stated: a kernel for every number of tokens"
