"""Quantized matrices: grid values while they are made, then packed as they are stored.

The packed tensors are those of the layout in `alphaquant.spaces.formats`; their bytes equal
`Format.storage_bits` exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from alphaquant.errors import StoreError
from alphaquant.kernels.grids import E8M0_BIAS, from_e8m0
from alphaquant.kernels.packing import (
    look_up,
    make_table,
    pack_codes,
    pick_codes,
    unpack_codes,
)
from alphaquant.quant.codecs import LEAST_MULTIPLE, make_grid, rebuild
from alphaquant.quant.ggml.decoding import decode
from alphaquant.spaces.formats import SUB_BITS, Format, parse_format

_BY_ROW = ("codes", "scales", "super_scales", "weight")
"""Stored tensors with a row for every row of the matrix."""


@dataclass(frozen=True)
class RoundedBatch:
    """A batch of matrices rounded to one format, not packed yet.

    Attributes:
        format: their format.
        values: float32 [B, N, K] grid values.
        scales: float32 [B, N, G], exactly as stored.
        zeros: float32 [B, N, G] or None.
        global_scale: float32 [B, N] (nvfp4) or None.
        super_scales: float32 [B, N, P], of P super-blocks, or None.
    """

    format: Format
    values: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    global_scale: Tensor | None = None
    super_scales: Tensor | None = None

    def weights(self) -> Tensor:
        """Dequantized weights, float32 [B, N, K]; bit for bit `PackedMatrix.dequantize`."""
        return dequantize_groups(self.format, self.values, self.scales, self.zeros)

    def pack(self, index: int, rows: slice) -> "PackedMatrix":
        """Pack rows of one matrix of the batch, on the device of the tensors."""
        one = slice(index, index + 1)
        stored = RoundedBatch(
            self.format,
            self.values[one, rows],
            self.scales[one, rows],
            None if self.zeros is None else self.zeros[one, rows],
            None if self.global_scale is None else self.global_scale[one, rows],
            None if self.super_scales is None else self.super_scales[one, rows],
        )._stored()
        n_rows, n_cols = self.values[index, rows].shape
        return PackedMatrix(self.format, n_rows, n_cols, {k: t[0] for k, t in stored.items()})

    def pack_all(self) -> list["PackedMatrix"]:
        """Pack all matrices of the batch; on the CPU, each in memory of its own."""
        stored = {name: tensor.cpu() for name, tensor in self._stored().items()}
        n_matrices, n_rows, n_cols = self.values.shape
        own = [
            {name: t[b].clone(memory_format=torch.contiguous_format) for name, t in stored.items()}
            for b in range(n_matrices)
        ]
        return [PackedMatrix(self.format, n_rows, n_cols, tensors) for tensors in own]

    def _stored(self) -> dict[str, Tensor]:
        """The tensors of `PackedMatrix`, all with a first dimension of B."""
        fmt, scales = self.format, self.scales
        codes = make_grid(fmt).to_codes(self.values)
        stored = {"codes": pack_codes(codes, fmt.bits), "scales": scales.to(torch.float16)}
        if fmt.shared.scale == "e8m0":
            stored["scales"] = (torch.frexp(scales).exponent - 1 + E8M0_BIAS).to(torch.uint8)
        if fmt.shared.global_bits:
            assert self.global_scale is not None
            shared = self.global_scale[:, :1]  # [B, 1]
            stored["scales"] = (scales / shared.unsqueeze(-1)).to(torch.float8_e4m3fn)
            stored["global_scale"] = shared.clone()
        if self.super_scales is not None:
            supers = _by_group(fmt, self.super_scales, scales.shape[-1])
            stored["scales"] = pack_multiples((scales / supers).round())
            stored["super_scales"] = self.super_scales.to(torch.float16)
        if self.zeros is not None:
            stored["zeros"] = pack_codes(self.zeros.to(torch.uint8).flatten(1), fmt.bits)
        return stored


@dataclass(frozen=True)
class PackedMatrix:
    """One matrix as it is stored.

    Attributes:
        format: its format.
        rows: outputs.
        cols: inputs.
        tensors: `codes` uint8 [rows, row bytes], `scales` [rows, G], optional `zeros` uint8
            [bytes] and `global_scale` float32 [1]; with super-blocks `scales` uint8 [rows, bytes]
            and `super_scales` float16 [rows, P]; for bf16 only `weight` bfloat16 [rows, cols],
            for llama.cpp's types only `codes`, their blocks.
    """

    format: Format
    rows: int
    cols: int
    tensors: Mapping[str, Tensor]

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def to(self, device: torch.device) -> "PackedMatrix":
        """The same matrix on a device, still packed."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, tensors=moved)

    def dequantize(self) -> Tensor:
        """Weights, float32 [rows, cols], on the tensors' device; bit for bit `plain_weights`.

        Values are looked up by the byte (`alphaquant.kernels.packing`) and scaled in place.
        """
        if not self.format.is_quantized:
            return self.tensors["weight"].to(torch.float32)
        if self.format.is_ggml:
            return decode(self.format.kind, self.tensors["codes"])
        values, scales, zeros = self._values(), self._scales(), self._zeros()
        size = self.format.columns_per_scale(self.cols)
        n_even = self.cols // size * size  # the last group may be shorter
        for start, end, width in ((0, n_even, size), (n_even, self.cols, self.cols - n_even)):
            if start == end:
                continue
            grouped = values[:, start:end].view(self.rows, -1, width)  # [N, G, g]
            groups = slice(start // size, -(-end // size))
            if zeros is not None:
                grouped.sub_(zeros[:, groups].unsqueeze(-1))
            grouped.mul_(scales[:, groups].unsqueeze(-1))
        return values

    def rows_at(self, ids: Tensor) -> Tensor:
        """Some rows of the weights, float32 [n, cols]; no others are dequantized.

        Args:
            ids: int64 [n], on the device of the tensors.
        """
        own = {name: t[ids] for name, t in self.tensors.items() if name in _BY_ROW}
        if "zeros" in self.tensors:
            n_groups, bits = self.format.n_groups(self.cols), self.format.bits
            groups = torch.arange(n_groups, device=ids.device)
            places = ids.unsqueeze(-1) * n_groups + groups  # [n, G]
            own["zeros"] = pack_codes(
                pick_codes(self.tensors["zeros"], bits, places).flatten(), bits
            )
        shared = {name: t for name, t in self.tensors.items() if name not in {*_BY_ROW, "zeros"}}
        return replace(self, rows=len(ids), tensors={**own, **shared}).dequantize()

    def plain_weights(self) -> Tensor:
        """What `dequantize` gives, code by code: its reference."""
        if not self.format.is_quantized:
            return self.tensors["weight"].to(torch.float32)
        if self.format.is_ggml:
            return decode(self.format.kind, self.tensors["codes"])
        codes = unpack_codes(self.tensors["codes"], self.format.bits, self.cols)
        values = make_grid(self.format).to_values(codes)
        zeros = None
        n_groups = self.format.n_groups(self.cols)
        if "zeros" in self.tensors:
            flat = unpack_codes(self.tensors["zeros"], self.format.bits, self.rows * n_groups)
            zeros = flat.reshape(self.rows, n_groups).to(torch.float32)
        return dequantize_groups(self.format, values, self._scales(), zeros)

    def _values(self) -> Tensor:
        """Grid values, float32 [rows, cols], not shared."""
        codes = self.tensors["codes"]
        if self.format.bits == 8 and not self.format.element:  # nothing to look up
            return make_grid(self.format).to_values(codes)
        return look_up(codes, self.format.bits, self.cols, self._table())

    def _zeros(self) -> Tensor | None:
        """Zero points, float32 [rows, G], None where there are none."""
        if "zeros" not in self.tensors:
            return None
        n_groups = self.format.n_groups(self.cols)
        # With zero points the value of a code is its number, so the table is that of the codes.
        zeros = self.tensors["zeros"]
        flat = look_up(zeros, self.format.bits, self.rows * n_groups, self._table())
        return flat.reshape(self.rows, n_groups)

    def _table(self) -> Tensor:
        """Values of words of codes."""
        codes = self.tensors["codes"]
        # Tensors that only stand for others, as tracing has, are not kept for later.
        make = _make_table if type(codes) is Tensor else _make_table.__wrapped__
        return make(self.format, codes.device)

    def multiples(self) -> Tensor:
        """Scales inside super-blocks as multiples of their super-scales, float32 [rows, G]."""
        n_groups = self.format.n_groups(self.cols)
        found: Tensor = unpack_codes(self.tensors["scales"], SUB_BITS, n_groups).float()
        return found + float(LEAST_MULTIPLE)

    def _scales(self) -> Tensor:
        stored = self.tensors["scales"]
        if self.format.super_size:
            multiples = self.multiples()
            supers = self.tensors["super_scales"].to(torch.float32)
            return multiples * _by_group(self.format, supers, multiples.shape[1])
        if self.format.shared.scale == "e8m0":
            return from_e8m0(stored)
        scales = stored.to(torch.float32)
        return scales * self.tensors["global_scale"] if self.format.shared.global_bits else scales


@lru_cache(maxsize=256)
def _make_table(fmt: Format, device: torch.device) -> Tensor:
    """Values of words of codes, made once per format and device; nobody writes to it."""
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8, device=device)
    return make_table(make_grid(fmt).to_values(codes), fmt.bits)


