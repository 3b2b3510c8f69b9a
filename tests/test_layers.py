"""Who may import whom, read from the syntax trees of the package; nothing is imported.

The rules are data (`MAY_IMPORT`, `OUTSIDE`, `EAGER_IN_CLI`), the checker is a few functions from
sources to messages, and every rule is shown to fail on a synthetic source. A part is a folder of
`alphaquant`, `errors` and `import_hook` for the files of that name, or `root` for `__init__.py`.
"""

import ast
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

Check = Callable[[Mapping[str, str]], list[str]]

PACKAGE = Path(__file__).parents[1] / "alphaquant"

# Chains: errors < spaces < kernels < quant < evaluators < studies < cli, quant < gptq, and
# spaces < search < studies. kernels take integers and tensors, so they see no Format and nothing
# else of spaces. demo is data, and testing is for tests only.
MAY_IMPORT: dict[str, set[str]] = {
    "root": {"import_hook"},
    "import_hook": set(),
    "errors": set(),
    "spaces": {"errors"},
    "kernels": {"errors"},
    "demo": {"errors"},
    "quant": {"errors", "spaces", "kernels"},
    "gptq": {"errors", "spaces", "kernels", "quant"},
    "search": {"errors", "spaces"},
    "evaluators": {"errors", "spaces", "kernels", "quant", "demo"},
    "studies": {"errors", "spaces", "kernels", "quant", "evaluators", "search", "demo"},
    "cli": {"errors", "spaces", "kernels", "quant", "evaluators", "search", "studies", "demo"},
    "testing": {"errors", "spaces", "kernels", "quant", "evaluators", "search", "studies", "demo"},
}

# Packages from outside that a part may import; parts not listed may import any dependency.
OUTSIDE: dict[str, set[str]] = {
    "root": set(),
    "import_hook": set(),
    "errors": set(),
    "spaces": {"pydantic"},
    "search": {"numpy", "scipy", "optuna"},
    "kernels": {"torch", "triton"},
}

# What a module of cli, which every --help loads, may import outside its functions.
EAGER_IN_CLI = {"typer", "rich", "errors", "spaces", "cli"}

# The script that made the demo model: it imports torch, and nothing imports it.
DEMO_SCRIPT = "alphaquant.demo.train"


@dataclass(frozen=True)
class Import:
    """One imported name.

    Attributes:
        module: the importing module, dotted.
        target: what it imports, dotted; for `from a import b` that is `a.b`.
        line: line number.
        in_function: whether it waits for a call.
    """

    module: str
    target: str
    line: int
    in_function: bool

    @property
    def where(self) -> str:
        return f"{self.module}:{self.line}"

    @property
    def is_own(self) -> bool:
        return self.target.split(".")[0] == "alphaquant"


def part_of(dotted: str) -> str:
    """The part that a dotted name of the package belongs to."""
    names = dotted.split(".")
    return names[1] if len(names) > 1 else "root"


