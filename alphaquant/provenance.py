"""What a number on disk depends on besides its data: versions and device."""

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

_PACKAGES = (
    *("aq-search", "torch", "transformers", "safetensors", "numpy", "numba", "scipy", "optuna"),
)


@dataclass(frozen=True)
class Provenance:
    """What the numbers of a search depend on.

    Attributes:
        model: its name, as asked for.
        model_type: of its configuration.
        model_digest: sha256 of its weights.
        data: role of a text -> its provenance, see `TokenSet.provenance`.
        device: see `device_facts`.
        rounded_on: type of the device that matrices were rounded on, such as `cpu`.
        versions: see `versions`.
        seed: of windows, labels and proposals.
        bank: name of the bank.
        bank_bytes: of all its files.
        calibration_tokens_per_expert: experts module -> tokens of each expert, [E].
        rare_matrices: matrices that too few calibration tokens reached.
        lacking_formats: formats in which the bank does not hold every matrix.
        rotation: of the residual stream, see `RotationFacts` with the `kl` of the rotated weights
            on the held-out text; None where it is as it was.
        gguf: the GGUF file that it was made from, see `GgufOrigin`; None for other checkpoints.
        scratch: what was copied to a disk of this machine, and what was not and why; None where
            no such disk was asked for.
        dashboard_problem: why the study lacks its note and figures; None where it has them.
    """

    model: str
    model_type: str
    model_digest: str
    data: Mapping[str, Mapping[str, Any]]
    device: Mapping[str, Any]
    rounded_on: str
    versions: Mapping[str, str]
    seed: int
    bank: str
    bank_bytes: int
    calibration_tokens_per_expert: Mapping[str, Sequence[int]]
    rare_matrices: tuple[str, ...]
    lacking_formats: tuple[str, ...] = ()
    rotation: Mapping[str, Any] | None = None
    gguf: Mapping[str, Any] | None = None
    scratch: Mapping[str, Any] | None = None
    dashboard_problem: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Ready for JSON; what is None is left out."""
        found = asdict(self)
        device = found.pop("device")
        return {k: v for k, v in (found | device).items() if v is not None}


def versions() -> dict[str, str]:
    """Installed versions of what the results depend on; `source` for what is not installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "source"
    with suppress(PackageNotFoundError):  # its types are rounded by its own code
        found["xllamacpp"] = version("xllamacpp")
    return found


def device_facts(device: str) -> dict[str, Any]:
    """Name of the device; of a CPU also its threads, and whether it multiplies bfloat16 (AMX)."""
    if device.startswith("cuda"):
        return {"device": torch.cuda.get_device_name(device)}
    return {
        "device": f"cpu {platform.machine()}",
        "threads": torch.get_num_threads(),
        "amx": multiplies_bfloat16(),
    }


def multiplies_bfloat16() -> bool:
    """Whether the processor multiplies matrices of bfloat16 faster than those of float32."""
    return bool(torch.cpu._is_amx_tile_supported())
