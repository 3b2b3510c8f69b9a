"""The distribution for vLLM's environment has what the plug-in imports, and asks for no more.

Read from the syntax trees; that it works there is tested with the engine.
"""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PLUGIN = ROOT / "plugins" / "vllm"
ENTRY = "alphaquant.runtime.vllm.plugin:register"
KERNELS = "alphaquant.kernels.ops_triton"  # imported by name
BROUGHT_BY_VLLM = {"torch", "triton", "safetensors", "numpy", "vllm"}
NOT_REACHED = {"gguf"}  # tables of llama.cpp's types, which `check_formats` refuses


def project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def file_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports_of(module: str) -> Iterator[str]:
    """Modules that a module imports, also inside functions, without their folders."""
    tree = ast.parse(file_of(module).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = full.startswith("alphaquant.") and file_of(full).is_file()
                yield full if is_module else str(node.module)


def reached() -> set[str]:
    """Every module that the plug-in imports, directly or not."""
    todo, seen = [ENTRY.partition(":")[0], KERNELS], set[str]()
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        if module.startswith("alphaquant"):
            todo += [found for found in imports_of(module) if found not in seen]
    return seen


def test_every_folder_that_the_plug_in_reaches_is_in_the_distribution() -> None:
    listed = set(project(PLUGIN)["tool"]["setuptools"]["packages"])
    own = {module for module in reached() if module.startswith("alphaquant")}
    folders = {m if file_of(m).name == "__init__.py" else m.rpartition(".")[0] for m in own}
    assert folders <= listed
    assert all(file_of(package).name == "__init__.py" for package in listed)


def test_the_plug_in_needs_nothing_that_vllm_does_not_bring() -> None:
    outside = {module.split(".")[0] for module in reached()}
    outside -= sys.stdlib_module_names | {"alphaquant"} | NOT_REACHED
    assert outside == BROUGHT_BY_VLLM


def test_both_distributions_have_one_version_and_one_entry_point() -> None:
    whole, part = (project(folder)["project"] for folder in (ROOT, PLUGIN))
    assert whole["version"] == part["version"]
    for made in (whole, part):
        assert made["entry-points"]["vllm.general_plugins"] == {"alphaquant": ENTRY}


def test_the_link_leads_to_the_package() -> None:
    assert (PLUGIN / "alphaquant").resolve() == (ROOT / "alphaquant").resolve()
