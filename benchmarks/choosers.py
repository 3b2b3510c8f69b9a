"""Runs one peer that chooses a format per matrix; the worker of `allocation_peers.py`.

    python benchmarks/choosers.py JOB.json FOLDER

`JOB.json` holds `peer` (a key of `CHOOSERS`), `options` (of that peer), `model`, `tokens` (as in
`peers.py`), `budget_bits` (stored bits per weight of the decoder layers' linears) and `scores` (a
folder that outlives the job). FOLDER gets `weights.safetensors` and `report.json`, with `formats`.

Both peers give all experts of a layer one format, as they do by default. Routers, gates of shared
experts, embeddings and head stay. ModelOpt leaves a layer's experts fused; AutoRound unfuses them.
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers import (
    BATCH_SIZE,
    SEED,
    Clock,
    layer_weights,
    load_model,
    read_job,
    read_tokens,
    times,
    write_result,
)

_WINDOWS = "calibration-windows"
_OVERHEAD_BITS = 0.08
"""AutoScheme counts a zero point for every group, also of symmetric formats: at most 4 / 64 up to
int4 in groups of 64, and 8 / 128 for int8 in groups of 128, bits per weight."""


@dataclass(frozen=True)
class Choice:
    """What a peer that gives each matrix its own format has made.

    Attributes:
        model: quantized.
        formats: path -> `family`, `bits`, `group_size`, `symmetric`; matrices that the peer left
            unquantized are absent.
        search: time of choosing, without loading the model.
        quantize: time of quantizing to the chosen formats.
        notes: what else is known.
    """

    model: Any
    formats: Mapping[str, Mapping[str, Any]]
    search: Clock
    quantize: Clock
    notes: Mapping[str, Any] = field(default_factory=dict)


def auto_scheme(job: dict[str, Any]) -> Choice:
    """AutoRound's AutoScheme, then its rounding; `options`: `schemes`, the rest as `auto_round`.

    It counts a zero point for every group, also of symmetric formats, whose stored form has none.
    So its target is raised in bisection as long as what is stored stays within the budget. Its
    scores of the schemes do not depend on the target and are kept in `scores`.
    """
    budget, scores = job["budget_bits"], Path(job["scores"])
    shapes = _shapes(load_model(job))
    before = _open_scores(scores)
    search = Clock()
    os.environ["AR_AUTO_SCHEME_CACHE"] = str(scores)
    rounder = _scheme_search(job, budget)
    _keep_scores(scores, before, search.stop())
    low, high = budget, budget + _OVERHEAD_BITS
    for _ in range(5):
        middle = (low + high) / 2
        other = _scheme_search(job, middle)
        if stored_bits(shapes, _scheme_formats(other)) <= budget:
            low, rounder = middle, other
        else:
            high = middle
    _add(search.stop(), before)
    formats = _scheme_formats(rounder)
    quantize = Clock()
    model, _ = rounder.quantize()
    notes = {"target_bits": low, "had_scores": before is not None}
    return Choice(model, formats, search, quantize.stop(), notes)


def model_opt(job: dict[str, Any]) -> Choice:
    """ModelOpt's auto_quantize; `options`: `formats`, integers, and `algorithm` of their scales.

    Each format states its stored bits as `effective_bits`, so that its linear program counts what
    is stored; head, router and gates, which it would count at 16 bits, are excluded from the cost.
    Its search state does not depend on the budget and is kept in `scores`.
    """
    import modelopt.torch.quantization as mtq
    import torch

    tokens, kept = read_tokens(job), ["*lm_head*", "*.gate", "*_gate"]
    recipes = [_recipe(f, job["options"]["algorithm"]) for f in job["options"]["formats"]]
    scores = Path(job["scores"])
    before = _open_scores(scores)
    model = load_model(job)
    search = Clock()
    batches = torch.split(tokens, BATCH_SIZE)
    model, state = mtq.auto_quantize(
        model,
        constraints={
            "effective_bits": job["budget_bits"],
            "cost": {"excluded_module_name_patterns": kept},
        },
        quantization_formats=recipes,
        data_loader=batches,
        forward_step=lambda module, batch: module(input_ids=batch),
        forward_backward_step=lambda module, batch: module(
            input_ids=batch, labels=batch
        ).loss.backward(),
        disabled_layers=kept,
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
        method="gradient",
        checkpoint=str(scores / "search.pth"),
    )
    _keep_scores(scores, before, search.stop())
    _add(search, before)
    if not state["best"]["is_satisfied"]:
        raise ValueError(f"no choice of formats takes {job['budget_bits']} bits per weight")
    quantize = Clock()
    formats = _recipe_formats(model, job["options"]["formats"])
    mtq.fold_weight(model)
    peer_bits = state["best"]["constraints"]["effective_bits"]
    notes = {"peer_bits": peer_bits, "had_scores": before is not None}
    return Choice(model, formats, search, quantize.stop(), notes)


CHOOSERS = {"auto-scheme": auto_scheme, "modelopt": model_opt}
"""Peer -> function that chooses formats and quantizes: (job) -> Choice."""

Shapes = Mapping[str, tuple[int, int]]


def stored_bits(shapes: Shapes, formats: Mapping[str, Mapping[str, Any]]) -> float:
    """Bits per weight of integers with a float16 scale per group and no zero points.

    Worked example: int3 in groups of 128 is 3 + 16 / 128 = 3.125. The caller counts again with
    `alphaquant.spaces.formats`.

    Args:
        shapes: path -> (rows, cols) of all matrices that count.
        formats: path -> `bits`, `group_size`; the others keep 16 bits.
    """
    n_bits = 0
    for name, (rows, cols) in shapes.items():
        chosen = formats.get(name)
        if chosen is None:
            n_bits += 16 * rows * cols
        else:
            n_bits += 8 * rows * -(-cols * chosen["bits"] // 8)
            n_bits += 16 * rows * -(-cols // chosen["group_size"])
    return n_bits / sum(rows * cols for rows, cols in shapes.values())


def _shapes(model: Any) -> Shapes:
    """Matrices that count: linears of decoder layers but routers and gates of shared experts."""
    return {
        name: tuple(weight.shape)
        for name, weight in layer_weights(model).items()
        if not name.endswith(("gate", "router"))
    }


def _open_scores(folder: Path) -> dict[str, float] | None:
    """What scoring took when an earlier job did it; else None, and the folder is empty."""
    done = folder / "scoring.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return None


def _keep_scores(folder: Path, before: Mapping[str, float] | None, search: Clock) -> None:
    """Write what the search of the first job took; from then on its scores are reused."""
    if before is None:
        (folder / "scoring.json").write_text(json.dumps(times(search)))


def _add(search: Clock, before: Mapping[str, float] | None) -> None:
    """Add to a stopped clock what scoring took in an earlier job."""
    if before is not None:
        search.seconds += before["seconds"]
        search.cpu_seconds += before["cpu_seconds"]


def _scheme_search(job: dict[str, Any], target_bits: float) -> Any:
    """AutoRound with its schemes chosen for a target that counts zero points."""
    os.environ["AR_DISABLE_DATASET_SUBPROCESS"] = "1"  # a child process has no windows of ours
    import torch
    from auto_round import AutoRound, AutoScheme
    from auto_round.calib_dataset import register_dataset
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokens = read_tokens(job)
    columns = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    register_dataset(_WINDOWS)(lambda **_: Dataset.from_dict(columns).with_format("torch"))
    options = dict(job["options"])
    shared = {
        "dataset": _WINDOWS,
        "nsamples": len(tokens),
        "seqlen": tokens.shape[1],
        "batch_size": BATCH_SIZE,
    }
    rounder = AutoRound(
        load_model(job),
        AutoTokenizer.from_pretrained(job["model"]),
        scheme=AutoScheme(avg_bits=target_bits, options=options.pop("schemes"), **shared),
        seed=SEED,
        amp=False,
        device_map="cpu",
        disable_model_free=True,
        enable_torch_compile=False,
        **shared,
        **options,
    )
    rounder.post_init()
    return rounder


def _scheme_formats(rounder: Any) -> dict[str, dict[str, Any]]:
    """The choice of an AutoRound: path -> format, without what stays at 16 bits."""
    return {
        name: {
            "family": chosen["data_type"],
            "bits": chosen["bits"],
            "group_size": chosen["group_size"],
            "symmetric": chosen["sym"],
        }
        for name, chosen in rounder.layer_config.items()
        if chosen["bits"] < 16
    }


def _recipe(fmt: Mapping[str, Any], algorithm: str) -> dict[str, Any]:
    """ModelOpt's configuration of one integer format of weights."""
    if fmt["family"] != "int" or not fmt["symmetric"]:
        raise ValueError(f"{fmt} asked; only symmetric integers run on a CPU")
    weight = {"num_bits": fmt["bits"], "block_sizes": {-1: fmt["group_size"]}}
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": weight, "enable": True},
        ],
        "algorithm": algorithm,
        "effective_bits": fmt["bits"] + 16 / fmt["group_size"],
    }


def _recipe_formats(model: Any, offered: Any) -> dict[str, dict[str, Any]]:
    """The choice of ModelOpt, read from the quantizers that are enabled: path -> format."""
    by_size = {(f["bits"], f["group_size"]): dict(f) for f in offered}
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    found = {}
    for name, module in model.named_modules():
        if not hasattr(module, "is_enabled") or not module.is_enabled:
            continue
        chosen = by_size[module.num_bits, module.block_sizes[-1]]
        owner, _, last = name.rpartition(".")
        if last == "weight_quantizer":
            found[owner] = chosen
        else:  # experts.gate_up_proj_weight_quantizers.7
            experts, _, quantizers = owner.rpartition(".")
            for part in parts[quantizers.removesuffix("_weight_quantizers")]:
                found[f"{experts}.{last}.{part}"] = chosen
    return found


def main() -> None:
    """Run the job."""
    job = read_job({"auto-scheme": "auto_round"})
    choice = CHOOSERS[job["peer"]](job)
    facts = {
        "formats": choice.formats,
        "search": times(choice.search),
        "quantize": times(choice.quantize),
        "notes": choice.notes,
    }
    write_result(Path(sys.argv[2]), choice.model, facts)


if __name__ == "__main__":
    main()
