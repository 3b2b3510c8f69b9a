"""Who may import whom, read from the syntax trees of the package; nothing is imported.

The rules are data (`MAY_IMPORT`, `OUTSIDE`, `EAGER_IN_CLI`), the checker is a few functions from
sources to messages, and every rule is shown to fail on a synthetic source. A part is a room, that
is a folder of `alphaquant`, or a module beside them, or `root` for `__init__.py`.
"""

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

Check = Callable[[Mapping[str, str]], list[str]]

PACKAGE = Path(__file__).parents[1] / "alphaquant"

# The modules at the package's root that everybody may import: they import nothing but each other.
GROUND = {"errors", "lease", "files", "checksums", "provenance", "progress", "import_hook"}

# Each line: the rooms to the left that a room may import, beside the ground. kernels take integers
# and tensors, so they see no Format and nothing else of spaces; search never sees a tensor, so it
# sees neither kernels nor models. demo is data, gptq is for users, and testing is for tests only.
_ROOMS: dict[str, set[str]] = {
    "spaces": set(),
    "specs": {"spaces"},
    "demo": set(),
    "kernels": set(),
    "models": {"spaces", "kernels"},
    "texts": {"spaces", "specs", "demo"},
    "search": {"spaces", "specs"},
    "work": {"models"},
    "quant": {"spaces", "specs", "kernels", "models", "work"},
    "costs": {"spaces", "specs", "kernels", "models", "quant", "work"},
    "runtime": {"spaces", "specs", "kernels", "models", "quant"},
    "exports": {"spaces", "specs", "kernels", "models", "quant", "runtime"},
    "gptq": {"spaces", "specs", "kernels", "models", "quant", "runtime"},
    "evaluators": {"spaces", "specs", "kernels", "models", "texts", "quant", "runtime", "work"},
}
_BELOW_STUDIES = set(_ROOMS) - {"gptq", "runtime", "exports"}
_BELOW_REPORTS = _BELOW_STUDIES | {"studies"}
_BELOW_COMMANDS = _BELOW_REPORTS | {"runtime", "exports", "reports"}
_LATE_ROOMS = {
    "studies": _BELOW_STUDIES,
    "reports": _BELOW_REPORTS,
    "commands": _BELOW_COMMANDS,
    "cli": _BELOW_COMMANDS | {"commands"},
    "testing": _BELOW_COMMANDS - {"reports"},
}
MAY_IMPORT: dict[str, set[str]] = {
    "root": {"import_hook"},
    "import_hook": set(),
    "errors": set(),
    "lease": {"errors"},
    "files": {"errors", "lease"},
    "checksums": {"errors"},
    "provenance": {"errors"},
    "progress": {"errors"},
} | {room: below | GROUND - {"import_hook"} for room, below in (_ROOMS | _LATE_ROOMS).items()}

# Packages from outside that a part may import; parts not listed may import any dependency.
OUTSIDE: dict[str, set[str]] = {
    "root": set(),
    "import_hook": set(),
    "errors": set(),
    "lease": set(),
    "files": {"safetensors"},
    "checksums": {"numpy"},
    "provenance": {"torch"},
    "progress": set(),
    "spaces": {"pydantic"},
    "specs": {"cyclopts", "docstring_parser"},
    "search": {"numpy", "scipy", "optuna"},
    "kernels": {"torch", "triton"},
}

# What runs in vLLM's own environment: the plug-in, and the worker that is asked for logits.
IN_VLLM = ("alphaquant.runtime.vllm.", "alphaquant.evaluators.engines.vllm_worker")

# What a module of cli, which every --help loads, may import outside its functions.
EAGER_IN_CLI = {
    "cyclopts",
    "rich",
    "tomlkit",
    "errors",
    "files",
    "progress",
    "spaces",
    "specs",
    "cli",
}

# Names that `alphaquant/__init__.py` finds when they are asked for.
SET_BY_IMPORT = {"__version__"}

# Modules in one folder, which a person can look through; its `__init__.py` is not counted.
MOST_FILES = 16

# One command has one word in these rooms, suites are named as what they test, and gptq keeps the
# names of the old pipeline.
SAME_NAMES = {"specs", "commands", "cli", "testing", "gptq"}

# Module names that two other rooms share, each with what tells them apart.
TWINS = {
    "config": "spaces: the file of formats by pattern; kernels.moe: launch parameters",
    "parts": "kernels: of one packed matrix; runtime: of an unfinished checkpoint",
    "scores": "evaluators: how they are made; studies.store: how they are kept",
}

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


@cache
def nodes_of(source: str) -> tuple[ast.AST, ...]:
    """Every node of a source, the module first; each source is parsed once for all rules."""
    return tuple(ast.walk(ast.parse(source)))


