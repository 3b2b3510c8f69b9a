"""What the couplings of serving engines cost, and whether a served file is what was searched.

For each profile and budget it runs `aq-search`'s own function, and lists the held-out KL of the
winner. Files of the winners under `transformers` are then written by `aq-quantize --export
compressed-tensors`, loaded by stock transformers, and measured on the same held-out windows.

    python benchmarks/serving_profiles.py --work DIR --out benchmarks/results/profiles-demo.json
    python benchmarks/serving_profiles.py --model MODEL --effort quick --no-served \
        --profiles any vllm transformers gguf --work DIR --out result.json

Searches that DIR holds already are not run again. Prints a table and writes JSON with provenance,
after every search anew.
"""

import argparse
import json
import logging
import resource
from pathlib import Path
from typing import Any

from release import parse_with_out, run_facts

from alphaquant.commands.quantize import quantize
from alphaquant.commands.search import search
from alphaquant.evaluators.divergence import measure_divergence
from alphaquant.evaluators.teacher import open_teacher, store_teacher
from alphaquant.runtime.checkpoint import load
from alphaquant.spaces.profiles import PROFILES
from alphaquant.specs.quantize import QuantizeSpec
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.inputs import find_device, load_source
from alphaquant.studies.stages import load_inputs

logger = logging.getLogger("serving_profiles")

SERVED = "transformers"
"""The profile whose files can be run here in every format."""


def searched(spec: SearchSpec) -> dict[str, Any]:
    """The winner of a search on held-out text; the search is run unless its folder is there."""
    file, seconds = spec.run.out / "front.json", spec.run.out / "seconds"
    if not file.exists():
        before = _processor_seconds()
        search(spec)
        seconds.write_text(f"{_processor_seconds() - before:.0f}")
    front = json.loads(file.read_text())
    best = front["best"]
    row = next(row for row in front["heldout"] if row["name"] == best["searched"])
    return {
        "profile": spec.limits.profile,
        "budget": spec.limits.budget,
        "winner": best["searched"],
        "n_units": front["n_units"],
        "bits_per_weight": row["bits_per_weight"],
        "kl": row["kl"],
        "kl_stderr": row["kl_stderr"],
        "kl_by_domain": {name: part["kl"] for name, part in row["domains"].items()},
        "trials": front["n_trials"],
        "processor_seconds": int(seconds.read_text()) if seconds.exists() else None,
    }


def _processor_seconds() -> float:
    """Of this process and those that it started."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


class Served:
    """One model and one held-out text, for files that another program runs."""

    def __init__(self, model: str, cache: Path, work: Path) -> None:
        """Load the model and the windows of its searches, and store the original's predictions."""
        self.model, self.cache = model, cache
        source = load_source(model, find_device("auto"), "auto", cache=cache)
        self.heldout = load_inputs(SearchSpec.of(model=model, budget="4bits"), source).heldout
        store_teacher(work / "teacher.safetensors", source.map.model, self.heldout.tokens)
        self.teacher = open_teacher(work / "teacher.safetensors")

    def kl(self, folder: Path) -> dict[str, Any]:
        """KL of a search's winner, exported and loaded by stock transformers, and of our files."""
        from transformers import AutoModelForCausalLM

        files = self._quantized(folder, "compressed-tensors")
        entry = json.loads((files / "config.json").read_text())["quantization_config"]
        formats = [group["format"] for group in entry["config_groups"].values()]
        # compressed-tensors dequantizes four-bit floats of linears into bfloat16
        dtype = "bfloat16" if any("fp4" in name for name in formats) else "float32"
        model = AutoModelForCausalLM.from_pretrained(files, dtype=dtype)
        ours = load(self._quantized(folder, "alphaquant"), dtype=dtype)
        return {
            "served_kl": self._measured(model),
            "own_kl": self._measured(ours),
            "served_in": dtype,
        }

    def _quantized(self, folder: Path, export: str) -> Path:
        """The files of a winner."""
        out = folder.with_name(f"{folder.name}-{export}")
        if not out.exists():
            config, model = folder / "best.json", self.model
            quantize(
                QuantizeSpec.of(
                    model=model, config=config, out=out, export=export, cache=self.cache
                )
            )
        return out

    def _measured(self, model: Any) -> float:
        found = measure_divergence(model.eval(), self.heldout.tokens, self.teacher)
        scores = {score.metric: score for score in found.scores(self.heldout.digest)}
        return scores["kl"].value


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: budgets down, profiles across."""
    profiles = list(dict.fromkeys(row["profile"] for row in rows))
    lines = [f"| budget | {' | '.join(profiles)} |", "|---" * (1 + len(profiles)) + "|"]
    for budget in dict.fromkeys(row["budget"] for row in rows):
        cells = []
        for profile in profiles:
            found = [r for r in rows if (r["budget"], r["profile"]) == (budget, profile)]
            cells.append(_cell(found[0]) if found else "")
        lines.append(f"| {budget} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    served = f" (served {row['served_kl']:.6f})" if "served_kl" in row else ""
    return f"{row['kl']:.6f} +- {row['kl_stderr']:.6f}{served}"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--profiles", nargs="+", default=["any", "vllm", SERVED], choices=PROFILES)
    parser.add_argument("--budgets", nargs="+", default=["2.5", "3", "3.5", "4.25"])
    parser.add_argument("--effort", default="default")
    parser.add_argument("--no-served", action="store_true", help="searches only")
    parser.add_argument("--cache", type=Path, help="default: inside --work")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the searches and files"
    )
    args = parse_with_out(parser)
    cache = args.cache or args.work / "cache"
    args.work.mkdir(parents=True, exist_ok=True)
    rows, served = [], None
    for budget in args.budgets:
        for profile in args.profiles:
            folder = args.work / f"{profile}-{budget}"
            spec = SearchSpec.of(
                **{"model": args.model, "budget": f"{budget}bits", "profile": profile},
                **{"effort": args.effort, "out": folder, "cache": cache},
            )
            row = searched(spec)
            if profile == SERVED and not args.no_served:
                served = served or Served(args.model, cache, args.work)
                row |= served.kl(folder)
            rows.append(row)
            logger.info("%s", json.dumps(row))
            facts = {"model": Path(args.model).name, "effort": args.effort}
            facts |= run_facts(find_device("auto"))
            args.out.write_text(json.dumps({"rows": rows, **facts}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
