"""What a model's code does with its linears, seen in one forward pass without weights or numbers.

A copy of the model with fake tensors (shapes and dtypes, no data) runs over one short window.
Every operation of torch is watched, and each tensor carries the names of the parameters that it
was last multiplied by ("its makers"); whole numbers carry none. From that follows, for each
`nn.Linear`:

    chooses     its outputs feed a top-k, a softmax over experts, or the routing weights of
                experts, and nothing else that is computed: routers, however they are built, and
                indexers of sparse attention
    is odd      its weight is used by other code than its own forward pass (absorbed projections),
                or its forward pass never runs (the weight is used in its place, or not at all)

Experts run no code here: their module gives zeros, so data-dependent loops are not entered. Where
code asks which elements are not zero, all of them are.

Letters: E experts, T tokens.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from alphaquant.models.layouts.standard import ListedExperts
from alphaquant.models.sites import ExpertsSite

N_TOKENS = 23
"""T of the window: a prime, so that it is no number of experts."""

_PRODUCTS = frozenset(
    {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"}
)
_CHOICES = frozenset({"topk", "argmax", "sort", "argsort", "kthvalue"})
_SEARCHES = frozenset({"nonzero", "argwhere"})
_QUESTIONS = frozenset(
    {"__get__", "size", "dim", "numel", "stride", "is_floating_point", "get_device"}
)
"""Operations that ask about a tensor and do not compute with it."""


@dataclass(frozen=True)
class Probe:
    """What one forward pass showed.

    Attributes:
        choosing: linears that only decide where tokens go.
        odd: linears that are no plain product, with the reason in a few words.
        problem: why the pass ended early, None if it did not; then nothing is said about linears
            that it did not reach.
    """

    choosing: frozenset[str] = frozenset()
    odd: Mapping[str, str] = field(default_factory=dict)
    problem: str | None = None


def probe_model(model: nn.Module, layers: str, experts: Sequence[ExpertsSite]) -> Probe:
    """Watch a forward pass of a model's code.

    Args:
        model: a transformers causal language model, on any device, with or without weights; it is
            not changed and not run.
        layers: path of its list of decoder layers; only linears inside are judged.
        experts: its routed experts.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        twin = _fake_copy(model, mode)
    except Exception as error:  # whatever a model's attributes raise when they are copied
        return Probe(problem=_first_line(error))
    watch = _Watch(twin, f"{layers}.", {s.n_experts for s in experts if s.is_routed})
    for site in experts:
        _silence(twin, site, watch)
    problem = None
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, log.disabled = log.disabled, True  # it prints tracebacks of what is caught here
    # Whoever makes the model without weights has meta as the default device.
    with torch.device("cpu"), mode, torch.no_grad(), watch:
        try:
            twin(torch.zeros(1, N_TOKENS, dtype=torch.int64), use_cache=False)
        except Exception as error:  # code that needs data; what was seen before it counts
            problem = _first_line(error)
        finally:
            log.disabled = was_disabled
    return watch.verdict(problem)