@cache
def imports_of(module: str, source: str) -> tuple[Import, ...]:
    """All absolute imports of a source, also those inside functions."""
    nodes = nodes_of(source)
    functions = (n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    imports = ast.Import | ast.ImportFrom
    inside = {id(n) for f in functions for n in ast.walk(f) if isinstance(n, imports)}
    found: list[Import] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [Import(module, name, node.lineno, id(node) in inside) for name in names]
    return tuple(found)


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
    """Packages that a part may not use; triton outside *_triton.py, vllm outside its plug-in."""
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
        if package == "vllm" and not found.module.startswith(IN_VLLM):
            messages.append(f"{found.where}: vllm belongs into {' and '.join(IN_VLLM)}")
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
        for node in nodes_of(source):
            if isinstance(node, ast.ImportFrom) and node.level > 0:
                messages.append(f"{module}:{node.lineno}: relative import")
            if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
                messages.append(f"{module}:{node.lineno}: star import")
            names = {getattr(node, "id", ""), getattr(node, "attr", ""), getattr(node, "name", "")}
            if "TYPE_CHECKING" in names:
                messages.append(f"{module}:{getattr(node, 'lineno', 0)}: TYPE_CHECKING")
    return messages


def missing_names(sources: Mapping[str, str]) -> list[str]:
    """Imports of the package's own names that do not exist, also inside functions."""
    defined = {module: {*names_of(source), *SET_BY_IMPORT} for module, source in sources.items()}
    messages = []
    for found in all_imports(sources):
        parent, _, name = found.target.rpartition(".")
        is_there = found.target in sources or name in defined.get(parent, set())
        if found.is_own and not is_there:
            messages.append(f"{found.where}: there is no {found.target}")
    return messages


def names_of(source: str) -> Iterator[str]:
    """Names that a module defines or imports, outside its functions and classes."""
    todo: list[ast.AST] = [nodes_of(source)[0]]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        if isinstance(node, ast.alias):
            yield node.asname or node.name.split(".")[0]
        todo += ast.iter_child_nodes(node)


def leaves(sources: Mapping[str, str]) -> list[str]:
    """Modules that are no folders."""
    folders = {module.rpartition(".")[0] for module in sources}
    return [module for module in sources if module not in folders]


def crowded_folders(sources: Mapping[str, str]) -> list[str]:
    """Folders with more modules than `MOST_FILES`."""
    counts = Counter(module.rpartition(".")[0] for module in leaves(sources))
    return [f"{folder}: {n} modules" for folder, n in counts.items() if n > MOST_FILES]


def twin_names(sources: Mapping[str, str]) -> list[str]:
    """Modules of one name, or of a name and its plural, in two rooms or in one."""
    places: dict[str, list[str]] = defaultdict(list)
    for module in leaves(sources):
        if part_of(module) not in SAME_NAMES:
            places[module.rpartition(".")[2]].append(module)
    twins = [found for name, found in places.items() if len(found) > 1 and name not in TWINS]
    plurals = [places[n] + places[f"{n}s"] for n in list(places) if f"{n}s" in places]
    return [" and ".join(found) for found in twins + plurals]


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
        missing_names,
        crowded_folders,
        twin_names,
        import_cycle,
    ],
)
def test_package_keeps_the_rule(check: Check, package: dict[str, str]) -> None:
    assert check(package) == []


def test_the_layer_rule_itself_has_no_cycle() -> None:
    TopologicalSorter(MAY_IMPORT).prepare()


