"""Models: finding what can be quantized.

One walk serves every architecture: linears of the decoder layers, and routed experts in any layout
of `alphaquant.models.layouts.standard`. A linear is quantized if it is exactly an `nn.Linear` that
computes a plain product for its own caller; what only chooses (routers, indexers) stays, as seen
in one pass of the model's code without numbers (`alphaquant.models.probe`). 3-D parameters that no
layout knows are refused by name, and so are experts that the configuration promises and that are
not found; everything else of two dimensions that stays is listed with its reason.

Letters: E experts.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.models.dtypes import named_dtype
from alphaquant.models.ends import find_ends
from alphaquant.models.layouts.standard import LAYOUTS
from alphaquant.models.pages.private_maps import ModelPages
from alphaquant.models.probe import Probe, probe_model
from alphaquant.models.promises import promises_experts
from alphaquant.models.sites import (
    ExpertsSite,
    LayerSite,
    LinearSite,
    ModelMap,
    Staying,
    make_site,
)
from alphaquant.spaces.units import Inventory, Kept, Matrix

_PART = 2**22
"""Numbers that are looked at together: 16 MiB in float32."""

LAYOUT_GROUP = "alphaquant.experts"
"""Entry points of installed packages that name further subclasses of `ExpertsSite`."""


def known_layouts() -> tuple[type[ExpertsSite], ...]:
    """Layouts of installed packages, by name, then the project's own.

    Raises:
        ModelError: an entry point names something else.
    """
    found = []
    for entry in sorted(entry_points(group=LAYOUT_GROUP), key=lambda entry: entry.name):
        layout = entry.load()
        if not (isinstance(layout, type) and issubclass(layout, ExpertsSite)):
            raise ModelError(
                f"entry point {entry.name} of group {LAYOUT_GROUP} names {layout!r}, which is no "
                "subclass of alphaquant.models.sites.ExpertsSite; correct or uninstall its package"
            )
        found.append(layout)
    return (*found, *LAYOUTS)


def map_model(
    model: nn.Module,
    layouts: Sequence[type[ExpertsSite]] | None = None,
    pages: ModelPages | None = None,
    include: Sequence[str] = (),
) -> ModelMap:
    """Find the quantizable matrices of a model.

    Args:
        model: a transformers causal language model, also on the meta device.
        layouts: layouts of routed experts, the first that knows a module takes it; None for
            `known_layouts()`.
        pages: its weights in maps of files, where they are.
        include: names in `alphaquant.spaces.units.ENDS` of what is quantized beside the layers.

    Raises:
        ModelError: no decoder layers or no quantizable matrices, an experts layout that is not
            supported, or a head or embeddings that are not plain ones.
    """
    chosen = known_layouts() if layouts is None else tuple(layouts)
    named = find_layers(model)
    experts = [_find_experts(i, name, layer, chosen) for i, (name, layer) in enumerate(named)]
    found = [site for of_layer in experts for site in of_layer]
    probe = probe_model(model, named[0][0].rpartition(".")[0], found)
    layers = tuple(
        _map_parts(i, name, layer, of_layer, probe)
        for i, ((name, layer), of_layer) in enumerate(zip(named, experts, strict=True))
    )
    matrices = tuple(m for layer in layers for m in layer.matrices())
    config: Any = model.config
    if not any(site.is_routed for site in found) and promises_experts(config):
        raise ModelError(_missing_experts_text(model, layers))
    if not matrices:
        raise ModelError(
            f"{type(model).__name__} has no quantizable matrices: its decoder layers hold neither "
            "nn.Linear nor routed experts; see CONTRIBUTING.md, 'a model'"
        )
    if pages is not None:
        layers = tuple(replace(layer, pages=pages.layers[layer.name]) for layer in layers)
    rest = None if pages is None else pages.rest
    ends = find_ends(model, len(layers), include, rest)
    parts = layers if ends is None else (*layers, ends)
    kept, included = _kept_tensors(model, parts), _kept_tensors(model, layers)
    inventory = Inventory(
        str(config.model_type),
        matrices if ends is None else (*matrices, *ends.matrices()),
        kept,
        tuple(k for k in included if k not in kept),
    )
    views = dict(pair for part in parts for pair in part.views())
    staying = tuple(part for layer in layers for part in _staying(layer, probe))
    return ModelMap(model, inventory, layers, views, staying, probe.problem, rest=rest, ends=ends)


def map_layer(
    index: int, name: str, layer: nn.Module, layouts: Sequence[type[ExpertsSite]] = LAYOUTS
) -> LayerSite:
    """Find the quantizable matrices of one decoder layer.

    Args:
        index: its number.
        name: its path in the model.
        layer: the layer.
        layouts: as in `map_model`.

    Raises:
        ModelError: an experts layout that is not supported.
    """
    experts = _find_experts(index, name, layer, layouts)
    return _map_parts(index, name, layer, experts, Probe(problem="the model was not run"))


def _map_parts(
    index: int, name: str, layer: nn.Module, experts: tuple[ExpertsSite, ...], probe: Probe
) -> LayerSite:
    """The layer with its experts and the linears beside them.

    Raises:
        ModelError: an experts layout that is not supported.
    """
    # Where experts sit in the layer itself, what is beside them are the layer's other parts.
    blocks = [site for site in experts if site.block is not layer]
    linears = []
    for path, module in layer.named_modules():
        full = f"{name}.{path}"
        if any(full.startswith(f"{site.name}.") for site in experts):
            continue
        if type(module) is nn.Linear and _reason_to_stay(full, module, experts, probe) is None:
            rows, cols = module.weight.shape
            parent = layer.get_submodule(path.rpartition(".")[0])
            matrix = Matrix(full, rows, cols, _kind(full, parent, blocks), index)
            linears.append(LinearSite(matrix, module, _shared_gate(full, blocks)))
    site = LayerSite(index, name, layer, tuple(linears), experts)
    _refuse_unknown_experts(site)
    return site


def find_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Paths and modules of the decoder layers: the ModuleList as long as the configuration says.

    That is `num_hidden_layers`, or `num_layers` where a layer has two attentions and the former
    counts those (LongCat-Flash).

    Raises:
        ModelError: there is none.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise ModelError(
            f"{type(model).__name__} has no configuration of transformers, so its decoder layers "
            "cannot be found; give a transformers causal language model"
        )
    text = config.get_text_config()
    counts = (text.num_hidden_layers, getattr(text, "num_layers", None))
    candidates = [
        (name, module)
        for name, module in _language_model_first(model)
        if isinstance(module, nn.ModuleList)
        and name.rsplit(".", 1)[-1] in ("layers", "h", "blocks")
    ]
    for count in counts:
        for name, module in candidates:
            if len(module) == count:
                return [(f"{name}.{i}", layer) for i, layer in enumerate(module)]
    seen = ", ".join(f"{name} ({len(module)})" for name, module in candidates) or "none at all"
    raise ModelError(
        f"{type(model).__name__} has no list of {counts[0]} decoder layers called layers, h or "
        f"blocks (found: {seen}); see CONTRIBUTING.md, 'a model'"
    )


def _language_model_first(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Named modules, those of the text decoder of a multimodal model before all others.

    A vision tower can have as many layers as the decoder. The decoder is the module whose
    configuration is the text part of the model's own.
    """
    named = list(model.named_modules())
    text = model.config.get_text_config()  # type: ignore[union-attr,operator]
    decoders = [n for n, m in named[1:] if getattr(m, "config", None) is text]
    inside = [pair for pair in named if any(pair[0].startswith(f"{n}.") for n in decoders)]
    return inside + named


