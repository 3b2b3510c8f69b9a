"""Sites: where in a model the quantizable matrices live, and how experts see their tokens.

`ExpertsSite` is the interface between the engine and a way of storing routed experts; the ways
that come with the project are in `alphaquant.models.layouts.standard`. Another is a subclass with
four members: `sizes`, `views`, `apply_gate`, `state_names`; see CONTRIBUTING.md, "a model".

Letters: E experts, H hidden size, I expert width, n tokens, k experts per token.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from alphaquant.models.pages.private_maps import LayerPages
from alphaquant.models.routing import ExpertTokens
from alphaquant.spaces.units import Inventory, Matrix

_MIXTRAL_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class ExpertSizes(NamedTuple):
    """How many experts a module holds, and how large they are."""

    n_experts: int
    hidden: int
    width: int


class ExpertViews(NamedTuple):
    """Weights of one expert: gate and up [I, H], down [H, I]; writing them writes the model.

    `gate` is None where experts have none and compute down(activation(up(x))).
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor


class RoutedTokens(NamedTuple):
    """What an experts module is called with: inputs [n, H], expert ids and weights [n, k]."""

    inputs: Tensor
    expert_ids: Tensor
    weights: Tensor


class Weighted(NamedTuple):
    """What one expert is given: inputs [m, H], and weights [m] that multiply its outputs."""

    inputs: Tensor
    weights: Tensor


@dataclass(frozen=True)
class LinearSite:
    """An `nn.Linear` that is quantized: its matrix is the whole weight.

    Attributes:
        matrix: the matrix.
        module: the linear.
        gate: where it belongs to a shared expert whose output is scaled by the sigmoid of a linear
            with one output (Qwen2-MoE), that linear.
    """

    matrix: Matrix
    module: nn.Linear
    gate: nn.Linear | None = None

    def view(self) -> Tensor:
        """The weight, [rows, cols]; writing it writes the model."""
        return self.module.weight.data


@dataclass(frozen=True)
class EmbeddingSite:
    """The token embeddings of a model: every row is looked up by itself.

    Attributes:
        matrix: their matrix, a row per token.
        module: an `nn.Embedding`, or one that scales what it looks up.
        head: lm_head, where it has the same weight.
    """

    matrix: Matrix
    module: nn.Embedding
    head: nn.Linear | None = None

    def view(self) -> Tensor:
        """The weight, [rows, cols]; writing it writes the model."""
        return self.module.weight.data


