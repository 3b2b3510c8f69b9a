#!/usr/bin/env bash
# Guess: GPTQ files (version 1) hold a zero point minus one, modulo 16, so that a zero point of 0 is stored as 15 and read back as 0
# by readers that add one modulo 16.
#
# Seen with auto-round 0.16.1, its packing for GPTQ version 1 with zero points: the lowest zero point is stored as that of 1. A group
# of weights that are all positive has the zero point 0; in the file it has 1, whoever reads it, and every weight of the group is one
# step of its scale too small. Nothing is told. Groups with a zero point of 1 and more are right, and so is symmetric quantization.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip="$work/venv/bin/pip"
"$pip" install -q torch==2.13.0 2>/dev/null
echo "torch==2.13.0" >"$work/c.txt"
"$pip" install -q -c "$work/c.txt" transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 py-cpuinfo==9.0.0 pydantic==2.14.3 threadpoolctl==3.8.0 2>/dev/null
"$pip" install -q --no-deps auto-round==0.16.1 2>/dev/null
cat >"$work/run.py" <<'PY'
import torch
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
from torch import nn

ROWS, COLS, GROUP, STEP = 32, 64, 32, 0.5
for zero in (0, 1, 8):
    codes = torch.arange(ROWS * COLS).mul(7).remainder(16).reshape(ROWS, COLS)
    linear = nn.Linear(COLS, ROWS, bias=False)
    linear.weight.data = (codes - zero) * STEP  # exactly on the grid of this zero point
    packed = QuantLinear(4, GROUP, COLS, ROWS, False)
    packed.device = "cpu"
    grid = (ROWS, COLS // GROUP)
    packed.pack(linear, torch.full(grid, STEP), torch.full(grid, float(zero)), None, "cpu")
    stored = int(packed.qzeros[0, 0]) & 15
    at = torch.arange(8) * 4
    found = (packed.qweight.unsqueeze(1) >> at.view(1, 8, 1) & 15).reshape(COLS, ROWS).T
    read = (found - (stored + 1) % 16) * STEP
    off = sorted({float(d) for d in (read - linear.weight.data).flatten()})
    print(f"zero point {zero}: stored {stored}, read {(stored + 1) % 16}, weights off by {off}")
PY
"$work/venv/bin/python" "$work/run.py" 2>"$work/error.txt" | tee "$work/out.txt" || { tail -n 3 "$work/error.txt"; exit 1; }
[ "$(cat "$work/out.txt")" = "zero point 0: stored 0, read 1, weights off by [-0.5]
zero point 1: stored 0, read 1, weights off by [0.0]
zero point 8: stored 7, read 8, weights off by [0.0]" ]
echo "as stated: 0 and 1 are stored alike"
