"""Layers of an engine in kernel order: whether kernels run them, their tensors, their products.

Matrices are put into kernel order once, after loading, and the stored bytes are given up. Kernels
are tried before they are trusted, as in `alphaquant.runtime.kernel_use`: one matrix of every
format, and experts with every format of gate, of up and of down, must give on this device what
dequantized weights give.

Tensors in kernel order are buffers of the engine's layer, so that they are where a compiler and
CUDA graphs look for them.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from alphaquant.errors import ConfigError, ModelError
from alphaquant.kernels.moe.plan import ExpertWeights, stack_experts
from alphaquant.kernels.parts import take_apart
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.runtime.kernel_order import order_matrix
from alphaquant.runtime.kernel_use import check_trial, kernels_problem, why_no_kernel
from alphaquant.spaces.formats import Format

logger = logging.getLogger(__name__)

VARIABLE = "ALPHAQUANT_KERNELS"
"""Environment variable: `auto` (on GPUs where they can), `0` (never), `1` (an error if not)."""

_ADVICE = f"set {VARIABLE}=0 to compute with torch, and report this"
_N_TRIED = 4
"""Tokens of a comparison."""

Checked = set[tuple[str, Format]]
"""Where formats were compared already: in a linear, or in a projection of an expert."""


def wants_kernels(device: torch.device) -> bool:
    """Whether kernels run what they can on a device, as `VARIABLE` says.

    Raises:
        ConfigError: it says something else than `auto`, `0` or `1`.
        ModelError: it says `1`, and they cannot run here.
    """
    setting = os.environ.get(VARIABLE, "auto")
    if setting not in ("auto", "0", "1"):
        raise ConfigError(f"{VARIABLE}={setting!r} is not possible; use auto, 0 or 1")
    if setting == "0":
        return False
    problem = kernels_problem(device)
    if problem is not None and setting == "1":
        raise ModelError(f"{VARIABLE}=1 asks for kernels, but {problem}; or set {VARIABLE}=auto")
    if problem is not None and device.type == "cuda":
        logger.warning("packed matrices run in plain torch: %s", problem)
    return problem is None and (setting == "1" or device.type == "cuda")


def why_no_kernels(formats: Sequence[tuple[Format, int]], device: torch.device) -> str | None:
    """Why kernels cannot run a layer; None if they can.

    Args:
        formats: of its matrices, each with its columns.
        device: where they are.
    """
    reasons = (why_no_kernel(fmt, cols, device) for fmt, cols in formats)
    return next((reason for reason in reasons if reason is not None), None)


@dataclass(frozen=True)
class OrderedShard:
    """One matrix of a linear layer in kernel order.

    Attributes:
        buffers: names of its tensors in the layer.
        facts: of the operator; empty for bf16, whose only tensor is the weight, for torch.
    """

    buffers: tuple[str, ...]
    facts: str

    def product(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Its outputs, [n, K] -> [n, N]."""
        tensors = [getattr(layer, name) for name in self.buffers]
        if not self.facts:
            return linear(x, tensors[0].to(x.dtype))
        y: Tensor = torch.ops.alphaquant.packed_linear(x, tensors, self.facts)
        return y


def order_shards(
    layer: nn.Module, matrices: Sequence[PackedMatrix], dtype: torch.dtype, checked: Checked
) -> tuple[OrderedShard, ...]:
    """Put the matrices of a linear layer into kernel order, as buffers of the layer.

    Args:
        layer: of the engine.
        matrices: its shards, of formats that have kernels.
        dtype: of its inputs.
        checked: places where formats were compared; new ones are added.

    Raises:
        ModelError: a kernel fails or gives other numbers than torch.
    """
    import_module("alphaquant.kernels.ops_triton")
    shards = []
    for index, matrix in enumerate(matrices):
        if matrix.format.is_quantized:
            tensors, facts = take_apart(order_matrix(matrix))
        else:
            tensors, facts = [matrix.tensors["weight"].clone()], ""
        shard = OrderedShard(_keep(layer, f"shard_{index}", tensors), facts)
        if facts and ("linear", matrix.format) not in checked:
            checked.add(("linear", matrix.format))
            _try_shard(layer, shard, matrix, dtype)
        shards.append(shard)
    return tuple(shards)


