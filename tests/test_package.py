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
        ("run_search", "alphaquant.commands.search", "search"),
        ("plan_search", "alphaquant.commands.search", "plan_search"),
        ("quantize", "alphaquant.commands.quantize", "quantize"),
        ("load", "alphaquant.runtime.checkpoint", "load"),
        ("evaluate", "alphaquant.commands.evaluate", "evaluate"),
        ("SearchSpec", "alphaquant.specs.search", "SearchSpec"),
        ("QuantizeSpec", "alphaquant.specs.quantize", "QuantizeSpec"),
        ("EvaluateSpec", "alphaquant.specs.evaluate", "EvaluateSpec"),
    ],
)
def test_public_name_is_loaded_from_its_module(
    name: str, module: str, attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = object()
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{attribute: target}))
    assert getattr(alphaquant, name) is target
    assert name in dir(alphaquant)


def test_only_search_is_both_a_public_name_and_a_folder() -> None:
    folders = {path.name for path in Path(alphaquant.__path__[0]).iterdir()}
    assert folders & set(alphaquant.__all__) == {"search"}


def printed(probe: str) -> str:
    """What a program prints in a process of its own."""
    command = [sys.executable, "-c", probe]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


SAME = "from alphaquant.search.solver import solve\nprint(alphaquant.search.solver.solve is solve)"


def test_search_is_a_package_that_can_be_called() -> None:
    probe = (
        "import sys, alphaquant, alphaquant.commands.search\n"
        "try:\n"
        "    alphaquant.search('3bits', trails=4)\n"
        "except alphaquant.errors.ConfigError as error:\n"
        "    print(error)\n"
    )
    found = printed(probe + SAME)
    assert found.startswith("search has no setting 'trails'; perhaps trials")
    assert found.endswith("True\n")


def test_search_can_be_called_when_a_module_in_it_is_imported_first() -> None:
    probe = (
        "import sys, types, alphaquant.search.solver\n"
        "command = types.SimpleNamespace(search=print, run_search=print)\n"
        "sys.modules['alphaquant.commands.search'] = command\n"
        "print(callable(alphaquant.search), alphaquant.run_search is print)\n"
    )
    assert printed(probe + SAME) == "True True\nTrue\n"


def test_the_package_of_search_algorithms_loads_no_torch() -> None:
    probe = (
        "import sys, alphaquant.search; print(callable(alphaquant.search), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True
    )
    assert done.stdout == "True False\n"


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'sarch'"):
        _ = alphaquant.sarch


def test_version_is_that_of_the_installed_distribution() -> None:
    try:
        installed = version("aq-search")
    except PackageNotFoundError:
        pytest.skip("the distribution is not installed")
    assert alphaquant.__version__ == installed
