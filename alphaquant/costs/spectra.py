"""Spectra of weights: the exponent alpha of their heavy tail, and their variance. Needs no text.

PL_Alpha_Hill: with the squared singular values l_1 <= .. <= l_n of a matrix, n = min(N, K), and a
tenth of them, k = floor(n / 10), at least 10, at most n - 1::

    alpha = 1 + k / sum_{i=1..k} ln(l_{n-i+1} / l_{n-k})

A small alpha is a heavy tail, the mark of a well trained matrix. Worked example: (1, e, e, e^3)
has k = 3, so alpha = 1 + 3 / (1 + 1 + 3) = 1.6.

alpha depends on the shape: about 6.43 for Gaussian noise of 2048 x 2048, 8.28 for 1024 x 2048.
FARMS pools the values of 128 x 128 blocks instead, which have one shape in all matrices (6.34 for
both); of more than 256 blocks 256 are drawn. A matrix that is narrower than a block falls back to
the plain alpha.

They depend on the weights alone, so `stored_spectra` keeps them in the cache under their digest.

Squared singular values are taken as the eigenvalues of the smaller Gram matrix in float64: 0.18 s
instead of 0.93 s for 1024 x 2048, and alpha differs by 3e-6 (one core, Intel Xeon).

Sources: Zhou et al. 2023, arXiv 2312.00359 (PL_Alpha_Hill); Hu et al. 2025, arXiv 2506.06280
(FARMS, there with overlapping blocks); AlphaQ, arXiv 2606.04980 (block size and number).
Letters: M matrices, U units, N rows and K columns of a matrix, B blocks.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from alphaquant.checksums import SUM, content_sum
from alphaquant.errors import ModelError, StoreError
from alphaquant.files import mark_used, whole_file
from alphaquant.models.sites import ModelMap
from alphaquant.progress import Progress, Stage
from alphaquant.spaces.units import Unit

SPECTRA_VERSION = 1
"""Part of the name of stored spectra; another number measures them anew."""

BLOCK_SIZE = 128
MAX_BLOCKS = 256
_PARTS = ("alpha", "alpha_farms", "variance")
_LEAST = 1e-12
"""Below it eigenvalues, and sums of logarithms, count as it: a matrix of zeros has an alpha."""


@dataclass(frozen=True, eq=False)
class Spectra:
    """Spectra of M matrices.

    Attributes:
        matrices: M names, in inventory order.
        alpha: float64 [M], PL_Alpha_Hill; NaN for a matrix of one row or column.
        alpha_farms: float64 [M], the same over pooled blocks.
        variance: float64 [M], population variance of the weights.
    """

    matrices: tuple[str, ...]
    alpha: npt.NDArray[np.float64]
    alpha_farms: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class UnitSpectra:
    """Spectra of U units: means over their matrices, weighted by weights.

    Attributes:
        alpha: float64 [U].
        alpha_farms: float64 [U].
        variance: float64 [U].
    """

    alpha: npt.NDArray[np.float64]
    alpha_farms: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]


def measure_spectra(
    model_map: ModelMap,
    *,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> Spectra:
    """Measure every matrix of a model, on the device where its weights are.

    Args:
        model_map: the model at its original weights.
        seed: of the drawn blocks; matrices of one shape get the same blocks.
        progress: called with "spectra", layers done, layers in all.

    Raises:
        ModelError: a weight is not finite.
    """
    rows: list[tuple[float, float, float]] = []
    for index, layer in enumerate(model_map.layers):
        for name, view in layer.views():
            weight = view.detach().float()
            if not bool(torch.isfinite(weight).all()):
                raise ModelError(
                    f"{name} has weights that are not finite, so it has no spectrum; "
                    "repair or download the checkpoint again"
                )
            variance = float(weight.double().var(correction=0))
            rows.append((plain_alpha(weight), farms_alpha(weight, seed), variance))
        layer.release()
        progress(Stage.SPECTRA, index + 1, len(model_map.layers))
    # Copied, since safetensors writes the bytes below a transposed array as they lie.
    alpha, alpha_farms, variances = np.array(rows, dtype=np.float64).T.copy()
    names = tuple(name for layer in model_map.layers for name, _ in layer.views())
    return Spectra(names, alpha, alpha_farms, variances)


def stored_spectra(
    folder: Path,
    weights: str,
    model_map: ModelMap,
    *,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> Spectra:
    """Measure every matrix of a model, or read what was measured of these weights before.

    Args:
        folder: of all stored spectra.
        weights: digest of the model's weights.
        model_map: the model at these weights.
        seed: of the drawn blocks.
        progress: as of `measure_spectra`; not called where nothing is measured.

    Raises:
        StoreError: the stored file is damaged.
        ModelError: a weight is not finite.
    """
    names = tuple(matrix.name for matrix in model_map.inventory.matrices)
    key = [weights, names, seed, BLOCK_SIZE, MAX_BLOCKS, SPECTRA_VERSION]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    path = folder / f"{digest}.safetensors"
    if path.exists():
        mark_used(path)
        return _read(path, names)
    spectra = measure_spectra(model_map, seed=seed, progress=progress)
    arrays = {part: getattr(spectra, part) for part in _PARTS}
    with whole_file(path) as part_file:
        save_file(arrays, part_file, metadata={SUM: content_sum(sorted(arrays.items()))})
    return spectra


def unit_spectra(spectra: Spectra, units: Sequence[Unit]) -> UnitSpectra:
    """Means over the matrices of each unit, weighted by their numbers of weights.

    Args:
        spectra: of all matrices.
        units: U units of those matrices.
    """
    index = {name: i for i, name in enumerate(spectra.matrices)}
    table = np.stack([spectra.alpha, spectra.alpha_farms, spectra.variance])  # [3, M]
    means = [
        np.average(
            table[:, [index[m.name] for m in unit.matrices]],
            axis=1,
            weights=[m.n_weights for m in unit.matrices],
        )
        for unit in units
    ]
    return UnitSpectra(*np.array(means, dtype=np.float64).T)


def plain_alpha(weight: Tensor) -> float:
    """PL_Alpha_Hill of a matrix, float [N, K]; NaN where N or K is 1."""
    return _hill(_squared_singular_values(weight))


def farms_alpha(weight: Tensor, seed: int) -> float:
    """PL_Alpha_Hill of the pooled spectra of a matrix's blocks.

    Args:
        weight: float [N, K].
        seed: of the blocks that are drawn where there are more than `MAX_BLOCKS`.

    Returns:
        alpha; that of the whole matrix where N or K is below `BLOCK_SIZE`.
    """
    if min(weight.shape) < BLOCK_SIZE:
        return plain_alpha(weight)
    grid = weight.unfold(0, BLOCK_SIZE, BLOCK_SIZE).unfold(1, BLOCK_SIZE, BLOCK_SIZE)
    n_across = grid.shape[1]
    n_blocks = grid.shape[0] * n_across
    drawn = torch.arange(n_blocks)
    if n_blocks > MAX_BLOCKS:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(n_blocks, generator=generator)[:MAX_BLOCKS]
    blocks = grid[drawn // n_across, drawn % n_across]  # [B, 128, 128]
    return _hill(_squared_singular_values(blocks).flatten())


def _squared_singular_values(weight: Tensor) -> Tensor:
    """float64 [..., min(N, K)] of matrices [..., N, K], in any order."""
    wide = weight.double() if weight.shape[-2] <= weight.shape[-1] else weight.double().mT
    squares: Tensor = torch.linalg.eigvalsh(wide @ wide.mT)
    return squares


def _hill(squares: Tensor) -> float:
    n = squares.numel()
    if n < 2:
        return math.nan
    k = min(max(10, n // 10), n - 1)
    tail = squares.clamp(min=_LEAST).sort().values[n - k - 1 :]  # [k + 1], l_{n-k} first
    total = float((tail[1:] / tail[0]).log().sum())
    return 1 + k / max(total, _LEAST)


def _read(path: Path, names: tuple[str, ...]) -> Spectra:
    try:
        with safe_open(path, "np") as opened:
            stated = (opened.metadata() or {}).get(SUM)
            arrays = {part: opened.get_tensor(part) for part in sorted(_PARTS)}
        if content_sum(arrays.items()) != stated:
            raise ValueError("its sha256 differs from the one written with it")
        if any(array.shape != (len(names),) for array in arrays.values()):
            raise ValueError(f"it is not of {len(names)} matrices")
    except (OSError, SafetensorError, ValueError) as error:
        raise StoreError(
            f"{path} is damaged ({error}); delete it and run the same command again: it is "
            "measured anew"
        ) from error
    return Spectra(names, **arrays)
