"""Weights that make up for what the quantized layers before them lost.

In the sequential mode a matrix is given x', what the quantized layers before it make, where the
original model gives it x. Rounding W for x' keeps W x' and so hands the loss on. Of all weights,

    W + W C H^-1,    C = sum_j w_j (x_j - x'_j) x'_j',    H = sum_j w_j x'_j x'_j'

come closest to W x on x' (least squares, H damped as for GPTQ). That is the asymmetric calibration
of GPTAQ (arXiv 2504.02692). The whole way is too far: what x' cannot tell of x makes outputs
smaller, layer by layer (SmolLM2 135M at 3 bits: KL 0.376 without, 0.330 with a quarter of the way,
0.387 with half, 3.93 with all of it; benchmarks/quantizer.md). So weights go a share of it before
they are rounded.

The sums are those of `crosses.py`; experts' are pooled as their Hessians are. What is not
quantized keeps its weights, and so do the head and the embeddings.

Letters: N rows, K columns of a matrix.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from alphaquant.models.sites import ModelMap
from alphaquant.quant.factor import factorize
from alphaquant.quant.hessian import HessianBatch
from alphaquant.specs.quantizer import QuantSettings


class CorrectedWeights:
    """What the engine rounds: weights of a layer, a share of the way corrected."""

    def __init__(
        self,
        model_map: ModelMap,
        batches: Sequence[HessianBatch],
        crosses: Mapping[str, Tensor],
        settings: QuantSettings,
    ) -> None:
        """Nothing is computed yet.

        Args:
            model_map: the original model.
            batches: Hessians of the layer.
            crosses: C of the matrices that are corrected; all others stay as they are.
            settings: `percdamp` and `correction` are used.
        """
        self._map, self._crosses, self._settings = model_map, crosses, settings
        self._places = {
            matrix.name: (batch, b)
            for batch in batches
            for b, stack in enumerate(batch.stacks)
            for matrix in stack
        }
        self._leader, self._factor = "", torch.empty(0)

    def view(self, name: str) -> Tensor:
        """The weight of a matrix that is rounded, [N, K]: float32 where it is corrected.

        Raises:
            ModelError: its Hessian cannot be factorized.
        """
        weight, (batch, b) = self._map.view(name), self._places[name]
        if name not in self._crosses or not batch.has_data[b]:
            return weight
        leader = batch.stacks[b][0].name
        if self._leader != leader:  # gate and up have one
            damped = factorize(batch.hessian[b], self._settings.percdamp, (False,), name)
            self._leader, self._factor = leader, torch.linalg.cholesky(damped.matrix)
        lost = weight.to(self._factor) @ self._crosses[name]  # W C, [N, K]
        correction: Tensor = torch.cholesky_solve(lost.T, self._factor).T
        return weight.to(correction) + self._settings.correction * correction
