"""Which model, and how it is computed with."""

from dataclasses import dataclass

from alphaquant.specs.check import Natural, check


@dataclass(frozen=True, kw_only=True)
class CheckpointSpec:
    """The model."""

    model: str = "demo"
    """demo, a local directory, a GGUF file, or a hub id."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""
    dtype: str = "auto"
    """Of the computation: auto (on the CPU float32, or bfloat16 for a bfloat16 checkpoint whose
    float32 weights would take a quarter of the memory; else the checkpoint's), float32, bfloat16,
    float16."""
    rotate: Natural | None = None
    """Seed of a rotation of the residual stream, such as 0: the same function, with outliers
    spread over all inputs (docs/rotation.md); default: none."""

    def __post_init__(self) -> None:
        """Refuse wrong types.

        Raises:
            ConfigError: naming the field.
        """
        check(self)
