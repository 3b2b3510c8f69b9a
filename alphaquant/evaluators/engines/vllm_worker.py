"""Runs inside the environment of vLLM: logits of windows, one after another.

Started as `python vllm_worker.py FOLDER PIPE` by `vllm_process`, which is beside it; standard
library, numpy and vLLM only. The first line on stdin says what to load, every further one that
`tokens.npy` is there. Answers are lines of JSON on the pipe.

The engine is asked for log-probabilities of the prompt, which makes it compute the logits of every
position; they are taken where the model computes them, before anything is sorted or cut.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
}
"""Of the engine, where the environment does not say otherwise: a window as long as the model takes
and one token more, which is never run; no compiling, which takes longer than a short text."""
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Whatever the environment says: the model is reached in this process."""


def main(folder: Path, pipe: Any) -> None:
    """Load what the first line says, then answer."""
    asked = json.loads(sys.stdin.readline())
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.update(ONE_PROCESS)
    try:
        import numpy as np
        import vllm
    except ImportError as error:
        tell(pipe, error=f"{sys.executable} has no vLLM ({error}); give --engine-python")
        return
    captured: list[Any] = []
    try:
        engine = vllm.LLM(
            asked["model"],
            dtype=asked["dtype"],
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=asked["seq_len"] + 1,
            max_num_batched_tokens=max(2048, asked["seq_len"] + 1),
            max_num_seqs=1,
            enable_prefix_caching=False,
        )
        engine.apply_model(lambda model: capture(model, captured))
    except Exception as error:  # whatever an engine raises is what the user must read
        tell(pipe, error=f"{asked['model']} does not load: {' '.join(str(error).split())[:400]}")
        return
    tell(pipe, version=vllm.__version__, dtype=str(engine.llm_engine.model_config.dtype))
    wanted = vllm.SamplingParams(max_tokens=1, prompt_logprobs=1, detokenize=False, temperature=0)
    for _ in sys.stdin:
        tokens = np.load(folder / "tokens.npy").tolist()
        captured.clear()
        engine.generate([{"prompt_token_ids": tokens}], wanted, use_tqdm=False)
        np.save(folder / "logits.npy", np.concatenate(in_order(captured, len(tokens))))
        tell(pipe, logits="logits.npy")


def capture(model: Any, captured: list[Any]) -> None:
    """Keep what the model's head gives, float32 [rows, V] each."""
    compute = model.compute_logits

    def kept(*args: Any, **kwargs: Any) -> Any:
        logits = compute(*args, **kwargs)
        captured.append(logits.float().cpu().numpy())
        return logits

    model.compute_logits = kept


def in_order(captured: list[Any], n_tokens: int) -> list[Any]:
    """Logits of the prompt's positions, then those of its last, as [n_tokens, V] in parts.

    The last position's are computed for the next token, the others for the prompt.
    """
    prompt = [part for part in captured if len(part) == n_tokens - 1]
    last = [part for part in captured if len(part) == 1]
    assert prompt and last, [part.shape for part in captured]
    return [prompt[0], last[0]] if n_tokens > 2 else [captured[1], captured[0]]


def tell(pipe: Any, **words: Any) -> None:
    """One line of JSON."""
    pipe.write(json.dumps(words) + "\n")
    pipe.flush()


if __name__ == "__main__":
    number = int(sys.argv[2])
    os.set_inheritable(number, False)  # what vLLM starts must not keep the pipe open
    main(Path(sys.argv[1]), os.fdopen(number, "w"))
