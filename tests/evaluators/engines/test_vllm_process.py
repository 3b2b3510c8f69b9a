"""vLLM's process, with a package of that name that computes by hand; the real one is slow."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from alphaquant.errors import ModelError
from alphaquant.evaluators.engines.protocol import EngineRequest
from alphaquant.evaluators.engines.vllm_process import open_vllm

STAND_IN = '''
"""LLM of vLLM as far as the worker uses it: logits of token t at position p are 10 t + p + v."""
import os, subprocess, sys
from types import SimpleNamespace
import numpy as np
__version__ = "0.0.stand-in"
class Rows(np.ndarray):
    def float(self): return self
    def cpu(self): return self
    def numpy(self): return np.asarray(self)
class SamplingParams(SimpleNamespace): pass
class Model:
    def compute_logits(self, pairs):
        rows = [[10 * t + p + v for v in range(5)] for p, t in pairs]
        return np.array(rows, np.float32).view(Rows)
class LLM:
    def __init__(self, model, dtype, max_model_len, **rest):
        if model.endswith("broken"):
            raise ValueError("no such\\nformat")
        if model.endswith("killed"):
            print("out of memory", file=sys.stderr); sys.exit(137)
        if model.endswith("outlived"):
            subprocess.Popen(["sleep", "20"], close_fds=False); sys.exit(3)
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] == "1"
        config = SimpleNamespace(dtype=f"{dtype} of {max_model_len}")
        self.llm_engine, self.model = SimpleNamespace(model_config=config), Model()
    def apply_model(self, function): function(self.model)
    def generate(self, prompts, wanted, use_tqdm):
        assert wanted.prompt_logprobs == 1
        pairs = list(enumerate(prompts[0]["prompt_token_ids"]))
        self.model.compute_logits(pairs[-1:])  # for the next token
        self.model.compute_logits(pairs[:-1])  # for the prompt
'''


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


@pytest.mark.parametrize("tokens", [[3, 1, 2, 0], [4, 4], [1, 2, 3]])
def test_logits_are_in_the_order_of_the_window(stand_in: None, tokens: list[int]) -> None:
    with open_vllm(EngineRequest(Path("model"), "bfloat16", 16)) as engine:
        for _ in range(2):
            found = engine.logits(np.array(tokens))
            expected = [[10 * t + p + v for v in range(5)] for p, t in enumerate(tokens)]
            assert found.tolist() == expected
        assert engine.facts == {
            "engine": "vllm",
            "version": "0.0.stand-in",
            "dtype": "bfloat16 of 17",
        }


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("broken", "broken does not load: no such format"),
        ("killed", "vllm stopped with exit code 137; its last words: out of memory"),
        ("outlived", "vllm stopped with exit code 3"),  # by a process that it started
    ],
)
def test_engine_that_does_not_start_says_why(stand_in: None, name: str, says: str) -> None:
    started = time.monotonic()
    with pytest.raises(ModelError, match=says), open_vllm(EngineRequest(Path(name), "auto", 16)):
        pass
    assert time.monotonic() - started < 15  # the process that outlives it takes 20


def test_engine_that_dies_between_windows_is_an_error(stand_in: None) -> None:
    with (
        pytest.raises(ModelError, match="vllm stopped with exit code -9"),
        open_vllm(EngineRequest(Path("model"), "auto", 16)) as engine,
    ):
        engine.process.kill()
        engine.process.wait()
        engine.logits(np.array([3, 1, 2]))


def test_one_process_is_asked_for_whatever_the_environment_says(
    stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with open_vllm(EngineRequest(Path("model"), "auto", 16)) as engine:
        assert engine.logits(np.array([3, 1, 2])).shape == (3, 5)


def test_environment_without_the_engine_is_named() -> None:
    request = EngineRequest(Path("model"), "auto", 16, Path(sys.executable))
    with (
        pytest.raises(ModelError, match=r"has no vLLM .*give --engine-python"),
        open_vllm(request),
    ):
        pass


def test_python_that_is_none_is_named(tmp_path: Path) -> None:
    request = EngineRequest(Path("model"), "auto", 16, tmp_path / "none")
    with (
        pytest.raises(ModelError, match="--engine-python .*none cannot be run"),
        open_vllm(request),
    ):
        pass
