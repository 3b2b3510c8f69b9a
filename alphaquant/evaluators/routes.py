"""How a model routes its tokens: chosen experts, their weights, and what the routers said.

One pass of the decoder over the windows, without the language model head. Read is what plain and
packed models have in common: the arguments of the call of the experts, or the block's for experts
in a ModuleList (which runs such a block three times, see `ListedExperts`), and the input of the
router. Everything is found by structure. Hooks live during the forward pass of a batch, so memory
holds the routes of one batch: layers x B x T x E float32 log-probabilities, and k ids and weights.

The router's distribution is the softmax over all E of its logits, which are recomputed from its
input and weight in float32: what routers return differs (logits, probabilities, only the chosen).
For routers that score by sigmoid, or add a bias before the choice (DeepSeek-V3, GLM-4), it is
still the softmax of the logits: it moves with them, but is not what experts are weighted by.

Letters: N windows, B of them in a batch, T tokens, n = B * T, E experts, k chosen, H hidden size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from alphaquant.errors import ModelError
from alphaquant.models.layouts.standard import ListedExperts
from alphaquant.models.mapping import device_of, find_layers, known_layouts
from alphaquant.models.sites import ExpertsSite, make_site
from alphaquant.models.walk import batches_of
from alphaquant.progress import Progress, Stage
from alphaquant.runtime.modules import PackedExperts, PackedLinear
from alphaquant.spaces.units import Matrix
from alphaquant.texts.windows import token_digest


@dataclass(frozen=True)
class RoutedSite:
    """Routed experts of a plain or packed model, and their router.

    Attributes:
        name: path of the experts module.
        n_experts: E.
        reader: reads the routing from the arguments of a call of `hooked`.
        hooked: the module that is called with them.
        router: the only module nearest to the experts' block with a weight of E rows; None if
            there is none or more than one, so that the router's logits are not known.
    """

    name: str
    n_experts: int
    reader: ExpertsSite
    hooked: nn.Module
    router: nn.Module | None


@dataclass(frozen=True)
class LayerRoutes:
    """How the experts of one layer were chosen for the tokens of a batch; on the model's device.

    Attributes:
        site: whose.
        expert_ids: int64 [B, T, k]; E where fewer than k were chosen.
        weights: float32 [B, T, k], as the experts' outputs are weighted; 0 where none was chosen.
        log_probs: float32 [B, T, E], softmax of the router's logits; None where these are not
            known, and ids and weights of the top k are all there is.
    """

    site: RoutedSite
    expert_ids: Tensor
    weights: Tensor
    log_probs: Tensor | None


@dataclass(frozen=True)
class KeptRoutes:
    """What is kept of one layer and batch of the original; on the CPU.

    Attributes:
        expert_ids: int16 [B, T, k]; E where fewer than k were chosen.
        log_probs: float16 [B, T, E]; `unpack` normalizes them again.
    """

    expert_ids: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class Routes:
    """The routes of a model over windows, compact: 2 * (E + k) bytes per token and layer.

    Attributes:
        n_experts: E of each experts module by its name, in the order of the layers.
        batches: per batch of windows, the routes of each layer.
        batch_size: windows per batch.
        data_digest: of the windows.
    """

    n_experts: Mapping[str, int]
    batches: tuple[tuple[KeptRoutes, ...], ...]
    batch_size: int
    data_digest: str

    @property
    def n_bytes(self) -> int:
        """Memory that the tensors take."""
        kept = [routes for batch in self.batches for routes in batch]
        return sum(r.expert_ids.nbytes + r.log_probs.nbytes for r in kept)


def find_routed(model: nn.Module) -> tuple[RoutedSite, ...]:
    """Find the routed experts of a plain or packed model, in the order of its layers.

    Args:
        model: a transformers causal language model.

    Raises:
        ModelError: it has none, or in a layout that is not supported.
    """
    found = []
    layouts = known_layouts()
    for index, (name, layer) in enumerate(find_layers(model)):
        for path, module in layer.named_modules():
            if path:
                block = layer.get_submodule(path.rpartition(".")[0])
                reader = _find_reader(index, f"{name}.{path}", module, block, layouts)
                if reader is not None and reader.is_routed:
                    found.append(_make_site(f"{name}.{path}", module, reader))
    if not found:
        raise ModelError(
            f"{type(model).__name__} routes no tokens: its {index + 1} decoder layers hold no "
            "routed experts; give a mixture-of-experts model, or leave out what measures routing"
        )
    return tuple(found)


def route_batches(
    model: nn.Module, tokens: Tensor, batch_size: int = 8
) -> Iterator[tuple[LayerRoutes, ...]]:
    """Run a model over windows and give the routes of all layers, batch by batch.

    Args:
        model: a plain or packed causal language model.
        tokens: int64 [N, T].
        batch_size: windows per forward pass; memory grows with it.

    Raises:
        ModelError: no routed experts, a layout that is not supported, or a module that routes was
            not called.
    """
    sites = find_routed(model)
    layers = find_layers(model)[0][0].rpartition(".")[0]  # path of the list of layers
    body = model.get_submodule(layers.rpartition(".")[0])
    device = device_of(model)
    for batch in batches_of(tokens, batch_size):
        yield _route_batch(body, sites, batch.to(device))


def keep_routes(
    model: nn.Module,
    tokens: Tensor,
    batch_size: int = 8,
    progress: Progress = lambda stage, done, total: None,
) -> Routes:
    """Run a model over windows and keep its routes.

    Args:
        model: as in `route_batches`; its routers' logits must be known.
        tokens: int64 [N, T].
        batch_size: windows per forward pass.
        progress: called with ("scores", windows done, windows).

    Raises:
        ModelError: as `route_batches`, or the logits of a router are not known.
    """
    sizes = {site.name: site.n_experts for site in find_routed(model)}
    batches = []
    for batch in route_batches(model, tokens, batch_size):
        batches.append(tuple(map(_kept, batch)))
        progress(Stage.SCORES, min(batch_size * len(batches), len(tokens)), len(tokens))
    return Routes(sizes, tuple(batches), batch_size, token_digest(tokens))


def _kept(routes: LayerRoutes) -> KeptRoutes:
    """The routes of a layer as they are kept."""
    return KeptRoutes(routes.expert_ids.to("cpu", torch.int16), pack(known_log_probs(routes)))


def pack(log_probs: Tensor) -> Tensor:
    """Log-probabilities as they are kept: float16 on the CPU, nothing below -65504."""
    return log_probs.clamp(min=torch.finfo(torch.float16).min).to("cpu", torch.float16)


def unpack(packed: Tensor, device: torch.device) -> Tensor:
    """Kept log-probabilities as float32, normalized again; [..., E]."""
    return torch.log_softmax(packed.to(device, torch.float32), -1)


def known_log_probs(routes: LayerRoutes) -> Tensor:
    """The router's distribution, float32 [B, T, E].

    Raises:
        ModelError: the router's logits are not known.
    """
    if routes.log_probs is None:
        raise ModelError(
            f"the router of {routes.site.name} was not found: there must be exactly one module "
            f"beside the experts with a weight of {routes.site.n_experts} rows; only the chosen "
            "experts are known; measure utilization, which needs no more"
        )
    return routes.log_probs


def _find_reader(
    index: int,
    name: str,
    module: nn.Module,
    block: nn.Module,
    layouts: Sequence[type[ExpertsSite]],
) -> ExpertsSite | None:
    """What reads the routing of an experts module, None for any other module."""
    if isinstance(module, PackedExperts):
        return module.site  # of the module that it replaced, and is called like
    if _is_packed_list(module) and ListedExperts.is_called_by(block, module):
        # Reading needs the experts and their count, and no sizes.
        n_experts = sum(1 for _ in module.children())
        own = tuple(Matrix(f"{name}.{e}", 1, 1, "expert", index, e) for e in range(n_experts))
        return ListedExperts(name, module, block, own, own, own)
    return make_site(layouts, index, name, module, block)


def _is_packed_list(module: nn.Module) -> bool:
    """Whether a module is a list whose members have three packed linears each, as experts do."""
    members = list(module.children()) if isinstance(module, nn.ModuleList) else []
    n_packed = [sum(isinstance(c, PackedLinear) for c in m.children()) for m in members]
    return bool(members) and set(n_packed) == {3}


def _make_site(name: str, module: nn.Module, reader: ExpertsSite) -> RoutedSite:
    # Packed experts take the place of the module that they were made from.
    is_replaced = isinstance(module, PackedExperts) and reader.hooked is reader.module
    hooked = module if is_replaced else reader.hooked
    router = _find_router(reader.block, reader.n_experts)
    return RoutedSite(name, reader.n_experts, reader, hooked, router)


def _find_router(block: nn.Module, n_experts: int) -> nn.Module | None:
    """The only module nearest to a block with E outputs; experts are deeper than routers."""
    by_depth: dict[int, list[nn.Module]] = {}
    for path, module in block.named_modules():
        if _n_outputs(module) == n_experts:
            by_depth.setdefault(path.count("."), []).append(module)
    nearest = by_depth[min(by_depth)] if by_depth else []
    return nearest[0] if len(nearest) == 1 else None


def _n_outputs(module: nn.Module) -> int | None:
    """Rows of a module's own weight matrix, packed or not; None without one."""
    if isinstance(module, PackedLinear):
        return module.rows
    weight = getattr(module, "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.dim() == 2 else None


@torch.no_grad()
def _route_batch(
    body: nn.Module, sites: Sequence[RoutedSite], batch: Tensor
) -> tuple[LayerRoutes, ...]:
    """Routes of one batch, int64 [B, T]; `body` is the decoder."""
    routed: dict[str, tuple[Tensor, Tensor]] = {}
    logits: dict[str, Tensor] = {}

    def experts_hook(site: RoutedSite) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = site.reader.route(args, kwargs)
            routed[site.name] = tokens.expert_ids, tokens.weights

        return hook

    def router_hook(site: RoutedSite) -> Any:
        def hook(router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            logits[site.name] = _router_logits(router, next(iter((*args, *kwargs.values()))))

        return hook

    handles: list[RemovableHandle] = []
    try:
        for site in sites:
            for module, hook in ((site.hooked, experts_hook), (site.router, router_hook)):
                if module is not None:
                    made = module.register_forward_pre_hook(hook(site), with_kwargs=True)
                    handles.append(made)
        body(batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(_layer_routes(site, batch, routed, logits) for site in sites)


def _router_logits(router: nn.Module, inputs: Tensor) -> Tensor:
    """Logits of a router in float32, inputs [..., H] -> [n, E]."""
    if isinstance(router, PackedLinear):
        weight = router.packed().dequantize()
    else:
        weight = router.get_parameter("weight").detach()
    bias: Tensor | None = getattr(router, "bias", None)
    flat = inputs.reshape(-1, inputs.shape[-1]).float()
    return nn.functional.linear(flat, weight.float(), None if bias is None else bias.float())


def _layer_routes(
    site: RoutedSite,
    batch: Tensor,
    routed: Mapping[str, tuple[Tensor, Tensor]],
    logits: Mapping[str, Tensor],
) -> LayerRoutes:
    """The routes of one layer by window.

    Raises:
        ModelError: a hook did not fire, or did for other tokens than those of the batch.
    """
    if site.name not in routed or (site.router is not None and site.name not in logits):
        missing = "router" if site.name in routed else "experts"
        raise ModelError(
            f"the forward pass never called the {missing} of {site.name}, so its routing is "
            "unknown; leave out what measures routing, or report the architecture"
        )
    expert_ids, weights = routed[site.name]
    found = logits.get(site.name)
    for rows in [expert_ids, *([] if found is None else [found])]:
        if len(rows) != batch.numel():
            raise ModelError(
                f"{site.name} routed {len(rows)} tokens in a pass over {batch.numel()}; routing "
                "is measured only where every token is routed once per layer; leave it out"
            )
    shape = tuple(batch.shape)  # [n, ...] -> [B, T, ...] below
    return LayerRoutes(
        site,
        expert_ids.to(torch.int64).reshape(*shape, -1),
        weights.float().reshape(*shape, -1),
        None if found is None else torch.log_softmax(found, -1).reshape(*shape, -1),
    )
