"""Matrices of stacks in llama.cpp's types: its own code begins, our descent goes on from there."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from alphaquant.errors import FormatError
from alphaquant.quant.ggml.encoding import encode
from alphaquant.quant.ggml.improving import improve
from alphaquant.quant.ggml.ladders import LADDERS
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.quant.stacks import QuantizedMatrix, Stacks
from alphaquant.spaces.formats import Format, parse_format
from alphaquant.specs.quantizer import QuantSettings

_ENCODED_WEIGHTS = 2**22
"""Weights that are put into a type together, 16 MiB and a few times that."""


def encodings(
    stacks: Stacks, asked: Sequence[Mapping[str, tuple[int, ...]]]
) -> Iterator[tuple[Format, int, tuple[int, ...]]]:
    """What llama.cpp's code starts with: format, position of the matrix, numbers of the stacks."""
    together: dict[tuple[str, int], list[int]] = {}
    for s, of_stack in enumerate(asked):
        for name, positions in of_stack.items():
            if parse_format(name).is_ggml:
                for position in positions:
                    together.setdefault((name, position), []).append(s)
    for (name, position), numbers in together.items():
        n_most = max(1, _ENCODED_WEIGHTS // stacks.matrices[0][position].n_weights)
        for start in range(0, len(numbers), n_most):
            yield parse_format(name), position, tuple(numbers[start : start + n_most])


def encode_some(
    stacks: Stacks, settings: QuantSettings, fmt: Format, position: int, numbers: tuple[int, ...]
) -> list[QuantizedMatrix]:
    """Matrices in a type of llama.cpp: by its own code, then by descent where there is data.

    Its code gets the diagonal of a matrix's Hessian, descent all of it.
    """
    index = torch.tensor(numbers, device=stacks.weights.device)
    weights = stacks.weights[index][:, stacks.rows_of(position)]
    matrices = [stacks.matrices[s][position] for s in numbers]
    first = matrices[0]
    if not fmt.fits(first.cols):
        raise FormatError(
            f"{first.name} has {first.cols} inputs, and {fmt.name} has blocks of "
            f"{fmt.group_size}; use a format of smaller blocks for it"
        )
    H = None if stacks.damped is None else stacks.damped.matrix[index]
    rows = [None] * len(numbers) if H is None else H.diagonal(dim1=-2, dim2=-1)
    codes = torch.stack([encode(fmt.kind, w, d) for w, d in zip(weights, rows, strict=True)])
    if H is not None:
        codes = improve(fmt.kind, codes, weights, H, settings.refine_sweeps)
    is_ours = H is not None and fmt.kind in LADDERS and settings.refine_sweeps > 0
    found = []
    for matrix, own, weight, s in zip(matrices, codes, weights, numbers, strict=True):
        packed = PackedMatrix(fmt, matrix.rows, matrix.cols, {"codes": own.clone()})
        errors = _errors(stacks, packed, weight, s)
        method = "descent" if is_ours else "ggml"
        record = stacks.record(s, matrix, fmt, method, errors, settings)
        found.append(QuantizedMatrix(matrix, packed, record))
    return found


def _errors(
    stacks: Stacks, packed: PackedMatrix, weight: Tensor, s: int
) -> tuple[float, float | None]:
    """How far a matrix is from what it was: its weights, and its outputs where there is data."""
    D = weight - packed.dequantize().to(weight.device)
    of_weights = float(D.square().sum() / weight.square().sum().clamp(min=1e-30))
    if stacks.hessian is None:
        return of_weights, None
    H = stacks.hessian[s]
    error = (D @ H * D).sum() / (weight @ H * weight).sum().clamp(min=1e-30)
    return of_weights, float(error)
