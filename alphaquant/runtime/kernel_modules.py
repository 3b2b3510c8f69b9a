"""Packed modules that the GPU kernels run.

Each takes the place of a module of `alphaquant.runtime.modules` and is one: what asks a model for
its packed matrices, or saves it, gets the stored tensors bit for bit, made anew from kernel order.
What makes these modules is `alphaquant.runtime.kernel_use`.

Letters: n tokens, k experts per token, E experts, H hidden size.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.kernels.moe.plan import (
    ExpertWeights,
    GroupedExperts,
    stack_experts,
    unstack_expert,
)
from alphaquant.kernels.order import KernelWeight
from alphaquant.kernels.parts import put_together, take_apart
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.runtime.activations import fake_quantize
from alphaquant.runtime.kernel_order import order_matrix, restore_matrix
from alphaquant.runtime.modules import PackedExpert, PackedExperts, PackedLinear, restore_dtypes


class KernelLinear(PackedLinear):
    """A packed linear whose weight is in kernel order."""

    def __init__(self, packed: PackedLinear) -> None:
        """Take over a packed linear that has its tensors.

        Args:
            packed: of a format that has a kernel order; not changed.
        """
        nn.Module.__init__(self)
        self.format, self.rows, self.cols = packed.format, packed.rows, packed.cols
        self.activation, self.bias, self.cache = packed.activation, packed.bias, None
        self.dtype = packed.dtype
        self.n_parts, self.facts = _keep_parts(self, order_matrix(packed.packed()))

    def packed(self) -> PackedMatrix:
        """The weight as stored, made anew."""
        return restore_matrix(put_together(_parts(self, self.n_parts), self.facts), self.format)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., cols] -> [..., rows] in the inputs' dtype."""
        x = fake_quantize(inputs, self.activation).reshape(-1, self.cols)
        y: Tensor = torch.ops.alphaquant.packed_linear(x, _parts(self, self.n_parts), self.facts)
        y = y.reshape(*inputs.shape[:-1], self.rows)
        return y if self.bias is None else y + self.bias

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: t for name, t in self.packed().tensors.items()})


class KernelExperts(PackedExperts):
    """Packed experts in kernel order, all of a layer in a few launches."""

    def __init__(self, packed: PackedExperts) -> None:
        """Take over packed experts that have their tensors.

        Args:
            packed: at least one expert, without biases, gated by silu, inputs not rounded. Not
                changed.

        Raises:
            FormatError: a format has no kernel order.
        """
        nn.Module.__init__(self)
        self.num_experts, self.owned = packed.num_experts, packed.owned
        self.reduce, self.site = packed.reduce, packed.site
        experts = [packed.expert(number) for number in self.owned]
        self.formats = [tuple(part.format for part in linears_of(expert)) for expert in experts]
        grouped = stack_experts([_order_expert(expert) for expert in experts], self.owned.start)
        self.n_parts, self.facts = _keep_parts(self, grouped)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sum of the chosen experts' outputs, weighted, [n, H]; see `PackedExperts`."""
        tokens = self.site.route_packed(args, kwargs)
        output = self.add_experts(*tokens)
        output = output if self.reduce is None else self.reduce(output)
        return self.shaped(output, *tokens, (*args, *kwargs.values())[0])

    def add_experts(self, inputs: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Sum of the owned experts' outputs, weighted, before `reduce`.

        Args:
            inputs: [n, H].
            expert_ids: [n, k].
            weights: [n, k].
        """
        tensors = _parts(self, self.n_parts)
        try:
            output: Tensor = torch.ops.alphaquant.grouped_moe(
                inputs, expert_ids, weights, tensors, self.facts
            )
        except Exception as error:
            error.add_note(f"in {self.site.name}, {self.extra_repr()}")
            raise
        return output

    def keep_experts(self, owned: range) -> None:
        """Refused: experts are divided before they are stacked.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            f"the experts of {self.site.name} are in kernel order and cannot be divided any more; "
            "load with kernels=False, divide, then call use_kernels"
        )

    def packed_experts(self) -> Iterator[tuple[int, tuple[PackedMatrix, ...]]]:
        """Number of each owned expert with its gate, up and down as stored, made anew."""
        grouped: GroupedExperts = put_together(_parts(self, self.n_parts), self.facts)
        for number, formats in zip(self.owned, self.formats, strict=True):
            expert = unstack_expert(grouped, number)
            ordered = (expert.gate, expert.up, expert.down)
            yield number, tuple(map(restore_matrix, ordered, formats))

    def extra_repr(self) -> str:
        """Number of experts, and how many have which formats of gate, up and down."""
        names = [" / ".join(fmt.name for fmt in formats) for formats in self.formats]
        counts = ", ".join(f"{names.count(own)} x {own}" for own in sorted(set(names)))
        return f"{len(names)} of {self.num_experts} experts: {counts}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KernelExperts":
        """As of `PackedLinear`: to other devices, never to another dtype."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        restore_dtypes(self, before)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for number, matrices in self.packed_experts():
            for name, matrix in zip(PROJECTIONS, matrices, strict=True):
                for key, tensor in matrix.tensors.items():
                    destination[f"{prefix}{number}.{name}.{key}"] = tensor


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""Of a `PackedExpert`."""


def _keep_parts(module: nn.Module, value: KernelWeight | GroupedExperts) -> tuple[int, str]:
    """Register the tensors of a value as buffers outside the state; how many, and other facts."""
    tensors, facts = take_apart(value)
    for index, tensor in enumerate(tensors):
        module.register_buffer(f"kernel_part_{index}", tensor, persistent=False)
    return len(tensors), facts


def _parts(module: nn.Module, n_parts: int) -> list[Tensor]:
    """The buffers of `_keep_parts`, in their order."""
    return [getattr(module, f"kernel_part_{index}") for index in range(n_parts)]


def linears_of(expert: PackedExpert) -> tuple[PackedLinear, PackedLinear, PackedLinear]:
    """Gate, up and down of an expert that has a gate, as `PROJECTIONS` names them."""
    assert expert.gate_proj is not None
    return expert.gate_proj, expert.up_proj, expert.down_proj


def _order_expert(expert: PackedExpert) -> ExpertWeights:
    return ExpertWeights(*(order_matrix(part.packed()) for part in linears_of(expert)))
