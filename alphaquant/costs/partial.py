"""Banks that hold some matrices in a format and not others: what is measured, and what is unknown.

What a bank lacks has no cost: NaN. Stored costs of a layer and format carry a digest of the
matrices that they are of, so that they are measured again when the bank has got more of them.

Letters: F formats.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from alphaquant.costs.cost_store import Arrays
from alphaquant.quant.bank import Bank, BankLayer
from alphaquant.spaces.units import Matrix


@dataclass(frozen=True)
class HeldLayer:
    """One layer of a bank in some formats.

    Attributes:
        files: an open layer per format, None where it holds nothing.
        names: of the matrices that it holds, per format.
    """

    files: tuple[BankLayer | None, ...]
    names: tuple[frozenset[str], ...]

    def of(self, matrix: Matrix) -> list[BankLayer]:
        """The formats that a matrix is in."""
        pairs = zip(self.files, self.names, strict=True)
        return [file for file, names in pairs if file is not None and matrix.name in names]

    def spread(self, arrays: Arrays, matrix: Matrix) -> Arrays:
        """Arrays over all F formats of arrays over those that a matrix is in; NaN elsewhere."""
        is_held = np.array([matrix.name in names for names in self.names])
        if is_held.all():
            return arrays
        found: Arrays = {}
        for name, array in arrays.items():
            found[name] = np.full((len(is_held), *array.shape[1:]), np.nan, dtype=array.dtype)
            found[name][is_held] = array
        return found

    def unknown(self, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
        """Arrays over all F formats of a matrix that is in none of them: NaN.

        Args:
            shapes: of the numbers of one format, by name.
        """
        n_formats = len(self.names)
        return {
            name: np.full((n_formats, *shape), np.nan, dtype=np.float32)
            for name, shape in shapes.items()
        }


Wanted = Callable[[Matrix, str], bool]
"""Which matrices count in which format: a bank may hold more, made for later."""


def want_all(matrix: Matrix, name: str) -> bool:
    """See `Wanted`."""
    return True


def held_in(
    bank: Bank, layer: int, formats: Sequence[str], wanted: Wanted = want_all
) -> HeldLayer:
    """Open one layer of a bank.

    Args:
        bank: the bank.
        layer: number of the layer.
        formats: names.
        wanted: what of it counts.

    Raises:
        StoreError: a file is damaged.
    """
    names = tuple(wanted_names(bank, name, layer, wanted) for name in formats)
    pairs = zip(formats, names, strict=True)
    return HeldLayer(tuple(bank.layer(f, layer) if held else None for f, held in pairs), names)


def parts_held(
    bank: Bank, formats: Sequence[str], wanted: Wanted = want_all
) -> Mapping[tuple[int, str], str]:
    """Digests of what counts of a bank's layers in formats, where it is not everything.

    They do not depend on what else the bank holds, so a search that is taken up again after its
    bank has grown finds the costs that it measured before.
    """
    found: dict[tuple[int, str], str] = {}
    for layer in range(bank.inventory.n_parts):
        everything = {m.name for m in bank.inventory.matrices if m.layer == layer}
        for name in formats:
            names = wanted_names(bank, name, layer, wanted)
            if names != everything:
                text = "\n".join(sorted(names))
                found[layer, name] = hashlib.sha256(text.encode()).hexdigest()[:12]
    return found


def wanted_names(bank: Bank, name: str, layer: int, wanted: Wanted) -> frozenset[str]:
    """Matrices that a bank's layer holds in a format, of those that count.

    A search with `include` may have left matrices there that are not in this one's inventory.
    """
    matrices, held = bank.inventory.by_name, bank.matrices(name, layer)
    return frozenset(n for n in held if n in matrices and wanted(matrices[n], name))
