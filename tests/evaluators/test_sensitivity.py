"""Costs of formats against autograd, the measured KL and direct definitions; their files.

Letters: M matrices, F formats, D draws, S sequences, T tokens.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from alphaquant.errors import StoreError
from alphaquant.evaluators import sensitivity
from alphaquant.evaluators.sensitivity import CostSettings, CostTable, measure_costs, unit_costs
from alphaquant.quant.bank import Bank, fill_bank, open_bank
from alphaquant.quant.engine import QuantSettings
from alphaquant.quant.models import map_model
from alphaquant.quant.sites import ExpertsSite, ModelMap
from alphaquant.spaces.units import Unit
from alphaquant.testing.models import tiny_model, tiny_tokens

FORMATS = ("int3-g32-asym", "int8-g32")
TOKENS = tiny_tokens(6, 10)
FAMILIES = ["mixtral", "qwen2_moe", "deepseek_v2"]
"""Routed experts alone; a shared expert behind a gate; latent attention, a dense layer."""


@dataclass(frozen=True)
class Case:
    """A tiny model with its bank."""

    map: ModelMap
    bank: Bank

    def costs(self, tokens: Tensor = TOKENS, **settings: Any) -> CostTable:
        """The table; settings as in `CostSettings`."""
        return measure_costs(self.map, self.bank, tokens, FORMATS, CostSettings(**settings))

    def weight_error(self, name: str, format_name: str) -> Tensor:
        """Q - W of a matrix."""
        quantized = self.bank.read(self.map.inventory.by_name[name], format_name).dequantize()
        return quantized - self.map.view(name)

    def experts(self) -> Iterator[tuple[int, ExpertsSite]]:
        """Layer and site of every experts module."""
        for layer in self.map.layers:
            for site in layer.experts:
                yield layer.index, site


def make_case(root: Path, family: str, **changes: Any) -> Case:
    """A model of hidden size 32; banks of equal models are shared by nobody."""
    model_map = map_model(tiny_model(family, hidden_size=32, **changes))
    bank = open_bank(root, "bank", model_map.inventory, {})
    settings = QuantSettings(method="rtn")
    fill_bank(bank, model_map, TOKENS, FORMATS, settings)
    return Case(model_map, bank)


@pytest.fixture(scope="module", params=FAMILIES)
def family_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Mixtral, for tests that only read its bank."""
    return make_case(tmp_path_factory.mktemp("case"), "mixtral")


@pytest.fixture
def own_case(tmp_path: Path) -> Case:
    """Mixtral, with a bank and weights that the test may break."""
    return make_case(tmp_path, "mixtral")


def shards(bank: Bank) -> list[Path]:
    return sorted((bank.path / "costs").rglob("*.safetensors"))


# Products


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The labels that are drawn, in the order of the draws."""
    labels: list[Tensor] = []
    multinomial = torch.multinomial

    def record(*args: Any, **options: Any) -> Tensor:
        labels.append(multinomial(*args, **options))
        return labels[-1]

    monkeypatch.setattr(torch, "multinomial", record)
    return labels


def whole_gradients(case: Case, window: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradients of the log-likelihood of labels [T] at every matrix, through the whole model."""
    model = case.map.model
    model.requires_grad_(True)
    try:
        log_probs = torch.log_softmax(model(window[None], use_cache=False).logits[0], -1)
        log_probs.gather(-1, labels[:, None]).sum().backward()
        found = {}
        for layer in case.map.layers:
            for linear in layer.linears:
                found[linear.matrix.name] = linear.module.weight.grad.clone()
            for site in layer.experts:
                gate_up, down = site.module.gate_up_proj.grad, site.module.down_proj.grad
                half = site.gate[0].rows
                for e in range(site.n_experts):
                    found[site.gate[e].name] = gate_up[e, :half].clone()
                    found[site.up[e].name] = gate_up[e, half:].clone()
                    found[site.down[e].name] = down[e].clone()
    finally:
        model.zero_grad()
        model.requires_grad_(False)
    return found


