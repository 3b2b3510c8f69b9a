"""Costs of formats against autograd, the measured KL and direct definitions.

Letters: M matrices, F formats, D draws, S sequences, T tokens.
"""

import copy
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from alphaquant.costs.fisher import (
    CostSettings,
    CostTable,
    check_coverage,
    rare_matrices,
    unit_costs,
)
from alphaquant.costs.labels import SampledLabels
from alphaquant.costs.matrix_costs import sums_by_token
from alphaquant.costs.output_error import outward
from alphaquant.errors import ModelError
from alphaquant.models.mapping import map_model
from alphaquant.models.sites import ExpertsSite
from alphaquant.spaces.units import Unit
from alphaquant.testing.cost_cases import (
    COST_FAMILIES,
    COST_FORMATS,
    COST_TOKENS,
    CostCase,
    make_cost_case,
)
from alphaquant.testing.models import tiny_model, tiny_tokens


@pytest.fixture(scope="module", params=COST_FAMILIES)
def family_case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> CostCase:
    return make_cost_case(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> CostCase:
    """Mixtral, for tests that only read its bank."""
    return make_cost_case(tmp_path_factory.mktemp("case"), "mixtral")


@pytest.fixture
def own_case(tmp_path: Path) -> CostCase:
    """Mixtral, with a bank and weights that the test may break."""
    return make_cost_case(tmp_path, "mixtral")


# Products


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The labels that are drawn, sequence by sequence, draw by draw."""
    labels: list[Tensor] = []
    draw = SampledLabels.draw

    def record(
        self: SampledLabels, probs: Tensor, tokens: Tensor, sequence: int, positions: slice
    ) -> Tensor:
        found = draw(self, probs, tokens, sequence, positions)
        labels.extend(found)
        return found

    monkeypatch.setattr(SampledLabels, "draw", record)
    return labels


def whole_gradients(case: CostCase, window: Tensor, labels: Tensor) -> dict[str, Tensor]:
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
                gradients = copy.deepcopy(site.module)
                for kept, parameter in zip(
                    gradients.parameters(), site.module.parameters(), strict=True
                ):
                    kept.data = parameter.grad.clone()
                of_site = replace(site, module=gradients)
                for e in range(site.n_experts):
                    names = (matrix.name for matrix in site.matrices(e))
                    found |= zip(names, of_site.weights(e), strict=True)
    finally:
        model.zero_grad()
        model.requires_grad_(False)
    return found


def test_products_equal_those_with_gradients_of_the_whole_model(
    family_case: CostCase, drawn: list[Tensor]
) -> None:
    case, (n_sequences, seq_len) = family_case, COST_TOKENS.shape
    table = case.costs(seed=3, n_draws=2, batch_size=n_sequences)
    labels = torch.cat([x.flatten() for x in drawn]).view(n_sequences, 2, seq_len).transpose(0, 1)
    expected = np.zeros_like(table.products)
    for i, of_sequence in enumerate(labels.flatten(0, 1)):
        gradients = whole_gradients(case, COST_TOKENS[i % n_sequences], of_sequence)
        for row, name in enumerate(table.matrices):
            for column, fmt in enumerate(COST_FORMATS):
                product = (case.weight_error(name, fmt) * gradients[name]).sum()
                expected[row, column, i] = product
    scale = np.abs(expected).max(-1, keepdims=True)
    assert (scale[:, 0] > 1e-3).all()  # every matrix of these models was reached
    # Both are float32 sums of about 1e4 terms, which cancel: 1e-7 * sqrt(1e4), times a few.
    assert (np.abs(table.products - expected) <= 1e-4 * scale).all()


def test_the_first_draw_of_more_is_the_only_one_of_fewer(case: CostCase) -> None:
    one, three = (case.costs(n_draws=n).products for n in (1, 3))
    assert three.shape[-1] == 3 * one.shape[-1]
    assert np.allclose(three[..., : len(COST_TOKENS)], one, rtol=1e-4, atol=1e-5)
    assert not np.allclose(
        three[..., len(COST_TOKENS) : 2 * len(COST_TOKENS)], one, rtol=0.1, atol=0.01
    )


def token_products(case: CostCase, name: str, format_name: str, labels: Tensor) -> Tensor:
    """d log-likelihood of labels [S, T] / d e_t at 0, token t seeing W + e_t D, float [S, T].

    For Mixtral; the experts are computed here once more.
    """
    matrix = case.map.inventory.by_name[name]
    delta, layer = case.weight_error(name, format_name), case.map.layers[matrix.layer]
    scales = torch.zeros(COST_TOKENS.numel(), 1, requires_grad=True)

    def add_linear(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (scales * (args[0].flatten(0, 1) @ delta.T)).view_as(output)

    def add_expert(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, ids, weights = args
        w1, w3, w2 = site.views(matrix.expert)
        parts = {"gate_proj": x @ w1.T, "up_proj": x @ w3.T}
        for key in parts:
            if matrix.projection == key:
                parts[key] = parts[key] + scales * (x @ delta.T)
        features = nn.functional.silu(parts["gate_proj"]) * parts["up_proj"]
        made = features @ w2.T
        if matrix.projection == "down_proj":
            made = made + scales * (features @ delta.T)
        c = (weights * (ids == matrix.expert)).sum(-1, keepdim=True)
        return output + c * (made - made.detach())

    if matrix.expert is None:
        site = next(x for x in layer.linears if x.matrix == matrix)
        handle = site.module.register_forward_hook(add_linear)
    else:
        site = layer.experts[0]
        handle = site.module.register_forward_hook(add_expert)
    try:
        logits = case.map.model(COST_TOKENS, use_cache=False).logits
    finally:
        handle.remove()
    total = torch.log_softmax(logits, -1).gather(-1, labels[..., None]).sum()
    return torch.autograd.grad(total, scales)[0].view_as(COST_TOKENS)


def test_token_fisher_is_that_of_derivatives_of_single_tokens(
    case: CostCase, drawn: list[Tensor]
) -> None:
    table = case.costs(seed=5, n_draws=2, batch_size=len(COST_TOKENS))
    labels = torch.cat([x.flatten() for x in drawn]).view(len(COST_TOKENS), 2, -1).transpose(0, 1)
    for row, name in enumerate(table.matrices):
        for column, fmt in enumerate(COST_FORMATS):
            p = torch.stack([token_products(case, name, fmt, own) for own in labels])  # [D, S, T]
            expected = float(0.5 * p.double().square().mean())
            assert table.token_fisher[row, column] == pytest.approx(expected, rel=1e-3), name
            # Sums over the tokens of a sequence are its products; float32 sums that cancel.
            sums, scale = p.sum(-1).flatten().numpy(), float(p.abs().sum(-1).max())
            assert np.allclose(table.products[row, column], sums, rtol=1e-3, atol=1e-5 * scale)


def measured_kl(case: CostCase, unit: Unit, format_name: str, scale: float) -> float:
    """KL per token, in float64, of the model with `scale` times a unit's error in a format."""
    model = case.map.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    errors = {m.name: scale * case.weight_error(m.name, format_name) for m in unit.matrices}
    try:
        model.double()
        p = torch.log_softmax(model(COST_TOKENS, use_cache=False).logits, -1)
        views = map_model(model).views
        for name, error in errors.items():
            views[name] += error.double()
        q = torch.log_softmax(model(COST_TOKENS, use_cache=False).logits, -1)
    finally:
        model.float().load_state_dict(before)
    return float(
        nn.functional.kl_div(q, p, reduction="sum", log_target=True) / COST_TOKENS.numel()
    )


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
    case, column = make_cost_case(tmp_path, "mixtral", num_experts_per_tok=top_k), 1
    table = case.costs(n_draws=512)
    matrices = case.map.inventory.matrices
    units = [Unit(m.name, (m,)) for m in matrices] + [Unit("all", matrices)]
    fisher = scale**2 * unit_costs(table, units).fisher[:, column]
    for unit, estimate in zip(units, fisher, strict=True):
        truth = measured_kl(case, unit, COST_FORMATS[column], scale)
        # Of 512 draws of 6 sequences of equal weight one standard error is sqrt(2 / 3072) = 2.6 %;
        # unequal weights make it up to 5 %. Four of them, and 5 % for terms of third order.
        tolerance = 4 * scale**2 * fisher_error(table, unit, column) + 0.05 * truth
        assert tolerance <= 0.3 * truth, unit.name
        assert estimate == pytest.approx(truth, abs=tolerance), unit.name


# Errors


def experts_output_change(
    case: CostCase, site: ExpertsSite, name: str, format_name: str
) -> Tensor:
    """Change of the experts' sum with a matrix in a format, in the block's output, [S * T, H]."""
    calls: list[tuple[Any, ...]] = []
    handle = site.module.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((*args, *kwargs.values())), with_kwargs=True
    )
    case.map.model(COST_TOKENS, use_cache=False)
    handle.remove()
    reference = site.module(*calls[0])
    view, delta = case.map.view(name), case.weight_error(name, format_name)
    original = view.clone()
    view += delta
    changed = site.module(*calls[0])
    view.copy_(original)
    # Llama 4's experts are summed outside, Nemotron's are in a smaller space.
    change = (changed - reference).view(-1, COST_TOKENS.numel(), changed.shape[-1]).sum(0)
    outward = getattr(site.block, "fc2_latent_proj", None)
    return change if outward is None else outward(change)