@dataclass(frozen=True)
class OrderedExperts:
    """The experts of a layer in kernel order.

    Attributes:
        buffers: names of their tensors in the layer.
        facts: of the operator.
    """

    buffers: tuple[str, ...]
    facts: str

    def product(self, layer: nn.Module, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Sum of the experts' outputs, weighted, [n, H] -> [n, H]; ids as the layer counts."""
        tensors = [getattr(layer, name) for name in self.buffers]
        y: Tensor = torch.ops.alphaquant.grouped_moe(x, expert_ids, weights, tensors, self.facts)
        return y


Projections = tuple[PackedMatrix, PackedMatrix, PackedMatrix]
"""Gate, up and down of an expert."""


def order_experts(
    layer: nn.Module,
    experts: Sequence[Projections],
    first_expert: int,
    dtype: torch.dtype,
    checked: Checked,
) -> OrderedExperts:
    """Put the experts of a layer into kernel order, as buffers of the layer.

    Args:
        layer: of the engine.
        experts: those of this rank, at least one, of formats that have kernels.
        first_expert: number of the first one in the whole layer.
        dtype: of their inputs.
        checked: as in `order_shards`.

    Raises:
        ModelError: a kernel fails or gives other numbers than torch.
    """
    import_module("alphaquant.kernels.ops_triton")
    weights = [ExpertWeights(*map(order_matrix, expert)) for expert in experts]
    tensors, facts = take_apart(stack_experts(weights, first_expert))
    ordered = OrderedExperts(_keep(layer, "experts", tensors), facts)
    for number, expert in enumerate(experts, first_expert):
        names = ("gate", "up", "down")
        places = {(name, m.format) for name, m in zip(names, expert, strict=True)}
        if not checked.issuperset(places):
            checked.update(places)
            _try_expert(layer, ordered, expert, number, dtype)
    return ordered


def _keep(layer: nn.Module, prefix: str, tensors: Sequence[Tensor]) -> tuple[str, ...]:
    """Register tensors as buffers outside the state; their names."""
    names = tuple(f"{prefix}_part_{index}" for index in range(len(tensors)))
    for name, tensor in zip(names, tensors, strict=True):
        layer.register_buffer(name, tensor, persistent=False)
    return names


@torch.no_grad()
def _try_shard(
    layer: nn.Module, shard: OrderedShard, matrix: PackedMatrix, dtype: torch.dtype
) -> None:
    x = _draw(matrix, dtype)

    def trial() -> tuple[Tensor, Tensor]:
        return shard.product(layer, x), linear(x.float(), matrix.dequantize())

    check_trial(f"the kernel of {matrix.format.name} on {x.device}", dtype, trial, _ADVICE)


@torch.no_grad()
def _try_expert(
    layer: nn.Module,
    ordered: OrderedExperts,
    expert: Projections,
    number: int,
    dtype: torch.dtype,
) -> None:
    x = _draw(expert[0], dtype)
    ids = torch.full((len(x), 1), number, device=x.device)
    ones = torch.ones(len(x), 1, device=x.device)

    def trial() -> tuple[Tensor, Tensor]:
        gate, up, down = (matrix.dequantize() for matrix in expert)
        inner = silu(linear(x.float(), gate)) * linear(x.float(), up)
        return ordered.product(layer, x, ids, ones), linear(inner, down)

    names = ", ".join(matrix.format.name for matrix in expert)
    check_trial(f"expert {number}: the kernel of {names} on {x.device}", dtype, trial, _ADVICE)


def _draw(matrix: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """Inputs of a matrix, the same for the same sizes."""
    device = next(iter(matrix.tensors.values())).device
    generator = torch.Generator().manual_seed(matrix.cols)
    drawn = torch.randn(_N_TRIED, matrix.cols, generator=generator, device="cpu")
    return drawn.to(device, dtype)
