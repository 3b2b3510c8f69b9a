"""What moves after the codes of a quantization are chosen."""

from dataclasses import dataclass

from alphaquant.errors import ConfigError
from alphaquant.specs.check import Positive, check

TUNED = ("scales", "norms", "routers")
"""What `--tune` takes; norms are biases too."""


@dataclass(frozen=True, kw_only=True)
class TuningSpec:
    """Whether and how long free numbers are tuned on the original's predictions."""

    tune: str = "none"
    """What moves after the codes are chosen, so that predictions are the original's: scales, norms
    (biases too), routers, with commas between them; all; or none. Kept only where it helps on
    windows that were not learned from."""
    tune_epochs: Positive = 2
    """Times that the calibration text is gone through."""

    def __post_init__(self) -> None:
        """Refuse wrong types and unknown names.

        Raises:
            ConfigError: naming the field.
        """
        check(self)
        names = {name.strip() for name in self.tune.split(",")}
        if names not in ({"none"}, {"all"}) and not names <= set(TUNED):
            raise ConfigError(
                f"tune is {self.tune!r}; known are {', '.join(TUNED)}, all and none: name some"
            )

    @property
    def settings(self) -> "TuningSettings | None":
        """The same with names told apart; None where nothing moves."""
        names = {name.strip() for name in self.tune.split(",")}
        if names == {"none"}:
            return None
        parts = tuple(name for name in TUNED if name in names or names == {"all"})
        return TuningSettings(parts, self.tune_epochs)


@dataclass(frozen=True)
class TuningSettings:
    """How a model is tuned.

    Attributes:
        parts: what moves, of `TUNED`.
        n_epochs: times that the calibration text is gone through.
        step_size: largest relative step.
        windows: per step.
        seed: of the order of the windows.
    """

    parts: tuple[str, ...] = TUNED
    n_epochs: int = 2
    step_size: float = 2e-3
    windows: int = 4
    seed: int = 0