def layer_output_change(case: CostCase, layer: int, name: str, format_name: str) -> Tensor:
    """Change of the decoder layer's output on the first two sequences, [2, T, H]."""
    outputs: list[Tensor] = []
    handle = case.map.layers[layer].module.register_forward_hook(
        lambda _, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    view, delta = case.map.view(name), case.weight_error(name, format_name)
    original = view.clone()
    case.map.model(COST_TOKENS[:2], use_cache=False)
    view += delta
    case.map.model(COST_TOKENS[:2], use_cache=False)
    view.copy_(original)
    handle.remove()
    return outputs[1] - outputs[0]


def text_gradients(case: CostCase, layer: int) -> Tensor:
    """Gradient of the text's cross-entropy at a decoder layer's output, [S, T, H]."""
    outputs: list[Tensor] = []
    handle = case.map.layers[layer].module.register_forward_hook(
        lambda _, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    embeddings = case.map.model.get_input_embeddings().weight
    embeddings.requires_grad_(True)  # so that there is a graph
    logits = case.map.model(COST_TOKENS, use_cache=False).logits[:, :-1]
    handle.remove()
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1), COST_TOKENS[:, 1:].flatten(), reduction="sum"
    )
    found = torch.autograd.grad(loss, outputs[0])[0]
    embeddings.requires_grad_(False)
    return found