def test_products_equal_those_with_gradients_of_the_whole_model(
    family_case: Case, drawn: list[Tensor]
) -> None:
    case, (n_sequences, seq_len) = family_case, TOKENS.shape
    table = case.costs(seed=3, n_draws=2, batch_size=n_sequences)
    labels = torch.cat([x.flatten() for x in drawn]).view(2, n_sequences, seq_len)
    expected = np.zeros_like(table.products)
    for i, of_sequence in enumerate(labels.flatten(0, 1)):
        gradients = whole_gradients(case, TOKENS[i % n_sequences], of_sequence)
        for row, name in enumerate(table.matrices):
            for column, fmt in enumerate(FORMATS):
                product = (case.weight_error(name, fmt) * gradients[name]).sum()
                expected[row, column, i] = product
    scale = np.abs(expected).max(-1, keepdims=True)
    assert (scale[:, 0] > 1e-3).all()  # every matrix of these models was reached
    # Both are float32 sums of about 1e4 terms, which cancel: 1e-7 * sqrt(1e4), times a few.
    assert (np.abs(table.products - expected) <= 1e-4 * scale).all()


def test_the_first_draw_of_more_is_the_only_one_of_fewer(case: Case) -> None:
    one, three = (case.costs(n_draws=n).products for n in (1, 3))
    assert three.shape[-1] == 3 * one.shape[-1]
    assert np.allclose(three[..., : len(TOKENS)], one, rtol=1e-4, atol=1e-5)
    assert not np.allclose(three[..., len(TOKENS) : 2 * len(TOKENS)], one, rtol=0.1, atol=0.01)


def measured_kl(case: Case, unit: Unit, format_name: str, scale: float) -> float:
    """KL per token, in float64, of the model with `scale` times a unit's error in a format."""
    model = case.map.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    errors = {m.name: scale * case.weight_error(m.name, format_name) for m in unit.matrices}
    try:
        model.double()
        p = torch.log_softmax(model(TOKENS, use_cache=False).logits, -1)
        views = map_model(model).views
        for name, error in errors.items():
            views[name] += error.double()
        q = torch.log_softmax(model(TOKENS, use_cache=False).logits, -1)
    finally:
        model.float().load_state_dict(before)
    return float(nn.functional.kl_div(q, p, reduction="sum", log_target=True) / TOKENS.numel())


def fisher_error(table: CostTable, unit: Unit, column: int) -> float:
    """Standard error of a unit's Fisher cost: draws are independent, sequences are fixed."""
    rows = [table.matrices.index(m.name) for m in unit.matrices]
    products = table.products[rows, column].astype(np.float64).sum(0)
    terms = (products**2 / 2 / table.seq_len).reshape(table.settings.n_draws, -1)  # [D, S]
    return math.sqrt(terms.var(0, ddof=1).sum() / terms.shape[0]) / terms.shape[1]


@pytest.mark.parametrize(
    ("top_k", "scale"),
    [
        # A token that is sent to another expert has a KL that no derivative knows: with int8 it
        # is one or two of these 60 for some matrices, whose KL is then six times the estimate.
        pytest.param(4, 1.0, id="int8, all experts chosen"),
        pytest.param(2, 0.01, id="a hundredth of the error of int8, two experts chosen"),
    ],
)
def test_fisher_estimates_the_kl_of_small_errors(tmp_path: Path, top_k: int, scale: float) -> None:
    case, column = make_case(tmp_path, "mixtral", num_experts_per_tok=top_k), 1
    table = case.costs(n_draws=512)
    matrices = case.map.inventory.matrices
    units = [Unit(m.name, (m,)) for m in matrices] + [Unit("all", matrices)]
    fisher = scale**2 * unit_costs(table, units).fisher[:, column]
    for unit, estimate in zip(units, fisher, strict=True):
        truth = measured_kl(case, unit, FORMATS[column], scale)
        # Of 512 draws of 6 sequences of equal weight one standard error is sqrt(2 / 3072) = 2.6 %;
        # unequal weights make it up to 5 %. Four of them, and 5 % for terms of third order.
        tolerance = 4 * scale**2 * fisher_error(table, unit, column) + 0.05 * truth
        assert tolerance <= 0.3 * truth, unit.name
        assert estimate == pytest.approx(truth, abs=tolerance), unit.name


