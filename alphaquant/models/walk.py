"""Walking a model decoder layer by decoder layer, over many batches at once.

Every batch runs through the model's own forward pass, which is paused whenever it calls a decoder
layer (a greenlet per batch). So the layers of all batches are run together, one layer after the
other, and whatever the model does between its layers happens as it is written: positional
arguments, masks, token ids, and state that one layer hands to the next. Memory holds the hidden
states of all batches and one layer's work. Weights that come from files are given back when the
walk leaves their layer, and hidden states that the memory would not hold are on disk, unless
gradients are wanted.

    for step in walk(model_map, batches):
        with observe_layer(step.layer, observer):
            step.run()

`check_walk` compares a walk with ordinary forward passes before hours are spent on one.

Letters: B windows in a batch, T tokens in a window, H hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from alphaquant.errors import ModelError
from alphaquant.models.dtypes import rough_products
from alphaquant.models.pages.hidden_states import DiskStates, fits
from alphaquant.models.pages.memory import trim_heap
from alphaquant.models.sites import ExpertsSite, LayerSite, LinearSite, ModelMap

TOLERANCE = 1e-3
"""Largest relative difference between a walk and a forward pass; float32 rounds below 1e-5."""

_PREDICTED_BYTES, _LEAST_POSITIONS = 28 << 20, 256
"""Float32 predictions in memory at once, of so many positions where that is more. A block of up to
32 MiB comes from the C library's heap, a larger one from the system, page by page. But for every
part the head's weights are read anew: over 151 936 tokens, hidden size 2048, bfloat16, a position
takes 2.1 ms of 48 at once, 1.2 of 256, 1.0 of 441, the way back 3.0, 1.2, 1.1 (one thread)."""
ROW_BYTES, _GPU_ROW_BYTES = 1 << 20, 1 << 24
"""What is computed from predictions is computed for so many bytes of them at a time. On a CPU they
stay in the cache: log_softmax of rows of 49 152 takes 0.08 ms each, with 16 MiB 0.16 (one
thread)."""

ROUGH_TOLERANCE = 0.05
"""Likewise where the model computes in bfloat16 or float16 and sums come in another order."""


@dataclass(frozen=True)
class LayerCall:
    """With what the model calls a layer for one batch, hidden states included."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def hidden(self) -> Tensor:
        """Hidden states that go into the layer, [B, T, H]."""
        found: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return found

    def with_hidden(self, hidden: Tensor) -> "LayerCall":
        """The same call with other hidden states, [B, T, H]."""
        if self.args:
            return LayerCall((hidden, *self.args[1:]), self.kwargs)
        return LayerCall((), {**self.kwargs, "hidden_states": hidden})

    def run(self, layer: LayerSite) -> Any:
        """What the layer gives: hidden states, or a tuple that starts with them."""
        return layer.module(*self.args, **self.kwargs)

    def first(self, n_windows: int) -> "LayerCall":
        """The same call for the first windows of the batch."""
        n_batch = len(self.hidden)

        def cut(x: Any) -> Any:
            is_batched = isinstance(x, Tensor) and x.dim() > 0 and len(x) == n_batch > 1
            return x[:n_windows] if is_batched else x

        args, kwargs = tree_map(cut, (self.args, dict(self.kwargs)))
        return LayerCall(args, kwargs)


class LayerObserver(Protocol):
    """Receives the inputs of the quantizable modules while a layer runs."""

    def on_linear(self, site: LinearSite, inputs: Tensor) -> None:
        """Inputs [B, T, K] or [n, K] of an nn.Linear."""

    def on_experts(
        self, site: ExpertsSite, inputs: Tensor, expert_ids: Tensor, weights: Tensor
    ) -> None:
        """Inputs [n, H], chosen experts [n, k] and routing weights [n, k] of routed experts."""


