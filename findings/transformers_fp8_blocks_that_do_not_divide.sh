#!/usr/bin/env bash
# Guess: transformers dequantizes fp8 weights in blocks of the size that `weight_block_size` states; the last block of a row or column
# may be short, as checkpoints with ceil(N / 128) scales have it (DeepSeek-V3: 576 rows in 5 blocks).
#
# Seen with transformers 5.23.0, Fp8Dequantize: the block is the weight's size divided by the size of the grid of scales, whatever is
# stated. 192 rows with two scales for blocks of 128 and 64 rows are dequantized as two blocks of 96: no error, and every weight of
# rows 96 to 127 has the other block's scale. 576 rows with five scales are an error, because 5 does not divide 576.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip="$work/venv/bin/pip"
"$pip" install -q torch==2.13.0 2>/dev/null
"$pip" install -q transformers==5.23.0 accelerate==1.15.0 2>/dev/null
cat >"$work/run.py" <<'PY'
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize


def dequantized(rows):
    blocks = -(-rows // 128)
    weight = torch.ones(rows, 128).to(torch.float8_e4m3fn)
    scales = torch.arange(1.0, blocks + 1).reshape(blocks, 1)  # block i has the scale i + 1
    return Fp8Dequantize(None)._dequantize_one(weight, scales, torch.float32)[:, 0]


found = dequantized(192)
right = torch.arange(192) // 128 + 1.0
wrong = (found != right).nonzero().flatten()
print("192 rows:", len(wrong), "rows wrong, from", int(wrong[0]), "to", int(wrong[-1]))
print("256 rows:", int((dequantized(256) != torch.arange(256) // 128 + 1.0).sum()), "rows wrong")
try:
    dequantized(576)
    print("576 rows: no error")
except ValueError as error:
    print("576 rows:", error)
PY
"$work/venv/bin/python" "$work/run.py" 2>"$work/error.txt" | tee "$work/out.txt"
grep -qx "192 rows: 32 rows wrong, from 96 to 127" "$work/out.txt"
grep -qx "256 rows: 0 rows wrong" "$work/out.txt"
grep -q "576 rows: Weight shape (576, 128) not divisible by scale grid (5, 1)" "$work/out.txt"
echo "as stated: the block follows from the grid, not from the configuration"
