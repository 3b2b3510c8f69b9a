"""Other quantizers beside ours: jobs for `peers.py`, cached results, checks of their weights.

A job is one peer with its options on one model, format and set of windows. Its weights and report
are kept in a folder named by the digest of the job and of the versions that run it, so that a
second run reuses them. A job that fails is not kept: it is tried again and its error reported.
"""

import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from alphaquant.files import whole_file
from alphaquant.spaces.formats import Format

JOB_VERSION = 1
TIMEOUT_SECONDS = 3600
_WORKER = Path(__file__).with_name("peers.py")
_RUNS_ON = {
    "llmcompressor": {"compressed-tensors"},
    "gptqmodel": {"defuser"},
    "auto-scheme": {"auto-round"},
    "modelopt": {"nvidia-modelopt"},
}
"""Peer -> distributions beside the one of its name that its result depends on."""
_PLACES = ("model", "tokens", "scores")


@dataclass(frozen=True)
class PeerMethod:
    """One way to run a peer.

    Attributes:
        peer: name of its distribution.
        options: what differs from its defaults.
        families: formats that it has.
    """

    peer: str
    options: Mapping[str, Any]
    families: tuple[str, ...] = ("int", "mxfp", "nvfp")


PEER_METHODS = {
    "AutoRound RTN": PeerMethod("auto-round", {"iters": 0}),
    "AutoRound RTN, searched scales": PeerMethod(
        "auto-round", {"iters": 0, "enable_opt_rtn": True}
    ),
    "AutoRound, 200 iterations": PeerMethod("auto-round", {"iters": 200}),
    "llm-compressor GPTQ": PeerMethod("llmcompressor", {}),
    "llm-compressor GPTQ, routed tokens": PeerMethod(
        "llmcompressor", {"moe_calibrate_all_experts": False}
    ),
    # Its first checkpoint version stores zero points less one, which `dequantize_weight` of a
    # module that was not loaded from a file does not undo.
    "GPTQModel GPTQ": PeerMethod("gptqmodel", {"format": "gptq_v2"}, ("int",)),
    "GPTQModel GPTQ, searched scales": PeerMethod(
        "gptqmodel", {"format": "gptq_v2", "mse": 2.0}, ("int",)
    ),
}

PEER_NOTES = (
    "All peers get the model in float32 and the same calibration windows in the same order, "
    "8 per batch; all other options are their defaults.",
    "Each peer unfuses the experts of transformers 5 into one linear per projection by its own "
    "means; router, embeddings and head stay unquantized.",
    "Peers calibrate a layer on the outputs of the layers quantized before it.",
    "llm-compressor sends every calibration token through every expert unless told otherwise "
    "(`routed tokens`), and keeps the scales of a float32 model in float32; those of AutoRound's "
    "and GPTQModel's integers are float16, as ours.",
    "AutoRound leaves out its search of scales on layers with experts unless told otherwise "
    "(`searched scales`).",
    "Seconds of a peer include calibration and not the loading of the model (GPTQModel loads its "
    "own); its memory is the peak of its process, imports and model included.",
)


@dataclass(frozen=True)
class PeerResult:
    """What a peer made.

    Attributes:
        weights: file of its dequantized weights.
        report: seconds, cpu_seconds, peak_memory_bytes, threads, versions.
        is_cached: whether an earlier run made it.
    """

    weights: Path
    report: Mapping[str, Any]
    is_cached: bool


class PeerError(Exception):
    """A peer did not finish, or its weights are not in the format asked for."""


def peer_versions(python: str) -> dict[str, str]:
    """Versions that an interpreter has of the peers.

    Raises:
        PeerError: it cannot be started.
    """
    return dict(json.loads(_run([python, str(_WORKER), "versions"], Path.cwd(), 120)))


def peer_job(method: PeerMethod, model: Path, tokens: Path, fmt: Format) -> dict[str, Any]:
    """The job as `peers.py` reads it."""
    asked = asdict(fmt)
    return {
        "peer": method.peer,
        "options": dict(method.options),
        "model": str(model),
        "tokens": str(tokens),
        "format": {k: asked[k] for k in ("family", "bits", "group_size", "symmetric")},
    }


