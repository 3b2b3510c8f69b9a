"""How fast this machine does what a search consists of, measured in seconds on random numbers.

The real functions run on the model's own shapes: a model of its first layers with random weights,
the quantizer on one stack of each shape, table dequantization, sha256. No weight of the model is
needed.
"""

import copy
import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from alphaquant.evaluators.predictions import predict_pieces
from alphaquant.models.loading import auto_class
from alphaquant.models.sites import ModelMap
from alphaquant.quant.engine import quantize_layer
from alphaquant.quant.hessian import HessianBatch
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.spaces.units import Matrix
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.studies.planning.needs import Needs, Stack

_FORMATS = ("int4-g64", "int3-g128", "int2-g128")
_ROWS = 1024
"""Rows of a matrix that the quantizer is measured on, at most."""
_LEAST_SECONDS = 0.2
_WINDOWS = 8
"""Windows of a batch."""
_SUMMED = 512
"""Tokens of an expert that are added to its Hessian at once."""
_HASHED = 2**26


@dataclass(frozen=True)
class Rates:
    """Speeds of one machine.

    Attributes:
        layer: seconds of decoder layers per token and weight that it passes.
        head: seconds of predictions per token, beside the layers.
        float32: multiplications a second in float32.
        once: seconds that a stack takes whatever the number of its formats, by (rows, columns).
        per_format: seconds of a stack in one format more.
        dequantized: weights a second.
        hashed: bytes a second, read from memory.
    """

    layer: float
    head: float
    float32: float
    once: Mapping[tuple[int, int], float]
    per_format: Mapping[tuple[int, int], float]
    dequantized: float
    hashed: float


UNKNOWN = Rates(0.0, 0.0, math.inf, defaultdict(float), defaultdict(float), math.inf, math.inf)
"""No time at all: for a plan of memory and disk alone."""


def measure_rates(needs: Needs, settings: QuantSettings, dtype: torch.dtype) -> Rates:
    """Speeds of this machine for a search.

    Args:
        needs: of the search; its shapes are taken.
        settings: of the quantizer.
        dtype: of the computation.
    """
    device = next(needs.model_map.model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device
    once, per_format = {}, {}
    packed: PackedMatrix | None = None
    for stack in needs.stacks:
        key = (stack.n_rows, stack.n_cols)
        once[key], per_format[key], packed = _quantizer(stack, settings)
    assert packed is not None, "a model has matrices"
    n_weights = packed.rows * packed.cols
    content = bytes(_HASHED)
    layer, head = _forward(needs, dtype, device)
    return Rates(
        layer=layer,
        head=head,
        float32=_products(needs, device),
        once=once,
        per_format=per_format,
        dequantized=n_weights / _seconds(packed.dequantize),
        hashed=_HASHED / _seconds(lambda: hashlib.sha256(content).digest()),
    )


@torch.no_grad()
def _forward(needs: Needs, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Seconds of the layers per token and weight, and of predictions per token."""
    model, n_layers = _short_model(needs.model_map, dtype)
    model.to(device).eval()
    # With few numbers, whose size does not matter, products are as fast as with any.
    tokens = torch.zeros(_WINDOWS, needs.seq_len, dtype=torch.int64)
    tokens += torch.arange(needs.seq_len) % needs.vocabulary
    body = getattr(model, "base_model", model)
    layers = _seconds(lambda: body(tokens.to(device), use_cache=False))
    whole = _seconds(lambda: [p.log_probs.amax() for p in predict_pieces(model, tokens)])
    n_active = tokens.numel() * needs.active_in(n_layers)
    return layers / n_active, max(whole - layers, 0.0) / tokens.numel()


def _short_model(model_map: ModelMap, dtype: torch.dtype) -> tuple[nn.Module, int]:
    """The model up to its first layer of the most weights, with random weights; its layers."""
    sizes = [sum(p.numel() for p in x.module.parameters()) for x in model_map.layers]
    n_layers = 1 + sizes.index(max(sizes))
    typed: Any = model_map.model
    config = copy.deepcopy(typed.config)
    text = config.get_text_config()
    text.num_hidden_layers = n_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:n_layers]
    model: nn.Module = auto_class(config).from_config(config, dtype=dtype)
    return model, n_layers


def _products(needs: Needs, device: torch.device) -> float:
    """Multiplications a second in float32, as Hessians are summed."""
    largest = max(needs.stacks, key=lambda s: s.count * s.n_rows * s.n_cols)
    inputs = torch.randn(_SUMMED, largest.n_cols, device=device)
    total = torch.zeros(largest.n_cols, largest.n_cols, device=device)
    return _SUMMED * largest.n_cols**2 / _seconds(lambda: total.addmm_(inputs.T, inputs))


def _seconds(run: Callable[[], Any]) -> float:
    """Seconds of a call: the mean of as many as take a fifth of a second, after a first one."""
    run()
    n_runs, started = 0, time.perf_counter()
    while True:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        n_runs += 1
        taken = time.perf_counter() - started
        if taken >= _LEAST_SECONDS:
            return taken / n_runs


def _quantizer(stack: Stack, settings: QuantSettings) -> tuple[float, float, PackedMatrix]:
    """Seconds of one stack of a shape: once, per format; and a packed matrix of it."""
    parts = _cut(stack.matrices)
    weights = {m.name: torch.randn(m.rows, m.cols) * m.cols**-0.5 for m in parts}
    inputs = torch.randn(2 * stack.n_cols, stack.n_cols)
    batch = HessianBatch((parts,), (inputs.T @ inputs)[None], (len(inputs),), ("plain",))
    weights_of = cast(ModelMap, _Weights(weights))
    found: list[PackedMatrix] = []

    def run(formats: Sequence[str]) -> float:
        started = time.perf_counter()
        items = quantize_layer(weights_of, cast(Any, None), [batch], formats, settings)
        found.extend(item.packed for item in items)
        return time.perf_counter() - started

    run(_FORMATS[:1])  # compiles the column loops where nobody has
    one, all_of_them = run(_FORMATS[:1]), run(_FORMATS)
    scale = stack.n_rows / sum(m.rows for m in parts)
    per_format = max(all_of_them - one, 0.1 * one) / (len(_FORMATS) - 1)
    return max(one - per_format, 0.0), per_format * scale, found[0]


def _cut(matrices: tuple[Matrix, ...]) -> tuple[Matrix, ...]:
    """The same with fewer rows: rows are independent."""
    most = max(1, _ROWS // len(matrices))
    return tuple(
        Matrix(m.name, min(m.rows, most), m.cols, m.kind, m.layer, m.expert) for m in matrices
    )


@dataclass(frozen=True)
class _Weights:
    """What the engine asks a model for."""

    weights: Mapping[str, Tensor]

    def view(self, name: str) -> Tensor:
        return self.weights[name]
