"""Pretrained models that packages ship: searched formats beside uniform ones of the same bytes.

Each model comes as a GGUF file (`real_models.py`), is decoded to bfloat16 by the product, and the
product's own programs do the rest, each in a process of its own whose processor time and peak
memory are in the result: `aq-search` at every budget, `aq-quantize` of its best.json, of the
uniform format of its menu that is best within the budget, and of the uniform one of the same
bytes, all with the same quantizer, and `aq-eval` of each on held-out text. With `--peer-python`
AutoRound quantizes to the same uniform formats on the same windows. With `--again` the winner is
quantized once more with other options: its formats, better rounding.

No package that we know ships WikiText-2, so its file is an option: any plain text of WikiText's
form is cut at articles into calibration, evaluation and held-out text.

    python benchmarks/real.py --text wiki.test.raw --work DIR --out result.json
    python benchmarks/real.py --text wiki.test.raw --models smollm2-135m --budgets 3 --work DIR \
        --search-options "--trials 8 --formats int2-g64-asym,int3-g64,int4-g64" --out result.json

Running it again with the same --work repeats nothing that is done. The source of these models is
quantized already, so what is said of 4 bits and more compares with a quantized original.
"""

import argparse
import hashlib
import json
import logging
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkout import commit
from real_models import MODELS, fetch
from real_stages import Stage, StageError, Stages, run_process
from scipy.special import stdtrit

from alphaquant.files import sha256_of, whole_file
from alphaquant.spaces.formats import parse_format

logger = logging.getLogger("real")

SHARES = {"calibration": 0.5, "evaluation": 0.2, "heldout": 0.3}
"""Parts of the text, in its order."""

UNIFORM = ("int2-g64-asym", "int2-g32", "int2-g16", "int3-g64", "int3-g32", "int4-g64")
"""Formats of which each budget gets the one of its size, whatever the search's menu was."""

_ARTICLE = re.compile(r"(?m)^ = [^=].* = *$")
_PEER = "AutoRound, 200 iterations"


@dataclass(frozen=True)
class Row:
    """One quantized model on held-out text.

    Attributes:
        model: name.
        name: what it is.
        budget: that it was made for.
        bits_per_weight: of the quantized matrices.
        checkpoint_bytes: of the whole checkpoint; None for a peer, whose file is another.
        kl: to the decoded original, nats per token.
        kl_interval: 95 %, from the standard error over windows and Student's distribution.
        perplexity: of the text.
        same_top: share of positions with the same first token.
        cpu_seconds: of making it: the search with its share of the bank, or the quantization.
        error: why there is no number; empty if there is.
    """

    model: str
    name: str
    budget: str
    bits_per_weight: float
    checkpoint_bytes: int | None = None
    kl: float | None = None
    kl_interval: tuple[float, float] | None = None
    perplexity: float | None = None
    same_top: float | None = None
    cpu_seconds: float | None = None
    error: str = ""


def cut_text(text: str) -> dict[str, str]:
    """A text in three parts that share no article.

    Args:
        text: with lines such as ` = Title = ` where articles begin; without any, it is cut at
            line ends.

    Returns:
        `calibration`, `evaluation` and `heldout`, in the order of the text.
    """
    starts = [m.start() for m in _ARTICLE.finditer(text)]
    if len(starts) < len(SHARES):
        starts = [m.end() for m in re.finditer(r"\n", text)]
    ends, passed = [], 0.0
    for share in list(SHARES.values())[:-1]:
        passed += share * len(text)
        ends.append(min(starts, key=lambda at: abs(at - passed)))
    bounds = [0, *ends, len(text)]
    return {role: text[bounds[i] : bounds[i + 1]] for i, role in enumerate(SHARES)}


