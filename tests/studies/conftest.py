"""A tiny random model with the demo's tokenizer, short texts, and one search that many tests read.

The model is made once per session: two OLMoE layers of four experts, 32 hidden features, weights
wide enough that quantization moves the logits.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alphaquant import demo
from alphaquant.studies.result import SearchResult
from alphaquant.studies.runner import search
from alphaquant.studies.spec import DataSpec, SearchSpec
from alphaquant.testing.models import tiny_model

SEQ_LEN = 48
N_CHARS = 30_000
MENU = "int3-g32,int4-g32,int8-row"

MakeSpec = Callable[..., SearchSpec]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model."""
    folder = tmp_path_factory.mktemp("tiny")
    return save_tiny(folder, num_experts=4, num_experts_per_tok=2, intermediate_size=32)


@pytest.fixture(scope="session")
def save() -> Callable[..., Path]:
    """Save another tiny model: `save(folder, "llama", vocab_size=4100)`."""
    return save_tiny


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files with the beginnings of the demo's three texts, by role."""
    folder = tmp_path_factory.mktemp("texts")
    files = {part: folder / f"{part}.txt" for part in demo.TEXT_PARTS}
    for part, file in files.items():
        file.write_text(demo.text_path(part).read_text(encoding="utf-8")[:N_CHARS])
    return files


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that all tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def make_spec(tiny: Path, texts: dict[str, Path], cache: Path) -> MakeSpec:
    """Make a small specification: `make_spec(out, budget="4bits")`."""

    def make(out: Path, **changes: Any) -> SearchSpec:
        data = DataSpec(
            str(texts["calibration"]),
            str(texts["search"]),
            str(texts["heldout"]),
            n_calibration=12,
            n_evaluation=6,
            n_heldout=6,
            seq_len=SEQ_LEN,
        )
        spec = SearchSpec(
            model=str(tiny),
            budget="5.2bits",
            formats=MENU,
            trials=14,
            data=data,
            out=out,
            cache=cache,
        )
        return replace(spec, **changes)

    return make


@pytest.fixture(scope="session")
def found(make_spec: MakeSpec, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """A finished search; read it, do not change its folder."""
    return search(make_spec(tmp_path_factory.mktemp("found") / "out"))
