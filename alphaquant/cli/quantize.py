"""`aq-quantize`: the packed checkpoint of a configuration."""

import json
from pathlib import Path
from typing import Annotated

import typer

from alphaquant.cli.console import Bars, application, quiet_libraries, reported, set_up
from alphaquant.cli.options import (
    ActOrder,
    Debug,
    Device,
    Dtype,
    PercDamp,
    PooledTokens,
    RefineSweeps,
    RouteExponent,
    StaticGroups,
)

_STOPPED = "stopped; nothing was written"

Model = Annotated[str, typer.Option(help="demo, a local directory, or a hub id.")]
ConfigFile = Annotated[Path, typer.Option(help="Configuration, e.g. best.json of aq-search.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Directory of the packed checkpoint; needed unless --dry-run."),
]
MethodName = Annotated[
    str | None,
    typer.Option(help="gptq or rtn; default what the configuration says, else gptq."),
]
Calibration = Annotated[
    str | None,
    typer.Option(help="Text for the Hessians; default what the configuration says, else demo."),
]
NCalibration = Annotated[
    int | None,
    typer.Option(min=1, help="Windows; default what the configuration says, else 128."),
]
SeqLen = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Tokens per window; default what the configuration says, else as in aq-search.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(min=0, help="Seed of the windows; default what the configuration says, else 0."),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="A pattern that matches nothing is an error.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan and its bits without loading weights.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a packed checkpoint in --out.")
]


def command(
    model: Model,
    config: ConfigFile,
    out: Out = None,
    method: MethodName = None,
    calibration: Calibration = None,
    calibration_samples: NCalibration = None,
    seq_len: SeqLen = None,
    seed: Seed = None,
    percdamp: PercDamp = None,
    route_exponent: RouteExponent = None,
    pooled_tokens: PooledTokens = None,
    actorder: ActOrder = None,
    static_groups: StaticGroups = None,
    refine_sweeps: RefineSweeps = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    strict: Strict = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Quantize a model as a configuration says and write a packed checkpoint.

    Prints a JSON summary; quantize_report.json in --out has a row per matrix.
    """
    if out is None and not dry_run:
        raise typer.BadParameter("needed unless --dry-run", param_hint="--out")
    set_up(debug)
    with reported(debug, _STOPPED):
        from alphaquant.studies import quantize as studies

        quiet_libraries()
        spec = studies.QuantizeSpec(
            model=model,
            config=config,
            out=out or Path(),
            quant={
                "method": method,
                "percdamp": percdamp,
                "route_exponent": route_exponent,
                "pooled_tokens": pooled_tokens,
                "actorder": actorder,
                "static_groups": static_groups,
                "refine_sweeps": refine_sweeps,
            },
            calibration=calibration,
            n_calibration=calibration_samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            dtype=dtype,
            strict=strict,
            overwrite=overwrite,
        )
        if dry_run:
            print(studies.plan_text(studies.dry_run(spec)))
            return
        with Bars() as bars:
            result = studies.quantize(spec, progress=bars)
        print(json.dumps(studies.result_json(result), indent=1))


def main() -> None:
    """Entry point."""
    application(command)()
