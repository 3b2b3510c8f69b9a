"""`aq-eval`: scores of a model or packed checkpoint."""

import json
from typing import Annotated

import typer

from alphaquant.cli.console import Bars, application, quiet_libraries, reported, set_up
from alphaquant.cli.options import Bos, Debug, Device, Dtype, Shots, TaskData
from alphaquant.cli.screen import say, screen_width

Model = Annotated[str, typer.Option(help="Packed checkpoint, local directory, hub id, or demo.")]
Reference = Annotated[
    str | None, typer.Option(help="The original model, measured too; needed for kl and drift.")
]
Tasks = Annotated[
    str | None,
    typer.Option(
        help="Comma-separated: kl (with same-top), ppl, utilization, drift; mmlu, mmlu_anatomy or "
        "any task, .yaml task file or folder of these of lm-eval; default kl,ppl, or ppl without "
        "a reference."
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="First documents of each task or subject (lm-eval); default all."),
]
SeqLen = Annotated[
    int | None,
    typer.Option(
        min=2, help="Tokens per window; default 256 for demo, else 2048 or the model's limit."
    ),
]
Data = Annotated[
    str,
    typer.Option(
        help="Text: demo (held-out part), demo:search, wikitext2, c4, or a .txt/.jsonl/.npy file."
    ),
]
Samples = Annotated[int, typer.Option(min=2, help="Windows.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the windows.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Windows or prompts per forward pass.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON with provenance instead of a table.")
]


def command(
    model: Model,
    reference: Reference = None,
    tasks: Tasks = None,
    data: Data = "demo",
    samples: Samples = 64,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    bos: Bos = "auto",
    batch_size: BatchSize = 8,
    shots: Shots = None,
    limit: Limit = None,
    task_data: TaskData = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure a model: divergence, perplexity, routing, tasks of lm-eval, with standard errors."""
    set_up(debug)
    with reported(debug, "stopped"):
        from alphaquant.studies import evaluate as studies

        quiet_libraries()
        chosen = tasks if tasks is not None else "kl,ppl" if reference else "ppl"
        spec = studies.EvaluateSpec(
            model=model,
            reference=reference,
            tasks=tuple(t.strip() for t in chosen.split(",") if t.strip()),
            data=data,
            n_samples=samples,
            seq_len=seq_len,
            seed=seed,
            bos=bos,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            n_shots=shots,
            limit=limit,
            task_data=task_data,
        )
        with Bars() as bars:
            found = studies.evaluate(spec, progress=bars)
        if as_json:
            print(json.dumps(studies.evaluation_json(found), indent=1))
        else:
            say(studies.evaluation_text(found, screen_width()))


def main() -> None:
    """Entry point."""
    application(command)()
