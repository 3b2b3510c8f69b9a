"""Weights that other tools quantized, in our own packed formats, where those hold them exactly.

Codes are copied bit by bit and scales are compared number by number; nothing is rounded. What a
matrix needs for that: consecutive groups of inputs, elements that a format of ours has, zero
points among the codes, and scales that float16 holds (of mxfp4 powers of two, of nvfp4 e4m3 under
one factor). GPTQ's and AWQ's scales are float16 themselves, bfloat16 ones fit unless they are
very small or large, float32 ones rarely do.

Blocks of rows become scales of every row, which take more bytes than the blocks did.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from alphaquant.errors import FormatError
from alphaquant.kernels.grids import E8M0_BIAS
from alphaquant.kernels.packing import pack_codes
from alphaquant.models.quantized.compressed import CompressedWeight, GroupedCodes
from alphaquant.quant.matrix import PackedMatrix, pack_bf16
from alphaquant.spaces.formats import PER_ROW, Format, is_group_size, make_format, parse_format

_FP4 = {32: "mxfp4", 16: "nvfp4"}


def exact_packed(weight: CompressedWeight) -> PackedMatrix:
    """The same weight in a format of ours.

    Args:
        weight: as another tool keeps it.

    Returns:
        The packed matrix; its dequantized weights are those of `weight`, bit for bit.

    Raises:
        FormatError: no format of ours holds it exactly; the message says why.
    """
    codes = weight.codes()
    if codes is None:
        return _plain(weight)
    size = _group_size(codes)
    if size is None:
        raise _inexact(weight, "its groups are of inputs that do not stand together (act-order)")
    packed = _packed(_Grouped(codes, size), weight)
    if not torch.equal(packed.dequantize(), weight.dequantize()):
        raise _inexact(weight, f"{packed.format.name} holds other numbers for its scales")
    return packed


@dataclass(frozen=True)
class _Grouped:
    """Codes in consecutive groups of `size` inputs."""

    codes: GroupedCodes
    size: int


def _plain(weight: CompressedWeight) -> PackedMatrix:
    plain = weight.tensors["weight"]
    if not torch.equal(plain.to(torch.bfloat16).to(plain.dtype), plain):
        raise _inexact(weight, f"bf16 does not hold its {plain.dtype} numbers")
    return pack_bf16(plain)


def _group_size(codes: GroupedCodes) -> int | None:
    """Inputs per group, -1 for one group; None where groups are not consecutive."""
    group_of, n_groups = codes.group_of, codes.scales.shape[1]
    if n_groups == 1:
        return PER_ROW
    size = int((group_of == 0).sum())
    even = torch.arange(len(group_of), device=group_of.device) // max(size, 1)
    return size if torch.equal(group_of, even) else None


def _packed(found: _Grouped, weight: CompressedWeight) -> PackedMatrix:
    fmt = _format(found, weight)
    codes = found.codes
    tensors = {"codes": pack_codes(codes.codes, fmt.bits), "scales": _scales(fmt, codes)}
    if not fmt.symmetric:
        assert codes.zeros is not None
        tensors["zeros"] = pack_codes(codes.zeros.to(torch.uint8).flatten(), fmt.bits)
    if fmt.shared.global_bits:
        assert codes.shared is not None
        tensors["global_scale"] = codes.shared.to(torch.float32)
    return PackedMatrix(fmt, weight.rows, weight.cols, tensors)


def _format(found: _Grouped, weight: CompressedWeight) -> Format:
    """The format of ours that may hold the codes."""
    codes, size = found.codes, found.size
    if codes.element == "e2m1":
        if size not in _FP4:
            raise _inexact(weight, f"fp4 has groups of 16 or 32 inputs, not {size}")
        return parse_format(_FP4[size])
    if not is_group_size(size):
        raise _inexact(weight, f"groups have 8 inputs at least, not {size}")
    if codes.element == "e4m3":
        return make_format("fp8", size, element="e4m3")
    if f"int{codes.bits}" not in ("int2", "int3", "int4", "int5", "int6", "int8"):
        raise _inexact(weight, f"there are no integers of {codes.bits} bits")
    return make_format(f"int{codes.bits}", size, symmetric=_is_symmetric(codes))


def _is_symmetric(codes: GroupedCodes) -> bool:
    """Whether all zero points are the middle, which our symmetric codes are offset by."""
    middle = 2.0 ** (codes.bits - 1)
    return codes.zeros is None or bool((codes.zeros == middle).all())


def _scales(fmt: Format, codes: GroupedCodes) -> Tensor:
    """Scales as the format stores them; the caller compares what they stand for."""
    if fmt.shared.scale == "e8m0":
        return (torch.frexp(codes.scales).exponent - 1 + E8M0_BIAS).to(torch.uint8)
    if fmt.shared.global_bits:
        assert codes.shared is not None
        return (codes.scales / codes.shared).to(torch.float8_e4m3fn)
    return codes.scales.to(torch.float16)


def _inexact(weight: CompressedWeight, why: str) -> FormatError:
    shape = f"[{weight.rows}, {weight.cols}]"
    return FormatError(
        f"{weight.form.name} {shape} has no exact format of ours: {why}; keep it as it is "
        "(a mixed_precision file does), or quantize the original"
    )
