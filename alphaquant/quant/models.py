"""Models: finding what can be quantized, and views of its weights.

One walk serves every architecture that keeps its routed experts in transformers' fused layout
(`gate_up_proj [E, 2I, H]` with gate rows first, `down_proj [E, H, I]`: OLMoE, Mixtral,
Qwen2/3-MoE, DeepSeek-V2/V3, ...) and dense Llama-like models. Routers are recognized by structure:
they are no `nn.Linear`, or an `nn.Linear` beside the experts with 1 or E outputs. Layouts that are
not supported yet (transposed or biased experts as in gpt-oss, experts in a ModuleList) are refused
by name.

Letters: E experts, H hidden size, I expert width.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.spaces.units import Inventory, Kept, Matrix

_MIXTRAL_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


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
class ExpertsSite:
    """A fused experts module.

    Attributes:
        name: path of the module.
        module: has `gate_up_proj [E, 2I, H]`, `down_proj [E, H, I]` and `_apply_gate`.
        gate: matrices of the gate projections, by expert; likewise `up` and `down`.
    """

    name: str
    module: nn.Module
    gate: tuple[Matrix, ...]
    up: tuple[Matrix, ...]
    down: tuple[Matrix, ...]

    @property
    def n_experts(self) -> int:
        """E."""
        return len(self.down)

    def w13(self, expert: int) -> Tensor:
        """Gate rows, then up rows of one expert, [2I, H]; a view."""
        return self.module.gate_up_proj.data[expert]  # type: ignore[index]

    def w2(self, expert: int) -> Tensor:
        """Down projection of one expert, [H, I]; a view."""
        return self.module.down_proj.data[expert]  # type: ignore[index]

    def apply_gate(self, gate_up: Tensor) -> Tensor:
        """The expert's gating function, [n, 2I] -> [n, I], as the model defines it."""
        return self.module._apply_gate(gate_up)  # type: ignore[operator,no-any-return]


@dataclass(frozen=True)
class LayerSite:
    """One decoder layer and what is quantized in it."""

    index: int
    name: str
    module: nn.Module
    linears: tuple[LinearSite, ...]
    experts: tuple[ExpertsSite, ...]

    def matrices(self) -> Iterator[Matrix]:
        """Its matrices: linears, then experts by number (gate, up, down)."""
        for linear in self.linears:
            yield linear.matrix
        for site in self.experts:
            for e in range(site.n_experts):
                yield from (site.gate[e], site.up[e], site.down[e])


@dataclass(frozen=True)
class ModelMap:
    """A model with its inventory and the place of every matrix.

    Attributes:
        model: a transformers causal language model.
        inventory: its matrices and kept tensors.
        layers: its decoder layers, in order.
    """

    model: nn.Module
    inventory: Inventory
    layers: tuple[LayerSite, ...]
    views: dict[str, Tensor] = field(repr=False)

    def view(self, matrix_name: str) -> Tensor:
        """The weight of a matrix, [rows, cols]; writing it writes the model."""
        return self.views[matrix_name]


def load_model(
    name: str | Path, device: str = "cpu", dtype: str = "auto", *, trust_remote_code: bool = False
) -> nn.Module:
    """Load a causal language model with transformers, in evaluation mode, gradients off.

    Args:
        name: a local directory or a hub id.
        device: `cpu`, `cuda`, ...
        dtype: `float32`, `bfloat16`, `float16`; `auto` is float32 on the CPU (bfloat16 is slow
            there) and the checkpoint's own elsewhere.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ModelError: the model cannot be found or read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    wanted: str | torch.dtype = "auto" if dtype == "auto" else named_dtype(dtype)
    if dtype == "auto" and device == "cpu":
        wanted = torch.float32
    try:
        stated = AutoConfig.from_pretrained(str(name), trust_remote_code=trust_remote_code).dtype
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(name), dtype=wanted, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(model_problem(name, error)) from error
    if stated is not None:
        # transformers overwrites this with the dtype in memory, but kept tensors are counted and
        # saved in the checkpoint's own.
        model.config.dtype = stated
    loaded: nn.Module = model.to(device)
    loaded.requires_grad_(False)
    return loaded.eval()


def named_dtype(name: str) -> torch.dtype:
    """The floating-point dtype of a name such as `bfloat16`.

    Raises:
        ModelError: there is none.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"unknown dtype {name!r}; use auto, float32, bfloat16 or float16")
    return dtype


