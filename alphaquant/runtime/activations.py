"""Activations rounded on the fly, token by token: what `aq` in a configuration asks for.

A token is the last dimension of [..., K]. Its scales come from its own K numbers at every call, so
a token's result does not depend on the other tokens, and there is nothing to calibrate:

    int     symmetric, one float32 scale per token, amax / (2^(b-1) - 1). The largest magnitude
            maps to the largest code and -2^(b-1) stays unused, as in the dynamic int8 kernels of
            inference engines; so int2 is ternary here, unlike in weights.
            int1 is refused: it has no zero.
    fp      one float32 scale per token, amax / the element's largest value.
    mxfp    2^k per 32 consecutive numbers of the token, k = floor(log2 amax) - emax (OCP MX v1.0,
            6.3); the last block may be short.
    nvfp4   E4M3 per 16 consecutive numbers under one float32 per token, amax / (448 * 6). Engines
            take that float32 per tensor from calibration; per token needs none.
    bf16    nothing is done.

int and fp have one scale per token whatever the format's group size: groups belong to weights.
Float32 scales, not the weights' float16, because they are never stored and amax / 127 of a small
token would be a float16 subnormal.

This file only rounds. Which modules round their inputs is decided where modules are built.

Worked example, int4, token 7.0 -3.2 0.5 1.5: the scale is 7 / 7 = 1, the codes are 7 -3 0 2 (ties
to even), the result is 7.0 -3.0 0.0 2.0.

Letters: T tokens, K numbers per token, G blocks per token, C numbers per block.
"""

import torch
from torch import Tensor

from alphaquant.errors import FormatError
from alphaquant.quant.codecs import (
    fit,
    make_codec,
    make_grid,
    nv_global_scale,
    rebuild,
    snap,
)
from alphaquant.spaces.formats import ACTIVATION_KINDS, Format

# Tokens below 2^-126 * the largest code round to fewer codes, in the end to zero.
_SCALE_MIN = torch.finfo(torch.float32).tiny


@torch.no_grad()
def fake_quantize(inputs: Tensor, fmt: Format) -> Tensor:
    """Round activations to a format and back, with scales from each token alone.

    Zero tokens stay zero. A NaN or infinite number makes everything that shares its scale NaN
    (its block in mxfp, its token elsewhere), so that it is seen and not rounded away.

    Args:
        inputs: [..., K] of any floating dtype and device, not changed.
        fmt: what to round to; of int and fp formats the group size does not count.

    Returns:
        The rounded numbers, computed in float32, with the shape and dtype of the inputs; for bf16
        the inputs themselves.

    Raises:
        FormatError: an asymmetric format, one with super-blocks, a table, or int1.
    """
    if fmt.kind not in ACTIVATION_KINDS:
        raise FormatError(
            f"activations cannot be rounded to {fmt.name}, which has no zero; use one of "
            f"{', '.join(ACTIVATION_KINDS)}"
        )
    if not fmt.symmetric or fmt.super_size:
        raise FormatError(
            f"activations cannot be rounded to {fmt.name}: their integers are symmetric, with a "
            f"scale per token; use {fmt.kind}"
        )
    if not fmt.is_quantized or inputs.numel() == 0:
        return inputs
    n_cols = inputs.shape[-1]
    block = fmt.shared.block or n_cols
    tokens = inputs.reshape(-1, n_cols).to(torch.float32)  # [T, K]
    padded = torch.nn.functional.pad(tokens, (0, -n_cols % block))
    blocks = padded.reshape(len(tokens), -1, block)  # [T, G, C]; zeros do not change an amax
    scale = _scales(blocks, fmt).unsqueeze(-1)  # [T, G, 1]
    rounded = rebuild(snap(make_grid(fmt), blocks, scale, None), scale, None)
    usable = torch.isfinite(blocks).all(-1, keepdim=True)  # [T, G, 1]
    if fmt.shared.scale != "e8m0":
        usable = usable.all(-2, keepdim=True)
    made = torch.where(usable, rounded, torch.nan).flatten(-2)[:, :n_cols]
    # code * (amax / code) can be a rounding error above the largest number of the dtype.
    limit = min(torch.finfo(dtype).max for dtype in (inputs.dtype, torch.float32))
    return made.clamp_(-limit, limit).to(inputs.dtype).reshape(inputs.shape)


def _scales(blocks: Tensor, fmt: Format) -> Tensor:
    """Scale of every block, float32 [T, G], for blocks [T, G, C]."""
    if fmt.has_groups:
        return (blocks.abs().amax(-1) / make_grid(fmt).high).clamp(min=_SCALE_MIN)
    shared = None
    if fmt.shared.global_bits:
        shared = nv_global_scale(blocks).expand(blocks.shape[:-1])
    return fit(make_codec(fmt, "minmax", shared), blocks).scale
