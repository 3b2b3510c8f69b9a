"""Our descent in llama.cpp's types: blocks come back byte for byte, errors only fall."""

from dataclasses import replace
from importlib.util import find_spec

import gguf
import pytest
import torch
from torch import Tensor

from alphaquant.quant.engine import quantize_batches
from alphaquant.quant.ggml.decoding import decode, levels_of
from alphaquant.quant.ggml.encoding import encode
from alphaquant.quant.ggml.improving import improve
from alphaquant.quant.ggml.ladders import LADDERS, packed
from alphaquant.quant.hessian import HessianBatch
from alphaquant.spaces.formats import GGML_BLOCKS
from alphaquant.spaces.units import Matrix
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.llama.blocks import drawn_blocks

needs_library = pytest.mark.skipif(
    find_spec("xllamacpp") is None, reason="xllamacpp (the extra llamacpp) is not installed"
)


def drawn_inputs(cols: int, n_tokens: int = 600, seed: int = 0) -> Tensor:
    """Correlated inputs of different sizes, [n, K]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(0.5 * torch.randn(cols, generator=generator))
    mix = torch.eye(cols) + 0.1 * torch.randn(cols, cols, generator=generator)
    return torch.randn(n_tokens, cols, generator=generator) @ mix * sizes


def drawn_hessian(cols: int) -> Tensor:
    X = drawn_inputs(cols)
    H = X.T @ X
    return H + 0.01 * H.diagonal().mean() * torch.eye(cols)


def errors(kind: str, codes: Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
    """tr(D H D') of every row."""
    D = weight - decode(kind, codes)
    return ((D @ hessian) * D).sum(-1)


@pytest.mark.parametrize("kind", LADDERS)
def test_decoded_blocks_are_packed_to_the_same_bytes(kind: str) -> None:
    blocks = drawn_blocks(kind).view(-1, GGML_BLOCKS[kind][1])
    assert torch.equal(packed(kind, levels_of(kind, blocks)), blocks)


@needs_library
@pytest.mark.parametrize("kind", LADDERS)
def test_no_row_gets_worse_and_all_together_a_quarter_better(kind: str) -> None:
    weight = 0.02 * torch.randn(2, 24, 256, generator=torch.Generator().manual_seed(0))
    hessians = torch.stack([drawn_hessian(256), torch.eye(256)])
    start = torch.stack(
        [encode(kind, w, H.diagonal()) for w, H in zip(weight, hessians, strict=True)]
    )
    found = improve(kind, start, weight, hessians, 3)
    assert found.shape == start.shape
    for one, own, w, H in zip(found, start, weight, hessians, strict=True):
        assert bool((errors(kind, one, w, H) <= errors(kind, own, w, H) * (1 + 1e-5)).all())
    after = errors(kind, found[0], weight[0], hessians[0]).sum()
    assert after < 0.75 * errors(kind, start[0], weight[0], hessians[0]).sum()


@pytest.mark.parametrize("kind", ["q4_1", "q5_1"])
def test_no_other_value_of_a_single_weight_is_better_at_the_end(kind: str) -> None:
    weight = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    hessian = drawn_hessian(32)
    numbers = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    found = improve(kind, torch.from_numpy(numbers)[None], weight[None], hessian[None], 30)[0]
    levels, least = levels_of(kind, found), errors(kind, found, weight, hessian)
    for column in range(32):
        for value in range(LADDERS[kind].high + 1):
            values = levels.values.clone()
            values[:, column] = value
            D = weight - replace(levels, values=values).weights()
            other = ((D @ hessian) * D).sum(-1)
            assert bool((other >= least * (1 - 1e-4)).all()), (column, value)


def test_a_part_without_a_scale_stays_as_it_is() -> None:
    blocks = drawn_blocks("q4_k").view(-1, 144)[:4].clone()
    blocks[:, 4:16] = 0  # all scales and minima
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    found = improve("q4_k", blocks[None], weight[None], drawn_hessian(256)[None], 2)
    assert bool(torch.isfinite(decode("q4_k", found[0])).all())


def test_vectors_of_a_table_and_no_sweeps_change_nothing() -> None:
    weight, hessian = torch.randn(1, 4, 256), drawn_hessian(256)[None]
    for kind, n_sweeps in (("iq3_s", 3), ("q4_k", 0)):
        blocks = drawn_blocks(kind).view(-1, GGML_BLOCKS[kind][1])[None, :4]
        assert torch.equal(improve(kind, blocks, weight, hessian, n_sweeps), blocks)


class Weights:
    """One matrix of its own per name."""

    def view(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(int(name[-1]))
        return 0.02 * torch.randn(16, 256, generator=generator)


@needs_library
def test_the_engine_improves_where_it_has_data_and_an_unseen_expert_is_kept() -> None:
    matrices = [Matrix(f"expert{i}", 16, 256, "expert", 0, i) for i in range(3)]
    hessian = torch.stack([drawn_hessian(256), drawn_hessian(256), torch.zeros(256, 256)])
    sources = ("routing_weighted", "routing_weighted", "none")
    batch = HessianBatch(tuple((m,) for m in matrices), hessian, (600, 600, 0), sources)
    records = {}
    for n_sweeps in (0, 2):
        settings = QuantSettings(refine_sweeps=n_sweeps, n_starts=1, shrinkage=False)
        items = list(quantize_batches(Weights(), [batch], ["q3_k"], settings))
        assert [item.matrix.name for item in items] == [m.name for m in matrices]
        records[n_sweeps] = [item.record for item in items]
        for item in items:  # zeros would be an error of 1
            assert item.record.weight_error < 0.1
            assert item.packed.dequantize().shape == (16, 256)
    assert [r.method for r in records[0]] == ["ggml", "ggml", "ggml"]
    assert [r.method for r in records[2]] == ["descent", "descent", "ggml"]
    assert [r.fallback for r in records[2]] == [None, None, "no_tokens"]
    for plain, ours in zip(records[0][:2], records[2][:2], strict=True):
        assert plain.output_error is not None and ours.output_error is not None
        assert ours.output_error < 0.8 * plain.output_error
