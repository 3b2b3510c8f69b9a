"""How fast this machine does what a search consists of, measured in seconds on random numbers.

The real functions run on the model's own shapes: a model of its first layers with random weights,
the quantizer on one stack of each shape, table dequantization, sha256. No weight of the model is
needed. Of llama.cpp's types in the menu one of each class is timed, and stands for the others.
"""

import copy
import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.evaluators.predictions import predict_pieces
from alphaquant.models.dtypes import rough_products
from alphaquant.models.layouts.padded import pad_experts
from alphaquant.models.loading import auto_class
from alphaquant.models.sites import ModelMap
from alphaquant.progress import Progress, Stage, no_progress
from alphaquant.quant.engine import quantize_batches
from alphaquant.quant.ggml.encoding import encode
from alphaquant.quant.hessian import HessianBatch
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.quant.two_sided.output_hessian import BLOCK_ROWS, row_blocks
from alphaquant.spaces.formats import Format
from alphaquant.spaces.units import Matrix
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.studies.planning.needs import Needs, Stack

_FORMATS = ("int4-g64", "int3-g128", "nl3-g32-s256")
"""That stand for all formats of ours. The last two are a plain one and the dearest kind, which
takes 2.5 times as long: about what a menu of both takes for each."""
_CLASSES = ("iq2_", "iq3_", "")
"""Starts of the names of llama.cpp's types that take about as long: tables of vectors, smaller
ones, and what descent goes on from. Of 1024 x 1024 weights, one thread, in times of int4-g64:
iq2_xxs 5, iq2_xs 10, iq2_s 17; iq3_* 2; all others 3 to 5."""
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
        calibrated: the same where calibration text runs, see `rough_products`.
        head: seconds of predictions per token, beside the layers.
        float32: multiplications a second as Hessians are summed.
        once: seconds that a stack takes whatever the number of its formats, by (rows, columns).
        per_format: seconds of a stack in one format more, the mean of the bank's formats; what
            does not fit its inputs counts as no time.
        dequantized: weights a second.
        hashed: bytes a second, read from memory.
    """

    layer: float
    calibrated: float
    head: float
    float32: float
    once: Mapping[tuple[int, int], float]
    per_format: Mapping[tuple[int, int], float]
    dequantized: float
    hashed: float


_NONE = defaultdict[tuple[int, int], float](float)
UNKNOWN = Rates(0.0, 0.0, 0.0, math.inf, _NONE, _NONE, math.inf, math.inf)
"""No time at all: for a plan of memory and disk alone."""


@dataclass(frozen=True)
class Pilot:
    """What a machine is measured with.

    Attributes:
        needs: of the search; its shapes are taken.
        dtype: of the computation.
        device: of the model.
        progress: called with ("pilot", measurements done, measurements).
    """

    needs: Needs
    dtype: torch.dtype
    device: torch.device
    progress: Progress = no_progress

    def measure(self, settings: QuantSettings) -> Rates:
        """Speeds of this machine for a search with these settings of the quantizer.

        Raises:
            ModelError: the first layers do not make a model.
        """
        stacks = self.needs.stacks
        total = len(stacks) + 1
        self.progress(Stage.PILOT, 0, total)
        layer, calibrated, head = self._measured_forward()
        for fmt in self.needs.bank_formats:
            if fmt.is_ggml:  # llama.cpp makes its tables once
                encode(fmt.kind, torch.ones(1, fmt.group_size))
        once, per_format = {}, {}
        packed: PackedMatrix | None = None
        for done, stack in enumerate(stacks, 1):
            self.progress(Stage.PILOT, done, total)
            key = (stack.n_rows, stack.n_cols)
            once[key], per_format[key], packed = self._quantizer(stack, settings)
        assert packed is not None, "a model has matrices"
        n_weights, content = packed.rows * packed.cols, bytes(_HASHED)
        found = Rates(
            layer=layer,
            calibrated=calibrated,
            head=head,
            float32=_products(self.needs, self.device),
            once=once,
            per_format=per_format,
            dequantized=n_weights / _seconds(packed.dequantize),
            hashed=_HASHED / _seconds(lambda: hashlib.sha256(content).digest()),
        )
        self.progress(Stage.PILOT, total, total)
        return found

    def measure_again(self, known: Rates, settings: QuantSettings) -> Rates:
        """The same for other settings: the quantizer alone is measured."""
        once, per_format = {}, {}
        for stack in self.needs.stacks:
            key = (stack.n_rows, stack.n_cols)
            once[key], per_format[key], _ = self._quantizer(stack, settings)
        return replace(known, once=once, per_format=per_format)

    def _quantizer(
        self, stack: Stack, settings: QuantSettings
    ) -> tuple[float, float, PackedMatrix]:
        """Seconds of one stack of a shape: once, per format; and a packed matrix of it."""
        parts = _cut(stack.matrices)
        shares = shares_of(self.needs.bank_formats, stack.n_cols)
        weights = _Random(
            {m.name: torch.randn(m.rows, m.cols, device=self.device) * m.cols**-0.5 for m in parts}
        )
        inputs = torch.randn(2 * stack.n_cols, stack.n_cols, device=self.device)
        batch = HessianBatch((parts,), (inputs.T @ inputs)[None], (len(inputs),), ("plain",))
        if settings.two_sided:
            batch = replace(batch, outputs={m.name: _outputs_of(m) for m in parts})
        found: list[PackedMatrix] = []

        def run(formats: Sequence[str]) -> float:
            started = time.perf_counter()
            items = quantize_batches(weights, [batch], formats, settings)
            found.extend(item.packed for item in items)
            return time.perf_counter() - started

        run(_FORMATS[:1])  # compiles the column loops where nobody has
        one = run(_FORMATS[:1])
        first = max(run(_FORMATS) - one, 0.1 * one) / (len(_FORMATS) - 1)
        once = max(one - first, 0.0)
        per_format = first * shares.pop(_FORMATS)
        for (name,), share in shares.items():
            per_format += share * max(run((name,)) - once, 0.0)
        scale = stack.n_rows / sum(m.rows for m in parts)
        return once, per_format * scale, found[0]

    def _measured_forward(self) -> tuple[float, float, float]:
        try:
            return self._forward()
        except Exception as error:  # of any kind: it is transformers' code of one architecture
            why = " ".join(str(error).split()) or type(error).__name__
            name = type(self.needs.model_map.model).__name__
            raise ModelError(
                f"the speed of {name} cannot be measured on its first layers ({why}); leave "
                "--plan and --time-limit out"
            ) from error

    @torch.no_grad()
    def _forward(self) -> tuple[float, float, float]:
        """Seconds of the layers per token and weight, also rough; of predictions per token."""
        model, n_layers = _short_model(self.needs.model_map, self.dtype)
        model.to(self.device).eval()
        tokens = torch.zeros(_WINDOWS, self.needs.seq_len, dtype=torch.int64)
        tokens += torch.arange(self.needs.seq_len) % self.needs.vocabulary
        body = getattr(model, "base_model", model)

        def pass_layers() -> None:
            body(tokens.to(self.device), use_cache=False)

        layers = rough = _seconds(pass_layers)
        if self.dtype == torch.float32:
            with rough_products(self.needs.space.inventory.matrices):
                rough = _seconds(pass_layers)
        whole = _seconds(lambda: [p.log_probs.amax() for p in predict_pieces(model, tokens)])
        n_active = tokens.numel() * self.needs.active_in(n_layers)
        of_head = max(whole - layers, 0.0) / tokens.numel()
        return layers / n_active, rough / n_active, of_head


def _outputs_of(matrix: Matrix) -> tuple[Tensor, ...]:
    """Output Hessians of a matrix, random."""
    drawn = [torch.randn(2 * BLOCK_ROWS, r.stop - r.start) for r in row_blocks(matrix.rows)]
    return tuple(x.T @ x / len(x) for x in drawn)


def _short_model(model_map: ModelMap, dtype: torch.dtype) -> tuple[nn.Module, int]:
    """The model up to its first layer of the most weights, with random weights; its layers."""
    sizes = [sum(p.numel() for p in x.module.parameters()) for x in model_map.layers]
    n_layers = 1 + sizes.index(max(sizes))
    typed: Any = model_map.model
    config = copy.deepcopy(typed.config)
    text = config.get_text_config()
    text.num_hidden_layers = n_layers
    if vars(text).get("layer_types"):  # where it is no property of the number of layers
        text.layer_types = text.layer_types[:n_layers]
    model: nn.Module = auto_class(config).from_config(config, dtype=dtype)
    pad_experts(model)
    return model, n_layers


def _products(needs: Needs, device: torch.device) -> float:
    """Multiplications a second as Hessians are summed."""
    largest = max(needs.stacks, key=lambda s: s.count * s.n_rows * s.n_cols)
    inputs = torch.randn(_SUMMED, largest.n_cols, device=device)
    total = torch.zeros(largest.n_cols, largest.n_cols, device=device)
    with rough_products(needs.space.inventory.matrices):
        seconds = _seconds(lambda: total.addmm_(inputs.T, inputs))
    return _SUMMED * largest.n_cols**2 / seconds


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


def shares_of(formats: Sequence[Format], n_cols: int) -> dict[tuple[str, ...], float]:
    """What stands for which share of a bank's formats, in matrices of so many inputs.

    Worked example: int4-g64, int8-g128, q4_k and iq2_s are a half of ours, a quarter q4_k and a
    quarter iq2_s in 256 inputs; in 128 inputs they are a half of ours.

    Args:
        formats: of the bank.
        n_cols: inputs.

    Returns:
        Formats to time -> share of the bank; those that do not fit have none.
    """
    fitting = [f for f in formats if f.fits(n_cols)]
    found: dict[tuple[str, ...], float] = {}
    found[_FORMATS] = sum(not f.is_ggml for f in fitting) / len(formats)
    left = [f.name for f in fitting if f.is_ggml]
    for start in _CLASSES:
        own = [name for name in left if name.startswith(start)]
        left = [name for name in left if name not in own]
        if own:
            found[(own[len(own) // 2],)] = len(own) / len(formats)
    return found


def _cut(matrices: tuple[Matrix, ...]) -> tuple[Matrix, ...]:
    """The same with fewer rows: rows are independent."""
    most = max(1, _ROWS // len(matrices))
    return tuple(
        Matrix(m.name, min(m.rows, most), m.cols, m.kind, m.layer, m.expert) for m in matrices
    )


@dataclass(frozen=True)
class _Random:
    """What the engine asks a model for, of random numbers."""

    weights: Mapping[str, Tensor]

    def view(self, name: str) -> Tensor:
        return self.weights[name]
