"""Which texts are used for what."""

from dataclasses import dataclass
from typing import Literal

from alphaquant.specs.check import Pair, Positive, check

DEMO_TEXT = "demo=0.75,demo:code=0.25"
"""Default text of every part of a search: three quarters books, one quarter Python, so that no
expert is starved of the tokens that it is for. Calibrated on books alone the demo's winner has
four times the KL on this mixture (benchmarks/allocation.md)."""

BosMode = Literal["auto", "always", "never"]
"""Whether texts start with the tokenizer's beginning of text; `auto`: as the tokenizer does it."""


@dataclass(frozen=True, kw_only=True)
class CalibrationSpec:
    """The text for Hessians and costs."""

    calibration: str = DEMO_TEXT
    """Text for Hessians and costs: demo, demo:code, wikitext2, c4, a .txt/.jsonl/.npy file, or
    ebss, which the model writes itself; several are separated by commas, such as
    a=0.75,b=0.25."""
    calibration_samples: Positive = 128
    """Windows of calibration text."""
    seq_len: Pair | None = None
    """Tokens per window; default 256 for demo, else 512 or the model's limit."""
    bos: BosMode = "auto"
    """Beginning-of-text token in front of windows and prompts: auto (as the tokenizer starts a
    text), always, never."""

    def __post_init__(self) -> None:
        """Refuse wrong types and counts that make no sense.

        Raises:
            ConfigError: naming the field.
        """
        check(self)


@dataclass(frozen=True, kw_only=True)
class TextSpec(CalibrationSpec):
    """The three texts, which must not overlap. By default books and code."""

    calibration_samples: Positive | None = None  # type: ignore[assignment]
    """Windows of calibration text; by default what the model's experts need (--effort)."""
    evaluation: str = DEMO_TEXT
    """Text for the divergence that the search sees."""
    evaluation_samples: Pair | None = None
    """Windows of evaluation text; default by --effort."""
    heldout: str = DEMO_TEXT
    """Text for the last comparison with uniform formats, domain by domain, never used before."""
    heldout_samples: Pair | None = None
    """Windows of held-out text; default by --effort."""

    @property
    def sources(self) -> dict[str, str]:
        """Role -> text, as `alphaquant.texts.windows` calls them."""
        texts = (self.calibration, self.evaluation, self.heldout)
        return dict(zip(("calibration", "search", "heldout"), texts, strict=True))
