"""What an assignment may cost and choose from."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter, validators

from alphaquant.errors import ConfigError
from alphaquant.specs.check import Positive, Share, check

KernelSet = Literal["all", "marlin"]
KvFormat = Literal["bf16", "fp8"]

_ABOVE_ZERO = Parameter(validator=validators.Number(gt=0))


@dataclass(frozen=True, kw_only=True)
class LimitSpec:
    """The budget, the formats, and limits beside it."""

    budget: str = ""
    """Size limit: 4.25bits, 4.25 or 4.25bpw (mean stored bits per quantizable weight),
    4.25bpw-file (per weight of the whole checkpoint), 13GiB or 13GB (whole checkpoint)."""
    fit: str | None = None
    """Memory of a GPU, such as 24GiB, in place of a budget: weights get what reserve, cache and
    activations leave of it. Needs a context; none by default."""
    context: Positive | None = None
    """Tokens of a sequence that the cache of keys and values must hold; needed with fit."""
    sequences: Positive = 1
    """Sequences at the same time; with fit."""
    kv: KvFormat = "bf16"
    """What the cache is in: bf16, or fp8 with the profiles vllm and sglang."""
    reserve: Share = 0.08
    """Share of the memory that the engine does not use for these; vLLM 0.32.0 leaves 0.08."""
    include: str | None = None
    """What is searched beside the decoder layers: head, embeddings, both with a comma, or none;
    default: both where the budget is of the whole checkpoint and the profile loads them, else
    none."""
    formats: str = "auto"
    """Formats and menus to choose from, comma-separated, such as int3-g64-asym,mxfp4; menus:
    default, int, nl, gguf, mx, fp, all. auto: the profile's menu."""
    profile: str = "any"
    """What the result must load in: any (our runtime), kernels (our runtime on GPUs), vllm
    (checked against 0.32.0), sglang (0.5.23, read and not run), transformers (5.23.0 with
    compressed-tensors 0.20.0), gguf (llama.cpp b11549)."""
    kernels: KernelSet = "all"
    """Of vllm and sglang: all, or marlin, which narrows formats to int4 and int8, symmetric, in
    groups of 32, 64, 128 or rows, and bf16."""
    candidates: str | None = None
    """Checkpoints of the model that others quantized, directories with commas between them: the
    search is among their matrices and the original's; none by default."""
    max_formats_per_layer: Positive | None = None
    """At most so many formats among a layer's routed experts; none by default."""
    layer_minimum_bits: Annotated[float, _ABOVE_ZERO] | None = None
    """Least stored bits per weight of every layer; none by default."""
    active_budget: str | None = None
    """Bytes of quantizable weights that a token may read on average: 600MiB; none by default."""

    def __post_init__(self) -> None:
        """Refuse wrong types and counts that make no sense.

        Raises:
            ConfigError: naming the field, or formats beside candidates.
        """
        check(self)
        if not self.budget and self.fit is None:
            raise ConfigError(
                "no budget; give one such as 4.25bits, 13GiB, or the memory of a GPU with fit and "
                "context"
            )
        if (self.fit is None) != (self.context is None):
            raise ConfigError(
                "fit and context go together: fit 24GiB, context 32768; give both, or a budget"
            )
        if self.candidates is not None and self.formats != "auto":
            raise ConfigError(
                f"formats is {self.formats!r}, and candidates have formats of their own; leave "
                "formats out, or candidates"
            )
        if self.candidates is not None and self.include not in (None, "none"):
            raise ConfigError(
                f"include is {self.include!r}, and candidates keep lm_head and embeddings as they "
                "are; leave include out, or candidates"
            )

    @property
    def candidate_names(self) -> tuple[str, ...]:
        """The directories in `candidates`."""
        names = (name.strip() for name in (self.candidates or "").split(","))
        return tuple(dict.fromkeys(name for name in names if name))
