"""What a number on disk depends on besides its data: versions and device."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

_PACKAGES = ("aq-search", "torch", "transformers", "safetensors", "numpy", "scipy", "optuna")


def versions() -> dict[str, str]:
    """Installed versions of what the results depend on; `source` for what is not installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "source"
    return found


def device_facts(device: str) -> dict[str, Any]:
    """Name of the device and threads used."""
    if device.startswith("cuda"):
        return {"device": torch.cuda.get_device_name(device)}
    return {"device": f"cpu {platform.machine()}", "threads": torch.get_num_threads()}