def load_skeleton(name: str | Path) -> nn.Module:
    """The model without weights (meta device): enough for its inventory.

    Raises:
        ModelError: no configuration can be found or read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(name))
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(model_problem(name, error)) from error
    return model


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer that belongs to a model.

    Raises:
        ModelError: none can be found.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(name))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(model_problem(name, error)) from error


def model_problem(name: str | Path, error: Exception) -> str:
    """One line that says why a model could not be loaded and what to give instead."""
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    where = (
        f"{name} is a directory, but"
        if Path(name).is_dir()
        else f"{name} is no directory here and"
    )
    return (
        f"cannot load model {str(name)!r}: {where} transformers says: {first_line}; give 'demo', "
        "a directory with config.json, safetensors and tokenizer, or a hub id that this machine "
        "can reach"
    )


def map_model(model: nn.Module) -> ModelMap:
    """Find the quantizable matrices of a model.

    Args:
        model: a transformers causal language model, also on the meta device.

    Raises:
        ModelError: no decoder layers or no quantizable matrices, or an experts layout that is not
            supported.
    """
    layers = tuple(
        _map_layer(i, name, layer) for i, (name, layer) in enumerate(find_layers(model))
    )
    views = {}
    for layer in layers:
        for linear in layer.linears:
            views[linear.matrix.name] = linear.view()
        for site in layer.experts:
            for e in range(site.n_experts):
                half = site.gate[e].rows
                views[site.gate[e].name] = site.w13(e)[:half]
                views[site.up[e].name] = site.w13(e)[half:]
                views[site.down[e].name] = site.w2(e)
    _refuse_unknown_experts(layers)
    matrices = tuple(m for layer in layers for m in layer.matrices())
    if not matrices:
        raise ModelError(
            f"{type(model).__name__} has no quantizable matrices: its decoder layers hold neither "
            "nn.Linear nor fused experts; see CONTRIBUTING.md, 'add a model'"
        )
    config: Any = model.config
    inventory = Inventory(str(config.model_type), matrices, _kept_tensors(model, layers))
    return ModelMap(model, inventory, layers, views)


def _refuse_unknown_experts(layers: tuple[LayerSite, ...]) -> None:
    """3-D parameters that no site covers are experts of a layout that would silently stay bf16."""
    for layer in layers:
        known = {id(p) for site in layer.experts for p in site.module.parameters()}
        for path, module in layer.module.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                is_kernel = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
                if parameter.dim() == 3 and id(parameter) not in known and not is_kernel:
                    full = ".".join(filter(None, (layer.name, path, name)))
                    raise ModelError(
                        f"{full} {tuple(parameter.shape)} looks like fused experts in an "
                        "unsupported layout; supported: gate_up_proj [E, 2I, H] and down_proj "
                        "[E, H, I] without biases"
                    )


def find_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Paths and modules of the decoder layers: the ModuleList as long as the configuration says.

    Raises:
        ModelError: there is none.
    """
    config: Any = model.config
    wanted = int(config.get_text_config().num_hidden_layers)
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == wanted
            and name.rsplit(".", 1)[-1] in ("layers", "h", "blocks")
        ):
            return [(f"{name}.{i}", layer) for i, layer in enumerate(module)]
    raise ModelError(
        f"{type(model).__name__} has no list of {wanted} decoder layers called layers, h or "
        "blocks; see CONTRIBUTING.md, 'add a model'"
    )


def stored_dtype(tensor: Tensor, checkpoint_dtype: torch.dtype) -> torch.dtype:
    """The dtype a kept tensor is saved in: the checkpoint's where exact, else its own."""
    if not tensor.is_floating_point() or tensor.dtype == checkpoint_dtype or tensor.is_meta:
        return checkpoint_dtype if tensor.is_floating_point() else tensor.dtype
    exact = torch.equal(tensor.to(checkpoint_dtype).to(tensor.dtype), tensor)
    return checkpoint_dtype if exact else tensor.dtype


def checkpoint_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that the model's configuration names (bfloat16 when it names none)."""
    dtype = getattr(model.config, "dtype", None)
    if isinstance(dtype, str):
        dtype = named_dtype(dtype)
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def kept_state(model: nn.Module, layers: tuple[LayerSite, ...]) -> dict[str, Tensor]:
    """Every tensor of the state that is no quantized matrix and not tied to an earlier one."""
    quantized = {f"{linear.matrix.name}.weight" for layer in layers for linear in layer.linears}
    for layer in layers:
        for site in layer.experts:
            quantized |= {f"{site.name}.gate_up_proj", f"{site.name}.down_proj"}
    parameters = dict(
        model.named_parameters()
    )  # tied parameters appear once, under their first name
    buffers = dict(model.named_buffers())
    kept = {}
    for name, tensor in model.state_dict().items():
        if name not in quantized and (name in parameters or name in buffers):
            kept[name] = tensor
    return kept