@dataclass(frozen=True)
class ExpertsSite(ABC):
    """The routed experts of one layer, or shared ones that are stored like them.

    Attributes:
        is_routed: whether tokens choose; experts that get every token are `shared`.
        name: path of the module.
        module: holds the experts' weights.
        block: the module that holds `module`, its router and shared experts.
        gate: matrices of the gate projections, by expert; likewise `up` and `down`. Empty where
            experts have no gate.
        bias_names: parameters of `module` that stay as they are when its weights are packed.
    """

    name: str
    module: nn.Module
    block: nn.Module
    gate: tuple[Matrix, ...]
    up: tuple[Matrix, ...]
    down: tuple[Matrix, ...]
    bias_names: tuple[str, ...] = ()
    is_routed: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def sizes(cls, module: nn.Module, name: str) -> ExpertSizes | None:
        """Sizes of the experts in a module of this layout, None for any other module.

        Raises:
            ModelError: it holds experts in a variant of the layout that is not supported.
        """

    @classmethod
    def is_called_by(cls, block: nn.Module, module: nn.Module) -> bool:
        """Whether the block that holds a module of this layout uses it as experts."""
        return True

    @abstractmethod
    def views(self, expert: int) -> ExpertViews:
        """The weights of one expert."""

    @abstractmethod
    def apply_gate(self, gate_up: Tensor) -> Tensor:
        """The gating function: gate outputs, then up outputs, [..., 2I] -> features [..., I].

        Without gate the activation: up outputs [..., I] -> features [..., I].
        """

    @abstractmethod
    def state_names(self) -> set[str]:
        """Names in the model's state of the tensors that hold the quantized matrices."""

    @classmethod
    def projections(cls, module: nn.Module) -> tuple[str | None, str, str]:
        """Names of gate, up and down in the matrices' names; no gate is None."""
        return ("gate_proj", "up_proj", "down_proj")

    @classmethod
    def make(cls, layer: int, name: str, module: nn.Module, block: nn.Module) -> "ExpertsSite":
        """The site of a module of this layout; arguments as the attributes, and the layer."""
        sizes = cls.sizes(module, name)
        assert sizes is not None
        names = cls.projections(module)
        shapes = ((sizes.width, sizes.hidden),) * 2 + ((sizes.hidden, sizes.width),)
        gate, up, down = (
            tuple(
                Matrix(
                    f"{name}.{e}.{own}",
                    *shape,
                    kind="expert" if cls.is_routed else "shared",
                    layer=layer,
                    expert=e if cls.is_routed else None,
                    aliases=_aliases(name, e, own),
                )
                for e in range(sizes.n_experts)
                if own is not None
            )
            for own, shape in zip(names, shapes, strict=True)
        )
        return cls(name, module, block, gate, up, down, cls.biases(module))

    @classmethod
    def biases(cls, module: nn.Module) -> tuple[str, ...]:
        """Names of the parameters that are added to the projections' outputs."""
        return ()

    @property
    def n_experts(self) -> int:
        """E."""
        return len(self.down)

    def inner(self, expert: int) -> tuple[Matrix, ...]:
        """What one expert's inputs go into: gate and up, or up alone."""
        return (*self.gate[expert : expert + 1], self.up[expert])

    def matrices(self, expert: int) -> tuple[Matrix, ...]:
        """The matrices of one expert: gate, if it has one, up and down."""
        return (*self.inner(expert), self.down[expert])

    def weights(self, expert: int) -> tuple[Tensor, ...]:
        """The weights of `matrices`, [rows, cols] each; writing them writes the model."""
        return tuple(weight for weight in self.views(expert) if weight is not None)

    @property
    def hooked(self) -> nn.Module:
        """The module whose inputs `route` reads; its output's gradient is that of the experts."""
        return self.module

    def route(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RoutedTokens:
        """Inputs, chosen experts and weights from the arguments of a call of `hooked`."""
        hidden, expert_ids, weights = (*args, *kwargs.values())[:3]
        return RoutedTokens(hidden, expert_ids, weights)

    def route_packed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RoutedTokens:
        """As `route`, from the arguments of a call of `module`, whose place packed experts take.

        Experts run on these inputs as they are, and these weights multiply their outputs.
        """
        return self.route(args, kwargs)

    def given(self, inputs: Tensor, tokens: ExpertTokens) -> Weighted:
        """What one expert is given of the inputs [n, H] that `route` found."""
        return Weighted(inputs[tokens.rows], tokens.weights)

    def passed(self, inputs: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor | None:
        """What chosen experts without weights add, [n, H]; None where there are none of those.

        Args:
            inputs: [n, H].
            expert_ids: [n, k]; numbers from E on are experts without weights, or padding.
            weights: [n, k].
        """
        return None

    def gate_up(self, expert: int, inputs: Tensor) -> Tensor:
        """Outputs of one expert's `inner` matrices, one after the other, [m, H] -> [m, 2I]."""
        parts = [inputs @ w.to(inputs.dtype).T for w in self.weights(expert)[:-1]]
        outputs = torch.cat(parts, -1)
        bias = self.gate_up_bias(self.module, expert)
        return outputs if bias is None else outputs + bias.to(outputs.dtype)

    def gate_up_bias(self, module: nn.Module, expert: int) -> Tensor | None:
        """Biases of the `inner` matrices, [2I]; `module` holds `bias_names`."""
        return None

    def down_bias(self, module: nn.Module, expert: int) -> Tensor | None:
        """Bias of the down projection, [H]; `module` holds `bias_names`."""
        return None


def make_site(
    layouts: Sequence[type[ExpertsSite]],
    layer: int,
    name: str,
    module: nn.Module,
    block: nn.Module,
) -> ExpertsSite | None:
    """The site of a module, None where no layout knows it.

    Args:
        layouts: the first that knows the module takes it.
        layer: index of its decoder layer.
        name: its path in the model.
        module: any module of the layer.
        block: the module that holds it.

    Raises:
        ModelError: it holds experts in a variant of a layout that is not supported.
    """
    for layout in layouts:
        if layout.sizes(module, name) is not None and layout.is_called_by(block, module):
            return layout.make(layer, name, module, block)
    return None


@dataclass(frozen=True)
class LayerSite:
    """A part of a model and what is quantized in it: a decoder layer, or what is beside these.

    Attributes:
        index: its number.
        name: its path in the model; empty beside the layers.
        module: the layer, or the model.
        linears: what is quantized beside routed experts.
        experts: routed experts, and shared ones that are stored like them.
        pages: its weights in maps of files; None where they are in memory.
        embeddings: the token embeddings, beside the layers.
    """

    index: int
    name: str
    module: nn.Module
    linears: tuple[LinearSite, ...]
    experts: tuple[ExpertsSite, ...]
    pages: LayerPages | None = None
    embeddings: tuple[EmbeddingSite, ...] = ()

    @property
    def plain(self) -> tuple[EmbeddingSite | LinearSite, ...]:
        """What is a module with one matrix."""
        return (*self.embeddings, *self.linears)

    @property
    def fresh_pages(self) -> LayerPages | None:
        """Its pages, from whose files its weights can come back; None where somebody wrote one."""
        return None if self.pages is None or self.pages.is_changed() else self.pages

    def release(self) -> None:
        """Give back the memory of weights that nobody changed, where they come from files."""
        if self.pages is not None:
            self.pages.release()

    def matrices(self) -> Iterator[Matrix]:
        """Its matrices: embeddings, linears, then experts by number (gate, up, down)."""
        for site in self.plain:
            yield site.matrix
        for experts in self.experts:
            for e in range(experts.n_experts):
                yield from experts.matrices(e)

    def views(self) -> Iterator[tuple[str, Tensor]]:
        """Name and weight [rows, cols] of each matrix; writing a weight writes the model."""
        for site in self.plain:
            yield site.matrix.name, site.view()
        for experts in self.experts:
            for e in range(experts.n_experts):
                names = (matrix.name for matrix in experts.matrices(e))
                yield from zip(names, experts.weights(e), strict=True)


@dataclass(frozen=True)
class Staying:
    """A parameter of a decoder layer with two or more dimensions that is not quantized.

    Attributes:
        name: its path in the model.
        n_weights: its size.
        reason: why, in a few words.
    """

    name: str
    n_weights: int
    reason: str


@dataclass(frozen=True)
class Carried:
    """A tensor of a checkpoint that its model does not load.

    Attributes:
        name: in the checkpoint.
        file: that holds it.
        n_weights: its size.
        n_bytes: likewise.
    """

    name: str
    file: Path
    n_weights: int
    n_bytes: int


@dataclass(frozen=True)
class ModelMap:
    """A model with its inventory and the place of every matrix.

    Attributes:
        model: a transformers causal language model.
        inventory: its matrices and kept tensors.
        layers: its decoder layers, in order.
        views: weights by matrix name.
        staying: what is not quantized although it has two or more dimensions.
        not_probed: why its code could not be run without numbers, so that routers were told by
            their place and size; None where it was.
        carried: tensors of the checkpoint that are no part of the model.
        source: the checkpoint's directory, where it is known.
        rest: weights beside the layers in maps of files; None where they are in memory.
        ends: what is quantized beside the layers; None for nothing.
    """

    model: nn.Module
    inventory: Inventory
    layers: tuple[LayerSite, ...]
    views: dict[str, Tensor] = field(repr=False)
    staying: tuple[Staying, ...] = ()
    not_probed: str | None = None
    carried: tuple[Carried, ...] = ()
    source: Path | None = None
    rest: LayerPages | None = None
    ends: LayerSite | None = None

    @property
    def parts(self) -> tuple[LayerSite, ...]:
        """Its layers, and what is beside them, if that is quantized."""
        return self.layers if self.ends is None else (*self.layers, self.ends)

    def release(self) -> None:
        """Give back the memory of all weights that nobody changed, where they come from files."""
        for layer in self.layers:
            layer.release()
        if self.rest is not None:
            self.rest.release()

    def view(self, matrix_name: str) -> Tensor:
        """The weight of a matrix, [rows, cols]; writing it writes the model."""
        return self.views[matrix_name]


def _aliases(name: str, expert: int, projection: str) -> tuple[str, ...]:
    """The other names that configurations may use: Llama's and Mixtral's, old path and new."""
    canonical = {v: k for k, v in _MIXTRAL_NAMES.items()}.get(projection, projection)
    paths = (
        name,
        name.replace(".mlp.", ".block_sparse_moe."),
        name.replace(".block_sparse_moe.", ".mlp."),
    )
    own = f"{name}.{expert}.{projection}"
    pairs = [
        f"{path}.{expert}.{other}"
        for path, other in (
            (name, _MIXTRAL_NAMES[canonical]),
            (paths[1], _MIXTRAL_NAMES[canonical]),
            (name, canonical),
            (paths[2], canonical),
        )
    ]
    return tuple(dict.fromkeys(alias for alias in pairs if alias != own))