def imports_of(module: str, source: str) -> list[Import]:
    """All absolute imports of a source, also those inside functions."""
    tree = ast.parse(source)
    functions = (
        n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    inside = {id(n) for function in functions for n in ast.walk(function)}
    found: list[Import] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [Import(module, name, node.lineno, id(node) in inside) for name in names]
    return found


def all_imports(sources: Mapping[str, str]) -> Iterator[Import]:
    for module, source in sources.items():
        yield from imports_of(module, source)


def layer_violations(sources: Mapping[str, str]) -> list[str]:
    """Imports of parts that are not to the left."""
    messages = []
    for found in all_imports(sources):
        here, there = part_of(found.module), part_of(found.target)
        allowed = MAY_IMPORT.get(here)
        if allowed is None:
            messages.append(f"{found.where}: folder {here!r} is not in MAY_IMPORT")
        elif found.is_own and there not in allowed | {here, "__version__"}:
            messages.append(f"{found.where}: {here} may not import {found.target}")
    return messages


def outside_violations(sources: Mapping[str, str]) -> list[str]:
    """Packages that a part may not use; triton outside *_triton.py."""
    messages = []
    for found in all_imports(sources):
        package = found.target.split(".")[0]
        if found.is_own or package in sys.stdlib_module_names:
            continue
        allowed = OUTSIDE.get(part_of(found.module))
        if allowed is not None and package not in allowed:
            messages.append(f"{found.where}: may not import {package}")
        if package == "triton" and not found.module.endswith("_triton"):
            messages.append(f"{found.where}: triton belongs into a *_triton.py file")
    return messages


def eager_violations(sources: Mapping[str, str]) -> list[str]:
    """Heavy imports that --help would load."""
    return [
        f"{found.where}: import {found.target} inside the function that needs it"
        for found in all_imports(sources)
        if part_of(found.module) == "cli" and not found.in_function
        if (part_of(found.target) if found.is_own else found.target.split(".")[0])
        not in EAGER_IN_CLI | sys.stdlib_module_names
    ]


def demo_violations(sources: Mapping[str, str]) -> list[str]:
    """Imports of the demo script, and of anything but the standard library by the rest of demo."""
    messages = []
    for found in all_imports(sources):
        if found.target.startswith(DEMO_SCRIPT):
            messages.append(f"{found.where}: nothing imports {DEMO_SCRIPT}")
        is_data = part_of(found.module) == "demo" and found.module != DEMO_SCRIPT
        package = found.target.split(".")[0]
        if is_data and package not in sys.stdlib_module_names | {"alphaquant"}:
            messages.append(f"{found.where}: demo may not import {package}")
    return messages


def form_violations(sources: Mapping[str, str]) -> list[str]:
    """Relative imports, star imports, and TYPE_CHECKING in any spelling."""
    messages = []
    for module, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level > 0:
                messages.append(f"{module}:{node.lineno}: relative import")
            if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
                messages.append(f"{module}:{node.lineno}: star import")
            names = {getattr(node, "id", ""), getattr(node, "attr", ""), getattr(node, "name", "")}
            if "TYPE_CHECKING" in names:
                messages.append(f"{module}:{getattr(node, 'lineno', 0)}: TYPE_CHECKING")
    return messages


def import_cycle(sources: Mapping[str, str]) -> list[str]:
    """One cycle between modules, function-level imports included; empty when there is none."""
    graph: dict[str, set[str]] = {module: set() for module in sources}
    for found in all_imports(sources):
        parent = found.target.rpartition(".")[0]
        target = found.target if found.target in sources else parent
        if target in sources and target != found.module:
            graph[found.module].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.fixture(scope="module")
def package() -> dict[str, str]:
    """Dotted module name -> source of everything in the package."""
    sources = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        names = path.relative_to(PACKAGE.parent).with_suffix("").parts
        dotted = ".".join(names[:-1] if names[-1] == "__init__" else names)
        sources[dotted] = path.read_text(encoding="utf-8")
    return sources


def test_the_package_is_found(package: dict[str, str]) -> None:
    assert {"alphaquant", "alphaquant.errors", "alphaquant.spaces.formats"} <= set(package)


@pytest.mark.parametrize(
    "check",
    [
        layer_violations,
        outside_violations,
        eager_violations,
        demo_violations,
        form_violations,
        import_cycle,
    ],
)
def test_package_keeps_the_rule(check: Check, package: dict[str, str]) -> None:
    assert check(package) == []


def test_the_layer_rule_itself_has_no_cycle() -> None:
    TopologicalSorter(MAY_IMPORT).prepare()


CHAINS = (
    ("errors", "spaces", "quant", "evaluators", "studies", "cli"),
    ("errors", "kernels", "quant"),
    ("errors", "spaces", "quant", "gptq"),
    ("spaces", "search", "studies"),
)


@pytest.mark.parametrize("chain", CHAINS)
def test_layers_import_to_the_left_and_never_to_the_right(chain: tuple[str, ...]) -> None:
    for i, left in enumerate(chain):
        for right in chain[i + 1 :]:
            forward = {f"alphaquant.{right}.a": f"from alphaquant.{left}.b import c"}
            backward = {f"alphaquant.{left}.b": f"from alphaquant.{right}.a import c"}
            assert layer_violations(forward) == []
            assert len(layer_violations(backward)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kernels.linear", "from alphaquant.spaces.formats import Format"),
        ("kernels.linear", "import alphaquant.spaces"),
        ("search.solver", "from alphaquant.quant.bank import Bank"),
        ("search.solver", "from alphaquant.kernels import packing"),
        ("quant.gptq", "from alphaquant.search import solver"),
        ("evaluators.base", "from alphaquant import studies"),
        ("quant.pipeline", "def f():\n    from alphaquant.studies import runner"),
        ("spaces.units", "from alphaquant import run_search"),
        ("quant.pipeline", "from alphaquant.demo import text_path"),
        ("demo", "from alphaquant.spaces import formats"),
        ("cli.search", "from alphaquant.testing import formats"),
        ("testing.formats", "from alphaquant.cli import search"),
        ("studies.quantize", "from alphaquant.gptq import GPTQConfig"),
        ("testing.models", "import alphaquant.gptq"),
        ("gptq.model", "from alphaquant.evaluators import data"),
        ("helpers.things", "import os"),
    ],
)
def test_layer_check_sees_a_forbidden_import(module: str, source: str) -> None:
    assert len(layer_violations({f"alphaquant.{module}": source})) == 1


