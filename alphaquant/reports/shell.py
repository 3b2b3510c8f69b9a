"""Commands that people copy into a shell."""

import shlex
from pathlib import Path

from alphaquant.spaces.profiles import find_profile
from alphaquant.specs.search import SearchSpec


def command_text(*parts: str | Path) -> str:
    """A command that a POSIX shell takes as it was meant, whatever stands in its parts.

    Worked example: `aq-eval`, `--model`, `a $(b)` make `aq-eval --model 'a $(b)'`.
    """
    return shlex.join(str(part) for part in parts)


def quantize_command(model: str, config: str | Path, export: str = "") -> str:
    """How to quantize a model as a configuration says.

    Args:
        model: as `--model` takes it.
        config: the configuration.
        export: whose files it becomes, empty for ours.
    """
    wanted = ["--export", export] if export else []
    return command_text(
        "aq-quantize", "--model", model, "--config", config, *wanted, "--out", "DIR"
    )


def use_command(spec: SearchSpec, config: str | Path) -> str:
    """What makes a model of a result: quantizing it, or putting candidates together.

    Args:
        spec: of the search.
        config: its configuration; the `mixed_precision` file of candidates is beside it.
    """
    model = spec.checkpoint.model
    if spec.limits.candidates is None:
        return quantize_command(model, config, find_profile(spec.limits.profile).export)
    mixed = Path(config).with_suffix(".yaml")
    return command_text("aq-eval", "--model", mixed, "--reference", model)


def evaluate_command(reference: str) -> str:
    """How to measure what that made."""
    return command_text("aq-eval", "--model", "DIR", "--reference", reference)
