"""`aq-sensitivity`: what quantizing each routed expert of a model costs, per saved bit and use."""

from pathlib import Path
from typing import Annotated

import typer

from alphaquant.cli.console import Bars, application, quiet_libraries, reported, set_up
from alphaquant.cli.options import (
    ActOrder,
    Blocksize,
    Bos,
    Debug,
    Device,
    Dtype,
    NStarts,
    PercDamp,
    PooledTokens,
    RefineSweeps,
    RouteExponent,
    ScaleSearch,
    Seed,
    SeqLen,
    StaticGroups,
)
from alphaquant.cli.screen import say

_RESUME = "stopped; run the same command again to resume"

FormatName = Annotated[
    str, typer.Option("--format", help="Format that experts are quantized to, e.g. int2-g64.")
]
Out = Annotated[Path, typer.Option(help="JSON file with all experts; written anew.")]
Model = Annotated[str, typer.Option(help="demo, a local directory, or a hub id.")]
Against = Annotated[
    str,
    typer.Option(help="Larger format that bits and costs are compared with; bf16: the original."),
]
Calibration = Annotated[
    str | None,
    typer.Option(help="Text for Hessians and costs, as aq-search takes it; default its default."),
]
NCalibration = Annotated[int, typer.Option(min=1, help="Windows of calibration text.")]
Cache = Annotated[
    Path | None,
    typer.Option(
        help="Directory of banks, shared with aq-search; default $ALPHAQUANT_CACHE or "
        "~/.cache/alphaquant."
    ),
]
MethodName = Annotated[str, typer.Option(help="gptq, or rtn (round to nearest).")]


def command(
    format_name: FormatName,
    out: Out,
    model: Model = "demo",
    against: Against = "bf16",
    calibration: Calibration = None,
    calibration_samples: NCalibration = 128,
    seq_len: SeqLen = None,
    bos: Bos = "auto",
    seed: Seed = 0,
    cache: Cache = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    method: MethodName = "gptq",
    percdamp: PercDamp = None,
    blocksize: Blocksize = None,
    scale_search: ScaleSearch = None,
    route_exponent: RouteExponent = None,
    pooled_tokens: PooledTokens = None,
    actorder: ActOrder = None,
    static_groups: StaticGroups = None,
    refine_sweeps: RefineSweeps = None,
    n_starts: NStarts = None,
    debug: Debug = False,
) -> None:
    """Rank the routed experts of a model by what quantizing them costs.

    Prints the five most and five least sensitive and writes all of them to --out. The bank and the
    costs stay in --cache, where aq-search finds them.
    """
    set_up(debug)
    with reported(debug, _RESUME, resumes=True):
        from alphaquant.studies import expert_sensitivity as studies
        from alphaquant.studies.spec import DataSpec, quant_settings

        quiet_libraries()
        spec = studies.SensitivitySpec(
            format=format_name,
            model=model,
            against=against,
            calibration=DataSpec.calibration if calibration is None else calibration,
            n_calibration=calibration_samples,
            seq_len=seq_len,
            bos=bos,
            seed=seed,
            quant=quant_settings(
                method=method,
                percdamp=percdamp,
                blocksize=blocksize,
                scale_search=scale_search,
                route_exponent=route_exponent,
                pooled_tokens=pooled_tokens,
                actorder=actorder,
                static_groups=static_groups,
                refine_sweeps=refine_sweeps,
                n_starts=n_starts,
            ),
            cache=cache,
            device=device,
            dtype=dtype,
        )
        studies.check_target(out)
        with Bars() as bars:
            found = studies.measure_expert_sensitivity(spec, progress=bars)
        studies.write_sensitivity(found, out)
        say(studies.sensitivity_text(found))


def main() -> None:
    """Entry point."""
    application(command)()