def test_error_and_gemq_of_an_expert_are_of_the_block_output(family_case: CostCase) -> None:
    table = family_case.costs(batch_size=4, with_gemq=True)
    assert table.gemq is not None
    for layer, site in family_case.experts():
        gradients = text_gradients(family_case, layer).flatten(0, 1)
        for matrix in (site.inner(0)[0], site.up[1], site.down[2]):
            for column, fmt in enumerate(COST_FORMATS):
                change = experts_output_change(family_case, site, matrix.name, fmt)
                row = table.matrices.index(matrix.name)
                # The direct definition subtracts float32 outputs: of int8 the difference is about
                # 1e-2 of them, so 1e-7 / 1e-2 = 1e-5 relative, twice for the square.
                error = float(change.square().sum(-1).mean())
                assert table.error[row, column] == pytest.approx(error, rel=1e-3)
                gemq = float((gradients * change).square().sum(-1).mean())
                assert table.gemq[row, column] == pytest.approx(gemq, rel=1e-3)
                assert error > 0 and gemq > 0


def test_experts_in_a_space_that_nothing_leads_out_of_are_refused() -> None:
    site = map_model(tiny_model("nemotron_h")).layers[1].experts[0]
    assert outward(site, 40) is None
    with pytest.raises(ModelError, match="gives 40 features in a layer of 64, and its block"):
        outward(site, 64)


def test_error_and_gemq_of_a_linear_are_of_the_layer_output(family_case: CostCase) -> None:
    # The two sequences are of two batches.
    table = family_case.costs(batch_size=1, with_gemq=True)
    assert table.gemq is not None
    for layer in family_case.map.layers:
        gradients = text_gradients(family_case, layer.index)[:2]
        for linear in layer.linears:
            name = linear.matrix.name
            change = layer_output_change(family_case, layer.index, name, "int3-g32-asym")
            row = table.matrices.index(name)
            error = float(change.square().sum(-1).mean())
            assert table.error[row, 0] == pytest.approx(error, rel=1e-3)
            gemq = float((gradients * change).square().sum(-1).mean())
            assert table.gemq[row, 0] == pytest.approx(gemq, rel=1e-3)


