#!/usr/bin/env bash
# Guess: integers of 3, 5 and 6 bits that compressed-tensors 0.17 packed are refused by 0.18 and later, which pack them in fewer
# words: the number of words per row does not fit the shape that is stored beside them.
#
# Seen with compressed-tensors 0.17.0 and 0.20.1: up to 0.17 a word of 32 bits holds as many whole codes as fit (ten of 3 bits, two
# bits stay empty); from 0.18 on codes are one dense stream. A row of 128 codes of 3 bits is 13 words in one and 12 in the other, and
# 0.20.1 reads the 13 words without an error: of these codes 83 % are wrong at 3 bits, 94 % at 5 and at 6. Codes of 2, 4 and 8 bits
# are the same in both. Nothing in the checkpoint says which layout it has: quant_method, format and weight_shape are equal. Whoever reads
# such files has to compare the words per row with ceil(K * bits / 32) and ceil(K / (32 // bits)).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip="$work/venv/bin/pip"
"$pip" install -q torch==2.13.0 2>/dev/null
"$pip" install -q transformers==5.23.0 loguru==0.7.3 psutil==7.2.2 2>/dev/null
"$pip" install -q --no-deps --target "$work/older" compressed-tensors==0.17.0 2>/dev/null
"$pip" install -q --no-deps --target "$work/newer" compressed-tensors==0.20.1 2>/dev/null
cat >"$work/run.py" <<'PY'
import sys

import torch

from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

writes = sys.argv[1] == "write"
for bits in (2, 3, 4, 5, 6, 8):
    numbers = torch.arange(2 * 128).mul(7) % 2**bits - 2 ** (bits - 1)
    codes = numbers.to(torch.int8).reshape(2, 128)
    file = f"{sys.argv[2]}/{bits}.pt"
    if writes:
        torch.save(pack_to_int32(codes, bits), file)
    words = torch.load(file)
    found = unpack_from_int32(words, bits, codes.shape)
    print(bits, words.shape[1], round(100 * float((found != codes).float().mean())))
PY
PYTHONPATH="$work/older" "$work/venv/bin/python" "$work/run.py" write "$work" >"$work/older.txt" 2>"$work/error.txt"
PYTHONPATH="$work/newer" "$work/venv/bin/python" "$work/run.py" read "$work" >"$work/newer.txt" 2>>"$work/error.txt"
echo "bits, words per row, wrong codes in percent; written and read by 0.17.0, then read by 0.20.1:"
cat "$work/older.txt"
echo
cat "$work/newer.txt"
[ "$(cat "$work/older.txt")" = "2 8 0
3 13 0
4 16 0
5 22 0
6 26 0
8 32 0" ]
[ "$(cat "$work/newer.txt")" = "2 8 0
3 13 83
4 16 0
5 22 94
6 26 95
8 32 0" ]
echo "as stated: no error, other codes"
