"""Options that several commands share, declared once."""

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
Seed = Annotated[int, typer.Option(min=0, help="Seed of text windows, labels and proposals.")]
SeqLen = Annotated[
    int | None,
    typer.Option(
        min=2, help="Tokens per window; default 256 for demo, else 1024 or the model's limit."
    ),
]