@dataclass
class LayerStep:
    """A walk at one layer: the model waits there with every batch.

    Attributes:
        layer: the layer.
        calls: how it is called, by batch.
        outputs: what it gave, by batch; the model goes on with these.
        states: where `run` keeps hidden states; None for memory.
        is_rough: whether `run` may round products, see `rough_products`.
    """

    layer: LayerSite
    calls: list[LayerCall]
    outputs: list[Any] = field(default_factory=list)
    states: DiskStates | None = None
    is_rough: bool = False

    def run(self) -> list[Tensor]:
        """Run the layer on every batch, again if called again; what it gives last counts.

        Returns:
            Hidden states [B, T, H] by batch.
        """
        rough = rough_products(self.layer.matrices()) if self.is_rough else nullcontext()
        with rough:
            self.outputs = [self._run(call) for call in self.calls]
        return [hidden_of(output) for output in self.outputs]

    def _run(self, call: LayerCall) -> Any:
        if self.states is None:
            return call.run(self.layer)
        output = self.states.keep_hidden(call.run(self.layer))
        self.states.drop(call.hidden)
        return output


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a layer gave."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def shared_state(kwargs: Mapping[str, Any]) -> dict[str, dict[Any, Any]]:
    """Copies of the dictionaries among a call's arguments, in which layers leave state."""
    return {
        name: dict(value) for name, value in kwargs.items() if isinstance(value, MutableMapping)
    }


def batches_of(tokens: Tensor, batch_size: int) -> list[Tensor]:
    """Split windows [N, T] into batches; all but the last have `batch_size` rows."""
    return list(torch.split(tokens, batch_size))


def walk(
    model_map: ModelMap,
    batches: Sequence[Tensor],
    results: list[Any] | None = None,
    before: Callable[[int], None] = lambda number: None,
    first: int = 0,
    is_rough: bool = False,
) -> Iterator[LayerStep]:
    """Go through the decoder layers, first to last, with all batches.

    Args:
        model_map: the model.
        batches: token ids, int64 [B, T] each.
        results: is filled with what the model gives for every batch, after the last layer; None to
            stop there, which leaves out norm and lm_head.
        before: called with the number of each batch before the model begins with it.
        first: number of the first layer that is run; what those before it give, the caller sets.
        is_rough: for what is counted over calibration text, see `rough_products`.

    Yields:
        One step per layer. It is run when the caller has not done so.

    Raises:
        ModelError: the model does not call its decoder layers in their order, once each.
    """
    states = _states_for(model_map, batches)
    layer = model_map.layers[0]
    with _pausing(model_map), _kept_embeddings(model_map, states):
        passes: list[_Pass] = []
        try:
            for number, batch in enumerate(batches):
                before(number)
                passes.append(_Pass(model_map, batch))
            for layer in model_map.layers:
                if layer.pages is not None and layer.index >= first:
                    layer.pages.prefetch()
                calls = [p.wait_for(layer) for p in passes]
                step = LayerStep(layer, calls, states=states, is_rough=is_rough)
                yield step
                if not step.outputs:
                    step.run()
                for one, output in zip(passes, step.outputs, strict=True):
                    is_last = layer is model_map.layers[-1]
                    if not is_last or results is not None:
                        one.resume(output)
                step.calls, step.outputs = [], []
                layer.release()
                trim_heap()
            if results is not None:
                results += [one.result for one in passes]
        finally:
            for one in passes:
                one.end()
            layer.release()
            if model_map.rest is not None:
                model_map.rest.release()


