"""What can be given a format: matrices, the units that group them, and the inventory of a model.

A matrix has the name that per-expert checkpoints use (`model.layers.3.mlp.experts.7.down_proj`),
also where transformers keeps all experts of a layer in one 3-D parameter. A unit is one matrix or
several that must share one format (an expert's gate and up; whatever a profile couples). Holds no
tensors.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from types import MappingProxyType

from alphaquant.spaces.formats import Format

KINDS = ("attention", "expert", "shared", "dense", "embedding", "head")
"""Attention projections, routed experts, shared experts (always on), MLPs of dense layers; beside
the layers the token embeddings, of which a token reads its own row, and lm_head, tied or not."""

ENDS: Mapping[str, str] = MappingProxyType({"head": "head", "embeddings": "embedding"})
"""What `--include` calls the kinds of matrix beside the decoder layers, which a search may leave
as they are."""

GATE = ("gate_proj", "w1")
UP = ("up_proj", "w3")
DOWN = ("down_proj", "w2")
"""Projections of an MLP under all their names."""


@dataclass(frozen=True)
class Matrix:
    """One quantizable weight matrix, [rows = outputs, cols = inputs].

    Attributes:
        name: canonical per-expert name, without `.weight`.
        rows: output features.
        cols: input features; groups and Hessians run along these.
        kind: one of `KINDS`.
        layer: index of its decoder layer; one more than the last for what is beside the layers.
        expert: index of its expert, None outside routed experts.
        aliases: other names that configurations may use (Mixtral's `w1`, `w2`, `w3`).
    """

    name: str
    rows: int
    cols: int
    kind: str
    layer: int
    expert: int | None = None
    aliases: tuple[str, ...] = ()

    @property
    def projection(self) -> str:
        """The last part of the name: `q_proj`, `gate_proj`, `down_proj`."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def place(self) -> str:
        """Number of its decoder layer, or `beside` the layers."""
        return "beside" if self.kind in ENDS.values() else str(self.layer)

    @property
    def role(self) -> str:
        """What it is for: `attention q`, `routed gate`, `shared up`, `dense down`."""
        if self.kind in ENDS.values():
            return self.kind
        where = "routed" if self.kind == "expert" else self.kind
        words = {"gate": GATE, "up": UP, "down": DOWN}
        what = [word for word, names in words.items() if self.projection in names]
        return " ".join((where, *(what or [self.projection.removesuffix("_proj")])))

    def is_included(self, include: Sequence[str]) -> bool:
        """Whether it is quantized where so much is beside the layers.

        Args:
            include: names in `ENDS`; tied weights are both, and known by their aliases.
        """
        if self.kind not in ENDS.values():
            return True
        if self.kind == ENDS["head"] and self.aliases:
            return bool(include)
        return self.kind in {ENDS[name] for name in include}

    @property
    def is_looked_up(self) -> bool:
        """Whether a token reads one row of it and not the whole."""
        return self.kind == ENDS["embeddings"]

    @property
    def n_weights(self) -> int:
        """Number of weights: rows * cols."""
        return self.rows * self.cols

    def storage_bits(self, fmt: Format) -> int:
        """Bits on disk in a format."""
        return fmt.storage_bits(self.rows, self.cols)


@dataclass(frozen=True)
class Unit:
    """The smallest thing that gets one format: one matrix, or several that are coupled."""

    name: str
    matrices: tuple[Matrix, ...]

    @property
    def kind(self) -> str:
        """Kind of its first matrix; coupled matrices are of one kind."""
        return self.matrices[0].kind

    @property
    def layer(self) -> int:
        """Layer of its first matrix."""
        return self.matrices[0].layer

    @property
    def family(self) -> str:
        """What allocators group by: `attention`, `expert.w13`, `expert.w2`, `head`, ..."""
        if self.kind in ("attention", *ENDS.values()):
            return self.kind
        parts = {"w2" if m.projection in DOWN else "w13" for m in self.matrices}
        return f"{self.kind}.{'all' if len(parts) > 1 else parts.pop()}"

    @property
    def n_weights(self) -> int:
        """Weights of all its matrices."""
        return sum(m.n_weights for m in self.matrices)

    def storage_bits(self, fmt: Format) -> int:
        """Bits on disk of all its matrices in a format."""
        return sum(m.storage_bits(fmt) for m in self.matrices)


@dataclass(frozen=True)
class Kept:
    """A tensor that stays as it is: embeddings, lm_head, norms, routers.

    Attributes:
        name: parameter name in the checkpoint, with `.weight`.
        n_weights: elements.
        n_bytes: bytes as stored.
        aliases: other names that configurations may use (Mixtral's `block_sparse_moe.gate`).
    """

    name: str
    n_weights: int
    n_bytes: int
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inventory:
    """The quantizable matrices of a model, in model order, and what stays unquantized.

    Attributes:
        model_type: the architecture's name in its configuration.
        matrices: quantizable matrices; names are unique.
        kept: tensors that are stored as they are.
        included: what the matrices beside the decoder layers are where they are stored as they
            are.
    """

    model_type: str
    matrices: tuple[Matrix, ...]
    kept: tuple[Kept, ...] = ()
    included: tuple[Kept, ...] = ()

    @cached_property
    def by_name(self) -> dict[str, Matrix]:
        """Matrices by canonical name."""
        return {m.name: m for m in self.matrices}

    @property
    def n_weights(self) -> int:
        """Quantizable weights: the denominator of `bits per weight`."""
        return sum(m.n_weights for m in self.matrices)

    @property
    def n_file_weights(self) -> int:
        """All weights, kept ones too."""
        return self.n_weights + sum(k.n_weights for k in self.kept)

    @property
    def n_layers(self) -> int:
        """One more than the largest index of a decoder layer."""
        return 1 + max(m.layer for m in self.matrices if m.kind not in ENDS.values())

    @property
    def n_parts(self) -> int:
        """One more than the largest layer index: layers, and what is beside them as one more."""
        return 1 + max(m.layer for m in self.matrices)

    @property
    def include(self) -> tuple[str, ...]:
        """Names in `ENDS` of the kinds that are among its matrices."""
        kinds = {m.kind for m in self.matrices}
        return tuple(name for name, kind in ENDS.items() if kind in kinds)

    @property
    def kept_bytes(self) -> int:
        """Bytes of everything that stays unquantized."""
        return sum(k.n_bytes for k in self.kept)

    @cached_property
    def digest(self) -> str:
        """sha256 over names, shapes and kept tensors; equal for equal architectures.

        Also whether matrices beside the layers are included or kept.
        """
        kept = sorted((*self.kept, *self.included), key=lambda k: k.name)
        facts = [
            self.model_type,
            [asdict(m) for m in self.matrices if m.kind not in ENDS.values()],
            [asdict(k) for k in kept],
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def storage_bits(self, fmt: Format) -> int:
        """Bits of all matrices in one uniform format."""
        return sum(m.storage_bits(fmt) for m in self.matrices)


def total_bits(choice: Iterable[tuple[Matrix, Format]]) -> int:
    """Bits on disk of matrices in their formats."""
    return sum(matrix.storage_bits(fmt) for matrix, fmt in choice)