def stored_dtype(tensor: Tensor, checkpoint_dtype: torch.dtype) -> torch.dtype:
    """The dtype a kept tensor is saved in: the checkpoint's where exact, else its own."""
    if not tensor.is_floating_point() or tensor.dtype == checkpoint_dtype or tensor.is_meta:
        return checkpoint_dtype if tensor.is_floating_point() else tensor.dtype
    exact = all(
        torch.equal(part.to(checkpoint_dtype).to(part.dtype), part) for part in _parts(tensor)
    )
    return checkpoint_dtype if exact else tensor.dtype


def checkpoint_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that the model's configuration names (bfloat16 when it names none)."""
    dtype = getattr(model.config, "dtype", None)
    if isinstance(dtype, str):
        dtype = named_dtype(dtype)
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def kept_state(model: nn.Module, layers: tuple[LayerSite, ...]) -> dict[str, Tensor]:
    """Every tensor of the state that is no quantized matrix and not tied to an earlier one.

    Args:
        model: the model.
        layers: the parts in which matrices are quantized.
    """
    quantized = {f"{site.matrix.name}.weight" for layer in layers for site in layer.plain}
    for layer in layers:
        for site in layer.experts:
            quantized |= site.state_names()
    parameters = dict(
        model.named_parameters()
    )  # tied parameters appear once, under their first name
    buffers = dict(model.named_buffers())
    kept = {}
    for name, tensor in model.state_dict().items():
        if name not in quantized and (name in parameters or name in buffers):
            kept[name] = tensor
    return kept


