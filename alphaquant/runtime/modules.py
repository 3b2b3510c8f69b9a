"""Modules that hold packed weights and dequantize them in their forward pass.

The torch reference of the packed runtime. Experts run one after the other, each once per call on
all of its tokens; an expert without tokens costs nothing.

Letters: n tokens, k experts per token, E experts, H hidden size, I expert width.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.models.ends import row_scale
from alphaquant.models.layouts.standard import ListedExperts
from alphaquant.models.quantization_config import PackedFormats
from alphaquant.models.routing import tokens_by_expert
from alphaquant.models.sites import ExpertsSite, LayerSite, ModelMap
from alphaquant.quant.matrix import PackedMatrix, packed_shapes
from alphaquant.runtime.activations import fake_quantize
from alphaquant.runtime.dequant_cache import DequantCache, StoredWeight, parse_cache_size
from alphaquant.spaces.formats import BF16, Format
from alphaquant.spaces.units import Matrix


class PackedWeight(nn.Module):
    """A module with one weight, which is packed; its buffers are the tensors of `PackedMatrix`."""

    def __init__(self, fmt: Format, rows: int, cols: int, activation: Format = BF16) -> None:
        """Make an empty one; `load_state_dict` fills it.

        Args:
            fmt: the weight's format.
            rows: outputs, or what can be looked up.
            cols: inputs, or numbers of what is looked up.
            activation: what the inputs are rounded to, token by token; bf16 leaves them.
        """
        super().__init__()
        self.format, self.rows, self.cols, self.activation = fmt, rows, cols, activation
        for name, (shape, dtype) in packed_shapes(fmt, rows, cols).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        self.cache: DequantCache | None = None
        # That of the model: transformers makes modules with its dtype as the default.
        self.dtype = torch.get_default_dtype()

    def __getattr__(self, name: str) -> Any:
        """`weight` for model code that asks for it: dequantized, in the model's dtype.

        A weight of plain numbers is a buffer of that name. It is made anew every time it is
        asked for, so writing it changes nothing.
        """
        if name != "weight" or not self._is_coded():
            return super().__getattr__(name)
        stored = next(iter(self._buffers.values()), None)
        if stored is None or stored.is_meta:
            return torch.empty(self.rows, self.cols, dtype=self.dtype, device="meta")
        return self.dequantized(self.dtype)

    def packed(self) -> PackedMatrix:
        """The weight as stored."""
        names = packed_shapes(self.format, self.rows, self.cols)
        return PackedMatrix(
            self.format, self.rows, self.cols, {n: self.get_buffer(n) for n in names}
        )

    def stored(self) -> StoredWeight:
        """The weight as its buffers have it."""
        return self.packed()

    @property
    def storage(self) -> str:
        """How it is stored, for people."""
        return self.format.name

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight, [rows, cols] on the device of the packed tensors; not to be written to."""
        plain = None if self._is_coded() else self._buffers.get("weight")
        if plain is not None and plain.dtype == dtype:
            return plain
        if self.cache is None:
            return self.stored().dequantize().to(dtype)
        return self.cache.weight(id(self), self.stored(), dtype)

    def _is_coded(self) -> bool:
        """Whether the weight is stored otherwise than as it is."""
        return self.format.is_quantized

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Packed tensors go to other devices with the model, but never to another dtype.

        `model.to(torch.bfloat16)` would round the scales and so change the weights.
        """
        packed = dict(self.named_buffers(recurse=False))
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        restore_dtypes(self, packed)
        if self.cache is not None:
            self.cache.drop(id(self))
        return self

    def extra_repr(self) -> str:
        """Shape and format."""
        activation = f", inputs {self.activation.name}" if self.activation.is_quantized else ""
        return f"{self.cols} -> {self.rows}, {self.storage}{activation}"


class PackedLinear(PackedWeight):
    """A linear layer whose weight is packed."""

    def __init__(
        self,
        fmt: Format,
        rows: int,
        cols: int,
        bias: nn.Parameter | None = None,
        activation: Format = BF16,
    ) -> None:
        """Make an empty one; arguments as of `PackedWeight`, and a bias, kept as it is."""
        super().__init__(fmt, rows, cols, activation)
        self.bias = bias

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., cols] -> [..., rows] in the inputs' dtype."""
        weight = self.dequantized(inputs.dtype)
        return nn.functional.linear(fake_quantize(inputs, self.activation), weight, self.bias)