CHAINS = (
    ("errors", "spaces", "specs", "quant", "costs", "studies", "reports", "commands", "cli"),
    ("errors", "files", "spaces"),
    ("kernels", "models", "quant", "runtime", "evaluators", "commands"),
    ("spaces", "specs", "search", "studies"),
    ("demo", "texts", "studies"),
    ("texts", "evaluators", "studies"),
    ("models", "quant", "runtime", "gptq"),
    ("quant", "runtime", "commands"),
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
        ("kernels.packing", "from alphaquant.spaces.formats import Format"),
        ("kernels.packing", "import alphaquant.spaces"),
        ("search.solver", "from alphaquant.quant.bank import Bank"),
        ("search.solver", "from alphaquant.kernels import packing"),
        ("search.solver", "from alphaquant.costs.cost_store import load_costs"),
        ("quant.rounding", "from alphaquant.search import solver"),
        ("models.walk", "from alphaquant.quant import hessian"),
        ("models.walk", "from alphaquant.texts import windows"),
        ("texts.windows", "from alphaquant.models import loading"),
        ("costs.fisher", "from alphaquant.evaluators import divergence"),
        ("evaluators.divergence", "from alphaquant.costs import fisher"),
        ("costs.fisher", "from alphaquant.runtime import modules"),
        ("evaluators.base", "from alphaquant import studies"),
        ("studies.loop", "from alphaquant.reports import notes"),
        ("studies.loop", "from alphaquant.runtime import checkpoint"),
        ("reports.html", "from alphaquant.commands import search"),
        ("runtime.pipeline", "def f():\n    from alphaquant.commands import quantize"),
        ("spaces.units", "from alphaquant import search"),
        ("specs.search", "from alphaquant.search import solver"),
        ("files", "from alphaquant.spaces import json_files"),
        ("runtime.pipeline", "from alphaquant.demo import text_path"),
        ("demo", "from alphaquant.spaces import formats"),
        ("cli.search", "from alphaquant.testing import formats"),
        ("testing.formats", "from alphaquant.cli import search"),
        ("commands.quantize", "from alphaquant.gptq import GPTQConfig"),
        ("testing.models", "import alphaquant.gptq"),
        ("gptq.model", "from alphaquant.texts import windows"),
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
        ("specs.search", "import cyclopts\nfrom docstring_parser import parse", 0),
        ("specs.search", "import torch", 1),
        ("specs.search", "def f():\n    import optuna", 1),
        ("specs.search", "import numpy", 1),
        ("kernels.linear.dequant_triton", "import triton", 0),
        ("kernels.packing", "import triton.language as tl", 1),
        ("kernels.packing", "import transformers", 1),
        ("models.mapping", "import transformers", 0),
        ("runtime.vllm.plugin", "from vllm.config import VllmConfig", 0),
        ("runtime.pipeline", "def f():\n    import vllm", 1),
    ],
)
def test_outside_check_sees_a_forbidden_package(module: str, source: str, n_messages: int) -> None:
    assert len(outside_violations({f"alphaquant.{module}": source})) == n_messages


@pytest.mark.parametrize(
    ("source", "n_messages"),
    [
        ("import cyclopts\nfrom alphaquant.errors import AlphaQuantError", 0),
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
        ("studies.inputs", "from alphaquant.demo.train import main", 1),
        ("studies.inputs", "from alphaquant.demo import train", 1),
        ("studies.inputs", "from alphaquant.demo import text_path", 0),
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


@pytest.mark.parametrize(
    ("source", "n_messages"),
    [
        ("from alphaquant.quant import b", 0),
        ("from alphaquant.quant.b import known, Kind, json, either", 0),
        ("def f():\n    from alphaquant.quant.b import unknown", 1),
        ("from alphaquant.quant import c", 1),
        ("import alphaquant.quant.c", 1),
        ("from alphaquant.quant.b import local", 1),
    ],
)
def test_missing_check_sees_a_name_that_is_gone(source: str, n_messages: int) -> None:
    sources = {
        "alphaquant": "",
        "alphaquant.quant": "",
        "alphaquant.quant.a": source,
        "alphaquant.quant.b": "import json\nknown: int = 1\nclass Kind: pass\n"
        "def f():\n    local = 1\nif known:\n    either = 2",
    }
    assert len(missing_names(sources)) == n_messages


def test_crowd_check_sees_a_folder_of_many_files() -> None:
    files = {f"alphaquant.quant.a{i}": "" for i in range(MOST_FILES)}
    assert crowded_folders(files) == []
    assert crowded_folders({**files, "alphaquant.quant.b": ""}) == ["alphaquant.quant: 17 modules"]


@pytest.mark.parametrize(
    ("modules", "n_messages"),
    [
        (("quant.bank", "costs.spectra"), 0),
        (("quant.bank", "costs.bank"), 1),
        (("quant.bank", "quant.banks"), 1),
        (("quant.bank", "costs.deep.banks"), 1),
        (("specs.search", "commands.search", "cli.search"), 0),
        (("spaces.config", "kernels.moe.config"), 0),
        (("spaces.config", "kernels.configs"), 1),
    ],
)
def test_twin_check_sees_one_name_in_two_rooms(modules: tuple[str, ...], n_messages: int) -> None:
    assert len(twin_names({f"alphaquant.{module}": "" for module in modules})) == n_messages


def test_every_allowed_twin_exists(package: dict[str, str]) -> None:
    names = Counter(m.rpartition(".")[2] for m in leaves(package) if part_of(m) not in SAME_NAMES)
    assert {name for name in TWINS if names[name] < 2} == set()


def test_every_room_has_its_rule(package: dict[str, str]) -> None:
    assert {part_of(module) for module in package} == set(MAY_IMPORT)


@pytest.mark.parametrize("importing", ["from q.b import y", "from q import b", "import q.b"])
def test_cycle_check_sees_a_cycle_also_through_a_function(importing: str) -> None:
    sources = {
        "alphaquant.quant.a": importing.replace("q", "alphaquant.quant"),
        "alphaquant.quant.b": "def f():\n    from alphaquant.quant.c import z",
        "alphaquant.quant.c": "from alphaquant.quant.a import x",
    }
    assert len(import_cycle(sources)) == 4
    assert import_cycle({**sources, "alphaquant.quant.c": ""}) == []