# Errors


def experts_output_error(case: Case, site: ExpertsSite, name: str, format_name: str) -> float:
    """Squared change of the experts module's output per token, with one matrix in a format."""
    calls: list[tuple[Any, ...]] = []
    handle = site.module.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((*args, *kwargs.values())), with_kwargs=True
    )
    case.map.model(TOKENS, use_cache=False)
    handle.remove()
    reference = site.module(*calls[0])
    view, delta = case.map.view(name), case.weight_error(name, format_name)
    original = view.clone()
    view += delta
    changed = site.module(*calls[0])
    view.copy_(original)
    return float((changed - reference).square().sum(-1).mean())


def test_the_error_of_an_expert_is_that_of_the_block_output(family_case: Case) -> None:
    table = family_case.costs()
    for _, site in family_case.experts():
        for matrix in (site.gate[0], site.up[1], site.down[2]):
            for column, fmt in enumerate(FORMATS):
                expected = experts_output_error(family_case, site, matrix.name, fmt)
                found = table.error[table.matrices.index(matrix.name), column]
                # The direct definition subtracts float32 outputs: of int8 the difference is about
                # 1e-2 of them, so 1e-7 / 1e-2 = 1e-5 relative, twice for the square.
                assert found == pytest.approx(expected, rel=1e-3)
                assert found > 0


def layer_output_error(case: Case, layer: int, name: str, format_name: str) -> float:
    """Squared change of the decoder layer's output per token of the first two sequences."""
    outputs: list[Tensor] = []
    handle = case.map.layers[layer].module.register_forward_hook(
        lambda _, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    view, delta = case.map.view(name), case.weight_error(name, format_name)
    original = view.clone()
    case.map.model(TOKENS[:2], use_cache=False)
    view += delta
    case.map.model(TOKENS[:2], use_cache=False)
    view.copy_(original)
    handle.remove()
    return float((outputs[1] - outputs[0]).square().sum(-1).mean())


def test_the_error_of_a_linear_is_that_of_the_layer_output(family_case: Case) -> None:
    table = family_case.costs()
    for layer in family_case.map.layers:
        for linear in layer.linears:
            name = linear.matrix.name
            expected = layer_output_error(family_case, layer.index, name, "int3-g32-asym")
            assert table.error[table.matrices.index(name), 0] == pytest.approx(expected, rel=1e-3)


def test_errors_are_scaled_up_from_the_capped_tokens(own_case: Case) -> None:
    # 200 equal tokens: the first 128 stand for all of them, and half of the experts are unused.
    tokens = torch.full((200, 1), 7)
    table, few = own_case.costs(tokens, batch_size=64), own_case.costs(tokens[:50])
    assert np.allclose(table.error, few.error, rtol=1e-4, atol=1e-12)
    expert_rows = [i for i, m in enumerate(own_case.map.inventory.matrices) if m.kind == "expert"]
    assert sorted(set(table.n_tokens[expert_rows])) == [0.0, 200.0]


# Experts without tokens, and counts


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        pytest.param((1, 3), {"num_local_experts": 8}, id="6 slots for 8 experts"),
        pytest.param((1, 1), {}, id="one token"),
        pytest.param((3, 1), {}, id="one token per sequence"),
    ],
)
def test_an_expert_without_tokens_costs_nothing(
    tmp_path: Path, shape: tuple[int, int], changes: dict[str, int]
) -> None:
    case = make_case(tmp_path, "mixtral", **changes)
    tokens = torch.full(shape, 5) if shape[1] == 1 else tiny_tokens(*shape)
    table = case.costs(tokens, n_draws=2)
    for array in (table.products, table.error, table.n_tokens):
        assert np.isfinite(array).all()
    unused = table.n_tokens == 0
    assert table.products.shape == (len(table.matrices), 2, 2 * shape[0])
    assert unused.sum() >= 2 * 3 * 2  # in both layers at least two experts of three matrices
    assert not table.products[unused].any()
    assert not table.error[unused].any()
    # Attention over one token does not look at queries and keys.
    looks = [not name.endswith(("q_proj", "k_proj")) for name in table.matrices]
    assert (table.error[~unused & looks] > 0).all()