class PackedEmbedding(PackedWeight):
    """Token embeddings that are packed; rows are dequantized as they are looked up."""

    def __init__(self, fmt: Format, rows: int, cols: int, scale: float = 1.0) -> None:
        """Make an empty one; arguments as of `PackedWeight`.

        Args:
            fmt: their format.
            rows: V, words.
            cols: H.
            scale: what is looked up is multiplied with, in the model's dtype.
        """
        super().__init__(fmt, rows, cols)
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., H] in the model's dtype."""
        found, places = torch.unique(ids, return_inverse=True)
        rows = self.packed().rows_at(found).to(self.dtype)[places]
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale).to(rows)


class TiedHead(nn.Module):
    """An lm_head whose weight is that of packed embeddings."""

    def __init__(self, embedding: PackedEmbedding, bias: nn.Parameter | None = None) -> None:
        """Take the embeddings; they stay the module that holds the weight."""
        super().__init__()
        self._tied = (embedding,)  # in a tuple: no child of this module
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """The weight, dequantized, [V, H]."""
        found: Tensor = self._tied[0].weight
        return found

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., H] -> [..., V] in the inputs' dtype."""
        weight = self._tied[0].dequantized(inputs.dtype)
        return nn.functional.linear(inputs, weight, self.bias)


class PackedExpert(nn.Module):
    """Gate, up and down of one expert; `gate_proj` is None where it has no gate."""

    def __init__(self, gate: PackedLinear | None, up: PackedLinear, down: PackedLinear) -> None:
        """Take the projections."""
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down

    def inner(self) -> tuple[PackedLinear, ...]:
        """What its inputs go into: gate and up, or up alone."""
        return (self.up_proj,) if self.gate_proj is None else (self.gate_proj, self.up_proj)

    def linears(self) -> tuple[PackedLinear, ...]:
        """All of them: gate, if it has one, up and down."""
        return (*self.inner(), self.down_proj)


class PackedExperts(nn.Module):
    """An experts module with a format per matrix, called like the module that it replaces.

    Attributes:
        num_experts: E, of the whole layer.
        owned: numbers of the experts that it holds; all, unless `keep_experts` was called.
        reduce: what the sum over the owned experts goes through, [n, H] -> [n, H]; None leaves it.
    """

    def __init__(self, site: ExpertsSite, formats: PackedFormats) -> None:
        """Make an empty one.

        Args:
            site: the module it replaces; its gating function is used.
            formats: of its matrices and their inputs.
        """
        super().__init__()
        self._take(site, partial(_empty, formats))

    def _take(self, site: ExpertsSite, linear_of: Callable[[Matrix], PackedLinear]) -> None:
        """Become the experts of a site, with a linear for each of their matrices."""
        self.num_experts = site.n_experts
        self.owned = range(site.n_experts)
        self.reduce: Callable[[Tensor], Tensor] | None = None
        # A site is no module: the replaced module's (meta) weights stay out of the state.
        self.site = site
        for name in site.bias_names:
            self.register_parameter(name, site.module.get_parameter(name))
        for e in range(site.n_experts):
            *gate, up, down = (linear_of(matrix) for matrix in site.matrices(e))
            self.add_module(str(e), PackedExpert(gate[0] if gate else None, up, down))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sum of the chosen experts' outputs, weighted, [n, H].

        Experts that it does not own add nothing; ids of E and above are padding, or experts
        without weights.

        Args:
            args: as the replaced module takes them; in transformers hidden states [n, H], expert
                ids int64 [n, k], weights [n, k].
            kwargs: likewise.
        """
        inputs, expert_ids, weights = self.site.route_packed(args, kwargs)
        output = torch.zeros_like(inputs)
        for tokens in tokens_by_expert(expert_ids, weights, self.num_experts):
            if tokens.expert in self.owned:
                y = self._run_expert(tokens.expert, inputs[tokens.rows])
                weighted = (y * tokens.weights.unsqueeze(-1)).to(output.dtype)
                output.index_add_(0, tokens.rows, weighted)
        output = output if self.reduce is None else self.reduce(output)
        return self.shaped(output, inputs, expert_ids, weights, (*args, *kwargs.values())[0])

    def shaped(
        self, output: Tensor, inputs: Tensor, expert_ids: Tensor, weights: Tensor, given: Tensor
    ) -> Tensor:
        """The sum with what experts without weights add, [n, H], in the shape of what was given.

        DBRX hands over [B, T, H] and gets it back so.
        """
        passed = self.site.passed(inputs, expert_ids, weights)
        return (output if passed is None else output + passed).view(given.shape)

    def expert(self, number: int) -> PackedExpert:
        """One of the owned experts."""
        expert = self.get_submodule(str(number))
        assert isinstance(expert, PackedExpert)
        return expert

    def keep_experts(self, owned: range) -> None:
        """Forget the other experts; the numbers and names of these stay.

        Args:
            owned: part of the experts that it holds, step 1; may be empty.
        """
        for e in self.owned:
            if e not in owned:
                delattr(self, str(e))
        self.owned = owned

    def _run_expert(self, index: int, x: Tensor) -> Tensor:
        """One expert on its tokens, [m, H] -> [m, H]; errors carry a note that names it."""
        expert = self.expert(index)
        try:
            gate_up = torch.cat([linear(x) for linear in expert.inner()], -1)
            bias = self.site.gate_up_bias(self, index)
            if bias is not None:
                gate_up = gate_up + bias
            y: Tensor = expert.down_proj(self.site.apply_gate(gate_up))
        except Exception as error:
            formats = ", ".join(part.storage for part in expert.linears())
            parts = "up, down" if expert.gate_proj is None else "gate, up, down"
            error.add_note(f"in {self.site.name}, expert {index} ({parts}: {formats})")
            raise
        bias = self.site.down_bias(self, index)
        return y if bias is None else y + bias


def restore_dtypes(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Give buffers of a module that were cast their old contents, on the device they are on now.

    Args:
        module: just cast, moved, or both.
        buffers: its buffers before that, by name.
    """
    for name, before in buffers.items():
        after = module._buffers[name]  # `get_buffer` would find a property of that name
        assert after is not None
        if after.dtype != before.dtype:
            module._buffers[name] = before.to(after.device)


