"""A measurement of a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from cyclopts import Parameter

from alphaquant.specs.check import Natural, Pair, Positive, check
from alphaquant.specs.texts import BosMode

EngineName = Literal["transformers", "vllm", "llama.cpp"]
ENGINE_NAMES: tuple[str, ...] = get_args(EngineName)
"""What --engine takes; the first runs in this process."""


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec:
    """What is measured, and on what."""

    model: str
    """Packed checkpoint, local directory, GGUF file, mixed_precision YAML file, hub id, or
    demo."""
    reference: str | None = None
    """The original model, measured too; needed for kl and drift."""
    tasks: str | None = None
    """Comma-separated: kl (with same_top), perplexity, utilization, drift; mmlu, mmlu_anatomy or
    any task, .yaml task file or folder of these of lm-eval; default kl,perplexity, or perplexity
    without a reference."""
    data: str = "demo"
    """Text: demo (held-out part), demo:search, wikitext2, c4, or a .txt/.jsonl/.npy file."""
    samples: Pair = 64
    """Windows."""
    seq_len: Pair | None = None
    """Tokens per window; default 256 for demo, else 2048 or the model's limit."""
    seed: Natural = 0
    """Seed of the windows."""
    bos: BosMode = "auto"
    """Beginning-of-text token in front of windows and prompts: auto (as the tokenizer starts a
    text), always, never."""
    batch_size: Positive = 8
    """Windows or prompts per forward pass."""
    shots: Natural | None = None
    """Examples before each question (lm-eval); default: the task's own."""
    limit: Positive | None = None
    """First documents of each task or subject (lm-eval); default all."""
    task_data: Path | None = None
    """Folder of MMLU's files dev/SUBJECT_dev.csv and test/SUBJECT_test.csv; default: the Hugging
    Face hub."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""
    dtype: str = "auto"
    """Of the computation: auto (on the CPU float32, or bfloat16 for a bfloat16 checkpoint whose
    float32 weights would take a quarter of the memory; else the checkpoint's), float32, bfloat16,
    float16. A packed checkpoint counts as a float32 one."""

    engine: EngineName = "transformers"
    """What runs the model: transformers, or vllm or llama.cpp, which load it as their servers do
    and give their own numbers; kl and perplexity, against a reference. --device and, with
    llama.cpp, --dtype are the reference's alone: an engine runs where and as it is installed."""
    engine_python: Path | None = None
    """Python of the environment that vllm is installed in; default: this one."""
    allow_missing: Annotated[bool, Parameter(negative="")] = False
    """Of a mixed_precision file: weights that are not found stay as in its base model, each with a
    warning, instead of being an error."""

    def __post_init__(self) -> None:
        """Refuse wrong types and counts that make no sense.

        Raises:
            ConfigError: naming the field.
        """
        check(self)

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, one by one."""
        default = "perplexity" if self.reference is None else "kl,perplexity"
        chosen = default if self.tasks is None else self.tasks
        return tuple(name.strip() for name in chosen.split(",") if name.strip())
