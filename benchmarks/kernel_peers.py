"""Other people's kernels for packed weights, by their documented interfaces, where installed.

GemLite (https://github.com/dropbox/gemlite, README "Usage", read at 0.6.0.post2):
`GemLiteLinear` and its `pack(W_q, scales, zeros, bias)`, W = (W_q - zeros) * scales. It gets our
codes, scales and zero points, so the expected product is that of the dequantized matrix.

torchao (`torchao.quantization.quantize_`, read at 0.18.0): `Int8WeightOnlyConfig`,
`Float8WeightOnlyConfig`, and `Int4WeightOnlyConfig` with tile_packed_to_4d, the packing whose
product its documentation shows on CUDA. It rounds by itself, so the expected product is that of
the matrix which its own linear layer returns for unit vectors.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from kernel_bench import DTYPE, Bench, check_error, draw, ratio, relative_error
from kernel_dense import time_cublas
from kernel_shapes import DenseShape
from kernel_timing import Call, Timing, n_copies
from torch import Tensor, nn

from alphaquant.kernels.packing import unpack_codes
from alphaquant.quant.rounding import quantize_rtn
from alphaquant.spaces.formats import parse_format

GEMLITE_FORMATS = ("int2-g128-asym", "int4-g128-asym", "int8-g128-asym")
TORCHAO_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8-row": ("Int8WeightOnlyConfig", {}),
    "fp8-e4m3-row": ("Float8WeightOnlyConfig", {}),
    "int4-g128-asym": (
        "Int4WeightOnlyConfig",
        {"group_size": 128, "int4_packing_format": "tile_packed_to_4d"},
    ),
}


@dataclass(frozen=True)
class PeerRow:
    """One peer with one matrix and number of tokens; timings are None in a dry run.

    Attributes:
        peer: its name.
        version: installed.
        format: of ours that has the same bits and groups.
        shape: name.
        rows: N.
        cols: K.
        n_tokens: M.
        relative_error: see the top.
        timing: of its product.
        cublas: of bfloat16 weights.
        speedup: time of cuBLAS in multiples of the peer's.
    """

    peer: str
    version: str
    format: str
    shape: str
    rows: int
    cols: int
    n_tokens: int
    relative_error: float
    timing: Timing | None
    cublas: Timing | None
    speedup: float | None


@dataclass(frozen=True)
class Peer:
    """Someone's kernels.

    Attributes:
        name: of the package.
        formats: ours that it has the like of.
        make: a product and the matrix that it stands for, from float32 [N, K] and a format.
    """

    name: str
    formats: Sequence[str]
    make: Callable[[Tensor, str], tuple[Callable[[Tensor], Tensor], Tensor]]


def installed(peer: Peer) -> str | None:
    """Its version, None if it is not installed or does not import here."""
    try:
        importlib.import_module(peer.name)
        return version(peer.name)
    except (ImportError, PackageNotFoundError, OSError, RuntimeError):
        return None


def gemlite_linear(weight: Tensor, name: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A GemLite layer, and the matrix float32 [N, K] that it stands for."""
    gemlite: Any = importlib.import_module("gemlite")
    fmt, (rows, cols) = parse_format(name), weight.shape
    matrix = quantize_rtn(weight[None], fmt, "minmax").pack(0, slice(None))
    shape = (rows, fmt.n_groups(cols))
    codes = unpack_codes(matrix.tensors["codes"], fmt.bits, cols)
    zeros = unpack_codes(matrix.tensors["zeros"], fmt.bits, shape[0] * shape[1]).reshape(shape)
    layer = gemlite.GemLiteLinear(
        fmt.bits,
        group_size=fmt.group_size,
        in_features=cols,
        out_features=rows,
        input_dtype=gemlite.DType.BF16,
        output_dtype=gemlite.DType.BF16,
    )
    scales = matrix.tensors["scales"].reshape(shape)
    layer.pack(*(t.to(weight.device) for t in (codes, scales.to(DTYPE), zeros.to(DTYPE))), None)
    return layer, matrix.dequantize().to(weight.device)


def torchao_linear(weight: Tensor, name: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A layer that torchao packed, and the matrix float32 [N, K] that it stands for."""
    torchao: Any = importlib.import_module("torchao.quantization")
    rows, cols = weight.shape
    kind, options = TORCHAO_CONFIGS[name]
    with torch.device("meta"):
        linear = nn.Linear(cols, rows, bias=False)
    linear.weight = nn.Parameter(weight.to(DTYPE), requires_grad=False)
    model = nn.Sequential(linear)
    torchao.quantize_(model, getattr(torchao, kind)(set_inductor_config=False, **options))
    if type(model[0].weight) is nn.Parameter:
        raise ValueError(f"torchao packs no matrix {rows} x {cols} like {name}")
    with torch.no_grad():
        columns = model(torch.eye(cols, dtype=DTYPE, device=weight.device))
    return torch.no_grad()(model), columns.T.to(torch.float32)


PEERS = (
    Peer("gemlite", GEMLITE_FORMATS, gemlite_linear),
    Peer("torchao", tuple(TORCHAO_CONFIGS), torchao_linear),
)


def measure_peer(
    bench: Bench, peer: Peer, shape: DenseShape, name: str, tokens: Sequence[int]
) -> Iterator[PeerRow]:
    """A peer on one matrix with every number of tokens.

    Raises:
        RuntimeError: a product is wrong.
    """
    weight = draw(shape.rows, shape.cols, bench.device)
    bits = parse_format(name).storage_bits(shape.rows, shape.cols)
    made = [peer.make(weight, name) for _ in range(n_copies(bits / 8, bench.l2_bytes))]
    runs = [run for run, _ in made]
    for n_tokens in tokens:
        x = draw(n_tokens, shape.cols, bench.device, seed=n_tokens).to(DTYPE)
        error = relative_error(runs[0](x), x.to(torch.float32) @ made[0][1].T)
        check_error(error, f"{peer.name} {name} {shape.name} with {n_tokens} tokens")
        calls: list[Call] = [partial(run, x) for run in runs]
        timing, cublas = bench.timer(calls), time_cublas(bench, shape, x)
        yield PeerRow(
            *(peer.name, version(peer.name), name, shape.name, shape.rows, shape.cols),
            *(n_tokens, error, timing, cublas, ratio(cublas, timing)),
        )
