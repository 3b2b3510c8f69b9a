"""Output Hessians: their noise, their blocks, their files, and the engine with them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaquant.costs.fisher import CostSettings
from alphaquant.costs.gradients import trace_layers
from alphaquant.costs.labels import SampledLabels
from alphaquant.costs.matrix_costs import trace_matrices
from alphaquant.costs.output_gradients import measure_output_hessians, output_hessians_key
from alphaquant.errors import ModelError, StoreError
from alphaquant.models.mapping import map_model
from alphaquant.models.sites import ModelMap
from alphaquant.models.walk import batches_of
from alphaquant.quant.bank import open_bank
from alphaquant.quant.filling import BankRequest, fill_bank
from alphaquant.quant.two_sided.output_hessian import OutputSums, owners, row_blocks
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.models import tiny_model, tiny_tokens


@pytest.fixture(scope="module")
def model_map() -> ModelMap:
    return map_model(tiny_model("olmoe").eval())


TOKENS = tiny_tokens(6, 16)
TWO_SIDED = QuantSettings(two_sided=True)


def test_rows_are_cut_into_blocks() -> None:
    assert [(r.start, r.stop) for r in row_blocks(1100)] == [(0, 512), (512, 1024), (1024, 1100)]


def test_correlations_are_drawn_toward_zero_by_their_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(50, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    sums = OutputSums(6)
    for part in gradients.split(20):
        sums.add(part)
    (found,) = sums.blocks()
    products = gradients[:, :, None] * gradients[:, None, :]  # [t, N, N]
    total = products.sum(0)
    noise = 50 * products.var(0)
    beside = ~torch.eye(6, dtype=torch.bool)
    share = float(noise[beside].sum() / total.square()[beside].sum())
    assert 0.0 < share < 1.0
    expected = torch.where(beside, (1 - share) * total, total) / total.diagonal().mean()
    assert torch.allclose(found, expected, rtol=1e-4)
    assert float(found.diagonal().mean()) == pytest.approx(1.0, abs=1e-5)


def test_gradients_that_say_nothing_together_leave_rows_apart() -> None:
    sums = OutputSums(8)
    gradients = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    sums.add(gradients)
    (found,) = sums.blocks()
    plain = gradients.T @ gradients
    beside = ~torch.eye(8, dtype=torch.bool)
    kept = found[beside].norm() / (plain / plain.diagonal().mean())[beside].norm()
    assert float(kept) < 0.5
    nothing = OutputSums(4)
    nothing.add(torch.zeros(5, 4))
    assert torch.equal(nothing.blocks()[0], torch.eye(4))


def test_sums_are_those_of_the_gradients(model_map: ModelMap, tmp_path: Path) -> None:
    measured = measure_output_hessians(model_map, TOKENS, tmp_path, CostSettings(batch_size=4))
    for trace in trace_layers(model_map, batches_of(TOKENS, 4), [SampledLabels(1, 0)]):
        found, sums = measured.read(trace.layer), dict[str, OutputSums]()
        shared = owners(trace.layer)
        for of_matrix in trace_matrices(trace):
            name = shared[of_matrix.matrix.name]
            own = sums.setdefault(name, OutputSums(of_matrix.matrix.rows))
            own.add(of_matrix.gradients[0])
        assert set(found) == {m.name for m in trace.layer.matrices()}
        for name, blocks in found.items():
            (expected,) = sums[shared[name]].blocks()
            assert torch.allclose(blocks[0], expected, atol=1e-3 * float(expected.abs().max()))
        downs = {shared[m.name] for site in trace.layer.experts for m in site.down}
        assert len(downs) == len(trace.layer.experts), "all experts write into one space"


def test_what_is_there_is_not_measured_again(model_map: ModelMap, tmp_path: Path) -> None:
    stages: list[tuple[str, int, int]] = []

    def tell(stage: str, done: int, total: int) -> None:
        stages.append((stage, done, total))

    first = measure_output_hessians(model_map, TOKENS, tmp_path, CostSettings(), tell)
    assert stages[-1] == ("outputs", 2, 2)
    first.file(model_map.layers[0]).unlink()
    kept = first.file(model_map.layers[1]).read_bytes()
    stages.clear()
    measure_output_hessians(model_map, TOKENS, tmp_path, CostSettings(), tell)
    assert stages == [("outputs", 1, 2), ("outputs", 2, 2)]
    assert first.file(model_map.layers[1]).read_bytes() == kept
    stages.clear()
    measure_output_hessians(model_map, TOKENS, tmp_path, CostSettings(), tell)
    assert stages == []


def test_a_damaged_file_is_named(model_map: ModelMap, tmp_path: Path) -> None:
    outputs = measure_output_hessians(model_map, TOKENS, tmp_path, CostSettings())
    path = outputs.file(model_map.layers[1])
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] * 2}, path, {"sha256": "0"})
    with pytest.raises(StoreError, match="layer-001.safetensors is damaged"):
        outputs.read(model_map.layers[1])
    path.unlink()
    with pytest.raises(StoreError, match="layer-001.safetensors is damaged"):
        outputs.read(model_map.layers[1])


def test_the_key_knows_model_text_and_settings() -> None:
    keys = {
        output_hessians_key(weights, text, CostSettings(seed=seed))
        for weights in "ab"
        for text in "cd"
        for seed in (0, 1)
    }
    assert len(keys) == 8


def test_a_bank_is_filled_with_both_sides_and_says_so(model_map: ModelMap, tmp_path: Path) -> None:
    bank = open_bank(tmp_path / "banks", "two", model_map.inventory, {})
    fill_bank(
        bank,
        model_map,
        TOKENS,
        BankRequest(
            ["int1-g32", "int3-g32", "mxfp4", "bf16"],
            TWO_SIDED,
            outputs=lambda: measure_output_hessians(model_map, TOKENS, tmp_path, CostSettings()),
        ),
    )
    plain = open_bank(tmp_path / "banks", "one", model_map.inventory, {})
    fill_bank(plain, model_map, TOKENS, BankRequest(["int1-g32", "int3-g32"], QuantSettings()))
    assert all(row["is_two_sided"] for row in bank.records("int3-g32", 0))
    assert all(row["output_damp"] == pytest.approx(0.02) for row in bank.records("int3-g32", 0))
    assert all(row["output_damp"] is None for row in bank.records("int1-g32", 0))
    assert not any(row["is_two_sided"] for row in bank.records("bf16", 0))
    assert not any(row["is_two_sided"] for row in bank.records("int1-g32", 0))
    for matrix in model_map.inventory.matrices:
        alone, found = plain.read(matrix, "int1-g32"), bank.read(matrix, "int1-g32")
        assert torch.equal(alone.dequantize(), found.dequantize()), "one bit is rounded alone"
    assert not any(row["is_two_sided"] for row in plain.records("int3-g32", 0))
    differing = [
        m.name
        for m in model_map.inventory.matrices
        if not torch.equal(
            bank.read(m, "int3-g32").dequantize(), plain.read(m, "int3-g32").dequantize()
        )
    ]
    assert len(differing) > len(model_map.inventory.matrices) / 2


def test_settings_that_ask_for_what_nothing_measures_are_refused(
    model_map: ModelMap, tmp_path: Path
) -> None:
    bank = open_bank(tmp_path, "none", model_map.inventory, {})
    with pytest.raises(ModelError, match="two_sided rounding needs output Hessians"):
        fill_bank(bank, model_map, TOKENS, BankRequest(["int3-g32"], TWO_SIDED))
