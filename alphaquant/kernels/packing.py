"""Bit streams: codes of 1 to 8 bits packed into bytes without waste, and back.

Layout, little-endian: code i of a row takes bits i*b .. i*b + b - 1 of the row's stream; bit j of
the stream is bit j % 8 of byte j // 8. A row ends on a byte boundary; its unused high bits are
zero.

Worked example, b = 3, codes 5 2 7 (binary 101 010 111)::

    stream bit    8 | 7 6 5 4 3 2 1 0
    code          7 | 7 7 2 2 2 5 5 5
    value         1 | 1 1 0 1 0 1 0 1   -> bytes 0xD5 0x01

Nine signs, b = 1, codes 1 0 1 1 0 0 0 0 1: bytes 0x0D 0x01.

Reading is by table where only the values of codes are wanted (`make_table`, `look_up`): a word of
8, 10 or 12 bits is a number of whole codes, and indexes what they stand for. `unpack_codes` is the
plain way, and what the table is made with. With b = 3 the word 0x1D5 of the example, its first 12
bits, is row 469 of 4096: the values of codes 5, 2, 7 and 0.

Letters: N rows, K codes per row, b bits per code.
"""

from math import gcd

import torch
from torch import Tensor

_WORD_BITS = {1: 8, 2: 8, 3: 12, 4: 8, 5: 10, 6: 12, 7: 7, 8: 8}
"""Bits of the words that tables are indexed by: whole codes, in at most two bytes. Seven bits have
no such word, so that codes are their own."""


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


def pick_codes(packed: Tensor, bits: int, places: Tensor) -> Tensor:
    """Some codes of one stream; no others are unpacked.

    Args:
        packed: uint8 [bytes], one stream.
        bits: bits per code, 1 to 8.
        places: int64 [...], numbers of codes, on the device of `packed`.

    Returns:
        uint8 [...].
    """
    first, shift = places * bits // 8, places * bits % 8
    second = (first + 1).clamp(max=len(packed) - 1)  # past the end where the code does not reach
    pair = packed[first].to(torch.int32) | (packed[second].to(torch.int32) << 8)
    return ((pair >> shift) & ((1 << bits) - 1)).to(torch.uint8)


def make_table(values: Tensor, bits: int) -> Tensor:
    """What every word of codes stands for.

    Args:
        values: of every code, float32 [2^bits], on any device.
        bits: bits per code, 1 to 8.

    Returns:
        float32 [words, codes of a word], the table of `look_up`: 8 KiB for 1 bit, 64 KiB for 3.
    """
    n_word = _WORD_BITS[bits]
    words = torch.arange(1 << n_word, device=values.device)
    shifts = torch.arange(0, n_word, bits, device=values.device)
    return values[(words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)]


def look_up(packed: Tensor, bits: int, n_codes: int, table: Tensor) -> Tensor:
    """Values of packed codes, equal to `values[unpack_codes(packed, bits, n_codes)]`.

    On one core, 2048 x 2048 codes of 1, 2, 3, 4, 5 and 6 bits take 0.8, 1.9, 2.5, 2.7, 3.8 and
    4.1 ns a code, and 9 to 20 ns by `unpack_codes`.

    Args:
        packed: uint8 [..., ceil(n_codes * bits / 8)].
        bits: bits per code, 1 to 8.
        n_codes: K.
        table: from `make_table`, on the device of `packed`.

    Returns:
        float32 [..., K], contiguous and nobody else's.
    """
    words = _words(packed, bits, n_codes)
    found = torch.nn.functional.embedding(words, table).flatten(-2)
    return found[..., :n_codes].contiguous()


def _words(packed: Tensor, bits: int, n_codes: int) -> Tensor:
    """The words of a row in their order, int32 [..., words]."""
    n_word = _WORD_BITS[bits]
    if n_word == 8:
        return packed.to(torch.int32)
    if n_word == bits:
        return unpack_codes(packed, bits, n_codes).to(torch.int32)
    n_words, n_bytes = _cell(n_word)  # 12 bits: 2 words fill 3 bytes
    n_cells = -(-packed.shape[-1] // n_bytes)
    padded = torch.nn.functional.pad(packed, (0, n_cells * n_bytes - packed.shape[-1]))
    cells = padded.reshape(*packed.shape[:-1], n_cells, n_bytes)
    # Half as long as int32 and as quick as it can be; what overflows is cut off by the mask.
    bytes_ = [cells[..., i].to(torch.int16) for i in range(n_bytes)]
    words = packed.new_empty((*packed.shape[:-1], n_cells, n_words), dtype=torch.int32)
    for i in range(n_words):
        byte, shift = divmod(i * n_word, 8)
        pair = (bytes_[byte] >> shift) | (bytes_[byte + 1] << (8 - shift))
        words[..., i] = pair & ((1 << n_word) - 1)
    return words.flatten(-2)


def _cell(bits: int) -> tuple[int, int]:
    """Codes and bytes of the smallest run that fills whole bytes: 3 bits -> 8 codes, 3 bytes."""
    return 8 // gcd(8, bits), bits // gcd(8, bits)