def test_version_may_be_imported_anywhere() -> None:
    assert layer_violations({"alphaquant.quant.a": "from alphaquant import __version__"}) == []


@pytest.mark.parametrize(
    ("module", "source", "n_messages"),
    [
        ("spaces.config", "import json, pydantic", 0),
        ("spaces.config", "import numpy", 1),
        ("spaces.config", "def f():\n    import torch", 1),
        ("search.solver", "import numpy as np\nfrom scipy.optimize import milp", 0),
        ("search.solver", "import torch", 1),
        ("search.solver", "def f():\n    from torch.nn import functional", 1),
        ("errors", "import pydantic", 1),
        ("kernels.linear_triton", "import triton", 0),
        ("kernels.linear", "import triton.language as tl", 1),
        ("kernels.linear", "import transformers", 1),
        ("quant.models", "import transformers", 0),
    ],
)
def test_outside_check_sees_a_forbidden_package(module: str, source: str, n_messages: int) -> None:
    assert len(outside_violations({f"alphaquant.{module}": source})) == n_messages


@pytest.mark.parametrize(
    ("source", "n_messages"),
    [
        ("import typer\nfrom alphaquant.errors import AlphaQuantError", 0),
        ("import torch", 1),
        ("from alphaquant.commands.search import search", 1),
        ("def main():\n    from alphaquant.commands.search import search", 0),
        ("def main():\n    import torch", 0),
    ],
)
def test_eager_check_sees_a_heavy_import_of_a_command(source: str, n_messages: int) -> None:
    assert len(eager_violations({"alphaquant.cli.search": source})) == n_messages


@pytest.mark.parametrize(
    ("module", "source", "n_messages"),
    [
        ("demo", "import torch", 1),
        ("demo.train", "import torch", 0),
        ("studies.runner", "from alphaquant.demo.train import main", 1),
        ("studies.runner", "from alphaquant.demo import train", 1),
        ("studies.runner", "from alphaquant.demo import text_path", 0),
    ],
)
def test_demo_check_sees_a_forbidden_import(module: str, source: str, n_messages: int) -> None:
    assert len(demo_violations({f"alphaquant.{module}": source})) == n_messages


@pytest.mark.parametrize(
    ("source", "n_messages"),
    [
        ("from alphaquant.spaces import formats", 0),
        ("from . import formats", 1),
        ("from ..spaces.formats import Format", 1),
        ("from alphaquant.spaces.formats import *", 1),
        ("from typing import TYPE_CHECKING", 1),
        ("import typing\nif typing.TYPE_CHECKING:\n    import os", 1),
    ],
)
def test_form_check_sees_a_forbidden_form(source: str, n_messages: int) -> None:
    assert len(form_violations({"alphaquant.quant.a": source})) == n_messages


@pytest.mark.parametrize("importing", ["from q.b import y", "from q import b", "import q.b"])
def test_cycle_check_sees_a_cycle_also_through_a_function(importing: str) -> None:
    sources = {
        "alphaquant.quant.a": importing.replace("q", "alphaquant.quant"),
        "alphaquant.quant.b": "def f():\n    from alphaquant.quant.c import z",
        "alphaquant.quant.c": "from alphaquant.quant.a import x",
    }
    assert len(import_cycle(sources)) == 4
    assert import_cycle({**sources, "alphaquant.quant.c": ""}) == []
