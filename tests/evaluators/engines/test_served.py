"""An engine's logits measured as a model's, and what is refused."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from alphaquant.commands import evaluate as command
from alphaquant.commands.evaluate import evaluate
from alphaquant.commands.evaluate_text import evaluation_json, evaluation_text
from alphaquant.errors import ConfigError, ModelError
from alphaquant.evaluators.engines import served
from alphaquant.evaluators.engines.protocol import EngineEntry, EngineRequest
from alphaquant.evaluators.engines.served import ServedModel, windows_at_once
from alphaquant.models.loading import load_model
from alphaquant.specs.evaluate import EvaluateSpec

FACTS: Mapping[str, Any] = MappingProxyType({"engine": "other", "version": "1.2"})


@dataclass(frozen=True)
class Other:
    """An engine that runs transformers, with logits of `more` tokens that nobody knows."""

    model: nn.Module
    more: int = 3
    facts: Mapping[str, Any] = field(default_factory=lambda: FACTS)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            found = self.model(torch.from_numpy(tokens).unsqueeze(0)).logits[0]
        padded: np.ndarray = nn.functional.pad(found.float(), (0, max(0, self.more))).numpy()
        return padded[:, : padded.shape[1] + min(0, self.more)]


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> list[EngineRequest]:
    """The name vllm stands for that engine; what it was started with."""
    asked: list[EngineRequest] = []

    @contextmanager
    def opened(request: EngineRequest) -> Iterator[Other]:
        asked.append(request)
        yield Other(load_model(str(request.model)))

    entry = EngineEntry(opened, lambda model, python: None)
    for module in (served, command):
        monkeypatch.setattr(module, "ENGINES", MappingProxyType({"vllm": entry}))
    return asked


@pytest.fixture
def spec(tiny: Path, texts: dict[str, Path]) -> EvaluateSpec:
    return EvaluateSpec(
        model=str(tiny),
        reference=str(tiny),
        data=str(texts["heldout"]),
        samples=4,
        seq_len=24,
        engine="vllm",
        engine_python=Path("/usr/bin/python3"),
    )


def test_engine_with_the_original_is_no_different_from_it(
    spec: EvaluateSpec, other: list[EngineRequest]
) -> None:
    found = evaluate(spec)
    values = {score.metric: score.value for score in found.scores}
    assert values["kl"] == pytest.approx(0.0, abs=1e-8)
    assert values["same_top"] == 1.0
    reference = {score.metric: score.value for score in found.reference_scores}
    assert values["perplexity"] == pytest.approx(reference["perplexity"], rel=1e-6)
    assert other == [EngineRequest(Path(spec.model), "auto", 24, Path("/usr/bin/python3"))]


def test_engine_and_its_version_are_told(spec: EvaluateSpec, other: list[EngineRequest]) -> None:
    found = evaluate(spec)
    assert evaluation_json(found)["engine"] == FACTS
    assert "engine other, version 1.2" in evaluation_text(found)


def test_model_of_another_vocabulary_is_refused() -> None:
    class Narrow(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> Any:
            return served.Answer(torch.zeros(*input_ids.shape, 8))

    with pytest.raises(ModelError, match=r"\[2, 8\] for a window of 2 tokens.*has 9 tokens"):
        ServedModel(Other(Narrow(), more=0), 9)(torch.zeros(1, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reference": None}, "--engine vllm runs the model elsewhere.*give --reference MODEL"),
        ({"tasks": "drift"}, "drift cannot be measured with --engine vllm.*kl, perplexity"),
        ({"tasks": "kl,mmlu"}, "mmlu cannot be measured with --engine vllm"),
        ({"engine": "transformers"}, "--engine-python .*python3 given.*or give --engine vllm"),
        ({"engine": "llama.cpp"}, "--engine-python .*python3 given, and --engine llama.cpp runs"),
    ],
)
def test_what_logits_do_not_say_is_refused(
    spec: EvaluateSpec, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        evaluate(EvaluateSpec(**{**vars(spec), **changes}))


def test_mixed_precision_file_is_refused(spec: EvaluateSpec, tmp_path: Path) -> None:
    file = tmp_path / "mix.yaml"
    file.write_text("base_model_path: here\n")
    with pytest.raises(ConfigError, match="mix.yaml is a mixed_precision file"):
        evaluate(replace(spec, model=str(file)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"engine_python": Path(sys.executable)}, "has no vLLM; give the python"),
        ({"engine_python": Path("/bin/false")}, r"/bin/false has no vLLM \(exit code 1\); give"),
        ({"engine_python": Path("/none/python")}, "--engine-python /none/python cannot be run"),
        ({"model": "/none/export"}, "/none/export"),
        ({"model": "/usr"}, "--engine vllm: /usr has no config.json; give the directory"),
        ({"engine": "llama.cpp", "engine_python": None}, "holds 0 GGUF files|xllamacpp"),
    ],
)
def test_what_an_engine_lacks_is_told_before_the_original_is_measured(
    spec: EvaluateSpec, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str
) -> None:
    def measured(*arguments: Any) -> nn.Module:
        raise AssertionError("the original is loaded")

    monkeypatch.setattr(command, "open_model", measured)
    if "model" in changes and changes["model"] != "/usr":  # its engine is found
        entry = EngineEntry(served.ENGINES["vllm"].open, lambda model, python: None)
        monkeypatch.setattr(command, "ENGINES", MappingProxyType({"vllm": entry}))
    with pytest.raises(ModelError, match=says):
        evaluate(replace(spec, **changes))


def test_demo_is_the_directory_of_the_demo_for_an_engine(spec: EvaluateSpec) -> None:
    assert (command._engine_model(replace(spec, model="demo")) / "config.json").is_file()
    assert command._engine_model(spec) == Path(spec.model)


def test_logits_of_few_windows_are_in_memory_at_once() -> None:
    # 2048 tokens x 151936 x 4 bytes are 1.2 GB, more than the 256 MiB that are allowed.
    assert windows_at_once(2048, 151936) == 1
    # 256 x 256 x 4 bytes are 256 KiB: a thousand windows.
    assert windows_at_once(256, 256) == 1024