def _by_group(fmt: Format, super_scales: Tensor, n_groups: int) -> Tensor:
    """Super-scales [.., P], each once per group of its super-block: [.., G]."""
    per_super = fmt.super_size // fmt.group_size
    return super_scales.repeat_interleave(per_super, -1)[..., :n_groups]


def pack_multiples(multiples: Tensor) -> Tensor:
    """Whole numbers -32 to 31 [..., G] as a stream of 6 bits each, uint8 [..., bytes]."""
    return pack_codes((multiples.float() - LEAST_MULTIPLE).to(torch.uint8), SUB_BITS)


def pack_bf16(weight: Tensor) -> PackedMatrix:
    """A matrix that stays in bfloat16, [rows, cols]."""
    rows, cols = weight.shape
    return PackedMatrix(
        parse_format("bf16"), rows, cols, {"weight": weight.to(torch.bfloat16).contiguous()}
    )


def packed_shapes(
    fmt: Format, rows: int, cols: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor that a packed [rows, cols] matrix has."""
    if not fmt.is_quantized:
        return {"weight": ((rows, cols), torch.bfloat16)}
    if fmt.is_ggml:
        return {"codes": ((rows, fmt.row_bytes(cols)), torch.uint8)}
    scale_dtype = {"float16": torch.float16, "e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "codes": ((rows, fmt.row_bytes(cols)), torch.uint8),
        "scales": ((rows, fmt.n_groups(cols)), scale_dtype[fmt.shared.scale]),
    }
    if fmt.super_size:
        shapes["scales"] = ((rows, fmt.sub_bytes(cols)), torch.uint8)
        shapes["super_scales"] = ((rows, fmt.n_supers(cols)), torch.float16)
    if not fmt.symmetric:
        shapes["zeros"] = ((fmt.zero_bytes(rows, cols),), torch.uint8)
    if fmt.shared.global_bits:
        shapes["global_scale"] = ((1,), torch.float32)
    return shapes


def check_packed(matrix: PackedMatrix, name: str, source: str) -> None:
    """Check that the tensors of a matrix have the shapes and dtypes that its format asks for.

    Raises:
        StoreError: naming the matrix and the file.
    """
    expected = packed_shapes(matrix.format, matrix.rows, matrix.cols)
    found = {key: (tuple(t.shape), t.dtype) for key, t in matrix.tensors.items()}
    if found != expected:
        raise StoreError(
            f"{source}: {name} in {matrix.format.name} has tensors {found}, expected {expected}; "
            "the file is damaged or of another version: delete it and run again"
        )


def dequantize_groups(fmt: Format, values: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """(value - zero) * scale with one scale per group of columns.

    Args:
        fmt: gives the group size.
        values: float32 [..., N, K].
        scales: float32 [..., N, G].
        zeros: float32 [..., N, G] or None.

    Returns:
        float32 [..., N, K].
    """
    n_cols = values.shape[-1]
    group_size = fmt.columns_per_scale(n_cols)
    if n_cols % group_size == 0:
        grouped = values.reshape(*values.shape[:-1], -1, group_size)  # [..., N, G, g]
        zero = None if zeros is None else zeros.unsqueeze(-1)
        return rebuild(grouped, scales.unsqueeze(-1), zero).flatten(-2)
    column_scale = scales.repeat_interleave(group_size, -1)[..., :n_cols]
    column_zero = None if zeros is None else zeros.repeat_interleave(group_size, -1)[..., :n_cols]
    return rebuild(values, column_scale, column_zero)
