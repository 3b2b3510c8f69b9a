"""Tensors of a packed checkpoint as tensors of a GGUF file: names, order of rows, stacks.

Every projection of a layer's experts is one tensor [E, N, K], so it has one type. Vectors and what
routers hold are float32, which llama.cpp expects; all other numbers that are not quantized keep
the dtype that they have.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from alphaquant.errors import ConfigError
from alphaquant.exports.gguf.dialects import Dialect, ropes_of
from alphaquant.exports.gguf.twins import Twin, blocks_of, plain_twin, twin_of
from alphaquant.exports.packed import PackedSource
from alphaquant.spaces.units import Matrix

_EXPERT = re.compile(r"experts\.\d+\.")
_ROUTERS = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GgufEntry:
    """One tensor of the file.

    Attributes:
        name: in the file.
        shape: rows first.
        twin: its type.
        read: its bytes, uint8, in the order of the file; called once.
    """

    name: str
    shape: tuple[int, ...]
    twin: Twin
    read: Callable[[], Tensor] = field(repr=False)

    @property
    def n_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape[:-1]) * self.twin.row_bytes(self.shape[-1])


def entries_of(source: PackedSource, dialect: Dialect) -> list[GgufEntry]:
    """Every tensor of the file, in the order in which it is written.

    Raises:
        ConfigError: a tensor has no name in llama.cpp's table of the architecture.
    """
    naming = _Naming(source, dialect)
    return [*naming.plain(), *naming.matrices(), *_rope_factors(naming.config)]


class _Naming:
    """The names and layouts of one model's tensors."""

    def __init__(self, source: PackedSource, dialect: Dialect) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        self.source, self.dialect = source, dialect
        typed: Any = source.model_map.model
        self.config: Any = typed.config
        (kind,) = (k for k, name in MODEL_ARCH_NAMES.items() if name == dialect.name)
        self.table = get_tensor_name_map(kind, int(self.config.num_hidden_layers))

    def plain(self) -> Iterator[GgufEntry]:
        """What is not quantized by us, and is a part of the model."""
        is_tied = getattr(self.config, "tie_word_embeddings", False)
        left_out = {*self.source.formats.carried, *(["lm_head.weight"] if is_tied else [])}
        for name in self.source.others():
            if name in left_out:
                continue
            yield from self._plain(name, self.source.tensor(name))

    def _plain(self, name: str, tensor: Tensor) -> Iterator[GgufEntry]:
        if name.endswith(".experts.gate_up_proj_bias"):  # gate and up take turns
            stem = name.removesuffix("gate_up_proj_bias")
            yield self._floats(f"{stem}gate_proj.bias", tensor[:, ::2])
            yield self._floats(f"{stem}up_proj.bias", tensor[:, 1::2])
        elif name.endswith(".experts.down_proj_bias"):
            yield self._floats(f"{name.removesuffix('_bias')}.bias", tensor)
        elif name.endswith(".sinks"):
            yield self._floats(f"{name}.weight", tensor)
        else:
            yield self._floats(name, tensor)

    def _floats(self, source_name: str, tensor: Tensor) -> GgufEntry:
        name = self._name(source_name)
        is_vector = tensor.dim() == 1 or name.endswith(".bias")
        if is_vector or name.endswith(_ROUTERS):
            tensor = tensor.to(torch.float32)
        if name.endswith("norm.weight"):
            tensor = tensor + self.dialect.norm_shift
        if name.endswith("ffn_gate_inp_shexp.weight"):
            tensor = tensor.flatten()  # [1, H]
        made = self._reordered(source_name)(tensor).contiguous()
        return GgufEntry(name, tuple(made.shape), plain_twin(made), lambda: made.view(torch.uint8))

    def matrices(self) -> Iterator[GgufEntry]:
        """Quantizable matrices, experts stacked by projection."""
        stacks: dict[str, list[Matrix]] = {}
        for matrix in self.source.model_map.inventory.matrices:
            stem = _EXPERT.sub("experts.", matrix.name)
            stacks.setdefault(self._name(f"{stem}.weight"), []).append(matrix)
        for name, members in stacks.items():
            yield self._stack(name, members)

    def _stack(self, name: str, members: list[Matrix]) -> GgufEntry:
        first = members[0]
        twin = twin_of(self.source.formats.weights[first.name], first.cols)
        assert twin is not None, "the plan was checked"
        shape = (first.rows, first.cols)
        if first.expert is not None:
            members = sorted(members, key=lambda m: m.expert or 0)
            shape = (len(members), *shape)  # type: ignore[assignment]

        def read() -> Tensor:
            parts = [
                self._reordered(f"{m.name}.weight")(blocks_of(self.source.matrix(m.name)))
                for m in members
            ]
            return torch.cat(parts)

        return GgufEntry(name, shape, twin, read)

    def _name(self, name: str) -> str:
        """The name in the file.

        Raises:
            ConfigError: llama.cpp has none.
        """
        found = self.table.get_name(name, (".weight", ".bias"))
        if found is None:
            raise ConfigError(
                f"--export gguf: llama.cpp's {self.dialect.name} has no tensor for {name}; leave "
                "--export out for our own checkpoint"
            )
        return str(found)

    def _reordered(self, name: str) -> Change:
        """What is done with the rows of a tensor, whatever a row holds."""
        heads = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": self.config.num_key_value_heads,
        }
        n_heads = heads.get(name.rsplit(".", 2)[-2])
        if n_heads is None or not self.dialect.is_permuted:
            return lambda tensor: tensor
        return lambda tensor: interleave_halves(tensor, n_heads)


def interleave_halves(rows: Tensor, n_heads: int) -> Tensor:
    """Rows of queries or keys, [heads * d, ..], with each head's halves taking turns.

    Example: one head of rows 0 1 2 3 becomes 0 2 1 3.
    """
    halves = rows.view(n_heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _rope_factors(config: Any) -> Iterator[GgufEntry]:
    """What Llama 3 divides its frequencies by, which llama.cpp has as a tensor."""
    rope = ropes_of(config).get("", {})
    if rope.get("rope_type") != "llama3":
        return
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    wavelengths = 2 * math.pi * rope["rope_theta"] ** exponents
    n_old, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((n_old / wavelengths - low) / (high - low)).clamp(0, 1)
    factors = 1 / ((1 - smooth) / factor + smooth)
    yield GgufEntry(
        "rope_freqs.weight",
        tuple(factors.shape),
        plain_twin(factors),
        lambda: factors.view(torch.uint8),
    )
