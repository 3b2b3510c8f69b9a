"""What `import alphaquant` gives: lazy public names, a version, and nothing heavy."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest

import alphaquant


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "('torch', 'optuna', 'transformers', 'numpy', 'pydantic')"
    probe = f"import sys, alphaquant; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_importing_the_package_again_leaves_one_hook() -> None:
    probe = (
        "import sys, importlib, alphaquant\n"
        "n = len(sys.meta_path)\n"
        "importlib.reload(alphaquant)\n"
        "print(len(sys.meta_path) - n, 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True
    )
    assert done.stdout == "0 False\n"


@pytest.mark.parametrize(
    ("name", "module", "attribute"),
    [
        ("run_search", "alphaquant.studies.runner", "search"),
        ("quantize", "alphaquant.studies.quantize", "quantize"),
        ("load", "alphaquant.quant.checkpoint", "load"),
        ("evaluate", "alphaquant.studies.evaluate", "evaluate"),
    ],
)
def test_public_name_is_loaded_from_its_module(
    name: str, module: str, attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = object()
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{attribute: target}))
    assert getattr(alphaquant, name) is target
    assert name in dir(alphaquant)


def test_no_public_name_is_the_name_of_a_folder() -> None:
    folders = {path.name for path in Path(alphaquant.__path__[0]).iterdir()}
    assert folders.isdisjoint(alphaquant.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'sarch'"):
        _ = alphaquant.sarch


def test_version_is_that_of_the_installed_distribution() -> None:
    try:
        installed = version("aq-search")
    except PackageNotFoundError:
        pytest.skip("the distribution is not installed")
    assert alphaquant.__version__ == installed
