"""What differs between two configurations of one model: bits, formats by role, layer and expert.

Either side is whatever `alphaquant.commands.statements` reads. Scores stand side by side only
where both were measured on the same windows of the same model's weights.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from alphaquant.commands.inspect import Inspection
from alphaquant.commands.inspect_text import (
    label_order,
    part_json,
    scores_of,
    source_text,
    warnings_text,
)
from alphaquant.commands.statements import Skeleton, Statement, read_skeleton, read_statement
from alphaquant.errors import ConfigError, ModelError
from alphaquant.reports.tables import aligned, fitted, is_wider, wrapped
from alphaquant.spaces.units import Matrix

MAX_CHANGES = 24
"""Changes of format that the text lists; `--all` and JSON have every matrix."""

MAP_WIDTH = 64
"""Experts per line of the map."""

MORE, FEWER, OTHER, EQUAL = "+", "-", "~", "."
"""What the map shows of an expert: bits in B against those in A."""


@dataclass(frozen=True)
class _Count:
    """A line of the counts: a field of `BitCount`, its name, a shorter one, decimals."""

    key: str
    name: str
    short: str
    digits: int


_COUNTS = (
    _Count("routed_bits_per_weight", "routed experts, bits per weight", "bits, routed", 4),
    _Count("bits_per_weight", "all quantizable, bits per weight", "bits, quantizable", 4),
    _Count("checkpoint_bits_per_weight", "whole checkpoint, bits per weight", "bits, whole", 4),
    _Count("quantized_bytes", "quantizable bytes", "bytes, quantizable", 0),
    _Count("checkpoint_bytes", "checkpoint bytes", "bytes, whole", 0),
)


@dataclass(frozen=True)
class Comparison:
    """Two configurations on one model.

    Attributes:
        a: the first.
        b: the second.
    """

    a: Inspection
    b: Inspection

    @cached_property
    def changed(self) -> tuple[Matrix, ...]:
        """Matrices whose weights or inputs are in other formats, in model order."""
        matrices = self.a.model.inventory.matrices
        return tuple(m for m in matrices if self.a.label(m) != self.b.label(m))

    @property
    def is_equal(self) -> bool:
        """Whether every matrix is stored alike."""
        return not self.changed

    def change(self, matrix: Matrix) -> tuple[str, str]:
        """Its format in A and in B."""
        return self.a.label(matrix), self.b.label(matrix)

    def n_changed(self, name_of: Callable[[Matrix], str]) -> Counter[str]:
        """Changed matrices by a name that is made of each."""
        return Counter(name_of(matrix) for matrix in self.changed)

    @cached_property
    def experts(self) -> Mapping[int, str]:
        """A character for every routed expert of every layer with some: see `MORE` and others."""
        bits: dict[int, dict[int, list[int]]] = {}
        changed = {m.name for m in self.changed}
        for m in self.a.model.inventory.matrices:
            if m.expert is None:
                continue
            found = bits.setdefault(m.layer, {}).setdefault(m.expert, [0, 0])
            found[0] += self.b.n_bits(m) - self.a.n_bits(m)
            found[1] += m.name in changed
        return {
            layer: "".join(_mark(*experts[e]) for e in sorted(experts))
            for layer, experts in bits.items()
        }

    @property
    def why_not_comparable(self) -> str | None:
        """Why the scores of the two say nothing about each other; None where they do."""
        sides = (self.a.statement.summary, self.b.statement.summary)
        if not all(scores_of(side) for side in sides):
            return "not both configurations carry scores"
        texts = [_digest(side.get("evaluation")) for side in sides]
        if None in texts or texts[0] != texts[1]:
            return "they were not measured on the same text"
        models = [side.get("model_digest") for side in sides]
        if None in models or models[0] != models[1]:
            return "they were not measured on the same weights"
        return None


def compare(first: Path, second: Path, model: str | None = None) -> Comparison:
    """Apply two configurations to one model, without its weights.

    Args:
        first: a configuration, a packed checkpoint or a search's directory.
        second: another.
        model: `demo`, a directory or a hub id; None for what the two name.

    Raises:
        AlphaQuantError: something cannot be read, or the two are of different models.
    """
    statements = (read_statement(first), read_statement(second))
    named = [s.model for s in statements if s.model is not None]
    if model is None and not named:
        raise ModelError(
            f"neither {statements[0].path} nor {statements[1].path} says which model it is for; "
            "give --model: demo, a directory with config.json, or a hub id"
        )
    names = [model or statement.model or named[0] for statement in statements]
    skeletons = {name: read_skeleton(name, statements) for name in dict.fromkeys(names)}
    a, b = (
        _inspection(statement, skeletons[name])
        for statement, name in zip(statements, names, strict=True)
    )
    if a.model.inventory.matrices != b.model.inventory.matrices:
        raise ConfigError(
            f"{a.statement.path} is for {a.model.name} and {b.statement.path} for {b.model.name}, "
            "whose matrices differ; compare configurations of one model"
        )
    return Comparison(a, b)


def comparison_text(found: Comparison, *, show_all: bool = False, width: int | None = None) -> str:
    """Everything for people; one line where nothing differs.

    Args:
        found: the two.
        show_all: list every matrix that differs.
        width: characters of the screen; columns that do not fit are left out. None for all.
    """
    if found.is_equal:
        counts = found.a.counts
        return (
            f"equal: {len(found.a.plan.schemes)} matrices in the same formats, "
            f"{counts.bits_per_weight:.4f} bits per weight, {counts.checkpoint_bytes} bytes"
        )
    parts = [
        f"A {found.a.statement.path}\nB {found.b.statement.path}",
        _counts_table(found, width),
        _scores_text(found, width),
        _parts_table(found, "role", width),
        _changes_table(found, width),
        _parts_table(found, "layer", width),
        _experts_text(found, width),
        _matrices_table(found, width) if show_all else "",
        *(warnings_text(side.warnings, width) for side in (found.a, found.b)),
    ]
    return "\n\n".join(part for part in parts if part)


def comparison_json(found: Comparison) -> dict[str, Any]:
    """Everything for programs; `experts` and `matrices` are there whatever the size."""
    why = found.why_not_comparable
    return {
        "is_equal": found.is_equal,
        "model": found.a.model.name,
        **{
            side: {
                "path": str(inspection.statement.path),
                "assignment_digest": inspection.plan.assignment.digest,
                "bits": asdict(inspection.counts),
                "roles": [part_json(part) for part in inspection.roles],
                "layers": [part_json(part) for part in inspection.layers],
                "scores": list(scores_of(inspection.statement.summary).values()),
                "warnings": list(inspection.warnings),
            }
            for side, inspection in (("a", found.a), ("b", found.b))
        },
        "scores_are_comparable": why is None,
        "why_not_comparable": why,
        "experts": {str(layer): marks for layer, marks in found.experts.items()},
        "matrices": {m.name: dict(zip("ab", found.change(m), strict=True)) for m in found.changed},
    }


def _inspection(statement: Statement, model: Skeleton) -> Inspection:
    return Inspection(statement, model, statement.plan_on(model))


def _digest(provenance: object) -> object:
    return provenance.get("digest") if isinstance(provenance, Mapping) else None


def _mark(more_bits: int, n_changed: int) -> str:
    if more_bits:
        return MORE if more_bits > 0 else FEWER
    return OTHER if n_changed else EQUAL


def _counts_table(found: Comparison, width: int | None) -> str:
    a, b = asdict(found.a.counts), asdict(found.b.counts)
    counts = [row for row in _COUNTS if a[row.key] is not None]
    cells = [_side_by_side(a[row.key], b[row.key], row.digits) for row in counts]
    head, names = ("", "A", "B", "B - A"), [row.name for row in counts]
    table = aligned(head, [[n, *c] for n, c in zip(names, cells, strict=True)], left=("",))
    if not is_wider(table, width):
        return table
    short = [[row.short, *c] for row, c in zip(counts, cells, strict=True)]
    return fitted(head, short, width, ("B - A",), left=("",))


def _side_by_side(a: float, b: float, digits: int) -> list[str]:
    return [f"{a:.{digits}f}", f"{b:.{digits}f}", f"{b - a:+.{digits}f}"]


def _scores_text(found: Comparison, width: int | None) -> str:
    why = found.why_not_comparable
    if why is not None:
        return wrapped(f"scores are not comparable: {why}", width)
    a, b = (scores_of(side.statement.summary) for side in (found.a, found.b))
    rows = [
        [
            name,
            *(f"{score['value']:.6f}{_error_text(score)}" for score in (a[name], b[name])),
            f"{b[name]['value'] - a[name]['value']:+.6f}",
        ]
        for name in a
        if name in b
    ]
    head = f"on {source_text(found.a.statement.summary['evaluation'])}"
    columns = ("score", "A", "B", "B - A")
    return f"{head}\n{fitted(columns, rows, width, ('B - A',), left=('score',))}"


def _error_text(score: Mapping[str, Any]) -> str:
    stderr = score.get("stderr")
    return "" if stderr is None else f" +- {stderr:.6f}"


def _parts_table(found: Comparison, title: str, width: int | None) -> str:
    """Bits of the roles or layers where something changed."""
    is_role = title == "role"
    n_changed = found.n_changed(lambda m: m.role if is_role else str(m.layer))
    pairs = zip(
        *((side.roles if is_role else side.layers) for side in (found.a, found.b)), strict=True
    )
    rows = [
        [
            *(a.name, f"{n_changed[a.name]} of {a.n_matrices}"),
            *_side_by_side(a.bits_per_weight, b.bits_per_weight, 4),
            f"{b.n_bytes - a.n_bytes:+d}",
        ]
        for a, b in pairs
        if n_changed[a.name]
    ]
    head = (title, "changed", "A bits", "B bits", "B - A", "bytes")
    return fitted(head, rows, width, ("bytes", "B - A", "changed"), left=("role",))


def _changes_table(found: Comparison, width: int | None) -> str:
    """How many matrices of each role went from which format to which, the most first."""
    counts = Counter((m.role, *found.change(m)) for m in found.changed)
    order = sorted(counts, key=lambda c: (-counts[c], c[0], label_order(c[1]), label_order(c[2])))
    rows = [[*change, str(counts[change])] for change in order[:MAX_CHANGES]]
    left = ("role", "A", "B")
    table = aligned((*left, "matrices"), rows, left=left)
    if is_wider(table, width):
        table = aligned((*left, "n"), rows, left=left)
    if is_wider(table, width):
        table = "\n".join(f"{n} x {role}\n    {a} -> {b}" for role, a, b, n in rows)
    rest = len(order) - len(rows)
    return table + (f"\nand {rest} more kinds of change; --all lists matrices" if rest else "")


def _experts_text(found: Comparison, width: int | None) -> str:
    """A map of the routed experts: a line per layer where something changed."""
    lines, size = [], MAP_WIDTH if width is None else max(8, min(MAP_WIDTH, width - 7))
    for layer, marks in found.experts.items():
        if set(marks) != {EQUAL}:
            pieces = [marks[i : i + size] for i in range(0, len(marks), size)]
            lines += [f"{'' if i else layer:>5}  {piece}" for i, piece in enumerate(pieces)]
    if not lines:
        return ""
    legend = f"{MORE} more bits in B, {FEWER} fewer, {OTHER} as many, {EQUAL} same formats"
    return "\n".join([wrapped(f"layer  experts ({legend})", width), *lines])


def _matrices_table(found: Comparison, width: int | None) -> str:
    """Every changed matrix; where that is too wide, the formats below the name."""
    rows = [[m.name, *found.change(m)] for m in found.changed]
    table = aligned(("matrix", "A", "B"), rows, left=("matrix", "A", "B"))
    if not is_wider(table, width):
        return table
    return "\n".join(f"{name}\n    {a} -> {b}" for name, a, b in rows)