def check_finite(model_map: ModelMap) -> None:
    """Refuse NaN and infinite numbers in what stays as it is; matrices are checked one by one.

    Raises:
        ModelError: naming the tensor.
    """
    parameters = dict(model_map.model.named_parameters())
    for name, tensor in kept_state(model_map.model, model_map.parts).items():
        if not tensor.is_floating_point():
            continue
        # Buffers may hold masks of minus infinity.
        finds = torch.isnan if name not in parameters else _not_finite
        if any(bool(finds(part).any()) for part in _parts(tensor)):
            raise ModelError(
                f"{name} holds NaN or infinite numbers, so every output would; give a checkpoint "
                "whose tensors are finite"
            )


def _not_finite(tensor: Tensor) -> Tensor:
    return ~tensor.isfinite()


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor in flat parts, so that what is computed of it stays small."""
    return iter(torch.split(tensor.detach().reshape(-1), _PART))


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its tokens: the device of its first tensor."""
    return next(chain(model.parameters(), model.buffers())).device


def weights_digest(model_map: ModelMap) -> str:
    """sha256 over the weights of a model: what a bank, a teacher and a study belong to.

    The numbers count, as float32, and neither their dtype nor how a checkpoint's files hold them.
    """
    digest = hashlib.sha256(model_map.inventory.digest.encode())
    layers = {layer.name: layer for layer in model_map.layers}
    depth = model_map.layers[0].name.count(".") + 1
    state = sorted(model_map.model.state_dict().items())
    for owner, named in groupby(state, lambda item: ".".join(item[0].split(".")[:depth])):
        for name, tensor in named:
            digest.update(name.encode())
            for part in _parts(tensor):
                digest.update(part.to("cpu", torch.float32).numpy().data)
        if owner in layers:
            layers[owner].release()
    return digest.hexdigest()


def _kept_tensors(model: nn.Module, layers: tuple[LayerSite, ...]) -> tuple[Kept, ...]:
    dtype = checkpoint_dtype(model)
    rows = []
    for name, tensor in kept_state(model, layers).items():
        n_bytes = tensor.numel() * stored_dtype(tensor, dtype).itemsize
        alias = name.replace(".mlp.", ".block_sparse_moe.")
        rows.append(Kept(name, tensor.numel(), n_bytes, () if alias == name else (alias,)))
    return tuple(rows)