def test_the_weight_error_is_a_sum_of_squares(case: CostCase) -> None:
    table = case.costs()
    for row, name in enumerate(table.matrices):
        for column, fmt in enumerate(COST_FORMATS):
            expected = float(case.weight_error(name, fmt).double().square().sum())
            assert table.weight_error[row, column] == pytest.approx(expected, rel=1e-5)


def test_errors_are_scaled_up_from_the_capped_tokens(own_case: CostCase) -> None:
    # 200 equal windows of two tokens: the first 128 tokens of an expert stand for all of them.
    tokens = torch.tensor([[7, 7]]).expand(200, 2)
    table, few = (own_case.costs(t, batch_size=64, with_gemq=True) for t in (tokens, tokens[:25]))
    assert np.allclose(table.error, few.error, rtol=1e-4, atol=1e-12)
    assert table.gemq is not None and few.gemq is not None
    assert np.allclose(table.gemq, few.gemq, rtol=1e-4, atol=1e-12)
    expert_rows = [i for i, m in enumerate(own_case.map.inventory.matrices) if m.kind == "expert"]
    assert sorted(set(table.n_tokens[expert_rows])) == [0.0, 400.0]


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
    case = make_cost_case(tmp_path, "mixtral", **changes)
    tokens = torch.full(shape, 5) if shape[1] == 1 else tiny_tokens(*shape)
    table = case.costs(tokens, n_draws=2, with_gemq=True)
    assert table.gemq is not None
    costs = (table.products, table.token_fisher, table.error, table.gemq)
    for array in (*costs, table.n_tokens, table.routing_weight):
        assert np.isfinite(array).all()
    unused = table.n_tokens == 0
    assert table.products.shape == (len(table.matrices), 2, 2 * shape[0])
    assert unused.sum() >= 2 * 3 * 2  # in both layers at least two experts of three matrices
    assert all(not array[unused].any() for array in costs)
    assert not table.routing_weight[unused].any() and not table.active_share[unused].any()
    assert (table.weight_error[unused] > 0).all()
    # Attention over one token does not look at queries and keys.
    looks = [not name.endswith(("q_proj", "k_proj")) for name in table.matrices]
    assert (table.error[~unused & looks] > 0).all()


def test_token_counts_add_up_to_the_choices_of_the_router(family_case: CostCase) -> None:
    table = family_case.costs()
    n_tokens = dict(zip(table.matrices, table.n_tokens, strict=True))
    for layer in family_case.map.layers:
        assert all(n_tokens[site.matrix.name] == COST_TOKENS.numel() for site in layer.linears)
    top_k = family_case.map.model.config.num_experts_per_tok
    for _, site in family_case.experts():
        for stack in filter(None, (site.gate, site.up, site.down)):
            assert sum(n_tokens[m.name] for m in stack) == top_k * COST_TOKENS.numel()


def test_shares_of_an_expert_are_those_of_the_router(case: CostCase) -> None:
    table, n_total = case.costs(), COST_TOKENS.numel()
    rows = {name: i for i, name in enumerate(table.matrices)}
    for layer in case.map.layers:
        of_linears = [rows[site.matrix.name] for site in layer.linears]
        assert (table.routing_weight[of_linears] == 1).all()
        assert (table.active_share[of_linears] == 1).all()
    for _, site in case.experts():
        calls: list[tuple[Tensor, ...]] = []
        handle = site.module.register_forward_pre_hook(lambda _, a, calls=calls: calls.append(a))
        case.map.model(COST_TOKENS, use_cache=False)
        handle.remove()
        _, ids, weights = calls[0]
        for e in range(site.n_experts):
            for matrix in (site.gate[e], site.up[e], site.down[e]):
                expected = float((weights * (ids == e)).sum() / n_total)
                assert table.routing_weight[rows[matrix.name]] == pytest.approx(expected, rel=1e-5)
                share = float((ids == e).sum()) / n_total
                assert table.active_share[rows[matrix.name]] == share
    assert 0 < table.routing_weight.min() < 0.5