def weights_digest(model_map: ModelMap) -> str:
    """sha256 over the weights of a model: what a bank, a teacher and a study belong to."""
    digest = hashlib.sha256(model_map.inventory.digest.encode())
    for name, tensor in sorted(model_map.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def _kept_tensors(model: nn.Module, layers: tuple[LayerSite, ...]) -> tuple[Kept, ...]:
    dtype = checkpoint_dtype(model)
    rows = []
    for name, tensor in kept_state(model, layers).items():
        n_bytes = tensor.numel() * stored_dtype(tensor, dtype).itemsize
        alias = name.replace(".mlp.", ".block_sparse_moe.")
        rows.append(Kept(name, tensor.numel(), n_bytes, () if alias == name else (alias,)))
    return tuple(rows)


def _map_layer(index: int, name: str, layer: nn.Module) -> LayerSite:
    linears: list[LinearSite] = []
    experts: list[ExpertsSite] = []
    for path, module in layer.named_modules():
        full = f"{name}.{path}"
        if is_fused_experts(module, full):
            experts.append(_map_experts(index, full, module))
        elif isinstance(module, nn.Linear) and not _is_router(layer, path, module):
            rows, cols = module.weight.shape
            matrix = Matrix(full, rows, cols, _kind(layer, path), index)
            linears.append(LinearSite(matrix, module, _shared_gate(layer, path)))
    return LayerSite(index, name, layer, tuple(linears), tuple(experts))


def is_fused_experts(module: nn.Module, name: str) -> bool:
    """Whether a module is a fused experts module of the supported layout.

    Raises:
        ModelError: it holds experts in a layout that is not supported.
    """
    if isinstance(module, nn.ModuleList) and name.endswith(".experts"):
        raise ModelError(
            f"{name}: experts in a ModuleList are not supported; use an architecture that "
            "transformers loads with fused experts"
        )
    up = getattr(module, "gate_up_proj", None)
    if not isinstance(up, nn.Parameter) or up.dim() != 3:
        return False
    odd = [
        flag
        for flag in ("is_transposed", "has_bias", "has_post_expert_norm")
        if getattr(module, flag, False)
    ]
    odd += [
        f"no {flag}" for flag in ("is_concatenated", "has_gate") if not getattr(module, flag, True)
    ]
    if odd or not hasattr(module, "_apply_gate"):
        raise ModelError(
            f"{name} ({type(module).__name__}) keeps its experts in an unsupported layout "
            f"({', '.join(odd) or 'no gate function'}); supported: gate_up_proj [E, 2I, H] and "
            "down_proj [E, H, I] without biases"
        )
    return True


def _map_experts(layer: int, name: str, module: nn.Module) -> ExpertsSite:
    n_experts, double, hidden = module.get_parameter("gate_up_proj").shape
    width = double // 2

    def matrices(projection: str, rows: int, cols: int) -> tuple[Matrix, ...]:
        other = _MIXTRAL_NAMES[projection]
        block = name.replace(".mlp.", ".block_sparse_moe.")
        return tuple(
            Matrix(
                f"{name}.{e}.{projection}",
                rows,
                cols,
                "expert",
                layer,
                e,
                (f"{name}.{e}.{other}", f"{block}.{e}.{other}"),
            )
            for e in range(n_experts)
        )

    gate, up = matrices("gate_proj", width, hidden), matrices("up_proj", width, hidden)
    return ExpertsSite(name, module, gate, up, matrices("down_proj", hidden, width))


def _experts_beside(layer: nn.Module, path: str) -> nn.Module | None:
    """The fused experts module among the siblings of a path, if any."""
    parent = layer.get_submodule(path.rpartition(".")[0])
    for child in parent.children():
        up = getattr(child, "gate_up_proj", None)
        if isinstance(up, nn.Parameter) and up.dim() == 3:
            return child
    return None


def _is_router(layer: nn.Module, path: str, module: nn.Linear) -> bool:
    experts = _experts_beside(layer, path)
    if experts is None:
        return False
    n_experts = experts.get_parameter("gate_up_proj").shape[0]
    return module.out_features in (1, n_experts)


def _shared_gate(layer: nn.Module, path: str) -> nn.Linear | None:
    """The linear with one output beside the shared expert that a path belongs to, if any."""
    parent = path.rpartition(".")[0]
    if not parent or _experts_beside(layer, parent) is None:
        return None
    for child in layer.get_submodule(parent.rpartition(".")[0]).children():
        if isinstance(child, nn.Linear) and child.out_features == 1:
            return child
    return None


def _kind(layer: nn.Module, path: str) -> str:
    parent = path.rpartition(".")[0]
    if parent and _experts_beside(layer, parent) is not None:
        return "shared"
    # The name decides only how a matrix is grouped in reports and knobs, never whether it is
    # quantized.
    return "attention" if "attn" in path or "attention" in path else "dense"
