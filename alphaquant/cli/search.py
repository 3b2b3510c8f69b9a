"""`aq-search`: the best assignment of formats to a model within a budget."""

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
    Shots,
    StaticGroups,
    TaskData,
)
from alphaquant.cli.screen import say, screen_width

_RESUME = "stopped; run the same command again to resume"

_DEMO_TEXT = "demo=0.75,demo:code=0.25"  # that of studies.spec, which loads torch; a test compares

Budget = Annotated[
    str,
    typer.Option(
        help="Size limit: 4.25bits, 4.25 or 4.25bpw (mean stored bits per quantizable weight), "
        "13GiB or 13GB (whole checkpoint)."
    ),
]
Model = Annotated[str, typer.Option(help="demo, a local directory, or a hub id.")]
Formats = Annotated[
    str,
    typer.Option(
        help="Formats and menus to choose from, comma-separated, e.g. int3-g64-asym,mxfp4; "
        "menus: default, int, mx, fp, all. auto: the profile's menu."
    ),
]
ProfileName = Annotated[
    str,
    typer.Option(help="What the result must load in: any, kernels, vllm, sglang, transformers."),
]
Mode = Annotated[
    str,
    typer.Option(
        help="What is sampled: knobs of the allocator, or groups: formats of groups of units."
    ),
]
Grouping = Annotated[
    str,
    typer.Option(help="Units that share a format in mode groups: layer (and role), utilization."),
]
AllocatorName = Annotated[
    str | None,
    typer.Option(
        "--allocator",
        help="Run one allocator alone, beside uniform formats: blend, fisher, token-fisher, "
        "error, utilization, random, uniform, alpha-hill, alphaq, pmq, gemq or evolution.",
    ),
]
AllocatorNames = Annotated[
    str,
    typer.Option(
        help="Allocators among the first trials, of the same names, comma-separated; all: every "
        "published and plain one but random and evolution; none by default."
    ),
]
MaxFormats = Annotated[
    int | None,
    typer.Option(
        min=1, help="At most so many formats among a layer's routed experts; none by default."
    ),
]
LayerMinimum = Annotated[
    float | None,
    typer.Option(help="Least stored bits per weight of every layer; none by default."),
]
ActiveBudget = Annotated[
    str | None,
    typer.Option(
        help="Bytes of quantizable weights that a token may read on average: 600MiB; none by "
        "default."
    ),
]
Trials = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Assignments to evaluate, planned ones included; by default as many as the gain that "
        "is still expected is worth, 48 at most.",
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(min=0, help="Seconds after which no further trial starts; none by default."),
]
Calibration = Annotated[
    str,
    typer.Option(
        help="Text for Hessians and costs: demo, demo:code, wikitext2, c4, or a .txt/.jsonl/.npy "
        "file; several domains are separated by commas, such as a=0.75,b=0.25."
    ),
]
Evaluation = Annotated[str, typer.Option(help="Text for the divergence that the search sees.")]
Heldout = Annotated[
    str,
    typer.Option(help="Text for the last comparison with uniform formats, domain by domain."),
]
Objectives = Annotated[
    str,
    typer.Option(
        help="What the study optimizes: bits,kl, then any of perplexity, same_top, drift, "
        "expert_overlap, utilization, load_entropy, starved_experts, active_bytes, latency, or "
        "tasks of lm-eval."
    ),
]
Also = Annotated[
    str,
    typer.Option(help="Scores of the same names that every trial measures and only reports."),
]
LatencyTable = Annotated[
    Path | None, typer.Option(help="Measured times, CSV or JSON lines; needed for latency.")
]
TaskLimit = Annotated[
    int, typer.Option(min=1, help="Only the first so many documents of each task of lm-eval.")
]
NCalibration = Annotated[int, typer.Option(min=1, help="Windows of calibration text.")]
NEvaluation = Annotated[int, typer.Option(min=2, help="Windows of evaluation text.")]
NHeldout = Annotated[int, typer.Option(min=2, help="Windows of held-out text.")]
Sampler = Annotated[str, typer.Option(help="Optuna sampler: tpe, gp, nsga2, random.")]
Storage = Annotated[
    str | None,
    typer.Option(
        help="Optuna storage: sqlite:///FILE, postgresql://USER@HOST/DATABASE or journal:FILE; "
        "default study.db in --out."
    ),
]
Study = Annotated[str, typer.Option(help="Name of the Optuna study.")]
Out = Annotated[Path, typer.Option(help="Directory of results; the same command resumes in it.")]
Cache = Annotated[
    Path | None,
    typer.Option(
        help="Directory of banks and predictions; default $ALPHAQUANT_CACHE or "
        "~/.cache/alphaquant."
    ),
]
MethodName = Annotated[str, typer.Option(help="gptq, or rtn (round to nearest).")]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace --out if it holds a search with other settings."),
]