class _Watch(TorchFunctionMode):
    """Follows which parameters made each tensor, and what linears' outputs are used for."""

    def __init__(self, model: nn.Module, prefix: str, counts: set[int]) -> None:
        super().__init__()
        self._prefix, self._counts = prefix, counts
        self._linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
        self._weights = {id(m.weight): n for n, m in self._linears.items()}
        # Tensors are kept, so that ids stay theirs; fake ones take no memory.
        self._makers: dict[int, tuple[Tensor, frozenset[str]]] = {}
        self._parameters: dict[int, tuple[Tensor, str]] = {}
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                owner = name.removesuffix(".weight") if id(parameter) in self._weights else name
                self._parameters[id(parameter)] = (parameter, owner)
        self._running: list[str] = []
        self._called: set[str] = set()
        self._elsewhere: set[str] = set()
        self._chosen: set[str] = set()
        self._by_count: set[str] = set()
        self._consumers: dict[str, set[str]] = {}
        for name, linear in self._linears.items():
            linear.forward = self._marked(name, linear.forward)  # type: ignore[method-assign]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(getattr(func, "__name__", ""))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name not in _QUESTIONS:
            self._note_use(inputs)
        is_search = name in _SEARCHES and not kwargs.get("as_tuple", False)
        result = _all_places(inputs[0]) if is_search else func(*args, **kwargs)
        if name in _QUESTIONS and name != "__get__":
            return result
        self._follow(name, inputs, args, result)
        return result

    def chose(self, tensors: Iterable[Any]) -> None:
        """Routing weights that experts are called with."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._choose(self._made_by(tensor))

    def verdict(self, problem: str | None) -> Probe:
        """What was seen, for the linears of the decoder layers."""
        inside = {n for n in self._linears if n.startswith(self._prefix)}
        choosing = {n for n in self._chosen if n in self._by_count or not self._consumers.get(n)}
        grown = True
        while grown:  # what feeds only those that choose, chooses: routers of several layers
            more = {n for n, to in self._consumers.items() if to <= choosing} - choosing
            grown = bool(more)
            choosing |= more
        odd = dict.fromkeys(self._elsewhere & inside, "other code uses its weight")
        if problem is None:
            odd |= dict.fromkeys(inside - self._called - odd.keys(), "it is never called")
        return Probe(frozenset(choosing & inside), odd, problem)

    def _marked(self, name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(inputs: Tensor) -> Tensor:
            self._called.add(name)
            self._running.append(name)
            try:
                return forward(inputs)
            finally:
                self._running.pop()

        return run

    def _note_use(self, inputs: list[Tensor]) -> None:
        own = self._running[-1] if self._running else None
        self._elsewhere |= {
            self._weights[id(x)]
            for x in inputs
            if id(x) in self._weights and self._weights[id(x)] != own
        }

    def _made_by(self, tensor: Tensor) -> frozenset[str]:
        found = self._makers.get(id(tensor))
        return found[1] if found else frozenset()

    def _choose(self, makers: frozenset[str]) -> None:
        self._chosen |= makers
        for name in makers & self._linears.keys():
            if any(0 <= self._linears[name].out_features - n <= n for n in self._counts):
                self._by_count.add(name)

    def _follow(self, name: str, inputs: list[Tensor], args: Any, result: Any) -> None:
        """Give the results their makers, and note what the inputs were used for."""
        owners = {self._parameters[id(x)][1] for x in inputs if id(x) in self._parameters}
        makers = frozenset().union(*(self._made_by(x) for x in inputs))
        if name in _CHOICES or (
            name == "softmax" and inputs[0].shape[-1:].numel() in self._counts
        ):
            self._choose(makers)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if name in _PRODUCTS and owners:
            for maker in makers:
                self._consumers.setdefault(maker, set()).update(owners)
            makers = frozenset(owners)
        elif owners:  # a view, a cast or an index of a parameter is that parameter
            for x in outputs:
                if x.is_floating_point() and x.dim() > 1 and not makers:
                    self._parameters.setdefault(id(x), (x, sorted(owners)[0]))
        if name == "__setitem__":
            outputs = [args[0]]
            makers |= self._made_by(args[0])
        for x in outputs:
            if x.is_floating_point() and makers:
                self._makers[id(x)] = (x, makers)


def _silence(twin: nn.Module, site: ExpertsSite, watch: _Watch) -> None:
    """Let experts of the copy give zeros and tell the watch what they were called with."""
    hooked = twin.get_submodule(
        site.name.rpartition(".")[0] if isinstance(site, ListedExperts) else site.name
    )
    forward = hooked.forward

    def give_zeros(*args: Any, **kwargs: Any) -> Tensor:
        hidden, *others = [*args, *kwargs.values()]
        watch.chose(others)
        return torch.zeros_like(hidden)

    def run_or_zeros(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except Exception:  # its loop over experts needs data; its router ran before that
            return torch.zeros_like(next(iter([*args, *kwargs.values()])))

    hooked.forward = run_or_zeros if isinstance(site, ListedExperts) else give_zeros


def _fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of a model on the CPU whose parameters and buffers have no data."""
    stand_ins: dict[int, Any] = {}
    with mode:
        for parameter in model.parameters():
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            stand_ins[id(parameter)] = nn.Parameter(empty, requires_grad=False)
        for buffer in model.buffers():
            stand_ins[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    twin = copy.deepcopy(model, stand_ins)
    for module in twin.modules():  # hooks are of whoever set them on the model
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return twin


def _all_places(tensor: Tensor) -> Tensor:
    """What `nonzero` gives where no element is zero: int64 [numel, dim]."""
    return tensor.new_zeros(tensor.numel(), tensor.dim(), dtype=torch.int64)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
