"""What is asked about a model's experts."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from alphaquant.specs.check import Natural, check
from alphaquant.specs.checkpoint import CheckpointSpec
from alphaquant.specs.flat import make, subject
from alphaquant.specs.quantizer import RoundingSpec
from alphaquant.specs.texts import CalibrationSpec


@dataclass(frozen=True, kw_only=True)
class SensitivitySpec:
    """A table of what quantizing each routed expert costs."""

    format: str
    """Format that experts are quantized to, such as int2-g64."""
    against: str = "bf16"
    """Larger format that bits and costs are compared with; bf16: the original."""
    seed: Natural = 0
    """Seed of text windows and labels."""
    cache: Path | None = None
    """Directory of banks, shared with aq-search; default $ALPHAQUANT_CACHE or
    ~/.cache/alphaquant."""
    checkpoint: Annotated[CheckpointSpec, subject("Model", 1)] = CheckpointSpec()
    text: Annotated[CalibrationSpec, subject("Text", 2)] = CalibrationSpec()
    quantizer: Annotated[RoundingSpec, subject("Quantizer", 3)] = RoundingSpec()

    @classmethod
    def of(cls, **settings: Any) -> "SensitivitySpec":
        """The specification of flat settings, named as the options of the command.

        Raises:
            ConfigError: an unknown name, a missing one, or a value that makes no sense.
        """
        return make(cls, settings, "sensitivity")

    def __post_init__(self) -> None:
        """Refuse wrong types.

        Raises:
            ConfigError: naming the field.
        """
        check(self)

    def facts(self) -> dict[str, Any]:
        """What decides the numbers, ready for JSON."""
        return {k: v for k, v in asdict(self).items() if k != "cache"}