def command(
    budget: Budget,
    model: Model = "demo",
    formats: Formats = "auto",
    profile: ProfileName = "any",
    mode: Mode = "knobs",
    grouping: Grouping = "layer",
    allocator: AllocatorName = None,
    allocators: AllocatorNames = "",
    max_formats_per_layer: MaxFormats = None,
    layer_minimum_bits: LayerMinimum = None,
    active_budget: ActiveBudget = None,
    trials: Trials = None,
    timeout: Timeout = None,
    seed: Seed = 0,
    calibration: Calibration = _DEMO_TEXT,
    evaluation: Evaluation = _DEMO_TEXT,
    heldout: Heldout = _DEMO_TEXT,
    objectives: Objectives = "bits,kl",
    also: Also = "",
    latency_table: LatencyTable = None,
    task_data: TaskData = None,
    shots: Shots = None,
    task_limit: TaskLimit = 20,
    calibration_samples: NCalibration = 128,
    evaluation_samples: NEvaluation = 48,
    heldout_samples: NHeldout = 64,
    seq_len: SeqLen = None,
    bos: Bos = "auto",
    sampler: Sampler = "tpe",
    storage: Storage = None,
    study: Study = "aq-search",
    out: Out = Path("aq-out"),
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
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Search number formats for every layer and expert of a model within a budget.

    Prints the front and writes front.json, configs/*.json, best.json, trials.csv, report.md,
    report.html and study.db to --out.
    """
    set_up(debug)
    with reported(debug, _RESUME, resumes=True):
        from alphaquant.studies.report import summary_text, trial_line, trial_note
        from alphaquant.studies.runner import search
        from alphaquant.studies.spec import DataSpec, ScoreSpec, SearchSpec, quant_settings

        quiet_libraries()
        spec = SearchSpec(
            model=model,
            budget=budget,
            formats=formats,
            profile=profile,
            mode=mode,
            grouping=grouping,
            allocator=allocator,
            allocators=allocators,
            max_formats_per_layer=max_formats_per_layer,
            layer_minimum_bits=layer_minimum_bits,
            active_budget=active_budget,
            trials=trials,
            timeout=timeout,
            seed=seed,
            data=DataSpec(
                calibration=calibration,
                evaluation=evaluation,
                heldout=heldout,
                n_calibration=calibration_samples,
                n_evaluation=evaluation_samples,
                n_heldout=heldout_samples,
                seq_len=seq_len,
                bos=bos,
            ),
            scores=ScoreSpec(
                objectives=objectives,
                reported=also,
                latency_table=None if latency_table is None else str(latency_table),
                task_data=None if task_data is None else str(task_data),
                n_shots=shots,
                task_limit=task_limit,
            ),
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
            sampler=sampler,
            storage=storage,
            study=study,
            out=out,
            cache=cache,
            device=device,
            dtype=dtype,
            overwrite=overwrite,
        )
        with Bars() as bars:
            result = search(
                spec,
                progress=bars,
                on_trial=lambda row: bars.note(trial_line(row), trial_note(row)),
            )
        say(summary_text(result, screen_width()))


def main() -> None:
    """Entry point."""
    application(command)()
