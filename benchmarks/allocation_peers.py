"""Other tools that choose a format per matrix under a budget: their jobs, cached, and checks.

A job runs `choosers.py` in the interpreter that has the peers. Its result is what the peer chose,
counted by `alphaquant.spaces`, and the weights that the peer quantized to it. Every matrix is
checked to be in the format that the peer claims. Results are cached like those of
`quantizer_peers`; scores that do not depend on the budget are kept beside them.

    choose(python, AUTO_SCHEME, model, tokens, 3.0, auto_scheme_options(3.0), cache)
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantizer_peers import (
    PeerError,
    PeerResult,
    check_matrix,
    job_key,
    peer_versions,
    read_weights,
    run_peer,
)
from safetensors.torch import load_file

from alphaquant.models.sites import ModelMap
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.formats import BF16, make_format, parse_format
from alphaquant.spaces.units import Inventory
from alphaquant.studies.inputs import load_source
from alphaquant.texts.windows import token_digest

AUTO_SCHEME = "auto-scheme"
MODELOPT = "modelopt"
MODELOPT_FORMATS = (
    *("int2-g128", "int2-g64", "int2-g32", "int3-g128", "int3-g64"),
    *("int4-g128", "int4-g64", "int8-g128"),
)
ALLOCATION_NOTES = (
    "Both peers score all calibration windows, 8 per batch, in float32, and give all experts of a "
    "layer one format, which is their default; ModelOpt also q, k and v of a layer.",
    "AutoScheme counts a zero point for every group, symmetric ones too. Its target is raised "
    "until what is stored meets the budget.",
    "ModelOpt has no integers below 4 bits among its own configurations; these use its quantizer "
    "with fewer bits, and its search of scales (mse). Its integers have a float32 scale where a "
    "float16 one is counted. Its MXFP4 and NVFP4 need CUDA and are not offered.",
    "Seconds of search include the scoring, also where an earlier job with another budget made "
    "the scores.",
)
_WORKER = Path(__file__).with_name("choosers.py")
_LEAST_AUTO_SCHEME_BITS = 2 + 18 / 64
"""What AutoScheme counts for W2A16G64, 2.28125: the zero point is counted with the scale."""


@dataclass(frozen=True)
class PeerChoice:
    """What a peer chose and made.

    Attributes:
        peer: key of the worker.
        options: of the peer.
        budget_bits: stored bits per weight that it was given.
        formats: matrix -> `family`, `bits`, `group_size`, `symmetric`; unquantized ones are bf16.
        assignment: the same as format names, in inventory order.
        bits_per_weight: what the assignment stores.
        weights: file of its dequantized weights, float32 [rows, cols] by matrix.
        search_seconds: wall time of choosing, scoring included.
        quantize_seconds: wall time of quantizing to the choice.
        cpu_seconds: processor time of both.
        versions: of the peer's interpreter.
        notes: what else the worker tells, with `values_per_group`, `is_cached`, `cache_key`.
    """

    peer: str
    options: Mapping[str, Any]
    budget_bits: float
    formats: Mapping[str, Mapping[str, Any]]
    assignment: Assignment
    bits_per_weight: float
    weights: Path
    search_seconds: float
    quantize_seconds: float
    cpu_seconds: float
    versions: Mapping[str, str]
    notes: Mapping[str, Any]


def auto_scheme_options(budget_bits: float, iters: int = 0) -> dict[str, Any]:
    """Options of AutoScheme: int2 in groups of 64, int3, int4 and int8 in groups of 128.

    Below 2.28125 bits, the least that it counts for these, int2 in groups of 128 joins them.

    Args:
        budget_bits: per weight.
        iters: 0 rounds to nearest, 200 is AutoRound's default.
    """
    schemes = ["W2A16G64", "W3A16", "W4A16", "W8A16"]
    if budget_bits < _LEAST_AUTO_SCHEME_BITS:
        schemes = ["W2A16", *schemes]
    return {"schemes": schemes, "iters": iters}


def modelopt_options() -> dict[str, Any]:
    """Options of ModelOpt: the integers that its quantizer has, scales of least squared error."""
    keys = ("family", "bits", "group_size", "symmetric")
    parsed = [asdict(parse_format(name)) for name in MODELOPT_FORMATS]
    return {"formats": [{k: f[k] for k in keys} for f in parsed], "algorithm": "mse"}


def choose(
    python: str,
    peer: str,
    model: Path,
    tokens: Path,
    budget_bits: float,
    options: Mapping[str, Any],
    cache: Path,
) -> PeerChoice:
    """Let a peer choose formats under a budget and quantize, or open its result.

    Args:
        python: the interpreter that has the peer.
        peer: `AUTO_SCHEME` or `MODELOPT`.
        model: directory.
        tokens: safetensors file with `tokens` [N, T], the calibration windows.
        budget_bits: stored bits per quantizable weight, scales included.
        options: from `auto_scheme_options` or `modelopt_options`.
        cache: folder of all results.

    Raises:
        PeerError: the peer failed, is over the budget, or its weights are not as it says.
    """
    source = load_source(str(model), "cpu", "auto")
    digests = {"model": source.digest, "tokens": token_digest(load_file(tokens)["tokens"])}
    versions = peer_versions(python)
    job: dict[str, Any] = {
        "peer": peer,
        "options": dict(options),
        "model": str(model.resolve()),
        "tokens": str(tokens.resolve()),
        "budget_bits": budget_bits,
    }
    scores = f"scores-{_scores_key(job, digests, versions)}"
    job["scores"] = str(cache.resolve() / scores)
    key = job_key(job, digests, versions)
    return _read_choice(job, key, run_peer(python, job, cache, key, _WORKER), source.map)


def _read_choice(
    job: Mapping[str, Any], key: str, result: PeerResult, model_map: ModelMap
) -> PeerChoice:
    """The result of a job, counted and checked."""
    report, budget_bits = result.report, job["budget_bits"]
    formats = _all_formats(report["formats"], model_map.inventory)
    assignment = _assignment(formats)
    bits = assignment.count_bits(model_map.inventory).bits_per_weight
    if bits > budget_bits:
        raise PeerError(
            f"{job['peer']} chose {bits:.5f} bits per weight; the budget is {budget_bits}"
        )
    found = {
        "values_per_group": _check(result, assignment, model_map),
        "threads": report["threads"],
        "is_cached": result.is_cached,
        "cache_key": key,
    }
    search, quantize = report["search"], report["quantize"]
    return PeerChoice(
        peer=job["peer"],
        options=job["options"],
        budget_bits=budget_bits,
        formats=formats,
        assignment=assignment,
        bits_per_weight=bits,
        weights=result.weights,
        search_seconds=search["seconds"],
        quantize_seconds=quantize["seconds"],
        cpu_seconds=search["cpu_seconds"] + quantize["cpu_seconds"],
        versions=report["versions"],
        notes={**report["notes"], **found},
    )


def _scores_key(
    job: Mapping[str, Any], digests: Mapping[str, str], versions: Mapping[str, str]
) -> str:
    """Digest of what scores depend on: neither the budget nor what rounding does later."""
    menu = {k: v for k, v in job["options"].items() if k != "iters"}
    key = job_key({"peer": job["peer"], "options": menu}, digests, versions)
    return hashlib.sha256(json.dumps(["scores", key]).encode()).hexdigest()[:16]


def _all_formats(
    chosen: Mapping[str, Mapping[str, Any]], inventory: Inventory
) -> dict[str, dict[str, Any]]:
    """One format per matrix in inventory order; what the peer left out is bf16."""
    unquantized = {"family": "bf16", "bits": 16, "group_size": BF16.group_size, "symmetric": True}
    return {m.name: dict(chosen.get(m.name, unquantized)) for m in inventory.matrices}


def _assignment(formats: Mapping[str, Mapping[str, Any]]) -> Assignment:
    """The formats by their names."""
    names = {}
    for matrix, f in formats.items():
        kind = "bf16" if f["family"] == "bf16" else f"{f['family']}{f['bits']}"
        names[matrix] = make_format(kind, f["group_size"], symmetric=f["symmetric"]).name
    return Assignment(names)


def _check(result: PeerResult, assignment: Assignment, model_map: ModelMap) -> dict[str, int]:
    """Most values in a group, by format; refuses a matrix that is not in its format."""
    weights = read_weights(result)
    most: dict[str, int] = {}
    for name, format_name in assignment.formats.items():
        found = check_matrix(weights, name, model_map.view(name), assignment.format_of(name))
        most[format_name] = max(most.get(format_name, 0), found)
    return most
