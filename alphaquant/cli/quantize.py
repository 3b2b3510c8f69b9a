"""`aq-quantize`: the packed checkpoint of a configuration."""

import json
from pathlib import Path
from typing import Annotated

import typer

from alphaquant.cli.console import Bars, quiet_libraries, reported, run, set_up

_STOPPED = "stopped; nothing was written"


def command(
    model: Annotated[str, typer.Option(help="demo, a local directory, or a hub id.")],
    config: Annotated[Path, typer.Option(help="Configuration, e.g. best.json of aq-search.")],
    out: Annotated[Path | None, typer.Option(help="Directory of the packed checkpoint; needed unless --dry-run.")] = None,
    method: Annotated[str | None, typer.Option(help="gptq or rtn; default what the configuration says, else gptq.")] = None,
    calibration: Annotated[str | None, typer.Option(help="Text for the Hessians; default what the configuration says, else demo.")] = None,
    calibration_samples: Annotated[int | None, typer.Option(min=1, help="Windows; default what the configuration says, else 128.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens per window; default what the configuration says, else as in aq-search.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the windows; default what the configuration says, else 0.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (float32 on the CPU, else the checkpoint's), float32, bfloat16, float16.")] = "auto",
    strict: Annotated[bool, typer.Option(help="A pattern that matches nothing is an error.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Print the plan and its bits without loading weights.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing --out.")] = False,
    debug: Annotated[bool, typer.Option(help="Show tracebacks and debug logs.")] = False,
) -> None:
    """Quantize a model as a configuration says and write a packed checkpoint.

    Prints a JSON summary; quantize_report.json in --out has a row per matrix.
    """
    set_up(debug)
    with reported(debug, _STOPPED):
        from alphaquant.errors import ConfigError
        from alphaquant.studies.quantize import QuantizeSpec, quantize

        quiet_libraries()
        if out is None and not dry_run:
            raise ConfigError("no --out given; name the directory to write, or use --dry-run to see the plan")
        if method not in (None, "gptq", "rtn"):
            raise ConfigError(f"unknown method {method!r}; use gptq or rtn")
        spec = QuantizeSpec(
            model, config, out or Path(), method, calibration, calibration_samples, seq_len, seed, device, dtype, strict, overwrite
        )
        if dry_run:
            _print_plan(spec)
            return
        with Bars() as bars:
            result = quantize(spec, progress=bars)
        summary = {
            "path": str(result.path),
            "quantized_bytes": result.quantized_bytes,
            "checkpoint_bytes": result.checkpoint_bytes,
            "fallbacks": dict(result.fallbacks),
            "seconds": round(result.seconds, 1),
        }
        print(json.dumps(summary, indent=1))


def _print_plan(spec: "QuantizeSpec") -> None:
    import sys
    from collections import Counter

    from alphaquant.studies.quantize import dry_run
    from alphaquant.studies.report import bit_lines

    found = dry_run(spec)
    for warning in found.plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    counts = Counter((m.kind, found.plan.assignment.formats[m.name]) for m in found.inventory.matrices)
    for (kind, name), n in sorted(counts.items()):
        print(f"{kind:<10} {name:<16} {n} matrices")
    print("\n".join(bit_lines(found.counts)))


def main() -> None:
    """Entry point."""
    run(command)
