#!/usr/bin/env bash
# Guess: torch and ml_dtypes (numpy, JAX) make the same byte of every number that is cast to float8_e8m0fnu, the scale of MX formats: 0
# becomes the smallest scale, 2^-127, and a negative number, which the format cannot hold, becomes NaN.
#
# Seen with torch 2.13.0 and ml_dtypes 0.6.0: they agree on all positive finite numbers tried (ties away from the lower power, too small
# saturates at 2^-127), and differ on 0 (torch 2^-127, ml_dtypes NaN) and on negatives (torch the scale of the magnitude, ml_dtypes
# NaN). So the scale of an all-zero block, cast from its largest magnitude by ml_dtypes, is NaN, and the block, whose codes are all 0,
# reads as NaN in torch; in the other direction torch forgets a sign without a word. Whoever writes MX scales has to replace zeros first.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 ml_dtypes==0.6.0 2>/dev/null
cat >"$work/run.py" <<'PY'
import ml_dtypes
import numpy as np
import torch

positive = np.float32(2.0) ** np.arange(-126, 127)[:, None] * np.linspace(1, 2, 64, endpoint=False, dtype=np.float32)
numbers = np.concatenate([np.array([0.0, -1.0, -2.5], np.float32), positive.ravel()])
ours = torch.from_numpy(numbers).to(torch.float8_e8m0fnu).view(torch.uint8).numpy()
theirs = numbers.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
for number, a, b in zip(numbers[:3], ours, theirs):
    print(f"{number}: torch {a}, ml_dtypes {b}")
print(f"{len(positive.ravel())} positive numbers: {int((ours != theirs)[3:].sum())} differ")

zeros = np.zeros((1, 32), np.float32)  # a block of an expert that was pruned
scale = np.abs(zeros).max(-1, keepdims=True).astype(ml_dtypes.float8_e8m0fnu)
read = torch.from_numpy(scale.view(np.uint8)).view(torch.float8_e8m0fnu).float() * torch.zeros(1, 32)
print(f"an all-zero block of ml_dtypes, read by torch: {int(read.isnan().sum())} of 32 numbers are NaN")
PY
"$work/venv/bin/python" "$work/run.py" | tee "$work/seen.txt"
[ "$(cat "$work/seen.txt")" = "0.0: torch 0, ml_dtypes 255
-1.0: torch 127, ml_dtypes 255
-2.5: torch 128, ml_dtypes 255
16192 positive numbers: 0 differ
an all-zero block of ml_dtypes, read by torch: 32 of 32 numbers are NaN" ]
echo "as stated: zero and negatives differ"