def job_key(
    job: Mapping[str, Any], digests: Mapping[str, str], versions: Mapping[str, str]
) -> str:
    """Digest of what a job's result depends on; paths are replaced by what they hold.

    Args:
        job: as the worker reads it.
        digests: of the model and the tokens.
        versions: from `peer_versions`.
    """
    names = {"python", "torch", "transformers", job["peer"]} | _RUNS_ON.get(job["peer"], set())
    facts = {
        **{k: v for k, v in job.items() if k not in _PLACES},
        **digests,
        "versions": {k: v for k, v in sorted(versions.items()) if k in names},
        "job_version": JOB_VERSION,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def run_peer(
    python: str, job: Mapping[str, Any], cache: Path, key: str, worker: Path = _WORKER
) -> PeerResult:
    """Run a job in the peers' interpreter, or open its result.

    Args:
        python: the interpreter.
        job: as the worker reads it.
        cache: folder of all results.
        key: from `job_key`.
        worker: script that runs the job.

    Raises:
        PeerError: the peer failed; the message ends with its last words.
    """
    folder = cache / key
    report = folder / "report.json"
    if report.exists():
        return PeerResult(
            folder / "weights.safetensors", json.loads(report.read_text()), is_cached=True
        )
    with tempfile.TemporaryDirectory(prefix="alphaquant-peer-") as scratch:
        place = Path(scratch)  # peers leave logs where they run
        (place / "job.json").write_text(json.dumps(job))
        _run([python, str(worker), str(place / "job.json"), scratch], place, TIMEOUT_SECONDS)
        for name in ("weights.safetensors", "report.json"):
            with whole_file(folder / name) as part:
                part.write_bytes((place / name).read_bytes())
    return PeerResult(
        folder / "weights.safetensors", json.loads(report.read_text()), is_cached=False
    )


def check_weights(weights: Mapping[str, Tensor], names: Mapping[str, Tensor], fmt: Format) -> int:
    """The most values that any group takes; refuses weights that are not in the format.

    Worked example: int2 has 4 levels, so rows of 64 weights with 5 different values are refused.

    Args:
        weights: path -> [rows, cols].
        names: the matrices that must be there, path -> [rows, cols].
        fmt: gives bits and group size.

    Raises:
        PeerError: a matrix is missing or of another shape, or a group has too many values.
    """
    most = 0
    for name, original in names.items():
        most = max(most, check_matrix(weights, name, original, fmt))
    return most


def check_matrix(weights: Mapping[str, Tensor], name: str, original: Tensor, fmt: Format) -> int:
    """The most values that any group of one matrix takes; as `check_weights`.

    A matrix in bf16 must be the original and counts 0.

    Args:
        weights: path -> [rows, cols].
        name: path of the matrix.
        original: [rows, cols].
        fmt: gives bits and group size.

    Raises:
        PeerError: it is missing, of another shape, or not in the format.
    """
    if name not in weights:
        raise PeerError(f"{name} is missing among {len(weights)} matrices")
    weight = weights[name]
    if weight.shape != original.shape:
        raise PeerError(f"{name} is {tuple(weight.shape)}, not {tuple(original.shape)}")
    if not fmt.is_quantized:
        if not torch.equal(weight, original.to(weight.dtype)):
            raise PeerError(f"{name} is said to be unquantized and differs from the original")
        return 0
    most = 0
    for group in torch.split(weight, fmt.group_size, -1):
        ordered = group.sort(-1).values
        n_values = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(-1)
        most = max(most, int(n_values.max()))
    if most > 2**fmt.bits:
        raise PeerError(
            f"a group of {fmt.group_size} of {name} has {most} values; "
            f"{fmt.name} has {2**fmt.bits}"
        )
    return most


def read_weights(result: PeerResult) -> dict[str, Tensor]:
    """The dequantized weights, float32: path -> [rows, cols]."""
    return load_file(result.weights)


def _run(command: list[str], place: Path, timeout: float) -> str:
    """Standard output of a command.

    Raises:
        PeerError: it cannot be started, fails or takes too long.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    try:
        done = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, timeout=timeout
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerError(f"{type(error).__name__}: {error}") from error
    if done.returncode:
        words = (done.stderr.strip() or "no message").splitlines()
        raise PeerError(f"exit {done.returncode}: {' | '.join(words[-3:])}")
    return done.stdout