def test_rare_matrices_are_those_below_the_threshold(case: CostCase) -> None:
    table = hand_table(case)
    assert rare_matrices(table, 5) == ()
    assert rare_matrices(table, 6) == table.matrices[1:]
    assert rare_matrices(table, 8) == table.matrices


# Coverage


def test_a_reached_matrix_that_changes_nothing_is_an_error(case: CostCase) -> None:
    table = replace(hand_table(case), seq_len=2)
    products, error = table.products.copy(), table.error.copy()
    products[1], error[1] = 0, 0
    check_coverage(replace(table, products=products))
    check_coverage(replace(table, error=error))
    blind = replace(table, products=products, error=error)
    with pytest.raises(ModelError, match=rf"1 matrices change no .*{table.matrices[1]},"):
        check_coverage(blind)
    check_coverage(replace(blind, weight_error=np.array([[1.0], [0.0]])))  # an exact format
    check_coverage(replace(blind, n_tokens=np.array([7.0, 0.0])))  # no token reached it
    check_coverage(replace(blind, seq_len=1))  # may be queries of a window of one token


def test_measuring_checks_that_every_reached_matrix_has_a_cost(own_case: CostCase) -> None:
    for name, view in own_case.map.views.items():
        if name.endswith("1.mlp.experts.2.down_proj"):
            view.fill_(0.0)  # features of this expert go nowhere: gate and up change nothing
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.2\.gate_proj"):
        own_case.costs()


def test_a_model_in_bfloat16_has_the_costs_of_one_in_float32(tmp_path: Path) -> None:
    exact = make_cost_case(tmp_path / "exact", "mixtral", num_experts_per_tok=4)
    half = make_cost_case(tmp_path / "half", "mixtral", num_experts_per_tok=4)
    half.map.model.bfloat16()
    # Where all experts are chosen no rounding sends a token elsewhere; labels may still differ.
    tables = [c.costs(n_draws=16, formats=COST_FORMATS[:1], with_gemq=True) for c in (exact, half)]
    for name in ("token_fisher", "error", "gemq", "weight_error"):
        found, expected = getattr(tables[1], name), getattr(tables[0], name)
        assert np.median(np.abs(found / expected - 1)) < 0.1, name


def _trace(**seen: Tensor) -> Any:
    return SimpleNamespace(**seen)


def test_products_of_tokens_in_bfloat16_are_those_of_the_same_numbers_in_float32() -> None:
    generator = torch.Generator().manual_seed(3)
    errors = 1e-3 * torch.randn(2, 48, 160, generator=generator)
    x = torch.randn(300, 160, generator=generator).bfloat16()
    g = torch.randn(1, 300, 48, generator=generator).bfloat16()
    sequence = torch.arange(300) // 30
    half, whole = (
        sums_by_token(errors, _trace(inputs=x, gradients=g, sequence=sequence), 10)
        for x, g in ((x, g), (x.float(), g.float()))
    )
    assert not torch.equal(half.squares, whole.squares)
    assert torch.allclose(half.squares, whole.squares, rtol=2e-3)
    assert float((half.products - whole.products).norm() / whole.products.norm()) < 5e-3


# Units


def hand_table(case: CostCase) -> CostTable:
    """Costs of two matrices in one format over two sequences of one token."""
    return CostTable(
        matrices=tuple(m.name for m in case.map.inventory.matrices[:2]),
        formats=COST_FORMATS[:1],
        products=np.array([[[1, -1]], [[2, 4]]], dtype=np.float32),
        token_fisher=np.array([[0.5], [5.0]]),
        error=np.array([[0.25], [0.5]]),
        gemq=np.array([[0.125], [2.0]]),
        weight_error=np.array([[1.0], [3.0]]),
        n_tokens=np.array([7.0, 5.0]),
        routing_weight=np.array([0.25, 0.75]),
        active_share=np.array([1.0, 0.5]),
        seq_len=1,
        settings=CostSettings(),
    )


