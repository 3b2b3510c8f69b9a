"""One matrix as compressed-tensors stores it, and the scheme that says so.

The same codes, scales and zero points as in our packed checkpoint, with other names and padding:

    int       weight_packed int32 [N, ceil(K * bits / 32)]   bit streams, padded to 32 bits
              weight_scale float16 [N, G], weight_shape int64 [2]
              weight_zero_point int32 [ceil(N * bits / 32), G], packed along the outputs
    fp8 row   weight float8_e4m3fn [N, K], weight_scale float32 [N, 1]
    mxfp4     weight_packed uint8 [N, K / 2], weight_scale uint8 (E8M0) [N, K / 32]
    nvfp4     weight_packed uint8 [N, K / 2], weight_scale float8_e4m3fn [N, K / 16],
              weight_global_scale float32 [1], which divides: the inverse of ours
    bf16      weight bfloat16 [N, K]

Codes are stored with the offset that ours have: value + 2^(bits - 1), and zero points with the
codes' own. The bit stream of 3, 5 and 6 bits is dense, as compressed-tensors has it since 0.18 and
vLLM 0.32 expects it; before, ten codes of 3 bits filled a word and left two bits over.

Worked example, K = 256: int3 has 24 words per row, 256 * 3 / 32; up to 0.17 it had 26.

Source: compressed_tensors/compressors of 0.20.0; letters: N outputs, K inputs, G groups per row.
"""

from typing import Any

import torch
from torch import Tensor

from alphaquant.kernels.packing import pack_codes, unpack_codes
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.spaces.formats import PER_ROW, Format

MIXED = "mixed-precision"
"""The format of a file whose matrices have several."""

_FLOAT_FORMATS = {
    "fp8": "naive-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}


def container_of(fmt: Format) -> str:
    """What compressed-tensors calls the way in which the tensors of a format are stored."""
    return _FLOAT_FORMATS.get(fmt.kind, "pack-quantized")


def scheme_of(fmt: Format) -> dict[str, Any]:
    """The entry of `config_groups` for a format, without its targets; inputs are not rounded."""
    is_int = fmt.family == "int"
    weights: dict[str, Any] = {
        "num_bits": fmt.bits,
        "type": "int" if is_int else "float",
        "symmetric": fmt.symmetric,
        "strategy": "channel" if fmt.group_size == PER_ROW else "group",
        "dynamic": False,
    }
    if fmt.group_size != PER_ROW:
        weights["group_size"] = fmt.group_size
    if fmt.kind == "mxfp4":
        weights |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    if fmt.kind == "nvfp4":
        weights |= {"strategy": "tensor_group"}
        weights |= {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
    return {"format": container_of(fmt), "weights": weights, "input_activations": None}


def compressed_tensors(matrix: PackedMatrix) -> dict[str, Tensor]:
    """The tensors of a matrix, by the last part of their names.

    Args:
        matrix: in a format of compressed-tensors, whose group divides its inputs.
    """
    fmt, parts = matrix.format, matrix.tensors
    if not fmt.is_quantized:
        return {"weight": parts["weight"]}
    if fmt.kind == "fp8":
        weight = parts["codes"].view(torch.float8_e4m3fn)
        return {"weight": weight, "weight_scale": parts["scales"].to(torch.float32)}
    if fmt.family != "int":
        found = {"weight_packed": parts["codes"], "weight_scale": parts["scales"]}
        if "global_scale" in parts:
            found["weight_global_scale"] = parts["global_scale"].reciprocal()
        return found
    found = {
        "weight_packed": _words(parts["codes"]),
        "weight_scale": parts["scales"],
        "weight_shape": torch.tensor([matrix.rows, matrix.cols]),
    }
    if "zeros" in parts:
        n_groups = fmt.n_groups(matrix.cols)
        zeros = unpack_codes(parts["zeros"], fmt.bits, matrix.rows * n_groups)
        by_group = zeros.view(matrix.rows, n_groups).t().contiguous()  # [G, N]
        found["weight_zero_point"] = _words(pack_codes(by_group, fmt.bits)).t().contiguous()
    return found


def _words(stream: Tensor) -> Tensor:
    """Bit streams, uint8 [R, bytes], padded to whole words of 32 bits: int32 [R, words]."""
    padded = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 4))
    return padded.contiguous().view(torch.int32)
