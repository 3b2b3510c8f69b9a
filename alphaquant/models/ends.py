"""What is quantized beside the decoder layers: the token embeddings and lm_head.

They are a part of the model with the number after the last layer. Tied weights are one matrix of
kind `head` with the name of the embeddings. A head is an `nn.Linear`, embeddings are an
`nn.Embedding` or a subclass that scales the rows it looks up (Gemma); anything else is refused by
name, because it would have to be replaced by something that computes the same.

What a head is given, the hidden states behind the last norm, is shown by `walk.watch_head`.
"""

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.models.pages.private_maps import LayerPages
from alphaquant.models.sites import EmbeddingSite, LayerSite, LinearSite
from alphaquant.spaces.units import ENDS, Matrix


def find_ends(
    model: nn.Module, index: int, include: Sequence[str], pages: LayerPages | None = None
) -> LayerSite | None:
    """The part of a model beside its layers.

    Args:
        model: a causal language model of transformers.
        index: the part's number.
        include: names in `ENDS`; none for no part. Tied weights are included by either.
        pages: the part's weights in maps of files, where they are.

    Raises:
        ModelError: the model has no plain one of them.
    """
    if not include:
        return None
    named = {id(module): name for name, module in model.named_modules()}
    head, table = _called(model, "get_output_embeddings"), _called(model, "get_input_embeddings")
    is_tied = head is not None and table is not None and _are_tied(model, named, head, table)
    linears: list[LinearSite] = []
    embeddings: list[EmbeddingSite] = []
    if is_tied or "embeddings" in include:
        if not isinstance(table, nn.Embedding) or not _only_scales(table):
            raise _refused(model, "embeddings", table)
        # Every token reads all of tied weights, as it does of a head.
        kind = "head" if is_tied else "embeddings"
        aliases = (named[id(head)],) if is_tied else ()
        matrix = _matrix(named[id(table)], table.weight, index, kind, aliases)
        embeddings = [EmbeddingSite(matrix, table, _plain(model, head) if is_tied else None)]
    if "head" in include and not is_tied:
        linear = _plain(model, head)
        linears = [LinearSite(_matrix(named[id(linear)], linear.weight, index, "head"), linear)]
    return LayerSite(index, "", model, tuple(linears), (), pages, tuple(embeddings))


def ends_named(model: nn.Module, names: Container[str]) -> tuple[str, ...]:
    """What of a model beside its layers is among some matrices, for `find_ends`.

    Args:
        model: a causal language model of transformers.
        names: of matrices.
    """
    paths = {id(module): name for name, module in model.named_modules()}
    found = {"head": "get_output_embeddings", "embeddings": "get_input_embeddings"}
    modules = {what: _called(model, method) for what, method in found.items()}
    return tuple(what for what, m in modules.items() if m is not None and paths[id(m)] in names)


def head_of(ends: LayerSite) -> nn.Linear | None:
    """The head that is quantized, also as tied embeddings; None where it is not."""
    for linear in ends.linears:
        return linear.module
    return ends.embeddings[0].head


def look_up(table: nn.Embedding, weight: Tensor, ids: Tensor) -> Tensor:
    """What embeddings would give with other weights.

    Args:
        table: the module.
        weight: [V, H].
        ids: int64 [...], numbers of rows.

    Returns:
        [..., H].
    """
    padding, table.padding_idx = table.padding_idx, None  # of a row that others may not have
    try:
        found: Tensor = torch.func.functional_call(table, {"weight": weight}, (ids,))
    finally:
        table.padding_idx = padding
    return found


def row_scale(table: nn.Embedding) -> float | None:
    """What embeddings multiply the rows with that they look up; None for anything else they do.

    Subclasses say it as a number (`scalar_embed_scale` of Gemma 3, `embed_scale` of BART).
    """
    if type(table) is nn.Embedding:
        return 1.0
    stated = (getattr(table, name, None) for name in ("scalar_embed_scale", "embed_scale"))
    return next((float(scale) for scale in stated if isinstance(scale, int | float)), None)


@torch.no_grad()
def _only_scales(table: nn.Embedding) -> bool:
    """Whether embeddings do what `row_scale` says; the word counts where there are no numbers."""
    scale = row_scale(table)
    if scale is None or table.weight.is_meta:
        return scale is not None
    rows = table.weight[: min(16, len(table.weight))]
    ids = torch.arange(len(rows), device=rows.device)
    return torch.equal(table(ids), rows * torch.tensor(scale).to(rows))


def _plain(model: nn.Module, head: nn.Module | None) -> nn.Linear:
    """A head that computes a plain product.

    Raises:
        ModelError: it is no `nn.Linear`, or there is none.
    """
    if type(head) is not nn.Linear:
        raise _refused(model, "head", head)
    return head


def _are_tied(
    model: nn.Module, named: Mapping[int, str], head: nn.Module, table: nn.Module
) -> bool:
    """Whether a head has the weight of the embeddings, or will get it when weights are loaded."""
    weight = getattr(head, "weight", None)
    if weight is not None and weight is getattr(table, "weight", None):
        return True
    stated: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    names = {f"{named[id(module)]}.weight" for module in (head, table)}
    return any({target, source} == names for target, source in stated.items())


def _matrix(
    name: str, weight: Tensor, index: int, what: str, aliases: tuple[str, ...] = ()
) -> Matrix:
    rows, cols = weight.shape
    return Matrix(name, rows, cols, ENDS[what], index, None, aliases)


def _called(model: nn.Module, name: str) -> Any:
    """What a model's method gives; None where it has none."""
    try:
        return getattr(model, name)()
    except (AttributeError, NotImplementedError):
        return None


def _refused(model: nn.Module, what: str, module: nn.Module | None) -> ModelError:
    found = "none" if module is None else f"a {type(module).__name__}"
    kind = "nn.Linear" if what == "head" else "nn.Embedding"
    return ModelError(
        f"--include {what}: {type(model).__name__} has {found} where an {kind} can be quantized; "
        "say with --include what else is searched, or --include none"
    )
