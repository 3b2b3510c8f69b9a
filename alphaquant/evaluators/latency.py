"""Predicted time of a decoding step from measured times of single matrices.

A table holds what was measured: microseconds of one matrix product per device, kernel, format,
shape [rows, cols] and number of tokens. The prediction for a step in which each of B sequences
gets one token is the sum over the quantizable matrices,

    always on:      t(format, shape, B)
    routed expert:  P * t(format, shape, n),  P = 1 - (1 - p)^B,  n = p B / P

with p the share of tokens that reach the expert: P is the chance that any of B independent tokens
does, n how many do if any does. t is interpolated linearly in tokens between two measured numbers
of tokens, and nothing else is guessed: a format, shape or number of tokens outside of what was
measured is refused. Of several kernels that were measured the fastest is taken.

Not predicted: attention itself, embeddings, norms, routers, an lm_head that is not searched,
launches that an engine fuses, and kernels that run all experts at once; so it orders assignments,
it is not the time that an engine shows. A table is a measurement: none comes with the project.

Worked example, B = 4: a dense matrix measured at 2 tokens with 10 us and at 6 tokens with 14 us
takes 12 us. An expert with p = 1/2 has P = 15/16 and n = 32/15; measured at 1 token with 3 us and
at 4 tokens with 6 us it takes 3 + 17/15 = 4.1333 us, times P 3.875 us. Together 15.875 us.
"""

import csv
import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import fsum
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from alphaquant.errors import AlphaQuantError, ConfigError, DataError, FormatError
from alphaquant.evaluators.base import Evaluated, Metric, Score, Subject
from alphaquant.evaluators.footprint import Placed, active_shares, place
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.json_errors import validation_text
from alphaquant.spaces.json_files import JsonError, parse_json


def _check_canonical(value: str) -> str:
    try:
        name = parse_format(value).name
    except FormatError as error:
        raise ValueError(str(error)) from error
    if name != value:
        raise ValueError(f"{value!r} is not the canonical name; write {name}")
    return value


Count = Annotated[int, Field(ge=1)]
Word = Annotated[str, Field(min_length=1)]


