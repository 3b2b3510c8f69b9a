"""Options of GPTQ, and which of two group sizes counts.

The configuration of the layers wins: `groupsize` stands in only where neither `default` nor an
override that matches says `group_size`. -1 means that it stands in nowhere, so the format's own
default (128 for int, nl and fp) holds. One scale per row is written as `"group_size": -1` in the
configuration. mxfp and nvfp4 have fixed blocks whatever both say.

    groupsize   default                            a matrix gets
    -1          {"wq": "int4"}                     int4-g128
    64          {"wq": "int4"}                     int4-g64
    64          {"wq": "int4", "group_size": 32}   int4-g32
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from alphaquant.errors import ConfigError
from alphaquant.spaces.config import Config, load_config, parse_config, resolve
from alphaquant.spaces.formats import MIN_GROUP_SIZE
from alphaquant.spaces.units import Inventory
from alphaquant.specs.quantizer import QuantSettings

logger = logging.getLogger(__name__)

AS_CONFIGURED = -1
"""The group size that leaves the decision to the configuration of the layers."""

LayerConfig = Config | Mapping[str, Any] | str | PathLike[str]
"""A configuration: read already, as JSON data, or the path of a file."""


@dataclass(frozen=True)
class GPTQConfig:
    """Options of the loop; everything else is as in `QuantSettings`.

    Attributes:
        blocksize: columns per lazy update; speed only.
        percdamp: damping, fraction of mean(diag H).
        groupsize: inputs per scale where the configuration of the layers says nothing; -1 for the
            default of each format.
        actorder: process columns by descending diag(H); implies static groups.
        static_groups: scales from the original weights, before the loop.
    """

    blocksize: int = 128
    percdamp: float = 0.01
    groupsize: int = AS_CONFIGURED
    actorder: bool = False
    static_groups: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: one is out of its range.
        """
        self.settings()
        if self.groupsize != AS_CONFIGURED and self.groupsize < MIN_GROUP_SIZE:
            raise ConfigError(
                f"groupsize is {self.groupsize}; use -1 (as the layer configuration says) or at "
                f"least {MIN_GROUP_SIZE}"
            )

    def settings(self) -> QuantSettings:
        """The engine's settings: sequential and in one order, as GPTQ describes it."""
        return QuantSettings(
            percdamp=self.percdamp,
            blocksize=self.blocksize,
            actorder=self.actorder,
            static_groups=self.static_groups,
            n_starts=1,
            sequential=True,
            correction=0.0,
        )


def read_layer_config(layer_config: LayerConfig) -> Config:
    """A configuration in any of its forms.

    Raises:
        ConfigError: it cannot be read or is not valid.
    """
    if isinstance(layer_config, Config):
        return layer_config
    if isinstance(layer_config, str | PathLike):
        return load_config(Path(layer_config))
    try:
        text = json.dumps(dict(layer_config))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"layer_config is {layer_config!r:.80} ({error}); give a path, a Config, or a "
            "dictionary of JSON values"
        ) from error
    return parse_config(text, "layer_config")


def choose_formats(config: Config, inventory: Inventory, groupsize: int) -> dict[str, str]:
    """Format name of every matrix; see the file header for `groupsize`.

    Raises:
        ConfigError: fields that do not go together, or activation formats, which weights alone
            cannot carry.
    """
    if groupsize != AS_CONFIGURED and config.default.group_size is None:
        default = config.default.model_copy(update={"group_size": groupsize})
        config = config.model_copy(update={"default": default})
    plan = resolve(config, inventory)
    activations = [n for n, scheme in plan.schemes.items() if scheme.activation.is_quantized]
    if activations:
        raise ConfigError(
            f"activation formats are asked for {len(activations)} matrices, e.g. "
            f"{activations[0]}, and only weights are quantized in place: set aq to bf16"
        )
    for warning in plan.warnings:
        logger.warning("%s", warning)
    return dict(plan.assignment.formats)
