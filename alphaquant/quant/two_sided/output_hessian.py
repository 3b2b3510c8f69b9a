"""Output Hessians: which rounding errors of a matrix's outputs the loss sees, and together.

GPTQ asks for the squared error of a matrix's outputs, tr(D H D') with D = W - Q, as if all outputs
mattered alike and apart. To second order the loss sees tr(O D H D') where O is the second moment
of the gradients at the outputs (the Kronecker approximation of the Fisher information, Martens and
Grosse 2015, arXiv 1503.05671; for rounding: YAQA, arXiv 2505.22988). It is measured with labels
drawn from the model, as costs are (`alphaquant.costs.output_gradients`), so O is that of the
divergence.

What is stored of it is kept small. A matrix's rows are cut into blocks of 512, and O is known
inside a block; the blocks are also what is rounded at the same time. All down projections of a
layer's experts write into one space and share one O. Its correlations are drawn toward zero as far
as their own noise says (Schafer and Strimmer 2005, Stat. Appl. Genet. Mol. Biol. 4(1), target D).

Letters: N rows, n rows of a block, t tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from alphaquant.checksums import SUM, content_sum
from alphaquant.errors import ModelError, StoreError
from alphaquant.files import whole_file
from alphaquant.models.sites import LayerSite
from alphaquant.specs.quantizer import QuantSettings

BLOCK_ROWS = 512
"""Rows of a block, at most."""

Measured = Callable[[], "OutputHessians"]
"""Measures those of a model, or finds them."""

OutputBlocks = Mapping[str, tuple[Tensor, ...]]
"""Float32 [n, n] of every block of a matrix's rows, by its name; a mean diagonal of 1."""


def row_blocks(n_rows: int) -> Iterator[slice]:
    """The rows of every block.

    Example: 768 rows -> 0 to 511, 512 to 767.
    """
    for start in range(0, n_rows, BLOCK_ROWS):
        yield slice(start, min(n_rows, start + BLOCK_ROWS))


class OutputSums:
    """Sums over tokens, for one matrix or several that write into one space.

    Args:
        n_rows: N.
    """

    def __init__(self, n_rows: int) -> None:
        self._products: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._n_rows, self._n_tokens = n_rows, 0

    def add(self, gradients: Tensor) -> None:
        """Add the gradients of some tokens, any float dtype [t, N]."""
        for k, rows in enumerate(row_blocks(self._n_rows)):
            own = gradients[:, rows].float()
            squared = own.square()
            if k == len(self._products):
                n = own.shape[1]
                self._products.append(torch.zeros(n, n, device=own.device))
                self._squares.append(torch.zeros(n, n, device=own.device))
            self._products[k].addmm_(own.T, own)
            self._squares[k].addmm_(squared.T, squared)
        self._n_tokens += len(gradients)

    def blocks(self) -> tuple[Tensor, ...]:
        """Every block's O with its noise taken out, float32 [n, n], a mean diagonal of 1.

        The identity where no gradient arrived.
        """
        pairs = zip(self._products, self._squares, strict=True)
        return tuple(_drawn(products, squares, self._n_tokens) for products, squares in pairs)


def _drawn(products: Tensor, squares: Tensor, n_tokens: int) -> Tensor:
    """A sum of g g' whose entries beside the diagonal are as much smaller as they are noise.

    Args:
        products: sum of g_i g_j, [n, n].
        squares: sum of g_i^2 g_j^2, [n, n].
        n_tokens: how many were added.
    """
    diagonal = products.diagonal()
    mean = float(diagonal.mean())
    if not mean > 0:
        return torch.eye(len(products))
    beside = 1 - torch.eye(len(products))
    noise = (squares - products.square() / n_tokens).clamp(min=0)
    noise *= n_tokens / max(n_tokens - 1, 1)
    signal = float((products.square() * beside).sum())
    share = float((noise * beside).sum()) / signal if signal > 0 else 0.0
    return (products * (1 - min(share, 1.0) * beside)) / mean


@dataclass(frozen=True)
class OutputHessians:
    """Stored output Hessians of a model, one file per layer.

    Attributes:
        folder: where they are.
    """

    folder: Path

    def file(self, layer: LayerSite) -> Path:
        """The file of a layer."""
        return self.folder / f"layer-{layer.index:03d}.safetensors"

    def has(self, layer: LayerSite) -> bool:
        """Whether a layer's are there."""
        return self.file(layer).exists()

    def save(self, layer: LayerSite, sums: Mapping[str, OutputSums]) -> None:
        """Store a layer's, float16.

        Args:
            layer: the layer.
            sums: by the name of the matrix, of the first of those that share one.
        """
        tensors = {
            f"{name}.{k}": block.to("cpu", torch.float16)
            for name, of_matrix in sums.items()
            for k, block in enumerate(of_matrix.blocks())
        }
        with whole_file(self.file(layer)) as part:
            save_file(tensors, part, {SUM: _sum_of(tensors)})

    def read(self, layer: LayerSite) -> OutputBlocks:
        """A layer's, by the name of every matrix that has them.

        Raises:
            StoreError: the file is missing or damaged.
        """
        path = self.file(layer)
        try:
            with safe_open(path, "pt") as file:
                stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                told = (file.metadata() or {}).get(SUM)
        except (OSError, SafetensorError) as error:
            raise _damaged(path, str(error)) from error
        if told != _sum_of(stored):
            raise _damaged(path, "its contents are not those that were written")
        found = {}
        for name, shared in owners(layer).items():
            n_blocks = sum(1 for key in stored if key.rpartition(".")[0] == shared)
            found[name] = tuple(stored[f"{shared}.{k}"].float() for k in range(n_blocks))
        return found


def checked_outputs(settings: QuantSettings, outputs: Measured | None) -> OutputHessians | None:
    """The output Hessians that settings ask for, None where they ask for none.

    Raises:
        ModelError: they ask for them, and nothing measures them.
    """
    if not settings.two_sided or settings.method != "gptq":
        return None
    if outputs is None:
        raise ModelError(
            "two_sided rounding needs output Hessians: give what measures them "
            "(alphaquant.costs.output_gradients), or two_sided=False"
        )
    return outputs()


def owners(layer: LayerSite) -> dict[str, str]:
    """For every matrix of a layer the name under which its output Hessian is kept."""
    found = {site.matrix.name: site.matrix.name for site in layer.linears}
    for experts in layer.experts:
        for e in range(experts.n_experts):
            found |= {m.name: m.name for m in experts.inner(e)}
        found |= {m.name: experts.down[0].name for m in experts.down}
    return found


def _sum_of(tensors: Mapping[str, Tensor]) -> str:
    return content_sum((name, tensors[name].numpy()) for name in sorted(tensors))


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(
        f"{path} is damaged ({why}); delete {path.parent} and run the same command again: it is "
        "made anew"
    )