def cache_dequantized(model: nn.Module, size: str | int) -> DequantCache:
    """Let a packed model keep dequantized weights between calls; outputs stay exactly the same.

    Args:
        model: with packed modules, from `alphaquant.load` or `from_pretrained`.
        size: most bytes of kept weights, such as `512MiB` or an integer; 0 keeps none. Kept
            weights have the dtype of the inputs, 4 bytes per weight in float32.

    Returns:
        The store, which the model's packed modules share; one of an earlier call is given up.

    Raises:
        ConfigError: the size cannot be read.
        ModelError: the model has no packed modules.
    """
    cache = DequantCache(parse_cache_size(size))
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    if not packed:
        raise ModelError(
            f"{type(model).__name__} has no packed matrices to keep dequantized; give a model "
            "loaded from a checkpoint of aq-quantize"
        )
    for module in packed:
        module.cache = cache if cache.max_bytes else None
    return cache


def install_packed_modules(model_map: ModelMap, formats: PackedFormats) -> None:
    """Replace every quantizable module of a model by an empty packed one.

    Args:
        model_map: the model, on the meta device.
        formats: of every matrix and its inputs.
    """
    for layer in model_map.layers:
        replaced: dict[str, nn.Module] = {
            site.matrix.name: _empty(formats, site.matrix, site.module.bias)
            for site in layer.linears
        }
        for experts in layer.experts:
            if isinstance(experts, ListedExperts):
                replaced |= _listed(experts, formats)
            else:
                replaced[experts.name] = PackedExperts(experts, formats)
        for name, module in replaced.items():
            model_map.model.set_submodule(name, module)
    if model_map.ends is not None:
        _install_ends(model_map.model, model_map.ends, formats)


def _install_ends(model: nn.Module, ends: LayerSite, formats: PackedFormats) -> None:
    """Replace head and embeddings; tied weights stay those of the embeddings."""
    for linear in ends.linears:
        name = linear.matrix.name
        model.set_submodule(name, _empty(formats, linear.matrix, linear.module.bias))
    for site in ends.embeddings:
        matrix = site.matrix
        scale = row_scale(site.module)
        assert scale is not None, "other embeddings were refused"
        made = PackedEmbedding(formats.weights[matrix.name], matrix.rows, matrix.cols, scale)
        if site.head is not None:
            (head,) = matrix.aliases
            model.set_submodule(head, TiedHead(made, site.head.bias))
            # transformers would look for the parameters that were tied.
            model.all_tied_weights_keys = {}  # type: ignore[assignment]
            model._tied_weights_keys = {}  # type: ignore[assignment]
        model.set_submodule(matrix.name, made)


def _listed(site: ListedExperts, formats: PackedFormats) -> dict[str, nn.Module]:
    """A packed linear for every linear of every expert."""
    found: dict[str, nn.Module] = {}
    for e in range(site.n_experts):
        for matrix, linear in zip(site.matrices(e), site.linears(e), strict=True):
            found[matrix.name] = _empty(formats, matrix, linear.bias)
    return found


def _empty(
    formats: PackedFormats, matrix: Matrix, bias: nn.Parameter | None = None
) -> PackedLinear:
    activation = formats.activations.get(matrix.name, BF16)
    return PackedLinear(formats.weights[matrix.name], matrix.rows, matrix.cols, bias, activation)
