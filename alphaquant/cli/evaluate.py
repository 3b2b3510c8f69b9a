"""`aq-eval`: scores of a model or packed checkpoint."""

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from alphaquant.cli.console import Bars, quiet_libraries, reported, run, set_up


def command(
    model: Annotated[str, typer.Option(help="Packed checkpoint, local directory, hub id, or demo.")],
    reference: Annotated[str | None, typer.Option(help="The original model; needed for kl.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Comma-separated: kl (with same-top), ppl; default both, or ppl without a reference.")] = None,
    data: Annotated[str, typer.Option(help="Text: demo (held-out part), demo:search, wikitext2, c4, or a .txt/.jsonl/.npy file.")] = "demo",
    samples: Annotated[int, typer.Option(min=2, help="Windows.")] = 64,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens per window; default 256 for demo, else 1024 or the model's limit.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the windows.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (float32 on the CPU, else the checkpoint's), float32, bfloat16, float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with provenance instead of a table.")] = False,
    debug: Annotated[bool, typer.Option(help="Show tracebacks and debug logs.")] = False,
) -> None:
    """Measure a model: KL and same-top against its reference, perplexity, with standard errors."""
    set_up(debug)
    with reported(debug, "stopped"):
        from alphaquant.studies.evaluate import EvaluateSpec, evaluate

        quiet_libraries()
        chosen = tasks or ("kl,ppl" if reference else "ppl")
        names = tuple(t.strip() for t in chosen.split(",") if t.strip())
        spec = EvaluateSpec(model, reference, names, data, samples, seq_len, seed, device, dtype, batch_size)
        with Bars() as bars:
            found = evaluate(spec, progress=bars)
        print(_json(spec, found) if as_json else _text(found))


def _text(found: Any) -> str:
    reference = {s.metric: s for s in found.reference_scores}
    lines = []
    for s in found.scores:
        beside = f"   original {reference[s.metric].value:.6f}" if s.metric == "perplexity" and reference else ""
        lines.append(f"{s.metric:<11} {s.value:.6f} +- {s.stderr:.6f} {s.unit}{beside}")
    n_samples, seq_len = found.tokens.tokens.shape
    lines.append(f"{n_samples} of {found.tokens.n_available} windows of {seq_len} tokens of {found.tokens.name}, digest {found.tokens.digest[:12]}")
    return "\n".join(lines)


def _json(spec: Any, found: Any) -> str:
    from alphaquant.quant.provenance import versions

    content = {
        "model": spec.model,
        "reference": spec.reference,
        "scores": [asdict(s) for s in found.scores],
        "reference_scores": [asdict(s) for s in found.reference_scores],
        "data": found.tokens.provenance(),
        "versions": versions(),
    }
    return json.dumps(content, indent=1)


def main() -> None:
    """Entry point."""
    run(command)
