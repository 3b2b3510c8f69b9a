"""The picture of the README: our front beside other tools and uniform formats, as SVG.

    python benchmarks/picture.py [RESULT] [--out docs/front.svg]

RESULT is a file of `benchmarks/allocation.py`. Needs matplotlib (`pip install .[docs]`). The same
file gives the same bytes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams |= {"svg.hashsalt": "alphaquant", "svg.fonttype": "none", "font.size": 12}

import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).parent
RESULT = HERE / "results" / "allocation-demo-peers.json"
OUT = HERE.parent / "docs" / "front.svg"

SERIES = (
    ("uniform", "uniform formats, our quantizer", "#6e7781", "s", -7),
    ("AutoScheme + RTN", "AutoScheme + RTN", "#b36b1e", "v", 0),
    ("AutoScheme + AutoRound, 200 iterations", "AutoScheme + AutoRound", "#a4432b", "^", 7),
    ("aq-search", "aq-search", "#1f6feb", "o", 0),
)
"""Name of a row or group, label, colour, marker, points that the label is moved up."""


def points(rows: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(bits per weight, held-out KL) of a series, by size; of uniform formats the lower hull."""
    found = sorted(
        (r["bits_per_weight"], r["kl"]) for r in rows if name in (r["name"], r["group"])
    )
    if name != "uniform":
        return found
    best = [p for i, p in enumerate(found) if all(p[1] < q[1] for q in found[:i])]
    return [p for p in best if 2.2 <= p[0] <= 4.6]


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Draw all series and write the file."""
    figure, axes = plt.subplots(figsize=(8, 4.2))
    for name, label, colour, marker, up in SERIES:
        xs, ys = zip(*points(rows, name), strict=True)
        axes.plot(xs, ys, marker=marker, color=colour, lw=2, ms=6)
        offset = {"xytext": (8, up), "textcoords": "offset points"}
        axes.annotate(label, (xs[-1], ys[-1]), color=colour, va="center", **offset)
    axes.set_yscale("log")
    axes.set_xlim(2.1, 5.9)
    axes.set_xlabel("stored bits per weight")
    axes.set_ylabel("KL to the original, nats per token\n(lower is better)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#d0d7de", lw=0.6)
    axes.set_xticks([2.5, 3, 3.5, 4, 4.5])
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None}, facecolor="white")


def main() -> None:
    """Read a result file and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", nargs="?", type=Path, default=RESULT)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    draw(json.loads(args.result.read_text(encoding="utf-8"))["rows"], args.out)


if __name__ == "__main__":
    main()
