"""Who reads and who writes the residual stream of a layer, found by what modules do.

One pass over a layer with its own numbers. Modules that give the same for larger inputs are norms;
what they give is cut off from the graph there, so that gradients show what reaches the layer's
output by addition alone:

    a norm of the stream    its inputs depend on the layer's inputs by addition alone
    a reader                its inputs are what such a norm gives, or the stream itself
    a writer                the output's gradient arrives at its outputs as it is, but for a factor
                            per token

All else (projections inside attention, norms of heads, convolutions) neither reads nor writes.
What is found is no proof: `alphaquant.models.rotation.derived` compares the model's predictions.

Letters: H hidden size, n tokens, I expert width.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.models.rotation.hadamard import Rotation
from alphaquant.models.sites import ExpertsSite, LayerSite
from alphaquant.models.walk import LayerCall, hidden_of, shared_state

_SAME = 1e-3
"""Relative difference that float32 leaves between equal directions, with room."""

_LARGE = 1000.0
"""What inputs are multiplied by to tell norms: the epsilon of a norm counts for nothing there."""


@dataclass(frozen=True)
class StreamNorm:
    """A norm of the residual stream, x / rms(x) * gain.

    Attributes:
        name: path in the model.
        module: the norm.
        offset: what is added to its weight to get the gain: 1 of Gemma's, else 0.
    """

    name: str
    module: nn.Module
    offset: float

    def gain(self) -> Tensor:
        """float32 [H]."""
        weight = getattr(self.module, "weight", None)
        return torch.ones(()) if weight is None else weight.detach().float() + self.offset

    @torch.no_grad()
    def clear(self) -> None:
        """Make the gain 1: whoever reads the norm has taken it over."""
        weight = getattr(self.module, "weight", None)
        if weight is not None:
            weight.fill_(1.0 - self.offset)


@dataclass(frozen=True)
class Reader:
    """Weights [..., H] whose products are with the stream.

    Attributes:
        name: path in the model.
        weights: they can be written.
        norm: whose outputs they read; None for the stream itself.
    """

    name: str
    weights: tuple[Tensor, ...]
    norm: StreamNorm | None


@dataclass(frozen=True)
class Writer:
    """What is added to the stream.

    Attributes:
        name: path in the model.
        weights: [H, K] each.
        biases: [..., H] each.
    """

    name: str
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]


@dataclass(frozen=True)
class Streams:
    """Readers, writers and norms of a layer."""

    norms: tuple[StreamNorm, ...]
    readers: tuple[Reader, ...]
    writers: tuple[Writer, ...]

    @torch.no_grad()
    def rotate(self, rotation: Rotation) -> None:
        """Fold the gains into the readers and rotate; the layer then works on a rotated stream."""
        for reader in self.readers:
            for weight in reader.weights:
                if reader.norm is not None:
                    weight.mul_(reader.norm.gain().to(weight.device))
                rotation.rotate_columns(weight)
        for writer in self.writers:
            for weight in writer.weights:
                rotation.rotate_rows(weight)
            for bias in writer.biases:
                rotation.rotate_columns(bias)
        for norm in self.norms:
            norm.clear()


def find_streams(layer: LayerSite, call: LayerCall) -> Streams:
    """Readers and writers of a layer.

    Args:
        layer: the layer, with weights.
        call: how it is called, in float32.

    Raises:
        ModelError: a norm that cannot be folded, naming it.
    """
    with torch.enable_grad():
        watch = _Watch(layer, call)
        return _Verdict(watch).streams()


def as_norm(name: str, module: nn.Module, width: int) -> StreamNorm:
    """A module as a norm of the stream.

    Args:
        name: its path.
        module: tells by its outputs what it is.
        width: H.

    Raises:
        ModelError: it is none that a rotation keeps.
    """
    weight = getattr(module, "weight", None)
    device = torch.device("cpu") if weight is None else weight.device
    inputs = torch.sin(torch.arange(2.0 * width, device=device) ** 1.5).reshape(2, width) + 0.5
    with torch.no_grad():
        found = module(inputs).float()
    plain = inputs / inputs.pow(2).mean(-1, keepdim=True).sqrt()
    for offset in (0.0, 1.0):
        norm = StreamNorm(name, module, offset)
        if _is_close(found, plain * norm.gain()):
            return norm
    raise ModelError(
        f"--rotate: {name} ({type(module).__name__}) is no root mean square norm with a gain "
        "alone (it subtracts the mean, adds a bias, or does more), which a rotation does not "
        "keep; leave --rotate out for this architecture"
    )


@torch.no_grad()
def is_norm(module: nn.Module, args: tuple[Any, ...], outputs: Any, **others: Any) -> bool:
    """Whether a module without others in it gives the same for larger inputs, and mixes them.

    Args:
        module: it was just called.
        args: with these, the inputs first.
        outputs: and gave this.
        others: arguments by name.
    """
    if next(module.children(), None) is not None or not isinstance(outputs, Tensor):
        return False
    inputs = args[0] if args else None
    if not isinstance(inputs, Tensor):
        return False
    is_small = all(p.dim() == 1 for p in module.parameters())
    if not is_small or outputs.shape != inputs.shape or not inputs.is_floating_point():
        return False
    large = inputs.detach().float() * _LARGE
    half = large.shape[-1] // 2
    mixed = torch.cat([large[..., :half], 8 * large[..., half:]], -1)
    found, larger, other = (
        module.forward(given, *args[1:], **others) for given in (large, large * 2, mixed)
    )
    return _is_close(larger, found) and not _is_close(other[..., :half], found[..., :half])


@dataclass
class _Seen:
    """A module's first call in the pass."""

    name: str
    module: Any
    inputs: Tensor
    outputs: Tensor


