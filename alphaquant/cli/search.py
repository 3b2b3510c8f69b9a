"""`aq-search`: the best assignment of formats to a model within a budget."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from alphaquant.cli.console import Bars, quiet_libraries, reported, run, set_up

_RESUME = "stopped; run the same command again to resume"


def command(
    budget: Annotated[str, typer.Option(help="Size limit: 4.25bits, 4.25 or 4.25bpw (mean stored bits per quantizable weight), 13GiB or 13GB (whole checkpoint).")],
    model: Annotated[str, typer.Option(help="demo, a local directory, or a hub id.")] = "demo",
    formats: Annotated[str, typer.Option(help="Formats and menus to choose from, comma-separated, e.g. int3-g64-asym,mxfp4; menus: default, int, mx, fp, all. auto: the profile's menu.")] = "auto",
    profile: Annotated[str, typer.Option(help="What the result must load in: any, vllm, sglang, transformers.")] = "any",
    trials: Annotated[int, typer.Option(min=1, help="Assignments to evaluate, planned ones (uniform, allocators) included.")] = 40,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which no further trial starts; none by default.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of text windows, drawn labels and proposals.")] = 0,
    calibration: Annotated[str, typer.Option(help="Text for Hessians and costs: demo, wikitext2, c4, or a .txt/.jsonl/.npy file.")] = "demo",
    evaluation: Annotated[str, typer.Option(help="Text for the divergence that the search sees.")] = "demo",
    heldout: Annotated[str, typer.Option(help="Text for the last comparison with uniform formats.")] = "demo",
    calibration_samples: Annotated[int, typer.Option(min=1, help="Windows of calibration text.")] = 128,
    evaluation_samples: Annotated[int, typer.Option(min=2, help="Windows of evaluation text.")] = 48,
    heldout_samples: Annotated[int, typer.Option(min=2, help="Windows of held-out text.")] = 64,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens per window; default 256 for demo, else 1024 or the model's limit.")] = None,
    sampler: Annotated[str, typer.Option(help="Optuna sampler: tpe, gp, nsga2, random.")] = "tpe",
    storage: Annotated[str | None, typer.Option(help="Optuna storage, e.g. sqlite:///study.db; default study.db in --out.")] = None,
    study: Annotated[str, typer.Option(help="Name of the Optuna study.")] = "aq-search",
    out: Annotated[Path, typer.Option(help="Directory of results; the same command resumes in it.")] = Path("aq-out"),
    cache: Annotated[Path | None, typer.Option(help="Directory of banks and predictions; default $ALPHAQUANT_CACHE or ~/.cache/alphaquant.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (float32 on the CPU, else the checkpoint's), float32, bfloat16, float16.")] = "auto",
    method: Annotated[str, typer.Option(help="gptq, or rtn (round to nearest).")] = "gptq",
    overwrite: Annotated[bool, typer.Option(help="Replace --out if it holds a search with other settings.")] = False,
    debug: Annotated[bool, typer.Option(help="Show tracebacks and debug logs.")] = False,
) -> None:
    """Search number formats for every layer and expert of a model within a budget.

    Prints the front and writes front.json, configs/*.json, best.json, trials.csv, report.md and study.db to --out.
    """
    set_up(debug)
    with reported(debug, _RESUME):
        from alphaquant.errors import ConfigError
        from alphaquant.quant.engine import QuantSettings
        from alphaquant.studies.runner import search
        from alphaquant.studies.spec import DataSpec, SearchSpec

        quiet_libraries()
        if method not in ("gptq", "rtn"):
            raise ConfigError(f"unknown method {method!r}; use gptq or rtn")
        data = DataSpec(calibration, evaluation, heldout, calibration_samples, evaluation_samples, heldout_samples, seq_len)
        spec = SearchSpec(
            model=model, budget=budget, formats=formats, profile=profile, trials=trials, timeout=timeout, seed=seed, data=data,
            quant=QuantSettings(method=method), sampler=sampler, storage=storage, study=study, out=out, cache=cache,
            device=device, dtype=dtype, overwrite=overwrite,
        )
        with Bars() as bars:
            result = search(spec, progress=bars, on_trial=lambda row: bars.note(_trial_line(row)))
        _print(result)


def _trial_line(row: Any) -> str:
    same = f" = trial {row.duplicate_of}" if row.duplicate_of is not None else ""
    return f"trial {row.number}: {row.origin}{same}, {row.bits_per_weight:.3f} bits, KL {row.kl:.6f} +- {row.kl_stderr:.6f}, {row.seconds:.1f} s"


def _print(result: Any) -> None:
    """The result on stdout."""
    from alphaquant.spaces.budget import counting_rule
    from alphaquant.studies.report import bit_lines, config_name, winner_text

    table = Table(title=f"front of {result.facts['model']} at {result.spec.budget}, KL on the evaluation text")
    for head in ("bits/weight", "MB", "KL (nats/token)", "same top", "from", "config"):
        table.add_column(head, justify="left" if head in ("from", "config") else "right")
    for row in result.front:
        table.add_row(
            f"{row.bits_per_weight:.3f}", f"{row.checkpoint_bytes / 1e6:.2f}", f"{row.kl:.6f} +- {row.kl_stderr:.6f}",
            f"{100 * row.same_top:.2f} %", row.origin, config_name(row),
        )
    console = Console()
    console.print(table)
    print("\n".join(bit_lines(result.published.count_bits(result.space.inventory))))
    print(counting_rule())
    print(winner_text(result))
    best = result.folder.path / "best.json"
    print(f"wrote {best}; next: aq-quantize --model {result.spec.model} --config {best} --out DIR")


def main() -> None:
    """Entry point."""
    run(command)
