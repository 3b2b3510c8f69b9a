"""Budgets: how large the result may be, and whether the formats at hand can reach it.

Three kinds. `4.25bits` (also `4.25bpw`, `4.25`) limits the mean stored bits of the quantizable
weights; `4.25bpw-file` those of all weights of the checkpoint; `13GiB`, `13GB` limits its bytes.
All become one number, the bits that the quantizable matrices may take on disk. Bits themselves are
counted in `alphaquant.spaces.formats`.

Worked example: 1 000 000 quantizable weights and 250 000 kept ones of 500 000 bytes. `4.25bits`
allows 4 250 000 bits. `1MB` allows 8 * (1 000 000 - 500 000) = 4 000 000 bits, 4.0 per weight.
`6.4bpw-file` allows 6.4 * 1 250 000 - 8 * 500 000 = 4 000 000 bits as well.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor

from alphaquant.errors import BudgetError
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.units import Inventory, Unit

BITS_UNITS: tuple[str, ...] = ("", "bit", "bits", "bpw")
"""Endings of a budget in bits per weight, lower case."""

FILE_UNIT = "bpw-file"
"""Ending of a budget in bits per weight of the whole checkpoint."""

BYTES_UNITS: dict[str, int] = {
    "bytes": 1,
    **{f"{p}b": 1000**i for i, p in enumerate("kmgt", start=1)},
    **{f"{p}ib": 1024**i for i, p in enumerate("kmgt", start=1)},
}
"""Endings of a budget in bytes, lower case, and how many bytes one is."""

_LARGEST_FIRST = tuple(
    (f"{prefix}{ending}", base**power)
    for power, prefix in ((4, "T"), (3, "G"), (2, "M"), (1, "K"))
    for base, ending in ((1024, "iB"), (1000, "B"))
)

_TEXT = re.compile(
    r"\s*([0-9]{1,15}(?:\.[0-9]{0,15})?|\.[0-9]{1,15})\s*([a-z]*(?:-file)?)\s*", re.IGNORECASE
)


@dataclass(frozen=True)
class Budget:
    """How large the result may be.

    Attributes:
        text: what the user wrote.
        kind: `bits` (per quantizable weight), `file_bits` (per weight of the whole checkpoint) or
            `bytes` (of the whole checkpoint).
        value: bits per weight, or bytes.
    """

    text: str
    kind: str
    value: float

    @property
    def canonical(self) -> str:
        """One text for equal budgets: `4.25bits`, or whole numbers of the largest unit, `13GiB`.

        `1.5GiB` is `1536MiB`, `13GB` stays.
        """
        unit = {"bits": "bits", "file_bits": FILE_UNIT}.get(self.kind)
        if unit is not None:
            return f"{self.value!r}{unit}".replace(f".0{unit}", unit)
        for unit, size in _LARGEST_FIRST:
            if self.value % size == 0:
                return f"{self.value / size:.0f}{unit}"
        return f"{self.value!r}bytes".replace(".0bytes", "bytes")

    @property
    def is_of_file(self) -> bool:
        """Whether it limits the whole checkpoint."""
        return self.kind != "bits"

    def limit_bits(self, inventory: Inventory) -> int:
        """Bits that the quantizable matrices may take on disk.

        Raises:
            BudgetError: the tensors that stay unquantized alone take more than the budget.
        """
        # Fraction of the text, not of the double: 4.35 * 100 weights are 435 bits, not 434.
        exact = Fraction(repr(self.value))
        if self.kind == "bits":
            return floor(exact * inventory.n_weights)
        n_bits = 8 * floor(exact)
        if self.kind == "file_bits":
            n_bits = floor(exact * inventory.n_file_weights)
        if n_bits < 8 * inventory.kept_bytes:
            raise BudgetError(
                f"budget {self.text} is below what stays unquantized: "
                f"{len(inventory.kept)} tensors ({_kept_text(inventory)}) take "
                f"{_bytes_text(inventory.kept_bytes)}; give a larger budget"
                f"{_include_text(inventory)}"
            )
        return n_bits - 8 * inventory.kept_bytes


def parse_budget(text: str) -> Budget:
    """Read a budget such as `4.25bits`, `4.25bpw`, `4.25`, `4.25bpw-file`, `13GiB` or `13GB`.

    In any case of letters.

    Bytes alone are `5361664bytes` or, with a capital, `5361664B`.

    Raises:
        BudgetError: not a positive number with one of the known endings.
    """
    match = _TEXT.fullmatch(text)
    number, unit = (Fraction(match[1]), match[2].lower()) if match else (Fraction(0), "")
    if match and match[2] == "B":  # a small b would be read as bits by some
        unit = "bytes"
    if number == 0 or unit not in {*BITS_UNITS, FILE_UNIT, *BYTES_UNITS}:
        raise BudgetError(
            f"cannot read the budget {text!r}; write bits per weight (4.25bits, 4.25bpw, 4.25), "
            "bits per weight of the whole checkpoint (4.25bpw-file) or its size (13GiB, 13GB, "
            "also K, M, T, or 5361664bytes), above zero"
        )
    if unit == FILE_UNIT:
        return Budget(text.strip(), "file_bits", float(number))
    if unit in BITS_UNITS:
        return Budget(text.strip(), "bits", float(number))
    return Budget(text.strip(), "bytes", float(number * BYTES_UNITS[unit]))


def achievable_range(units: Sequence[Unit], formats: Sequence[str]) -> tuple[int, int]:
    """Fewest and most bits that units can take, each in one of the formats.

    Args:
        units: the units of the active profile.
        formats: names of the candidate formats, at least one.

    Returns:
        (low_bits, high_bits) of all units together.
    """
    candidates = [parse_format(name) for name in formats]
    sizes = [[unit.storage_bits(fmt) for fmt in candidates] for unit in units]
    return sum(map(min, sizes)), sum(map(max, sizes))


def check_reachable(
    budget: Budget, inventory: Inventory, low_bits: int, high_bits: int | None = None
) -> None:
    """Refuse a budget that is below the smallest assignment; one above the largest is fine.

    Args:
        budget: the budget.
        inventory: the model's matrices and kept tensors.
        low_bits: fewest bits that the quantizable matrices can take, see `achievable_range`.
        high_bits: most bits, for the message only.

    Raises:
        BudgetError: the budget is too small; the message tells the range that can be reached.
    """
    if low_bits <= budget.limit_bits(inventory):
        return
    reach = f"from {_reach_text(inventory, low_bits)}"
    if high_bits is not None:
        reach += f" to {_reach_text(inventory, high_bits)}"
    raise BudgetError(
        f"budget {budget.text} cannot be reached; the formats at hand reach {reach}; "
        "give a larger budget, or smaller formats with --formats"
        f"{_include_text(inventory) if budget.is_of_file else ''}"
    )


def parse_byte_budget(text: str, what: str) -> int:
    """Read a number of bytes such as `600MiB` or `2GB`, rounded down.

    Args:
        text: what the user wrote.
        what: what is limited, for messages.

    Raises:
        BudgetError: not a positive number of bytes.
    """
    try:
        budget = parse_budget(text)
    except BudgetError:
        budget = None
    if budget is None or budget.kind != "bytes" or budget.value < 1:
        raise BudgetError(
            f"cannot read the {what} {text!r}; write bytes, such as 600MiB, 2GB or 5361664bytes"
        )
    return int(budget.value)


def idle_text(budget: Budget, inventory: Inventory, high_bits: int) -> str | None:
    """The sentence for a budget that is above the largest assignment; None for one that binds.

    Args:
        budget: the budget.
        inventory: the model's matrices and kept tensors.
        high_bits: most bits that the quantizable matrices can take, see `achievable_range`.
    """
    if budget.limit_bits(inventory) <= high_bits:
        return None
    return (
        f"budget {budget.text} binds nothing: the largest formats at hand take "
        f"{_reach_text(inventory, high_bits)}; give a smaller budget"
    )


def counting_rule() -> str:
    """The sentence that reports print beside every number of bits."""
    return (
        "Bits per weight are all bits stored for the quantizable matrices (the linear layers "
        "inside the decoder blocks, with --include lm_head and embeddings too: codes as packed, "
        "scales, zero points, padding) divided by their weights; norms and routers are left out, "
        "and a budget in bytes or bpw-file counts every tensor of the checkpoint."
    )


def _include_text(inventory: Inventory) -> str:
    """What else can be done where lm_head and embeddings stay as they are."""
    return "" if inventory.include else ", or search lm_head and embeddings too (--include)"


def _kept_text(inventory: Inventory) -> str:
    """What stays, for messages."""
    ends = {"embeddings": "embeddings", "head": "lm_head"}
    left = [what for name, what in ends.items() if name not in inventory.include]
    return ", ".join([*left, "norms", "routers"])


def _reach_text(inventory: Inventory, n_bits: int) -> str:
    """`4.251 bits per weight (5361664 bytes = 5.12 MiB of checkpoint)`, both rounded up."""
    bits_per_weight = ceil(1000 * Fraction(n_bits, inventory.n_weights)) / 1000
    n_bytes = -(-n_bits // 8) + inventory.kept_bytes
    return f"{bits_per_weight:g} bits per weight ({_bytes_text(n_bytes)} of checkpoint)"


def _bytes_text(n_bytes: int) -> str:
    """`5361664 bytes = 5.12 MiB`, rounded up so that the number can be given back as a budget."""
    for unit in ("TiB", "GiB", "MiB"):
        if n_bytes >= BYTES_UNITS[unit.lower()]:
            hundredths = ceil(Fraction(100 * n_bytes, BYTES_UNITS[unit.lower()]))
            return f"{n_bytes} bytes = {hundredths / 100:.2f} {unit}"
    return f"{n_bytes} bytes"
