"""Options that several commands share, declared once."""

from pathlib import Path
from typing import Annotated

import typer

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (float32 on the CPU, else the checkpoint's), float32, bfloat16, float16."
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logs.")]
Bos = Annotated[
    str,
    typer.Option(
        help="Beginning-of-text token in front of windows and prompts: auto (as the tokenizer "
        "starts a text), always, never."
    ),
]
Blocksize = Annotated[
    int | None,
    typer.Option(min=1, help="GPTQ columns per lazy update, speed only; default 32."),
]
ScaleSearch = Annotated[
    str | None,
    typer.Option(
        help="How scales are chosen: minmax (the formats' plain rule), mse (least squared error), "
        "hessian (least GPTQ error); default hessian."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of text windows, labels and proposals.")]
SeqLen = Annotated[
    int | None,
    typer.Option(
        min=2, help="Tokens per window; default 256 for demo, else 1024 or the model's limit."
    ),
]

PercDamp = Annotated[
    float | None,
    typer.Option(min=0, help="GPTQ damping, fraction of the mean Hessian diagonal; default 0.01."),
]
RouteExponent = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=2,
        help="Power of the routing weight in experts' Hessians: 0 plain GPTQ, 1 MoEQuant, "
        "2 exact (default).",
    ),
]
PooledTokens = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Tokens' worth of the layer's mean in each expert's Hessian; default 512, 0 is off.",
    ),
]
ActOrder = Annotated[
    bool | None,
    typer.Option(
        "--actorder/--no-actorder", help="Most used inputs first, static groups; default off."
    ),
]
StaticGroups = Annotated[
    bool | None,
    typer.Option(
        "--static-groups/--no-static-groups",
        "--static_groups",
        help="Scales from the original weights; default off.",
    ),
]
NStarts = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=2,
        help="1 quantizes in one order of columns; 2 (default) in both orders of --actorder and "
        "keeps each row's better result.",
    ),
]
RefineSweeps = Annotated[
    int | None,
    typer.Option(min=0, help="Rounds of refinement after GPTQ; default 3, 0 is plain GPTQ."),
]
Shots = Annotated[
    int | None,
    typer.Option(min=0, help="Examples before each question (lm-eval); default: the task's own."),
]
TaskData = Annotated[
    Path | None,
    typer.Option(
        help="Folder of MMLU's files dev/SUBJECT_dev.csv and test/SUBJECT_test.csv; default: the "
        "Hugging Face hub."
    ),
]
