"""Bit streams: codes of 1 to 8 bits packed into bytes without waste, and back.

Layout, little-endian: code i of a row takes bits i*b .. i*b + b - 1 of the row's stream; bit j of
the stream is bit j % 8 of byte j // 8. A row ends on a byte boundary; its unused high bits are
zero.

Worked example, b = 3, codes 5 2 7 (binary 101 010 111)::

    stream bit    8 | 7 6 5 4 3 2 1 0
    code          7 | 7 7 2 2 2 5 5 5
    value         1 | 1 1 0 1 0 1 0 1   -> bytes 0xD5 0x01

Nine signs, b = 1, codes 1 0 1 1 0 0 0 0 1: bytes 0x0D 0x01.

Letters: N rows, K codes per row, b bits per code.
"""

from math import gcd

import torch
from torch import Tensor


def packed_row_bytes(n_codes: int, bits: int) -> int:
    """Bytes of one packed row: ceil(n_codes * bits / 8)."""
    return (n_codes * bits + 7) // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: uint8 [..., K], each below 2^bits.
        bits: bits per code, 1 to 8.

    Returns:
        uint8 [..., ceil(K * bits / 8)].
    """
    if bits == 8:
        return codes.contiguous()
    n_codes = codes.shape[-1]
    cell_codes, cell_bytes = _cell(bits)
    n_cells = -(-n_codes // cell_codes)
    padded = torch.nn.functional.pad(codes, (0, n_cells * cell_codes - n_codes))
    cells = padded.reshape(*codes.shape[:-1], n_cells, cell_codes).to(torch.int64)
    shifts = torch.arange(cell_codes, device=codes.device) * bits
    words = (cells << shifts).sum(-1, keepdim=True)  # [..., n_cells, 1]; disjoint bits, sum = or
    byte_shifts = torch.arange(cell_bytes, device=codes.device) * 8
    stream = ((words >> byte_shifts) & 0xFF).to(torch.uint8)  # [..., n_cells, cell_bytes]
    flat = stream.reshape(*codes.shape[:-1], n_cells * cell_bytes)
    return flat[..., : packed_row_bytes(n_codes, bits)].contiguous()


def unpack_codes(packed: Tensor, bits: int, n_codes: int) -> Tensor:
    """Undo `pack_codes`.

    Args:
        packed: uint8 [..., ceil(n_codes * bits / 8)].
        bits: bits per code, 1 to 8.
        n_codes: K.

    Returns:
        uint8 [..., K].
    """
    if bits == 8:
        return packed
    cell_codes, cell_bytes = _cell(bits)
    n_cells = -(-n_codes // cell_codes)
    padded = torch.nn.functional.pad(packed, (0, n_cells * cell_bytes - packed.shape[-1]))
    cells = padded.reshape(*packed.shape[:-1], n_cells, cell_bytes).to(torch.int64)
    byte_shifts = torch.arange(cell_bytes, device=packed.device) * 8
    words = (cells << byte_shifts).sum(-1, keepdim=True)  # [..., n_cells, 1]
    shifts = torch.arange(cell_codes, device=packed.device) * bits
    mask = (1 << bits) - 1
    codes = ((words >> shifts) & mask).to(torch.uint8)  # [..., n_cells, cell_codes]
    return codes.reshape(*packed.shape[:-1], n_cells * cell_codes)[..., :n_codes].contiguous()


def _cell(bits: int) -> tuple[int, int]:
    """Codes and bytes of the smallest run that fills whole bytes: 3 bits -> 8 codes, 3 bytes."""
    return 8 // gcd(8, bits), bits // gcd(8, bits)
