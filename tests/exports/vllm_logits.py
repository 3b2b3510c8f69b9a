"""Logits of checkpoints by vLLM, run by the engine's own interpreter: no package of ours.

    ALPHAQUANT_VLLM_PYTHON vllm_logits.py VOCABULARY FOLDER...     writes FOLDER/logits.npy [T, V]

One import of vLLM, one child for each checkpoint. A folder that does not load leaves no file.
"""

import os
import sys

os.environ |= {
    "TORCHDYNAMO_DISABLE": "1",  # without the compiler's twenty seconds of g++
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}

import numpy as np
from vllm import LLM, SamplingParams

TOKENS = list(range(3, 67, 2))


def logits_of(folder: str, vocabulary: int) -> np.ndarray:
    """Raw logits of every token but the last, float32 [T, V]."""
    engine = LLM(
        folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=64,
        max_num_seqs=2,
        max_logprobs=vocabulary,
        logprobs_mode="raw_logits",
    )
    wanted = SamplingParams(
        max_tokens=2, ignore_eos=True, prompt_logprobs=vocabulary, detokenize=False, temperature=0
    )
    (found,) = engine.generate([{"prompt_token_ids": TOKENS}], wanted, use_tqdm=False)
    assert len(found.outputs[0].token_ids) == 2
    rows = [[row[t].logprob for t in range(vocabulary)] for row in found.prompt_logprobs[1:]]
    return np.array(rows, np.float32)


if __name__ == "__main__":
    for path in sys.argv[2:]:
        if (child := os.fork()) == 0:
            np.save(f"{path}/logits.npy", logits_of(path, int(sys.argv[1])))
            os._exit(0)
        os.waitpid(child, 0)
