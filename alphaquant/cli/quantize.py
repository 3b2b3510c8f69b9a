"""`aq-quantize`: the packed checkpoint of a configuration."""

import json
from pathlib import Path
from typing import Annotated

import typer

from alphaquant.cli.console import Bars, application, quiet_libraries, reported, set_up
from alphaquant.cli.options import (
    ActOrder,
    Blocksize,
    Debug,
    Device,
    Dtype,
    NStarts,
    PercDamp,
    PooledTokens,
    RefineSweeps,
    RouteExponent,
    ScaleSearch,
    StaticGroups,
)
from alphaquant.cli.screen import say

_STOPPED = "stopped; the same command goes on with the layers that are finished"

Model = Annotated[str, typer.Option(help="demo, a local directory, or a hub id.")]
ConfigFile = Annotated[Path, typer.Option(help="Configuration, e.g. best.json of aq-search.")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "--save", help="Directory of the packed checkpoint; needed unless --dry-run."
    ),
]
MethodName = Annotated[
    str | None,
    typer.Option(help="gptq or rtn; default what the configuration says, else gptq."),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        "--dataset",
        help="Text for the Hessians: demo, wikitext2, c4, or a .txt/.jsonl/.npy file; default "
        "what the configuration says, else that of aq-search.",
    ),
]
NCalibration = Annotated[
    int | None,
    typer.Option(
        "--calibration-samples",
        "--nsamples",
        min=1,
        help="Windows; default what the configuration says, else 128.",
    ),
]
SeqLen = Annotated[
    int | None,
    typer.Option(
        "--seq-len",
        "--seqlen",
        min=2,
        help="Tokens per window; default what the configuration says, else as in aq-search.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(min=0, help="Seed of the windows; default what the configuration says, else 0."),
]
Bos = Annotated[
    str | None,
    typer.Option(
        help="Beginning-of-text token in front of windows: auto (as the tokenizer starts a text), "
        "always, never; default what the configuration says, else auto."
    ),
]
Sequential = Annotated[
    bool | None,
    typer.Option(
        "--sequential/--no-sequential",
        help="A layer's inputs come from the quantized layers before it; default off.",
    ),
]
ModelType = Annotated[
    str,
    typer.Option(
        "--model-type",
        "--model_type",
        help="What the model is called in the report: olmoe, qwen, mixtral, deepseek, "
        "generic_moe, standard, or auto, which detects it. An error where one has routed experts "
        "and the other none.",
    ),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="A pattern that matches nothing is an error.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan and its bits without loading weights.")
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace a packed checkpoint in --out when the new one is complete, and drop an "
        "unfinished one of another job.",
    ),
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
    bos: Bos = None,
    percdamp: PercDamp = None,
    blocksize: Blocksize = None,
    scale_search: ScaleSearch = None,
    route_exponent: RouteExponent = None,
    pooled_tokens: PooledTokens = None,
    actorder: ActOrder = None,
    static_groups: StaticGroups = None,
    refine_sweeps: RefineSweeps = None,
    n_starts: NStarts = None,
    sequential: Sequential = None,
    model_type: ModelType = "auto",
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
                "blocksize": blocksize,
                "scale_search": scale_search,
                "route_exponent": route_exponent,
                "pooled_tokens": pooled_tokens,
                "actorder": actorder,
                "static_groups": static_groups,
                "refine_sweeps": refine_sweeps,
                "n_starts": n_starts,
                "sequential": sequential,
            },
            calibration=calibration,
            n_calibration=calibration_samples,
            seq_len=seq_len,
            seed=seed,
            bos=bos,
            device=device,
            dtype=dtype,
            model_type=model_type,
            strict=strict,
            overwrite=overwrite,
        )
        if dry_run:
            say(studies.plan_text(studies.dry_run(spec)))
            return
        with Bars() as bars:
            result = studies.quantize(spec, progress=bars)
        print(json.dumps(studies.result_json(result), indent=1))


def main() -> None:
    """Entry point."""
    application(command)()
