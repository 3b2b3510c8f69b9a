"""What vLLM calls the matrices of a checkpoint.

Checkpoints of ours have the names of transformers' modules, a matrix per expert. vLLM has those
too, with two differences: it fuses linears into one layer (`qkv_proj` of q, k, v), and a few
models keep the names of their first files (Mixtral: `block_sparse_moe.experts.3.w1`). Many build
embeddings without a name (`Ends`).
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from alphaquant.errors import ModelError
from alphaquant.models.quantization_config import PackedFormats
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

HEADS = ("lm_head", "embed_out", "output_layer")
"""Last parts of the names that model classes give a head."""

EMBEDDINGS = ("embed_tokens", "embeddings", "word_embeddings", "embed_in", "wte", "tok_embeddings")
"""Likewise of token embeddings."""


def check_formats(formats: PackedFormats) -> None:
    """Refuse a checkpoint that holds what is not served here, before anything is built.

    Raises:
        ModelError: inputs of matrices are to be rounded, for which vLLM has no place, or matrices
            are in llama.cpp's types, whose blocks are not cut.
    """
    rounded = sorted(formats.activations)
    if rounded:
        raise ModelError(
            f"inputs of {len(rounded)} matrices are rounded, e.g. of {rounded[0]} to "
            f"{formats.activations[rounded[0]].name}; vLLM serves packed weights alone: "
            "quantize without aq, or run it with alphaquant.load"
        )
    blocks = sorted(name for name, fmt in formats.weights.items() if fmt.is_ggml)
    if blocks:
        raise ModelError(
            f"{len(blocks)} matrices are in types of llama.cpp, e.g. {blocks[0]} in "
            f"{formats.weights[blocks[0]].name}, which vLLM's plug-in does not serve; write a "
            "file for llama.cpp with aq-quantize --export gguf, or search with --profile any"
        )


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


@dataclass(frozen=True)
class Ends:
    """What is packed beside the layers.

    Attributes:
        head: name of the head; None where it is not packed, or tied.
        embeddings: name of the embeddings; None where they are not packed.
        n_words: rows of both; other layers with a row per word are none of them.
        is_tied: whether the head has the weights of the embeddings.
    """

    head: str | None
    embeddings: str | None
    n_words: int = 0
    is_tied: bool = False

    def matrix_of(self, prefix: str, n_words: int, *, is_head: bool) -> str | None:
        """The packed matrix that a layer of vLLM holds; None where it holds none.

        Args:
            prefix: of the layer: `model.embed_tokens`, `embed_tokens`, or nothing, as many model
                classes do not name embeddings.
            n_words: its rows, without padding.
            is_head: whether it is a head.
        """
        name = self.head if is_head else self.embeddings
        if name is None or n_words != self.n_words:
            return None
        is_named = not prefix or f".{name}".endswith(f".{prefix.lstrip('.')}")
        return name if is_named else None

    def is_tied_head(self, n_words: int) -> bool:
        """Whether a head multiplies with packed embeddings."""
        tied = self.is_tied and self.head is None and self.embeddings is not None
        return tied and n_words == self.n_words


def find_ends(names: Iterable[str], config: object) -> Ends:
    """What is packed beside the layers.

    Args:
        names: of packed matrices, as vLLM calls them.
        config: of the model, from transformers.
    """
    parts = {name: name.split(".") for name in names}
    beside = {name: p[-1] for name, p in parts.items() if not any(map(str.isdigit, p))}
    head, table = (
        next((name for name, last in beside.items() if last in known), None)
        for known in (HEADS, EMBEDDINGS)
    )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    ties = [getattr(part, "tie_word_embeddings", False) for part in (config, text)]
    return Ends(head, table, getattr(text, "vocab_size", 0), any(ties))


def check_served(packed: Collection[str], served: Collection[str]) -> None:
    """Refuse a model of vLLM that has no layer for a packed matrix, or builds it unquantized.

    Where a class drops tensors that it does not know, it would run with whatever is in memory.

    Args:
        packed: matrices of the checkpoint.
        served: those that a layer was built for.

    Raises:
        ModelError: naming the first ones.
    """
    lost = sorted(set(packed) - set(served))
    if lost:
        raise ModelError(
            f"{len(lost)} packed matrices have no layer in vLLM's class of this model that could "
            f"be packed, e.g. {', '.join(lost[:3])}; give them bf16 and quantize again, or run "
            "the checkpoint with alphaquant.load"
        )