@torch.no_grad()
def check_walk(model_map: ModelMap, batches: Sequence[Tensor]) -> None:
    """Compare a walk over two windows with ordinary forward passes, before hours are spent.

    Every layer runs twice on each window, as later passes over its calls will.

    Args:
        model_map: the model.
        batches: windows, int64 [B, T] each; the very first and the very last are used.

    Raises:
        ModelError: the results differ; the first layer that gives something else when it runs
            again is named.
    """
    parameter = next(model_map.model.parameters())
    limit = TOLERANCE if parameter.dtype == torch.float32 else ROUGH_TOLERANCE
    windows = [w.to(parameter.device) for w in (batches[0][:1], batches[-1][-1:])]
    with releasing(model_map):
        expected = [model_map.model(window, use_cache=False).logits for window in windows]
    found: list[Any] = []
    for step in walk(model_map, windows, found):
        before = [hidden.clone() for hidden in step.run()]
        again = step.run()
        worst = max(relative_error(a, b) for a, b in zip(again, before, strict=True))
        if worst > limit:  # NaN is told by name where it is met
            raise ModelError(
                _walk_problem(model_map, f"{step.layer.name} run twice", worst, limit)
            )
    worst = max(relative_error(f.logits, e) for f, e in zip(found, expected, strict=True))
    if worst > limit:  # NaN is told by name where it is met
        raise ModelError(_walk_problem(model_map, "the walk through all layers", worst, limit))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is right; infinite for other shapes."""
    if found.shape != expected.shape:
        return float("inf")
    scale = float(expected.float().norm())
    distance = float((found.float() - expected.float()).norm())
    return distance / scale if scale else distance


def _walk_problem(model_map: ModelMap, what: str, error: float, limit: float) -> str:
    return (
        f"{type(model_map.model).__name__} cannot be quantized layer by layer: {what} differs "
        f"from an ordinary forward pass by {error:.1e} relative to it, at most {limit:.0e} is "
        "rounding; its layers keep state that is not among their arguments: use --method rtn, or "
        "report the architecture"
    )


class _Pass:
    """The model's forward pass over one batch, waiting at a decoder layer."""

    def __init__(self, model_map: ModelMap, batch: Tensor) -> None:
        device = next(model_map.model.parameters()).device
        self._model, self._batch = model_map.model, batch.to(device)
        self._greenlet = _PassGreenlet(self._run)
        self._with_gradients = torch.is_grad_enabled()
        self._call: tuple[nn.Module, LayerCall] | None = None
        self.result: Any = None
        self._switch(None)

    def wait_for(self, layer: LayerSite) -> LayerCall:
        """The call that the model waits with.

        Raises:
            ModelError: it waits at another layer, or ended.
        """
        if self._call is None or self._call[0] is not layer.module:
            raise ModelError(
                f"the model's forward pass never called {layer.name} where it comes in order; its "
                "layers cannot be walked one by one: use --method rtn or report the architecture"
            )
        return self._call[1]

    def resume(self, output: Any) -> None:
        """Let the model go on with what the layer gave, to the next layer or the end."""
        self._switch(output)

    def end(self) -> None:
        """Unwind what still waits."""
        if not self._greenlet.dead:
            self._greenlet.throw()  # GreenletExit, which a greenlet swallows

    def _run(self, _: Any) -> None:
        self.result = self._model(self._batch, use_cache=False)

    def _switch(self, value: Any) -> None:
        outer = torch.is_grad_enabled()
        torch.set_grad_enabled(self._with_gradients)
        try:
            self._call = self._greenlet.switch(value)
        finally:
            self._with_gradients = torch.is_grad_enabled()
            torch.set_grad_enabled(outer)


class _PassGreenlet(greenlet):  # type: ignore[misc]  # it has no types
    """Tells a model that runs inside a walk from one that is simply called."""


