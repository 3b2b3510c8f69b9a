"""Tiny checkpoints in the layouts of other tools, written by encoders that share no code with us.

    folder = save_foreign(base, folder, GPTQ)       a quantized copy of a checkpoint
    encoded = GPTQ.encode(weight)                   one matrix: tensors, and what they stand for

The encoders follow the layouts' definitions word by word in numpy; only compressed-tensors is
written by its own library. Every encoder says what its tensors stand for from its own codes and
scales, before they are packed.

Letters: N outputs, K inputs, g inputs per group, G groups.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Encoded(NamedTuple):
    """One matrix in another tool's layout.

    Attributes:
        tensors: by the ends of their names.
        weight: what they stand for, float32 [N, K].
    """

    tensors: dict[str, Tensor]
    weight: Tensor


@dataclass(frozen=True)
class Layout:
    """A tool's layout.

    Attributes:
        config: its `quantization_config`.
        encode: a weight, float32 [N, K], to its tensors.
    """

    config: Mapping[str, Any]
    encode: Callable[[Tensor], Encoded]


class _Rounded(NamedTuple):
    """Codes [N, K], scales float16 [N, G], zero points [N, G]."""

    codes: Any
    scales: Any
    zeros: Any
    weight: Any


def gptq(
    bits: int = 4,
    group: int = 32,
    *,
    version: int = 1,
    symmetric: bool = True,
    act_order: bool = False,
    made_by: str = "other:1.0",
) -> Layout:
    """GPTQ; `made_by` gptqmodel stores zero points of version 1 by whole words."""

    def encode(weight: Tensor) -> Encoded:
        order = np.arange(weight.shape[1])
        if act_order:  # inputs of the largest columns are quantized first
            order = np.argsort(-np.abs(weight.numpy()).sum(0), kind="stable")
        size = weight.shape[1] if group == -1 else group
        found = _round(weight.numpy()[:, order], bits, size, symmetric)
        back = np.argsort(order)
        tensors = {
            "qweight": _int32(_words(found.codes[:, back], bits).T),
            "qzeros": _int32(_gptq_zeros(found.zeros.T, bits, version, made_by)),
            "scales": torch.from_numpy(found.scales.T.copy()),
            "g_idx": torch.from_numpy((back // size).astype(np.int32)),
        }
        return Encoded(tensors, torch.from_numpy(found.weight[:, back].copy()))

    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": act_order,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "meta": {"quantizer": [made_by]},
    }
    return Layout(config, encode)


def auto_round(packing: str = "auto_round:auto_gptq", symmetric: bool = True) -> Layout:
    """What AutoRound 0.16.1 writes of 4 bits: the tensors of others, an entry of its own."""
    own = {
        "auto_round:auto_gptq": gptq(symmetric=symmetric),
        "auto_round": gptq(version=2, symmetric=symmetric),
        "auto_round:auto_awq": awq(),
    }[packing]
    config = {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": 32,
        "sym": symmetric,
        "data_type": "int",
        "autoround_version": "0.16.1",
        "block_name_to_quantize": "model.layers",
        "packing_format": packing,
        "extra_config": {"lm_head": {"bits": 16, "data_type": "float"}},
    }
    return Layout(config, own.encode)


def _gptq_zeros(zeros: Any, bits: int, version: int, made_by: str) -> Any:
    """Words of zero points [G, N], less one in version 1, code by code or word by word."""
    if version == 2:
        return _words(zeros, bits)
    if not made_by.startswith("gptqmodel"):
        return _words((zeros - 1) % 2**bits, bits)
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return ((_words(zeros, bits).astype(np.int64) - ones) % 2**32).astype(np.uint32)


def awq(group: int = 32) -> Layout:
    """AWQ of four bits, version gemm."""

    def encode(weight: Tensor) -> Encoded:
        found = _round(weight.numpy(), 4, group, symmetric=False)
        tensors = {
            "qweight": _int32(_words(_interleaved(found.codes.T), 4)),
            "qzeros": _int32(_words(_interleaved(found.zeros.T), 4)),
            "scales": torch.from_numpy(found.scales.T.copy()),
        }
        return Encoded(tensors, torch.from_numpy(found.weight))

    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    return Layout(config, encode)


def fp8(scales: str = "block", scale_dtype: torch.dtype = torch.float32) -> Layout:
    """fp8 with scales of blocks of 128 x 128, of rows, or of the matrix."""
    return _bytes("fp8", torch.float8_e4m3fn, 448.0, scales, scale_dtype)


def int8() -> Layout:
    """int8 with scales of blocks of 128 x 128."""
    return _bytes("blockwise_int8", torch.int8, 127.0, "block", torch.float32)


def _bytes(
    method: str, dtype: torch.dtype, highest: float, scales: str, scale_dtype: torch.dtype
) -> Layout:
    size = {"block": (128, 128), "row": (1, 0), "tensor": (0, 0)}[scales]

    def encode(weight: Tensor) -> Encoded:
        rows, cols = (own or whole for own, whole in zip(size, weight.shape, strict=True))
        codes, right = torch.empty(weight.shape, dtype=dtype), torch.empty(weight.shape)
        n_down, n_across = -(-weight.shape[0] // rows), -(-weight.shape[1] // cols)
        scale = torch.empty(n_down, n_across, dtype=scale_dtype)
        for i in range(n_down):
            for j in range(n_across):
                part = (slice(i * rows, (i + 1) * rows), slice(j * cols, (j + 1) * cols))
                scale[i, j] = weight[part].abs().max() / highest
                scaled = (weight[part] / scale[i, j].float()).clamp(-highest, highest)
                codes[part] = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
                right[part] = codes[part].float() * scale[i, j].float()
        if scales == "block":
            return Encoded({"weight": codes, "weight_scale_inv": scale}, right)
        of_whole = scale.reshape(1) if scales == "tensor" else scale
        return Encoded({"weight": codes, "weight_scale": of_whole}, right)

    config: dict[str, Any] = {"quant_method": method, "activation_scheme": "dynamic"}
    if scales == "block":
        config["weight_block_size"] = [128, 128]
    return Layout(config, encode)


CT_SCHEMES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "int4-g32": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "int3-g32": ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32}),
    "int4-g32-asym": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "int8-row": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "fp8-row": ("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8-tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
        | dict.fromkeys(("scale_dtype", "zp_dtype"), "torch.float8_e4m3fn"),
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
        | dict.fromkeys(("scale_dtype", "zp_dtype"), "torch.uint8"),
    ),
}
"""Packings and weight arguments of compressed-tensors."""


def compressed(scheme: str) -> Layout:
    """compressed-tensors, written and read back by its own library."""
    packing, own = CT_SCHEMES[scheme]
    weights = {"type": "int", "symmetric": True, "dynamic": False} | own
    group = {"format": packing, "targets": ["Linear"], "weights": weights}

    def encode(weight: Tensor) -> Encoded:
        return _compressed_by_library(weight, group)

    config = {
        "quant_method": "compressed-tensors",
        "format": packing,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    return Layout(config, encode)


def _compressed_by_library(weight: Tensor, group: Mapping[str, Any]) -> Encoded:
    # By name: the library ships no types.
    compressors: Any = import_module("compressed_tensors.compressors.base")
    quantization: Any = import_module("compressed_tensors.quantization")
    fitting: Any = import_module("compressed_tensors.quantization.utils")

    scheme = quantization.QuantizationScheme(**group)
    args, factor = scheme.weights, None
    tensors: dict[str, Tensor] = {"weight": weight}
    width = args.group_size or weight.shape[1]
    grouped = weight.reshape(len(weight), -1, width)
    low, high = grouped.amin(-1), grouped.amax(-1)
    if args.strategy == "tensor":
        low, high = low.amin().reshape(1), high.amax().reshape(1)
    if args.strategy == "tensor_group":
        factor = fitting.generate_gparam(weight.min()[None], weight.max()[None]).reshape(1)
        tensors["weight_global_scale"] = factor
    scale, zero = fitting.calculate_qparams(low, high, args, global_scale=factor)
    if args.type == "int":
        scale = scale.bfloat16()
    tensors["weight_scale"] = scale
    if not args.symmetric:
        tensors["weight_zero_point"] = zero
    library = compressors.BaseCompressor.get_value_from_registry(scheme.format)
    stored = library.compress(tensors, scheme)
    right = library.decompress(dict(stored), scheme)["weight"]
    return Encoded({name: t.contiguous() for name, t in stored.items()}, right.float())


def save_foreign(
    base: Path,
    folder: Path,
    layout: Layout,
    wanted: Callable[[str], bool] = lambda module: ".mlp." in module or "_proj" in module,
) -> dict[str, Tensor]:
    """Save a quantized copy of a checkpoint.

    Args:
        base: the checkpoint, in one file.
        folder: directory to write.
        layout: of the quantized matrices.
        wanted: which modules are quantized; routers never are.

    Returns:
        What every quantized module stands for, by its name, float32 [N, K].
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    right: dict[str, Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if "_proj" in module and tensor.dim() == 2 and wanted(module):
            found = layout.encode(tensor.float())
            right[module] = found.weight
            tensors |= {f"{module}.{end}": part for end, part in found.tensors.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = dict(layout.config)
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / file, folder)
    return right


def _round(weight: Any, bits: int, group: int, symmetric: bool) -> _Rounded:
    """Nearest codes with float16 scales; zero points reach both ends of their range."""
    grouped = weight.reshape(len(weight), -1, group)
    high, low = grouped.max(-1).clip(min=0), grouped.min(-1).clip(max=0)
    top = 2**bits - 1
    if symmetric:
        scales = (2 * np.abs(grouped).max(-1) / top).astype(np.float16)
        zeros = np.full(scales.shape, 2 ** (bits - 1), np.float32)
    else:
        scales = ((high - low) / top).astype(np.float16)
        zeros = np.round(-low / scales.astype(np.float32)).clip(0, top).astype(np.float32)
    wide = scales.astype(np.float32)[..., None]
    codes = np.round(grouped / wide + zeros[..., None]).clip(0, top)
    right = (codes - zeros[..., None]) * wide
    shape = weight.shape
    flat = codes.reshape(shape).astype(np.int64)
    return _Rounded(flat, scales, zeros.astype(np.int64), right.reshape(shape).astype(np.float32))


def _words(codes: Any, bits: int) -> Any:
    """Codes of rows as words, the first in the lowest bits, bit by bit: uint32 [R, C b / 32]."""
    codes = np.asarray(codes, np.int64)
    stream = (codes[..., None] >> np.arange(bits)) & 1  # [R, C, b]
    bit = stream.reshape(len(codes), -1, 32).astype(np.uint64)
    return (bit << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32)


def _interleaved(columns: Any) -> Any:
    """Columns in the order in which AWQ puts eight of them into a word."""
    eights = np.asarray(columns, np.int64).reshape(len(columns), -1, 8)
    return eights[:, :, list(_ORDER)].reshape(len(columns), -1)


def _int32(words: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int32).copy())