class LatencyRow(BaseModel):
    """One measurement.

    Attributes:
        device: name of the device.
        kernel: name of what was run.
        format: canonical name of the weights' format.
        rows: output features.
        cols: input features.
        tokens: inputs of the product.
        microseconds: of one product.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    device: Word
    kernel: Word
    format: Annotated[str, AfterValidator(_check_canonical)]
    rows: Count
    cols: Count
    tokens: Count
    microseconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]


_COLUMNS = tuple(LatencyRow.model_fields)


class Product(NamedTuple):
    """What a time was measured of: weights [rows, cols] in a format."""

    format: str
    rows: int
    cols: int


@dataclass(frozen=True)
class LatencyTable:
    """Measured times.

    Attributes:
        rows: the measurements; no two of the same thing.
        digest: sha256 of the file that they were read from.
    """

    rows: tuple[LatencyRow, ...]
    digest: str

    @cached_property
    def devices(self) -> tuple[str, ...]:
        """Names of the measured devices, sorted."""
        return tuple(sorted({row.device for row in self.rows}))

    def curves(self, device: str) -> dict[Product, dict[str, dict[int, float]]]:
        """Tokens -> microseconds of every product on a device, by kernel."""
        found: dict[Product, dict[str, dict[int, float]]] = {}
        for row in self.rows:
            if row.device == device:
                kernels = found.setdefault(Product(row.format, row.rows, row.cols), {})
                kernels.setdefault(row.kernel, {})[row.tokens] = row.microseconds
        return found


class _Timed(NamedTuple):
    """The fastest kernel of a product at a number of tokens."""

    microseconds: float
    kernel: str


class _Part(NamedTuple):
    """Matrices that are run alike: `weight` is their expected number per step."""

    product: Product
    tokens: float
    weight: float


@dataclass(frozen=True)
class LatencyEvaluator:
    """Predicted milliseconds per decoded token of a subject.

    The score names B sequences of one token, and the table's digest.

    Attributes:
        table: what was measured.
        n_tokens: B, sequences that decode together.
        device: of the table; None where it has one.
        active_share: as in `FootprintEvaluator`.
    """

    table: LatencyTable
    n_tokens: int = 1
    device: str | None = None
    active_share: Mapping[str, float] | None = None

    name: ClassVar[str] = "latency"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("decode_latency", "ms/token", "minimize"),)

    def __post_init__(self) -> None:
        """Refuse a device that was not measured.

        Raises:
            ConfigError: naming what was asked and what the table has.
        """
        if self.n_tokens < 1:
            raise ConfigError(f"n_tokens is {self.n_tokens}; use 1 or more")
        known = self.table.devices
        if self.device not in known and not (self.device is None and len(known) == 1):
            raise ConfigError(
                f"device {self.device!r} of a latency table that has {', '.join(known)}; name "
                "one of them"
            )

    def evaluate(self, subject: Subject) -> Evaluated:
        """Predict.

        Raises:
            ConfigError: no inventory or assignment, shares that are none, or something that was
                not measured, all of it listed.
            ModelError: see `FootprintEvaluator`.
        """
        started = time.perf_counter()
        placed = place(subject, self.name)
        shares = active_shares(placed.inventory, subject.model, self.active_share)
        device = self.device or self.table.devices[0]
        parts = _parts(placed, shares, self.n_tokens)
        timed = _times(self.table, device, parts)
        total = fsum(part.weight * timed[part].microseconds for part in parts) / 1000
        rows = [
            {
                **part.product._asdict(),
                "tokens": part.tokens,
                "expected_matrices": part.weight,
                **timed[part]._asdict(),
            }
            for part in parts
        ]
        seconds = time.perf_counter() - started
        (metric,) = self.metrics
        digest = self.table.digest
        n = self.n_tokens
        score = Score(
            metric.name, total, metric.unit, metric.direction, None, n, n, seconds, digest
        )
        facts = {"device": device, "n_tokens": self.n_tokens, "table_digest": digest}
        return Evaluated((score,), {**facts, "parts": rows})


def read_latency_table(path: Path) -> LatencyTable:
    """Read measurements from JSON lines, or from CSV where the name ends in `.csv`.

    Args:
        path: rows with the fields of `LatencyRow`, of which CSV names all in its first line.

    Raises:
        DataError: the file cannot be read, is empty, has a row that is none, or two of the same
            thing.
    """
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); give a latency table") from error
    parse = _csv_rows if path.suffix == ".csv" else _json_rows
    rows = tuple(parse(path, lines))
    if not rows:
        raise DataError(f"{path} holds no measurement; give rows with {', '.join(_COLUMNS)}")
    seen: dict[tuple[Any, ...], int] = {}
    for number, row in enumerate(rows, 1):
        key = tuple(row.model_dump(exclude={"microseconds"}).values())
        if key in seen:
            raise DataError(
                f"{path}: rows {seen[key]} and {number} measure the same thing; keep one of them"
            )
        seen[key] = number
    return LatencyTable(rows, hashlib.sha256(content).hexdigest())


def _json_rows(path: Path, lines: Iterable[str]) -> Iterable[LatencyRow]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield LatencyRow.model_validate(parse_json(line))
            except ValidationError as error:
                raise _bad_row(path, number, validation_text(error, {"": _COLUMNS})) from error
            except JsonError as error:
                raise _bad_row(path, number, str(error)) from error


def _csv_rows(path: Path, lines: Iterable[str]) -> Iterable[LatencyRow]:
    reader = csv.reader(lines, strict=True)
    try:
        head = next(reader, [])
        for fields in reader:
            if len(fields) != len(head):
                why = f"{len(fields)} fields, but {len(head)} columns"
                raise _bad_row(path, reader.line_num, why)
            row = dict(zip(head, fields, strict=True))
            yield LatencyRow.model_validate_strings(row)
    except ValidationError as error:
        text = validation_text(error, {"": _COLUMNS})
        raise _bad_row(path, reader.line_num, text) from error
    except csv.Error as error:
        raise _bad_row(path, reader.line_num, str(error)) from error


def _bad_row(path: Path, number: int, why: str) -> AlphaQuantError:
    return DataError(f"{path}, line {number}: {why}; rows have {', '.join(_COLUMNS)}")


def _parts(placed: Placed, shares: Mapping[str, float], n_tokens: int) -> list[_Part]:
    """What a step runs, equal products at equal numbers of tokens together."""
    weights: dict[tuple[Product, float], list[float]] = {}
    for m in placed.inventory.matrices:
        product = Product(placed.assignment.format_of(m.name).name, m.rows, m.cols)
        share = shares[m.name] if m.kind == "expert" else float(not m.is_looked_up)
        chance = 1 - (1 - share) ** n_tokens
        if chance > 0:  # an expert that no token reaches is not run
            # Within [1, B] but for rounding: 1 - (1 - 0.3) is more than 0.3.
            tokens = min(max(share * n_tokens / chance, 1.0), float(n_tokens))
            weights.setdefault((product, tokens), []).append(chance)
    return [_Part(product, tokens, fsum(found)) for (product, tokens), found in weights.items()]


def _times(table: LatencyTable, device: str, parts: Iterable[_Part]) -> dict[_Part, _Timed]:
    """The time of each part.

    Raises:
        ConfigError: listing what was not measured.
    """
    curves = table.curves(device)
    found: dict[_Part, _Timed] = {}
    missing: list[str] = []
    for part in parts:
        kernels = curves.get(part.product, {})
        timed = [
            _Timed(_interpolate(curve, part.tokens), kernel)
            for kernel, curve in sorted(kernels.items())
            if min(curve) <= part.tokens <= max(curve)
        ]
        if timed:
            found[part] = min(timed)
        else:
            missing.append(_missing_text(part, kernels))
    if missing:
        raise ConfigError(
            f"latency on {device}: not measured are {', '.join(dict.fromkeys(missing))}; measure "
            "them too, nothing is guessed"
        )
    return found


def _interpolate(curve: Mapping[int, float], tokens: float) -> float:
    """Microseconds at a number of tokens within the measured ones."""
    points = sorted(curve.items())
    return float(np.interp(tokens, [x for x, _ in points], [y for _, y in points]))


def _missing_text(part: _Part, kernels: Mapping[str, Mapping[int, float]]) -> str:
    name = f"{part.product.format} [{part.product.rows}, {part.product.cols}]"
    if not kernels:
        return name
    ranges = ", ".join(f"{k} {min(c)} to {max(c)}" for k, c in sorted(kernels.items()))
    return f"{name} at {part.tokens:.3g} tokens (measured: {ranges})"