def _find_experts(
    index: int, name: str, layer: nn.Module, layouts: Sequence[type[ExpertsSite]]
) -> tuple[ExpertsSite, ...]:
    found = []
    for path, module in layer.named_modules():
        full = f"{name}.{path}"
        block = layer.get_submodule(path.rpartition(".")[0])
        site = make_site(layouts, index, full, module, block) if path else None
        if site is not None:
            found.append(site)
    return tuple(found)


def _refuse_unknown_experts(site: LayerSite) -> None:
    """3-D parameters that no site covers are experts of a layout that would silently stay bf16."""
    known = {id(p) for experts in site.experts for p in experts.module.parameters()}
    for path, module in site.module.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_kernel = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            if parameter.dim() == 3 and id(parameter) not in known and not is_kernel:
                full = ".".join(filter(None, (site.name, path, name)))
                raise ModelError(
                    f"{full} {tuple(parameter.shape)} looks like fused experts in an unsupported "
                    "layout; supported are gate_up_proj [E, 2I, H] and down_proj [E, H, I], also "
                    "transposed, interleaved or with biases: see CONTRIBUTING.md, 'a model', for "
                    "adding another"
                )


def _site_beside(path: str, experts: Sequence[ExpertsSite]) -> ExpertsSite | None:
    """The experts that share their parent with a path, if any."""
    parent = path.rpartition(".")[0]
    return next((site for site in experts if site.name.rpartition(".")[0] == parent), None)


def _reason_to_stay(
    path: str, module: nn.Module, experts: Sequence[ExpertsSite], probe: Probe
) -> str | None:
    """Why a module's weight is not quantized, None for a linear that is."""
    if type(module) is not nn.Linear:
        return f"parameter of {type(module).__name__}"
    if module.out_features == 1 or path in probe.choosing:
        return "it chooses or weighs, and computes nothing else"
    if path in probe.odd:
        return probe.odd[path]
    site = _site_beside(path, experts)
    if probe.problem is not None and site is not None and module.out_features == site.n_experts:
        return "as many outputs as experts, beside them"
    return None


def _staying(layer: LayerSite, probe: Probe) -> Iterator[Staying]:
    """Parameters of two and more dimensions that are not quantized."""
    covered = {id(site.module.weight) for site in layer.linears}
    covered |= {id(p) for site in layer.experts for p in site.module.parameters()}
    for path, module in layer.module.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and id(parameter) not in covered:
                full = ".".join(filter(None, (layer.name, path)))
                reason = _reason_to_stay(full, module, layer.experts, probe)
                yield Staying(f"{full}.{name}", parameter.numel(), reason or "unknown")


def _missing_experts_text(model: nn.Module, layers: tuple[LayerSite, ...]) -> str:
    sizes = {
        f"{layer.name}.{name}": parameter.numel()
        for layer in layers
        for name, parameter in layer.module.named_parameters()
    }
    largest = max(sizes, key=lambda name: sizes[name])
    return (
        f"{type(model).__name__}: config.json promises routed experts, and none were found in its "
        f"decoder layers (largest parameter {largest}); they would stay unquantized: see "
        "CONTRIBUTING.md, 'a model', for adding their layout"
    )


def _shared_gate(path: str, experts: Sequence[ExpertsSite]) -> nn.Linear | None:
    """The linear with one output beside the shared expert that a path belongs to, if any."""
    site = _site_beside(path.rpartition(".")[0], experts)
    if site is None:
        return None
    for child in site.block.children():
        if isinstance(child, nn.Linear) and child.out_features == 1:
            return child
    return None


def _kind(path: str, parent: nn.Module, experts: Sequence[ExpertsSite]) -> str:
    if _site_beside(path.rpartition(".")[0], experts) is not None:
        return "shared"
    # Names decide only how a matrix is grouped in reports, knobs and profiles, never whether it is
    # quantized. Where every mixer of a layer has one name, its class tells.
    names = (path, type(parent).__name__.lower())
    return "attention" if any("attn" in n or "attention" in n for n in names) else "dense"