def test_products_of_coupled_matrices_are_added_before_they_are_squared(case: CostCase) -> None:
    table, (a, b) = hand_table(case), case.map.inventory.matrices[:2]
    costs = unit_costs(table, [Unit("a", (a,)), Unit("b", (b,)), Unit("both", (a, b))])
    assert costs.fisher.tolist() == [[0.5], [5.0], [4.5]]
    assert costs.error.tolist() == [[0.25], [0.5], [0.75]]
    assert costs.token_fisher.tolist() == [[0.5], [5.0], [5.5]]
    assert costs.gemq is not None
    assert costs.gemq.tolist() == [[0.125], [2.0], [2.125]]
    assert costs.n_tokens.tolist() == [
        7.0,
        5.0,
        6.0,
    ]  # the mean: a unit with an unseen expert counts
    assert costs.routing_weight.tolist() == [0.25, 0.75, 0.5]
    assert costs.active_share.tolist() == [1.0, 0.5, 0.75]


def test_gemq_is_left_out_where_it_was_not_measured(case: CostCase) -> None:
    assert case.costs().gemq is None
    table, matrix = replace(hand_table(case), gemq=None), case.map.inventory.matrices[0]
    assert unit_costs(table, [Unit("a", (matrix,))]).gemq is None


def test_the_fisher_cost_is_per_token(case: CostCase) -> None:
    table, matrix = hand_table(case), case.map.inventory.matrices[1]
    longer = unit_costs(replace(table, seq_len=10), [Unit("b", (matrix,))])
    assert longer.fisher.tolist() == [[0.5]]


def test_fewer_bits_cost_more(case: CostCase) -> None:
    costs = unit_costs(case.costs(), [Unit(m.name, (m,)) for m in case.map.inventory.matrices])
    used = costs.n_tokens > 0
    assert (costs.fisher[used, 0] > 10 * costs.fisher[used, 1]).all()
    # Where int8 sends a token to another expert, the layer's output changes as much as for int3.
    assert (costs.error[used, 0] > costs.error[used, 1]).all()
    assert np.median(costs.error[used, 0] / costs.error[used, 1]) > 100


# The same request, the same table


ARRAYS = ("products", "token_fisher", "error", "gemq", "n_tokens", "routing_weight")


def test_a_seed_gives_the_same_table_and_another_one_other_products(
    case: CostCase, own_case: CostCase
) -> None:
    first, again, other = (
        a_case.costs(seed=seed, with_gemq=True)
        for a_case, seed in ((case, 1), (own_case, 1), (case, 2))
    )
    for name in ARRAYS:
        assert np.array_equal(getattr(first, name), getattr(again, name)), name
    assert first.settings.seed == 1
    assert not np.allclose(first.products, other.products, rtol=0.1)
    assert np.array_equal(first.error, other.error)
    assert first.gemq is not None and other.gemq is not None
    assert np.array_equal(first.gemq, other.gemq)


@pytest.mark.parametrize("batch_size", [1, 4], ids=["single", "last batch short"])
def test_errors_and_counts_do_not_depend_on_batches(case: CostCase, batch_size: int) -> None:
    table, whole = (case.costs(batch_size=n, with_gemq=True) for n in (batch_size, 6))
    assert np.array_equal(table.n_tokens, whole.n_tokens)
    # Float32 sums in another order.
    for name in ("error", "gemq", "token_fisher", "routing_weight"):
        found, expected = getattr(table, name), getattr(whole, name)
        assert np.allclose(found, expected, rtol=1e-3, atol=1e-12), name


@pytest.mark.parametrize("batch_size", [1, 4], ids=["single", "last batch short"])
def test_labels_and_products_do_not_depend_on_batches(case: CostCase, batch_size: int) -> None:
    tables = [case.costs(n_draws=2, batch_size=n) for n in (batch_size, 6)]
    scale = np.abs(tables[1].products).max(-1, keepdims=True)
    # As against autograd above.
    assert (np.abs(tables[0].products - tables[1].products) <= 1e-4 * scale).all()


def test_rows_are_in_inventory_order(family_case: CostCase) -> None:
    table = family_case.costs(with_gemq=True)
    assert table.matrices == tuple(m.name for m in family_case.map.inventory.matrices)
    assert table.formats == COST_FORMATS
    assert table.products.dtype == np.float32
    assert all(getattr(table, name).dtype == np.float64 for name in ARRAYS[1:])
