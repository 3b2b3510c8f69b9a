"""A tiny random model, short texts, and one search that many tests read; made once per session."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alphaquant.studies.result import SearchResult
from alphaquant.studies.runner import search
from alphaquant.studies.spec import DataSpec, SearchSpec
from alphaquant.testing.checkpoints import save_texts, save_tiny

MakeSpec = Callable[..., SearchSpec]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files with the beginnings of the demo's three texts, by part."""
    return save_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that all tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def make_spec(tiny: Path, texts: dict[str, Path], cache: Path) -> MakeSpec:
    """Make a small specification: `make_spec(out, budget="4bits")`."""
    data = DataSpec(
        str(texts["calibration"]),
        str(texts["search"]),
        str(texts["heldout"]),
        n_calibration=12,
        n_evaluation=6,
        n_heldout=6,
        seq_len=48,
    )

    def make(out: Path, **changes: Any) -> SearchSpec:
        spec = SearchSpec(
            model=str(tiny),
            budget="5.2bits",
            formats="int3-g32,int4-g32,int8-row",
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