def test_token_counts_add_up_to_the_choices_of_the_router(family_case: Case) -> None:
    table = family_case.costs()
    n_tokens = dict(zip(table.matrices, table.n_tokens, strict=True))
    for layer in family_case.map.layers:
        assert all(n_tokens[site.matrix.name] == TOKENS.numel() for site in layer.linears)
    top_k = family_case.map.model.config.num_experts_per_tok
    for _, site in family_case.experts():
        for stack in (site.gate, site.up, site.down):
            assert sum(n_tokens[m.name] for m in stack) == top_k * TOKENS.numel()


# Units


def hand_table(case: Case) -> CostTable:
    """Costs of two matrices in one format over two sequences of one token."""
    names = tuple(m.name for m in case.map.inventory.matrices[:2])
    return CostTable(
        names,
        FORMATS[:1],
        np.array([[[1, -1]], [[2, 4]]], dtype=np.float32),
        np.array([[0.25], [0.5]]),
        np.array([7.0, 5.0]),
        1,
        CostSettings(),
    )


def test_products_of_coupled_matrices_are_added_before_they_are_squared(case: Case) -> None:
    table, (a, b) = hand_table(case), case.map.inventory.matrices[:2]
    costs = unit_costs(table, [Unit("a", (a,)), Unit("b", (b,)), Unit("both", (a, b))])
    assert costs.fisher.tolist() == [[0.5], [5.0], [4.5]]
    assert costs.error.tolist() == [[0.25], [0.5], [0.75]]
    assert costs.n_tokens.tolist() == [7.0, 5.0, 5.0]


def test_the_fisher_cost_is_per_token(case: Case) -> None:
    table, matrix = hand_table(case), case.map.inventory.matrices[1]
    longer = unit_costs(replace(table, seq_len=10), [Unit("b", (matrix,))])
    assert longer.fisher.tolist() == [[0.5]]


def test_fewer_bits_cost_more(case: Case) -> None:
    costs = unit_costs(case.costs(), [Unit(m.name, (m,)) for m in case.map.inventory.matrices])
    used = costs.n_tokens > 0
    assert (costs.fisher[used, 0] > 10 * costs.fisher[used, 1]).all()
    # Where int8 sends a token to another expert, the layer's output changes as much as for int3.
    assert (costs.error[used, 0] > costs.error[used, 1]).all()
    assert np.median(costs.error[used, 0] / costs.error[used, 1]) > 100


# The same request, the same table


def equal(a: CostTable, b: CostTable) -> bool:
    arrays = ("products", "error", "n_tokens")
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays)


def test_a_seed_gives_the_same_table_and_another_one_other_products(
    case: Case, own_case: Case
) -> None:
    first, again, other = case.costs(seed=1), own_case.costs(seed=1), case.costs(seed=2)
    assert equal(first, again)
    assert first.settings.seed == 1
    assert not np.allclose(first.products, other.products, rtol=0.1)
    assert np.array_equal(first.error, other.error)


@pytest.mark.parametrize("batch_size", [1, 4], ids=["single", "last batch short"])
def test_errors_and_counts_do_not_depend_on_batches(case: Case, batch_size: int) -> None:
    table, whole = case.costs(batch_size=batch_size), case.costs(batch_size=6)
    assert np.array_equal(table.n_tokens, whole.n_tokens)
    # Float32 sums in another order.
    assert np.allclose(table.error, whole.error, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 4], ids=["single", "last batch short"])
def test_labels_and_products_do_not_depend_on_batches(case: Case, batch_size: int) -> None:
    tables = [case.costs(n_draws=2, batch_size=n) for n in (batch_size, 6)]
    scale = np.abs(tables[1].products).max(-1, keepdims=True)
    # As against autograd above.
    assert (np.abs(tables[0].products - tables[1].products) <= 1e-4 * scale).all()


