"""What vLLM calls the matrices of a checkpoint.

Checkpoints of ours have the names of transformers' modules, a matrix per expert. vLLM has those
too, with two differences: it fuses linears into one layer (`qkv_proj` of q, k, v), and a few
models keep the names of their first files (Mixtral: `block_sparse_moe.experts.3.w1`).
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from alphaquant.errors import ModelError
from alphaquant.spaces.formats import Format

FUSED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
        "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    }
)
"""Shards of fused linears, in vLLM's order; a model class adds its own."""

RENAMED: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "mixtral": {
            ".mlp.experts.": ".block_sparse_moe.experts.",
            ".mlp.gate.": ".block_sparse_moe.gate.",
        }
    }
)
"""Parts of names that differ, by `model_type`: transformers' and then vLLM's.

vLLM's own model class renames projections (`gate_proj` to `w1`) but not what is before them.
"""


def shard_names(prefix: str, fused: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Names of the matrices of a linear layer, in the order of their outputs.

    Args:
        prefix: name of the layer in vLLM, `model.layers.0.self_attn.qkv_proj`.
        fused: shards that the model class names, by the last part of the layer's name.
    """
    parent, dot, last = prefix.rpartition(".")
    shards = fused.get(last) or FUSED.get(last) or (last,)
    return tuple(f"{parent}{dot}{shard}" for shard in shards)


def formats_of(
    names: Sequence[str], formats: Mapping[str, Format], layer: str
) -> list[Format] | None:
    """The formats of a layer's matrices; None where none of them is in the checkpoint's list.

    Args:
        names: of the matrices.
        formats: of the checkpoint, by the names that vLLM uses.
        layer: for messages.

    Raises:
        ModelError: some are in the list and some are not.
    """
    found = [formats.get(name) for name in names]
    known = [fmt for fmt in found if fmt is not None]
    if not known:
        return None
    if len(known) < len(names):
        lost = [name for name, fmt in zip(names, found, strict=True) if fmt is None]
        raise ModelError(
            f"{layer}: config.json has formats for {len(known)} of its {len(names)} matrices and "
            f"none for {', '.join(lost[:3])}; a layer of vLLM is packed as a whole: quantize the "
            "others too, bf16 keeps them as they are"
        )
    return known


def rename_matrices(
    formats: Mapping[str, Format], rename: Callable[[str], str | None]
) -> dict[str, Format]:
    """Formats by new names.

    Args:
        formats: by name of the matrix.
        rename: new name of a tensor; the patterns of engines have dots on both sides, so a tensor
            of the matrix is renamed and not the matrix. None drops it.
    """
    suffix = ".codes"
    renamed = {rename(name + suffix): fmt for name, fmt in formats.items()}
    return {name.removesuffix(suffix): fmt for name, fmt in renamed.items() if name is not None}


def substituted(name: str, model_type: str) -> str:
    """A tensor's name with the parts of `RENAMED` exchanged."""
    for old, new in RENAMED.get(model_type, {}).items():
        name = name.replace(old, new)
    return name