@contextmanager
def _pausing(model_map: ModelMap) -> Iterator[None]:
    """Let decoder layers hand their calls to the walk that runs the model, if one does."""

    def pausing(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            current = getcurrent()
            if not isinstance(current, _PassGreenlet) or current.parent is None:
                return forward(*args, **kwargs)
            return current.parent.switch((module, LayerCall(args, kwargs)))

        return run

    with replaced_forwards([layer.module for layer in model_map.layers], pausing):
        yield


def _states_for(model_map: ModelMap, batches: Sequence[Tensor]) -> DiskStates | None:
    """Where hidden states [B, T, H] of all batches go; None for memory."""
    parameter = next(model_map.model.parameters())
    config: Any = model_map.model.config
    width = getattr(config.get_text_config(), "hidden_size", None)
    if torch.is_grad_enabled() or parameter.device.type != "cpu" or not isinstance(width, int):
        return None
    n_bytes = sum(batch.numel() for batch in batches) * width * parameter.itemsize
    return None if fits(n_bytes) else DiskStates()


@contextmanager
def _kept_embeddings(model_map: ModelMap, states: DiskStates | None) -> Iterator[None]:
    """Keep what the embedding gives on disk too: every pass holds it to its end."""
    try:
        embedding: Any = model_map.model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        embedding = None
    if states is None or embedding is None:
        yield
        return
    with replaced_forwards([embedding], lambda _, forward: states.kept_outputs(forward)):
        yield


@contextmanager
def releasing(model_map: ModelMap) -> Iterator[None]:
    """Give the weights of every layer back when it has run, where they come from files.

    For ordinary forward passes, of which each goes through the whole model.
    """

    def hook(layer: LayerSite) -> Any:
        return lambda module, args, output: layer.release()

    layers = [layer for layer in model_map.layers if layer.pages is not None]
    handles = [layer.module.register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def layers_skipped(model_map: ModelMap, output: Any) -> Iterator[None]:
    """Let the last layer give what a walk found, and the others what they are given.

    An ordinary forward pass then runs what comes after the layers.

    Args:
        model_map: the model.
        output: of the last layer, for the batch that the pass is over.
    """
    last = model_map.layers[-1].module

    def skipping(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if module is last:
                return output
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return run

    with replaced_forwards([layer.module for layer in model_map.layers], skipping):
        yield


@contextmanager
def watch_head(head: nn.Linear, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Hand over what a head is given, [B, T, K], and let it give nothing, [B, T, 0]."""

    def seeing(_: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(inputs: Tensor) -> Tensor:
            see(inputs)
            return inputs.new_empty(*inputs.shape[:-1], 0)

        return run

    with replaced_forwards([head], seeing):
        yield


@torch.no_grad()
def end_logits(model_map: ModelMap, batch: Tensor, output: Any, positions: slice) -> Tensor:
    """What a model predicts of what its last layer gave.

    Args:
        model_map: the model; its head is an `nn.Linear`.
        batch: token ids, int64 [B, T].
        output: of the last layer, for this batch.
        positions: which of the T; the head computes no others.

    Returns:
        Logits, [B, positions, V].
    """
    model: Any = model_map.model

    def cut(_: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda inputs: forward(part_of_hidden(inputs, slice(None), positions))

    head = model.get_output_embeddings()
    with layers_skipped(model_map, output), replaced_forwards([head], cut):
        found: Tensor = model(batch.to(hidden_of(output).device), use_cache=False).logits
    return found


def positions_at_once(vocabulary: int) -> int:
    """Positions whose predictions over so many tokens are in memory at once."""
    return max(_LEAST_POSITIONS, _PREDICTED_BYTES // (4 * vocabulary))


def row_chunks(rows: Tensor) -> list[slice]:
    """Predictions [n, V] in chunks of bounded size in float32, one row at least."""
    n_rows, width = rows.shape
    n_bytes = _GPU_ROW_BYTES if rows.is_cuda else ROW_BYTES
    step = max(1, n_bytes // (4 * max(1, width)))
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def part_of_hidden(hidden: Tensor, windows: slice, positions: slice) -> Tensor:
    """A copy of some positions, [B, T, H] -> [b, t, H]; for a head a slice would not do.

    Of a slice, even of one window, which counts as contiguous, torch 2.13 multiplies every window
    by a copy of the weight in bfloat16 on a CPU: 128 positions of 512, 2048 inputs, 50 304 outputs
    take 4.6 s, of a copy of them 0.09 s (one thread; `findings/`).
    """
    return hidden[windows, positions].clone(memory_format=torch.contiguous_format)


@contextmanager
def replaced_forwards(
    modules: Sequence[nn.Module],
    replace: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """Give modules other forward functions for a while.

    Args:
        modules: in any order.
        replace: called with a module and its own function; gives the other one.
    """
    own = [module.__dict__.get("forward") for module in modules]  # None: the class's
    try:
        for module in modules:
            module.forward = replace(module, module.forward)
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


@contextmanager
def observe_layer(layer: LayerSite, observer: LayerObserver) -> Iterator[None]:
    """Call an observer with the inputs of every quantizable module while the layer runs.

    What a site runs to find the routing of its tokens is not observed.

    Raises:
        ModelError: on leaving, a module that the layer holds was never called.
    """
    reached: set[str] = set()
    routing = False

    def linear_hook(site: LinearSite) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if not routing:
                reached.add(site.matrix.name)
                observer.on_linear(site, args[0])

        return hook

    def experts_hook(site: ExpertsSite) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal routing
            routing = True
            try:
                tokens = site.route(args, kwargs)
            finally:
                routing = False
            reached.add(site.name)
            observer.on_experts(site, *tokens)

        return hook

    handles = [site.module.register_forward_pre_hook(linear_hook(site)) for site in layer.linears]
    handles += [
        site.hooked.register_forward_pre_hook(experts_hook(site), with_kwargs=True)
        for site in layer.experts
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    expected = {site.matrix.name for site in layer.linears} | {site.name for site in layer.experts}
    if expected - reached:
        names = sorted(expected - reached)
        raise ModelError(
            f"{len(names)} modules of {layer.name} were never called during calibration, e.g. "
            f"{names[0]}; their inputs are unknown, so they cannot be quantized with data: use "
            "--method rtn or report the architecture"
        )
