"""How matrices are quantized."""

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

from cyclopts import Parameter, validators

from alphaquant.errors import ConfigError
from alphaquant.specs.check import Natural, Positive, Share, check, whole
from alphaquant.specs.scale_search import ScaleSearch

Method = Literal["gptq", "rtn"]

_FRACTION = Parameter(validator=validators.Number(gte=0, lte=1))
_STATIC_GROUPS = Parameter(alias="--static_groups", negative="--no-static-groups")


@dataclass(frozen=True, kw_only=True)
class RoundingSpec:
    """How matrices are quantized, each for itself."""

    method: Method = "gptq"
    """gptq, or rtn (round to nearest, needs no text)."""
    percdamp: Share = 0.01
    """GPTQ damping, fraction of the mean Hessian diagonal."""
    blocksize: Positive = 128
    """Columns that are gone through between two matrix products, speed only."""
    scale_search: ScaleSearch = "hessian"
    """How scales are chosen: minmax (the formats' plain rule), mse (least squared error), hessian
    (least GPTQ error)."""
    route_exponent: Annotated[int, whole(0, 2)] = 2
    """Power of the routing weight in experts' Hessians: 0 plain GPTQ, 1 MoEQuant, 2 exact."""
    pooled_tokens: Natural = 512
    """Tokens' worth of the layer's mean in each expert's Hessian; 0 is off."""
    shrinkage: bool = True
    """Draw Hessians toward their diagonals where that rounds better for held-back tokens."""
    actorder: bool = False
    """Most used inputs first; implies static groups."""
    static_groups: Annotated[bool, _STATIC_GROUPS] = False
    """Scales from the original weights, before the loop."""
    refine_sweeps: Natural | None = None
    """Rounds of coordinate descent and scale fitting after GPTQ; 0 is plain GPTQ. Default 3, in
    a search by --effort."""
    n_starts: Annotated[int, whole(1, 2)] | None = None
    """1 quantizes in one order of columns; 2 in both orders of actorder and keeps each row's
    better result, where rounding is one-sided. Default 2, in a search by --effort."""
    two_sided: bool | None = None
    """Weigh rounding errors by the gradients at a matrix's outputs as well as by its inputs: a
    pass through the model more, and less divergence at the same bits. Default on; with rtn, and
    with --effort quick, off."""

    def __post_init__(self) -> None:
        """Refuse wrong types and values out of range, whoever gave them.

        Raises:
            ConfigError: naming the field, its value and what is possible.
        """
        check(self)
        if self.two_sided and self.method != "gptq":
            raise ConfigError(
                f"two_sided with method {self.method}: only gptq weighs errors; leave two_sided "
                "out, or take method gptq"
            )


@dataclass(frozen=True, kw_only=True)
class QuantSettings(RoundingSpec):
    """How the matrices of a model are quantized; nothing is left open."""

    refine_sweeps: Natural = 3
    """Rounds of coordinate descent and scale fitting after GPTQ; 0 is plain GPTQ."""
    n_starts: Annotated[int, whole(1, 2)] = 2
    """1 quantizes in one order of columns; 2 in both orders of actorder and keeps each row's
    better result, where rounding is one-sided."""
    two_sided: bool = False
    """Weigh rounding errors by the gradients at a matrix's outputs as well as by its inputs.
    Default: what the configuration says; where it says nothing of rounding, on with gptq."""
    sequential: bool = False
    """A layer's inputs come from the quantized layers before it; only where every matrix has one
    format, not in a bank."""
    correction: Annotated[float, _FRACTION] = 0.25
    """With sequential: how far weights go, before they are rounded, toward giving on the inputs
    of the quantized model what the original gives on its own; 0 is plain GPTQ, 1 all the way."""


def settings_of(rounding: RoundingSpec) -> QuantSettings:
    """The settings of a search, where layers are quantized independently.

    What is open gets its default.
    """
    given = {k: v for k, v in asdict(rounding).items() if v is not None}
    return QuantSettings(**{"two_sided": rounding.method == "gptq", **given})


def changed(settings: QuantSettings, changes: Any) -> QuantSettings:
    """Settings with the fields that somebody gave.

    Args:
        settings: what holds for the others.
        changes: any dataclass with fields of `QuantSettings`; None leaves a field as it is.
    """
    return replace(settings, **{k: v for k, v in asdict(changes).items() if v is not None})
