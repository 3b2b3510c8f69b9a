"""Logits of checkpoints in a real vLLM; runs under the Python of vLLM's environment, not of ours.

    python engine_logits.py REQUEST.json RESULT.safetensors

A request has `runs`, each with `model` (a directory), `tokens` (ids of a prompt) and `options` of
`vllm.LLM`. The result has for run i `logits.i`, float32 [tokens - 1, vocabulary], raw logits of
every position but the last, `greedy.i`, the tokens that follow, and in its metadata as JSON what
each model's parameters and buffers of packed matrices take.

No tokenizer, no network, nothing of the package: vLLM finds the plug-in by itself.
"""

import gc
import json
import sys
import time

N_GREEDY = 4


def packed_bytes(worker):
    """Bytes of packed matrices in a worker, by the last part of the buffer's name."""
    counts = {}
    for name, tensor in worker.model_runner.model.named_buffers():
        last = name.rsplit(".", 1)[-1]
        if last == "packed_bytes" or "_part_" in last:
            key = "packed_bytes" if last == "packed_bytes" else "in kernel order"
            counts[key] = counts.get(key, 0) + tensor.numel() * tensor.element_size()
    return counts


def run(model, tokens, options):
    """Raw logits of a prompt, the greedy tokens behind it, bytes by worker, seconds to start."""
    import torch
    from vllm import LLM, SamplingParams

    n_vocabulary = options.pop("n_vocabulary")
    defaults = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 64,
        "max_num_seqs": 2,
        "max_logprobs": n_vocabulary,
        "logprobs_mode": "raw_logits",
    }
    started = time.perf_counter()
    engine = LLM(model=model, **{**defaults, **options})
    seconds = time.perf_counter() - started
    params = SamplingParams(
        prompt_logprobs=n_vocabulary,
        max_tokens=N_GREEDY,
        temperature=0,
        detokenize=False,
        ignore_eos=True,
    )
    (output,) = engine.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
    logits = torch.zeros(len(tokens) - 1, n_vocabulary)
    for position, found in enumerate(output.prompt_logprobs[1:]):
        for token, entry in found.items():
            logits[position, token] = entry.logprob
    greedy = torch.tensor(output.outputs[0].token_ids)
    n_bytes = engine.collective_rpc(packed_bytes)
    del engine
    gc.collect()
    return logits, greedy, {"n_bytes": n_bytes, "seconds": seconds}


def main():
    """Run all requests, in one process after the other."""
    import torch
    from safetensors.torch import save_file

    with open(sys.argv[1]) as file:
        runs = json.load(file)["runs"]
    tensors, facts = {}, []
    for number, request in enumerate(runs):
        logits, greedy, own = run(request["model"], request["tokens"], dict(request["options"]))
        tensors |= {f"logits.{number}": logits, f"greedy.{number}": greedy}
        facts.append(own)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    save_file(tensors, sys.argv[2], metadata={"facts": json.dumps(facts)})


if __name__ == "__main__":
    main()
