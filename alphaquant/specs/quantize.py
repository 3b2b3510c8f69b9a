"""A quantization: from a configuration to a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from cyclopts import Parameter

from alphaquant.specs.check import Natural, Pair, Positive, check
from alphaquant.specs.flat import make, optional, subject
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.specs.texts import BosMode
from alphaquant.specs.tuning import TuningSpec

QuantChanges: Any = optional(QuantSettings, "QuantChanges")


@dataclass(frozen=True, kw_only=True)
class ConfiguredTextSpec:
    """The text for the Hessians, where it is not the one that the configuration names."""

    calibration: Annotated[str | None, Parameter(alias="--dataset")] = None
    """Text for the Hessians: demo, wikitext2, c4, or a .txt/.jsonl/.npy file; default: what the
    configuration says, else that of aq-search."""
    calibration_samples: Annotated[Positive | None, Parameter(alias="--nsamples")] = None
    """Windows; default: what the configuration says, else 128."""
    seq_len: Annotated[Pair | None, Parameter(alias="--seqlen")] = None
    """Tokens per window; default: what the configuration says, else as in aq-search."""
    seed: Natural | None = None
    """Seed of the windows; default: what the configuration says, else 0."""
    bos: BosMode | None = None
    """Beginning-of-text token in front of windows: auto (as the tokenizer starts a text), always,
    never; default: what the configuration says, else auto."""

    def __post_init__(self) -> None:
        """Refuse wrong types and counts that make no sense.

        Raises:
            ConfigError: naming the field.
        """
        check(self)


ExportName = Literal["alphaquant", "compressed-tensors", "gptq", "gguf"]
EXPORT_NAMES: tuple[str, ...] = get_args(ExportName)
"""What --export takes; the first is our own packed checkpoint."""


@dataclass(frozen=True, kw_only=True)
class QuantizeSpec:
    """A quantization."""

    model: str
    """demo, a local directory, a GGUF file, or a hub id."""
    config: Path
    """Configuration, such as best.json of aq-search."""
    out: Annotated[Path | None, Parameter(alias="--save")] = None
    """Directory of the packed checkpoint; needed unless --dry-run."""
    export: ExportName = "alphaquant"
    """What is written: alphaquant (our packed checkpoint), compressed-tensors (vLLM, SGLang,
    transformers; search with their profile), gptq (vLLM; --profile vllm --kernels marlin), gguf (a
    file for llama.cpp; --profile gguf)."""
    overwrite: Annotated[bool, Parameter(negative="")] = False
    """Replace a packed checkpoint or an export in out when the new one is complete, and drop an
    unfinished one of another job."""
    strict: Annotated[bool, Parameter(negative="")] = False
    """A pattern that matches nothing is an error."""
    model_type: Annotated[str, Parameter(alias="--model_type")] = "auto"
    """What the model is called in the report: olmoe, qwen, mixtral, deepseek, generic_moe,
    standard, or auto, which detects it. An error where one has routed experts and the other
    none."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""
    dtype: str = "auto"
    """Of the computation: auto (on the CPU float32, or bfloat16 for a bfloat16 checkpoint whose
    float32 weights would take a quarter of the memory; else the checkpoint's), float32, bfloat16,
    float16."""
    rotate: Natural | None = None
    """Seed of a rotation of the residual stream (docs/rotation.md); default: what the
    configuration says, else none."""
    cache: Path | None = None
    """Directory of copies of weights and of banks: what a search quantized the same way is taken
    from there; default $ALPHAQUANT_CACHE or ~/.cache/alphaquant."""
    workers: Positive | None = None
    """Processes of this machine that share the layers, one per GPU with --device cuda; by default
    one process does all. Codes do not depend on how many."""
    cluster: str | None = None
    """Ray cluster whose nodes share the layers: auto, or the address of its head; one worker per
    GPU, or per node where there are none, or --workers in all; none by default."""
    text: Annotated[ConfiguredTextSpec, subject("Text", 1)] = ConfiguredTextSpec()
    """Of the Hessians."""
    tuning: Annotated[TuningSpec, subject("Tuning", 2)] = TuningSpec()
    quantizer: Annotated[QuantChanges, subject("Quantizer", 3)] = QuantChanges()

    @classmethod
    def of(cls, **settings: Any) -> "QuantizeSpec":
        """The specification of flat settings, named as the options of the command.

        Raises:
            ConfigError: an unknown name, a missing one, or a value that makes no sense.
        """
        return make(cls, settings, "quantize")

    def __post_init__(self) -> None:
        """Refuse values of the wrong type.

        Raises:
            ConfigError: naming the field.
        """
        check(self)