@dataclass
class _Watch:
    """What one pass over a layer showed.

    Attributes:
        layer: the layer.
        call: its call; the hidden states are replaced by `start`.
        start: what goes in, [B, T, H].
        norms: norms that were called; their outputs are leaves of the graph.
        plain: modules with weights of their own.
        experts: sites of experts.
        end: what came out, [B, T, H].
    """

    layer: LayerSite
    call: LayerCall
    norms: list[_Seen] = field(default_factory=list)
    plain: list[_Seen] = field(default_factory=list)
    experts: list[_Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = self.call.hidden.detach().clone().requires_grad_()
        args, kwargs = self.call.args, {**self.call.kwargs, **shared_state(self.call.kwargs)}
        if args:
            args = (self.start, *args[1:])
        else:
            kwargs["hidden_states"] = self.start
        with self._hooked():
            self.end = hidden_of(self.layer.module(*args, **kwargs))

    @property
    def width(self) -> int:
        """H."""
        return self.start.shape[-1]

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        inside = {f"{site.name}." for site in self.layer.experts}
        sites = {id(site.hooked): site for site in self.layer.experts}
        owned = {id(site.module) for site in self.layer.experts}
        with ExitStack() as stack:
            for path, module in self.layer.module.named_modules():
                full = f"{self.layer.name}.{path}"
                if any(full.startswith(prefix) for prefix in inside):
                    continue
                see = self._hook(full, module, sites.get(id(module)), id(module) in owned)
                handle = module.register_forward_hook(see, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _hook(
        self, name: str, module: nn.Module, site: ExpertsSite | None, is_owned: bool
    ) -> Callable[..., Any]:
        has_weights = any(p.dim() > 1 for p in module.parameters(recurse=False))

        def see(_: nn.Module, args: Any, kwargs: Any, outputs: Any) -> Any:
            inputs = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            found = outputs[0] if isinstance(outputs, tuple) else outputs
            if inputs is None or not isinstance(found, Tensor):
                return None
            if site is not None:
                self.experts.append(_Seen(name, site, inputs, found))
            elif has_weights and not is_owned:
                self.plain.append(_Seen(name, module, inputs, found))
            elif is_norm(module, args, outputs, **kwargs):
                leaf = found.detach().requires_grad_()
                self.norms.append(_Seen(name, module, inputs, leaf))
                return leaf
            return None

        return see


class _Verdict:
    """What follows from a pass."""

    def __init__(self, watch: _Watch) -> None:
        self._watch = watch
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(watch.end.shape, generator=generator)
        self._noise = noise.to(watch.end.device)
        seen = (*watch.norms, *watch.plain, *watch.experts)
        outputs = [one.outputs for one in seen]
        asked = [t if t.requires_grad else watch.start for t in outputs]
        grads = torch.autograd.grad(
            (watch.end * self._noise).sum(), asked, retain_graph=True, allow_unused=True
        )
        self._arrives = {
            id(one): self._is_along(grad) if one.outputs.requires_grad else False
            for one, grad in zip(seen, grads, strict=True)
        }

    def streams(self) -> Streams:
        """Readers, writers and norms.

        Raises:
            ModelError: a norm that cannot be folded.
        """
        watch, norms = self._watch, {}
        for seen in watch.norms:
            if self._arrives[id(seen)]:
                raise ModelError(
                    f"--rotate: {seen.name} ({type(seen.module).__name__}) normalizes what is "
                    "added to the residual stream, and its gain cannot be folded; leave --rotate "
                    "out for this architecture"
                )
            if self._is_of_stream(seen.inputs):
                norms[id(seen)] = as_norm(seen.name, seen.module, watch.width)
        streams = [(seen.outputs, norms[id(seen)]) for seen in watch.norms if id(seen) in norms]
        bare = [watch.start, *(seen.inputs for seen in watch.norms if id(seen) in norms)]
        sources: list[tuple[Tensor, StreamNorm | None]] = [*streams, *((t, None) for t in bare)]
        readers = tuple(self._readers(sources))
        idle = [n.name for n in norms.values() if all(r.norm is not n for r in readers)]
        if idle:
            raise ModelError(
                f"--rotate: nothing that is known reads what {idle[0]} gives; leave --rotate out "
                "for this architecture"
            )
        return Streams(tuple(norms.values()), readers, tuple(self._writers()))

    def _readers(self, sources: list[tuple[Tensor, StreamNorm | None]]) -> Iterator[Reader]:
        for seen in (*self._watch.plain, *self._watch.experts):
            found = [norm for tensor, norm in sources if _are_equal(seen.inputs, tensor)]
            if not found:
                continue
            if isinstance(seen.module, ExpertsSite):
                weights = _inner(seen.module)
            else:
                own = seen.module.named_parameters(recurse=False)
                weights = tuple(
                    p.data for _, p in own if p.dim() == 2 and p.shape[-1] == self._watch.width
                )
            yield Reader(seen.name, weights, found[0])

    def _writers(self) -> Iterator[Writer]:
        for seen in self._watch.plain:
            if not self._arrives[id(seen)] or not isinstance(seen.module, nn.Linear):
                continue
            bias = () if seen.module.bias is None else (seen.module.bias.data,)
            yield Writer(seen.name, (seen.module.weight.data,), bias)
        for seen in self._watch.experts:
            if self._arrives[id(seen)]:
                yield Writer(seen.name, _outer(seen.module), _down_biases(seen.module))

    def _is_of_stream(self, inputs: Tensor) -> bool:
        """Whether a norm's inputs depend on what goes in by addition alone."""
        start = self._watch.start
        if inputs is start:
            return True
        if inputs.shape != start.shape or not inputs.requires_grad:
            return False
        (grad,) = torch.autograd.grad(
            (inputs * self._noise).sum(), [start], retain_graph=True, allow_unused=True
        )
        return self._is_along(grad)

    def _is_along(self, grad: Tensor | None) -> bool:
        """Whether a gradient is the noise but for a factor per token; zero rows say nothing."""
        if grad is None or grad.numel() != self._noise.numel():
            return False
        rows = grad.reshape(-1, self._watch.width).double()
        noise = self._noise.reshape(-1, self._watch.width).double()
        some = rows.norm(dim=-1) > 0
        if not some.any():
            return False
        cosines = torch.nn.functional.cosine_similarity(rows[some], noise[some], dim=-1)
        return bool((cosines.abs() > 1 - _SAME).all())


def _inner(site: ExpertsSite) -> tuple[Tensor, ...]:
    """Gate and up of every expert, [I, H] each."""
    return tuple(w for e in range(site.n_experts) for w in site.weights(e)[:-1])


def _outer(site: ExpertsSite) -> tuple[Tensor, ...]:
    """Down of every expert, [H, I] each."""
    return tuple(site.weights(e)[-1] for e in range(site.n_experts))


def _down_biases(site: ExpertsSite) -> tuple[Tensor, ...]:
    found = (site.down_bias(site.module, e) for e in range(site.n_experts))
    return tuple(bias for bias in found if bias is not None)


def _are_equal(inputs: Tensor, other: Tensor) -> bool:
    width = other.shape[-1]
    if inputs.shape[-1] != width or inputs.numel() != other.numel():
        return False
    return torch.equal(
        inputs.detach().float().reshape(-1, width), other.detach().reshape(-1, width)
    )


def _is_close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).norm()) <= _SAME * float(expected.norm())