def test_rows_are_in_inventory_order(family_case: Case) -> None:
    table = family_case.costs()
    assert table.matrices == tuple(m.name for m in family_case.map.inventory.matrices)
    assert table.formats == FORMATS
    assert table.products.dtype == np.float32
    assert table.error.dtype == table.n_tokens.dtype == np.float64


# Files


@pytest.mark.parametrize(("layer", "n_walked"), [(1, 1), (0, 2)])
def test_a_missing_layer_alone_is_measured_again(
    own_case: Case, monkeypatch: pytest.MonkeyPatch, layer: int, n_walked: int
) -> None:
    first = own_case.costs()
    files = shards(own_case.bank)
    assert [f.name for f in files] == ["layer-000.safetensors", "layer-001.safetensors"]
    files[layer].unlink()
    measured, steps = [], []
    layer_costs = sensitivity._layer_costs

    def record(trace: Any, *args: Any) -> Any:
        measured.append(trace.layer.index)
        return layer_costs(trace, *args)

    monkeypatch.setattr(sensitivity, "_layer_costs", record)
    again = measure_costs(
        own_case.map,
        own_case.bank,
        TOKENS,
        FORMATS,
        CostSettings(),
        progress=lambda *step: steps.append(step),
    )
    assert measured == [layer]
    assert steps == [*(("costs", done, 2) for done in range(n_walked)), ("costs", 2, 2)]
    assert equal(first, again)


def test_a_complete_table_is_read_without_running_the_model(
    own_case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = own_case.costs()
    monkeypatch.delattr(sensitivity, "trace_layers")
    assert equal(first, own_case.costs())


def test_other_requests_have_files_of_their_own(own_case: Case) -> None:
    own_case.costs()
    own_case.costs(seed=1)
    own_case.costs(n_draws=2)
    own_case.costs(TOKENS + 1 - 1 * (TOKENS.max() == TOKENS))
    measure_costs(own_case.map, own_case.bank, TOKENS, FORMATS[:1], CostSettings())
    assert len(shards(own_case.bank)) == 5 * 2
    assert len(list((own_case.bank.path / "costs").iterdir())) == 5


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def overwrite(path: Path) -> None:
    path.write_bytes(b"garbage")


def drop_products(path: Path) -> None:
    tensors = load_file(path)
    del tensors["products"]
    save_file(tensors, path)


def drop_row(path: Path) -> None:
    save_file({name: tensor[1:] for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize("damage", [truncate, overwrite, drop_products, drop_row])
def test_a_damaged_shard_is_a_store_error(own_case: Case, damage: Callable[[Path], None]) -> None:
    own_case.costs()
    damage(shards(own_case.bank)[1])
    with pytest.raises(StoreError, match=r"layer-001\.safetensors is damaged .*delete .* and run"):
        own_case.costs()


# The model's weights


def weights_of(case: Case) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in case.map.model.state_dict().items()}


def assert_weights(case: Case, expected: dict[str, Tensor]) -> None:
    for name, tensor in case.map.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert not any(p.requires_grad for p in case.map.model.parameters())


def test_measuring_leaves_the_weights_as_they_were(family_case: Case) -> None:
    before = weights_of(family_case)
    family_case.costs(seed=11)
    assert_weights(family_case, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("n_runs", [2, 3], ids=["first format", "second format"])
def test_an_interrupted_measurement_leaves_the_weights_as_they_were(
    own_case: Case, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], n_runs: int
) -> None:
    before = weights_of(own_case)
    run_layer, calls, states = sensitivity.run_layer, [], []

    def interrupted(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == n_runs:
            states.append(weights_of(own_case))
            raise error
        return run_layer(*args)

    monkeypatch.setattr(sensitivity, "run_layer", interrupted)
    with pytest.raises(error):
        own_case.costs()
    changed = [name for name in before if not torch.equal(before[name], states[0][name])]
    assert len(changed) == 1  # it was interrupted while a weight was another one
    assert_weights(own_case, before)
    assert shards(own_case.bank) == []
    monkeypatch.undo()
    own_case.costs()
    assert len(shards(own_case.bank)) == 2