def interval(value: float, stderr: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a mean.

    Worked example: 1.0 with a standard error of 0.1 over 16 windows is 0.787 to 1.213.
    """
    half = float(stdtrit(n - 1, 0.975)) * stderr
    return value - half, value + half


class Bench:
    """One model and its texts; every number comes out of a program of the package."""

    def __init__(self, model: str, file: Path, args: argparse.Namespace, stages: Stages) -> None:
        """Cut the text and decode the model.

        Args:
            model: its name in the result.
            file: its GGUF file or directory.
            args: the command line.
            stages: run the programs.
        """
        self.model, self.file, self.args, self.stages = model, str(file), args, stages
        self.folder = args.work / model
        self.folder.mkdir(parents=True, exist_ok=True)
        self.texts = {}
        for role, part in cut_text(args.text.read_text(encoding="utf-8")).items():
            self.texts[role] = str(self.folder / f"{role}.txt")
            Path(self.texts[role]).write_text(part, encoding="utf-8")
        self.converted = self.stages(
            "aq-quantize",
            ["--model", self.file, "--config", str(self._uniform("int4-g64")), "--dry-run"],
        )
        self.evaluation: dict[str, Any] = {}

    def budget(self, bits: str) -> list[Row]:
        """The rows of a budget: searched, uniform, and a peer's if one is asked for."""
        out = self.folder / f"search-{bits}"
        search = self.stages("aq-search", self._search_words(bits, out))
        front = json.loads((out / "front.json").read_text())
        ours = self._row(f"searched {bits} bits", bits, out / "best.json", front["best"], search)
        rival = uniform_rival(front["heldout"], float(bits))
        names = [] if rival is None else [rival["name"]]
        rows = [ours]
        for options in self.args.again:
            name = f"{ours.name}, quantized with {options}"
            rows.append(self._row(name, bits, out / "best.json", front["best"], None, options))
        for name in dict.fromkeys([*names, *same_bytes(float(bits))]):
            counts = {"bits_per_weight": float(parse_format(name).nominal_bits)}
            rows.append(self._row(f"uniform {name}", bits, self._uniform(name), counts, None))
            if self.args.peer_python is not None:
                rows.append(self._peer(name, bits, counts))
        return rows

    def _search_words(self, bits: str, out: Path) -> list[str]:
        words = ["--budget", f"{bits}bits", "--model", self.file, "--out", str(out)]
        for role, path in self.texts.items():
            words += [f"--{role}", path]
        args = self.args
        words += ["--calibration-samples", str(args.calibration_samples)]
        words += ["--evaluation-samples", str(args.evaluation_samples)]
        words += ["--heldout-samples", str(args.heldout_samples), "--seq-len", str(args.seq_len)]
        words += shlex.split(args.search_options) + shlex.split(args.quantizer_options)
        return words

    def _row(
        self,
        name: str,
        bits: str,
        config: Path,
        counts: Mapping[str, Any],
        search: Stage | None,
        options: str = "",
    ) -> Row:
        """Quantize a configuration, perhaps with more options, and measure its checkpoint."""
        args, out = self.args, self.folder / name.replace(" ", "-")
        words = ["--model", self.file, "--config", str(config), "--out", str(out)]
        words += ["--calibration", self.texts["calibration"], "--seq-len", str(args.seq_len)]
        words += ["--calibration-samples", str(args.calibration_samples)]
        words += shlex.split(args.quantizer_options) + shlex.split(options)
        made = self.stages("aq-quantize", words)
        words = ["--model", str(out), "--reference", self.file, "--json"]
        words += ["--data", self.texts["heldout"], "--samples", str(args.heldout_samples)]
        measured = self.stages("aq-eval", [*words, "--seq-len", str(args.seq_len)])
        self.evaluation = json.loads(measured.output)
        scores = {score["metric"]: score for score in self.evaluation["scores"]}
        kl = scores["kl"]
        return Row(
            self.model,
            name,
            bits,
            counts["bits_per_weight"],
            json.loads(made.output)["checkpoint_bytes"],
            kl["value"],
            interval(kl["value"], kl["stderr"], args.heldout_samples),
            scores["perplexity"]["value"],
            scores["same_top"]["value"] if "same_top" in scores else None,
            made.cpu_seconds if search is None else search.cpu_seconds,
        )

    def _uniform(self, format_name: str) -> Path:
        """A configuration with one format for everything."""
        path, fmt = self.folder / f"{format_name}.json", parse_format(format_name)
        scheme: dict[str, Any] = {"wq": fmt.kind}
        if fmt.family == "int":
            scheme |= {"group_size": fmt.group_size, "symmetric": fmt.symmetric}
        path.write_text(json.dumps({"default": scheme}))
        return path

    def _peer(self, format_name: str, bits: str, counts: Mapping[str, Any]) -> Row:
        """AutoRound in a uniform format on the same windows; a failure is a row with its error."""
        args, script = self.args, str(Path(__file__).with_name("real_peer.py"))
        words = [self.file, self.texts["calibration"], self.texts["heldout"], format_name]
        words += [str(args.calibration_samples), str(args.heldout_samples), str(args.seq_len)]
        words += [args.peer_python, str(args.work / "peers"), _PEER]
        name = f"{_PEER}, {format_name}"
        try:
            done = run_process(
                "peer", [sys.executable, script, *words], ["real_peer.py", *words], self.folder
            )
        except StageError as error:
            return Row(self.model, name, bits, counts["bits_per_weight"], error=str(error))
        found = json.loads(done.output.splitlines()[-1])
        if found["error"]:
            return Row(self.model, name, bits, counts["bits_per_weight"], error=found["error"])
        return Row(
            self.model,
            name,
            bits,
            found["bits_per_weight"],
            None,
            found["kl"],
            interval(found["kl"], found["kl_stderr"], args.heldout_samples),
            found["perplexity"],
            found["same_top"],
            found["cpu_seconds"],
        )


def uniform_rival(rows: Sequence[Mapping[str, Any]], budget_bits: float) -> Any:
    """The uniform format of at most a budget with the least divergence; None if none fits.

    Args:
        rows: `heldout` of a search's front.json.
        budget_bits: per weight.
    """
    fitting = [  # a uniform format can be a trial too
        row
        for row in rows
        if not row["name"].startswith("trial-") and row["bits_per_weight"] <= budget_bits
    ]
    return min(fitting, key=lambda row: row["kl"], default=None)


def same_bytes(budget_bits: float) -> list[str]:
    """The one of `UNIFORM` with the most bits of at most a budget; none below the least.

    Worked example: 2.5 gives int2-g32, 3 int2-g16, 3.5 int3-g32, 4.25 int4-g64.
    """
    bits = {name: float(parse_format(name).nominal_bits) for name in UNIFORM}
    fitting = [name for name in UNIFORM if bits[name] <= budget_bits]
    return [max(fitting, key=lambda name: bits[name])] if fitting else []


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    head = (
        "| model | | bits/weight | checkpoint bytes | KL, 95 % | perplexity | same top | CPU s |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for r in rows:
        if r.kl is None or r.kl_interval is None:
            lines.append(f"| {r.model} | {r.name} | {r.bits_per_weight:.3f} | {r.error} | | | | |")
            continue
        low, high = r.kl_interval
        same = "" if r.same_top is None else f"{100 * r.same_top:.1f} %"
        lines.append(
            f"| {r.model} | {r.name} | {r.bits_per_weight:.3f} | {r.checkpoint_bytes or ''} "
            f"| {r.kl:.4f} ({low:.4f} to {high:.4f}) | {r.perplexity:.2f} | {same} "
            f"| {r.cpu_seconds:.0f} |"
        )
    return "\n".join(lines)


def result_json(
    benches: Sequence[Bench], rows: Sequence[Row], args: argparse.Namespace
) -> dict[str, Any]:
    """Everything with its provenance."""
    models = {}
    for bench in benches:
        reference = bench.evaluation.get("reference_scores", [])
        models[bench.model] = {
            "file": Path(bench.file).name,
            "sha256": sha256_of(Path(bench.file)) if Path(bench.file).is_file() else None,
            "gguf": bench.evaluation.get("gguf", {}).get("reference"),
            "original": {s["metric"]: s["value"] for s in reference},
            "heldout": bench.evaluation.get("data"),
            "versions": bench.evaluation.get("versions"),
            "stages": [stage.as_json() for stage in bench.stages.done],
        }
    text = args.text.read_bytes()
    return {
        "rows": [asdict(row) for row in rows],
        "models": models,
        "text": {"name": args.text.name, "sha256": hashlib.sha256(text).hexdigest(), **SHARES},
        "settings": {k: v if v is None else str(v) for k, v in vars(args).items()},
        "command": shlex.join(["python", "benchmarks/real.py", *sys.argv[1:]]),
        "machine": platform.machine(),
        "commit": commit(),
    }


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="such as WikiText-2's test part")
    parser.add_argument("--work", type=Path, required=True, help="kept: caches and checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="the result file")
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), help="names, GGUF files or directories"
    )
    parser.add_argument("--budgets", nargs="+", default=["2.5", "3", "3.5", "4.25"])
    parser.add_argument("--calibration-samples", type=int, default=128)
    parser.add_argument("--evaluation-samples", type=int, default=32)
    parser.add_argument("--heldout-samples", type=int, default=48)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--search-options", default="", help="more options of aq-search")
    parser.add_argument("--quantizer-options", default="", help="of aq-search and aq-quantize")
    parser.add_argument(
        "--again",
        action="append",
        default=[],
        help="options of aq-quantize with which the winner is quantized once more, such as "
        '--again="--sequential"; may be given several times',
    )
    parser.add_argument("--peer-python", help="an interpreter that has auto-round")
    return parser.parse_args(words)


def run(args: argparse.Namespace, stages: Any = Stages) -> list[Row]:
    """All models and budgets; the result file is written anew after every budget.

    Args:
        args: from `parse`.
        stages: made of a folder, runs programs.
    """
    rows: list[Row] = []
    benches: list[Bench] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        file = fetch(MODELS[name], args.work / "models") if name in MODELS else Path(name)
        model = name if name in MODELS else file.stem
        benches.append(Bench(model, file, args, stages(args.work / "stages" / model)))
        for bits in args.budgets:
            rows += benches[-1].budget(bits)
            logger.info("%s", table(rows[-2:]))
            text = json.dumps(result_json(benches, rows, args), indent=1)
            for path, shown in ((args.work, "WORK"), (args.text, "TEXT"), (args.out, "OUT")):
                text = text.replace(str(path), shown)  # places on this machine are no facts
            with whole_file(args.out) as part:
                part.write_text(text + "\n")
    return rows


def main() -> None:
    """Run and print."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse()
    os.environ.setdefault("ALPHAQUANT_CACHE", str(args.work / "cache"))
    print(table(run(args)))


if __name__ == "__main__":
    main()
