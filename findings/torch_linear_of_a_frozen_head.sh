#!/usr/bin/env bash
# Guess: `requires_grad_(False)` changes no forward pass that runs under no_grad, and logits of the last position alone (`logits_to_keep=1`, what
# generate asks for) take no longer than those of all positions.
#
# Seen with torch 2.13.0 and transformers 5.23.0, bfloat16 on a CPU: in a frozen model the last position's logits take some twenty times as long as
# in the same model before it was frozen, and as all positions' logits. transformers hands the head a slice, [1, 1, H] of [1, T, H]. torch's linear
# folds windows and positions into one dimension if the weight requires a gradient, or if the strides allow it, and it looks at the stride of the
# one window too, although that means nothing: the slice counts as contiguous, and `.contiguous()` returns it as it is. Else the product becomes a
# batched one, for which the path to oneDNN copies the whole weight out of its transposed view. A clone of the slice is multiplied at once. In float32
# nothing is copied. Whoever freezes models and runs them on a CPU should clone what the head is given.
set -euo pipefail
grep -q avx512_bf16 /proc/cpuinfo || { echo "skipped: torch multiplies bfloat16 on this CPU without oneDNN"; exit 0; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy==2.4.6 2>/dev/null
cat >"$work/run.py" <<'PY'
import time

import torch
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
torch.set_grad_enabled(False)


def seconds(run):
    run()
    taken = []
    for _ in range(3):
        started = time.process_time()
        run()
        taken.append(time.process_time() - started)
    return min(taken)


def allocated(run):
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    return sum(max(0, e.self_cpu_memory_usage) for e in profile.events())


weight = torch.randn(32000, 1024).bfloat16()
last = torch.randn(1, 64, 1024).bfloat16()[:, -1:]
clone = last.clone(memory_format=torch.contiguous_format)
assert last.is_contiguous() and last.contiguous().stride() == last.stride() != clone.stride()
sizes = [allocated(lambda: linear(last, w)) for w in (weight, weight.clone().requires_grad_(True))]
sizes.append(allocated(lambda: linear(clone, weight)))
print(f"bytes allocated for a slice: {sizes[0]}, if the weight requires a gradient {sizes[1]}; for a clone {sizes[2]}; weight {weight.nbytes}")
assert sizes[0] >= weight.nbytes > 100 * max(sizes[1:])
last, weight = torch.randn(1, 64, 1024)[:, -1:], weight.float()
assert allocated(lambda: linear(last, weight)) < weight.nbytes / 100, "in float32 too"

config = LlamaConfig(vocab_size=32000, hidden_size=1024, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8)
model = LlamaForCausalLM(config).bfloat16().eval()
tokens = torch.arange(16)[None]
taken = {}
for state in ("as made", "frozen"):
    model.requires_grad_(state == "as made")
    taken[state] = [seconds(lambda: model(tokens, use_cache=False, logits_to_keep=n)) for n in (1, 0)]
    one, every = taken[state]
    print(f"{state}: a pass of 16 tokens with the logits of the last takes {one / every:.1f} times one with the logits of all")
assert taken["as made"][0] < 2 * taken["as made"][1]
assert taken["frozen"][0] > 4 * max(taken["frozen"][1], taken["as made"][0])
PY
"$work/venv/bin/python" "$work/run.py" 2>/dev/null
echo "as stated: a frozen head copies its weight for the last position"
