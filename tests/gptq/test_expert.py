"""One matrix by hand: which token gets which weight, and what is written."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphaquant.errors import AlphaQuantError, ConfigError, DataError, FormatError, ModelError
from alphaquant.gptq import GPTQMoE
from alphaquant.quant.stacks import QuantizedMatrix
from alphaquant.spaces.formats import parse_format

# The example of alphaquant/gptq/expert.py.
CHOSEN = torch.tensor([[0, 1], [2, 1], [0, 2]])
SCORES = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.5, 0.5]])
INPUTS = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]])


def direct_sum(inputs: Tensor, weights: Tensor) -> Tensor:
    """Sum of w x x', token by token in float64."""
    pairs = zip(inputs.double(), weights.double(), strict=True)
    return torch.stack([w * torch.outer(x, x) for x, w in pairs]).sum(0)


def random_routing(n_tokens: int, n_experts: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [n, 24], scores and experts [n, k], from a fixed seed."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(n_tokens, 24, generator=generator)
    probabilities = torch.randn(n_tokens, n_experts, generator=generator).softmax(-1)
    scores, chosen = probabilities.topk(top_k, -1)
    return inputs, scores, chosen


def hand(n_inputs: int = 24, expert_id: int = 0, **options: Any) -> GPTQMoE:
    return GPTQMoE(torch.zeros(4, n_inputs), expert_id, **options)


@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 2]])
def test_the_example_with_all_tokens_and_with_those_of_the_expert(rows: list[int]) -> None:
    expert = hand(2)
    expert.add_batch_with_routing(INPUTS[rows], SCORES, CHOSEN, 0, 3)
    # 0.6 [1 2; 2 4] + 0.5 [0.25 2; 2 16]
    assert torch.allclose(expert.H, torch.tensor([[0.725, 2.2], [2.2, 10.4]]))
    assert (expert.nsamples, expert.utilization_count) == (2, 2)


def test_every_expert_gets_the_direct_sum_of_its_tokens() -> None:
    inputs, scores, chosen = random_routing(50, 6, 2)
    total = 0
    for e in range(6):
        expert = hand(expert_id=e)
        expert.add_batch_with_routing(inputs, scores, chosen, e, 6)
        token, slot = torch.where(chosen == e)
        expected = direct_sum(inputs[token], scores[token, slot])
        assert torch.allclose(expert.H.double(), expected, rtol=1e-5, atol=1e-5)
        total += expert.utilization_count
    assert total == 50 * 2


def test_weights_follow_their_tokens_whatever_the_order_of_the_slots() -> None:
    inputs, scores, chosen = random_routing(50, 6, 3)
    expected, swapped = hand(), hand()
    expected.add_batch_with_routing(inputs, scores, chosen, 0, 6)
    swapped.add_batch_with_routing(inputs, scores.flip(-1), chosen.flip(-1), 0, 6)
    assert torch.equal(swapped.H, expected.H)


def test_weighting_the_inputs_by_the_root_gives_the_same_sum() -> None:
    inputs, scores, chosen = random_routing(50, 4, 4)
    expected, by_root = hand(), hand()
    expected.add_batch_with_routing(inputs, scores, chosen, 0, 4)
    weights = scores[chosen == 0]
    by_root.add_batch(inputs * weights.sqrt()[:, None])
    assert torch.allclose(by_root.H, expected.H, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("exponent", "power"), [(0, 0.0), (1, 1.0), (2, 2.0)])
def test_the_exponent_is_that_of_the_weight(exponent: int, power: float) -> None:
    inputs, scores, chosen = random_routing(30, 4, 2)
    expert = hand(route_exponent=exponent)
    expert.add_batch_with_routing(inputs, scores, chosen, 0, 4)
    expected = direct_sum(inputs[(chosen == 0).any(-1)], scores[chosen == 0] ** power)
    assert torch.allclose(expert.H.double(), expected, rtol=1e-5, atol=1e-5)


def test_weights_of_one_are_the_plain_sum_and_weights_of_zero_are_nothing() -> None:
    inputs, _, _ = random_routing(20, 4, 1)
    chosen = torch.zeros(20, 1, dtype=torch.int64)
    plain, ones, mixed, half = hand(), hand(), hand(), hand()
    plain.add_batch(inputs)
    ones.add_batch_with_routing(inputs, torch.ones(20, 1), chosen, 0, 4)
    assert torch.equal(ones.H, plain.H)
    weights = torch.cat([torch.ones(10, 1), torch.zeros(10, 1)])
    mixed.add_batch_with_routing(inputs, weights, chosen, 0, 4)
    half.add_batch(inputs[:10])
    assert torch.allclose(mixed.H, half.H, rtol=1e-6, atol=1e-6)
    assert mixed.utilization_count == 20


def test_batches_add_up_whatever_their_lengths_and_shapes() -> None:
    inputs, scores, chosen = random_routing(50, 6, 2)
    whole, parts, listed = hand(), hand(), hand()
    whole.add_batch_with_routing(inputs, scores, chosen, 0, 6)
    cuts = [slice(0, 7), slice(7, 8), slice(8, 50)]
    for cut in cuts:
        parts.add_batch_with_routing(inputs[cut], scores[cut], chosen[cut], 0, 6)
    listed.add_batch_with_routing(
        inputs.reshape(2, 25, 24), [scores[c] for c in cuts], [chosen[c] for c in cuts], 0, 6
    )
    assert torch.allclose(parts.H, whole.H, rtol=1e-5, atol=1e-5)
    assert torch.equal(listed.H, whole.H)
    assert parts.nsamples == whole.nsamples == listed.nsamples == int((chosen == 0).sum())


def test_an_expert_that_nothing_chose_stays_empty() -> None:
    inputs, scores, chosen = random_routing(10, 4, 2)
    for rows in (inputs, inputs[:0]):
        expert = hand(expert_id=7)
        expert.add_batch_with_routing(rows, scores, chosen, 7, 8)
        assert not expert.H.any() and expert.utilization_count == 0
    padded = hand(expert_id=3)
    padded.add_batch_with_routing(inputs, scores, torch.full_like(chosen, 8), 3, 8)
    assert not padded.H.any()


@pytest.mark.parametrize("shape", [(20,), (20, 1), (4, 5), (4, 5, 1)])
def test_a_shared_expert_is_weighted_by_its_gate(shape: tuple[int, ...]) -> None:
    inputs, _, _ = random_routing(20, 4, 1)
    gate = torch.linspace(0.1, 0.9, 20)
    shared, ungated, plain = hand(), hand(), hand()
    shared.add_batch_shared_expert(inputs.reshape(4, 5, 24), gate.reshape(shape))
    assert torch.allclose(shared.H.double(), direct_sum(inputs, gate), rtol=1e-5, atol=1e-5)
    ungated.add_batch_shared_expert(inputs)
    plain.add_batch(inputs)
    assert torch.equal(ungated.H, plain.H)
    assert (shared.nsamples, shared.utilization_count) == (20, 0)


def trained(weight: nn.Linear | Tensor) -> GPTQMoE:
    """An expert with a Hessian of rank 40, inputs of one large and many small directions."""
    inputs, scores, chosen = random_routing(80, 4, 2)
    expert = GPTQMoE(weight, 0, route_exponent=2)
    mixing = torch.eye(24) + 0.4
    expert.add_batch_with_routing(inputs @ mixing, scores, chosen, 0, 4)
    return expert


def random_weight(n_rows: int = 12) -> Tensor:
    return torch.randn(n_rows, 24, generator=torch.Generator().manual_seed(0))


def test_the_weight_is_written_in_place_and_only_there() -> None:
    linear = nn.Linear(24, 12)
    linear.weight.data.copy_(random_weight())
    fused = nn.Parameter(random_weight(36).reshape(3, 12, 24))
    before = fused.detach().clone()
    fused.data[1] = linear.weight.data
    made = [trained(linear).fasterquant("int4-g8"), trained(fused[1]).fasterquant("int4-g8")]
    assert torch.equal(linear.weight.data, made[0].packed.dequantize())
    assert torch.equal(fused.data[1], linear.weight.data)
    assert torch.equal(fused.data[[0, 2]], before[[0, 2]])
    assert torch.equal(made[0].packed.tensors["codes"], made[1].packed.tensors["codes"])
    assert not torch.equal(linear.weight.data, random_weight())


@pytest.mark.parametrize(
    ("quantizer", "groupsize", "format_name"),
    [
        ("int4", -1, "int4-g128"),
        ("int4", 8, "int4-g8"),
        ("int4-g16", 8, "int4-g16"),
        ({"wq": "int3"}, 8, "int3-g8"),
        ({"wq": "int3", "group_size": 16, "symmetric": False}, 8, "int3-g16-asym"),
        ({"wq": "fp6", "extra": {"format": "e2m3"}}, 8, "fp6-e2m3-g8"),
        ("mxfp4", 8, "mxfp4"),
        (parse_format("nvfp4"), -1, "nvfp4"),
    ],
)
def test_a_quantizer_is_a_format_a_name_or_a_scheme(
    quantizer: Any, groupsize: int, format_name: str
) -> None:
    made = trained(random_weight()).fasterquant(quantizer, groupsize=groupsize)
    assert made.record.format == made.packed.format.name == format_name


def test_what_was_done_is_returned() -> None:
    record = trained(random_weight()).fasterquant("int4-g8").record
    assert (record.method, record.hessian, record.fallback) == ("gptq", "routing_weighted", None)
    assert record.n_tokens and record.damp == 0.01
    assert record.output_error is not None and 0 < record.output_error < 0.1


def test_routing_weights_change_the_codes_and_beat_rounding_where_it_counts() -> None:
    expert = trained(random_weight())
    hessian = expert.H.clone()

    def loss(made: QuantizedMatrix) -> float:
        delta = random_weight() - made.packed.dequantize()
        return float(((delta @ hessian) * delta).sum())

    rounded = GPTQMoE(random_weight(), 0)
    plain = trained(random_weight())
    plain.H = torch.eye(24)
    found = loss(expert.fasterquant("int3-g8"))
    assert found < 0.8 * loss(plain.fasterquant("int3-g8"))
    assert found < 0.8 * loss(rounded.fasterquant("int3-g8"))


def test_options_of_the_loop_reach_it() -> None:
    found = {
        str(options): trained(random_weight()).fasterquant("int3-g8", **options)
        for options in ({}, {"percdamp": 10.0}, {"actorder": True}, {"static_groups": True})
    }
    codes = [made.packed.tensors["codes"].flatten().tolist() for made in found.values()]
    assert len({tuple(c) for c in codes}) == 4
    whole = trained(random_weight()).fasterquant("int3-g8", blocksize=1)
    close = trained(random_weight()).fasterquant("int3-g8", blocksize=24)
    assert torch.allclose(whole.packed.dequantize(), close.packed.dequantize(), atol=1e-5)


def test_without_tokens_it_rounds_and_says_so() -> None:
    record = GPTQMoE(random_weight(), 0).fasterquant("int4-g8").record
    assert (record.method, record.fallback) == ("rtn", "no_tokens")


def test_bf16_leaves_the_weight_alone() -> None:
    weight = random_weight()
    assert trained(weight).fasterquant({"skip": True}).record.method == "none"
    assert torch.equal(weight, random_weight())


ROUTED: dict[str, Any] = {
    "inp": INPUTS,
    "routing_scores": SCORES,
    "selected_experts": CHOSEN,
    "expert_num": 0,
    "num_experts": 3,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inp": INPUTS[:1]}, "1 rows .* had 3 tokens and 2 of them chose it"),
        ({"inp": torch.zeros(3, 5)}, "inputs of 5 features for expert 0, whose weight takes 2"),
        ({"inp": INPUTS / 0}, "NaN or infinity"),
        ({"routing_scores": SCORES[:, :1]}, "do not go together"),
        ({"selected_experts": SCORES}, "integer ids"),
        ({"selected_experts": CHOSEN - 1}, "negative ids"),
        ({"routing_scores": SCORES.log()}, "not the logits"),
        ({"expert_num": 1}, "expert_num is 1 of 3 experts, and this is expert 0"),
        ({"num_experts": 0}, "expert_num is 0 of 0 experts"),
    ],
)
def test_what_does_not_go_together_is_refused_and_not_added(
    change: dict[str, Any], words: str
) -> None:
    expert = hand(2)
    with pytest.raises(DataError, match=words):
        expert.add_batch_with_routing(**{**ROUTED, **change})
    assert not expert.H.any() and expert.nsamples == expert.utilization_count == 0


def test_scores_of_a_shared_expert_are_one_per_token() -> None:
    with pytest.raises(DataError, match="6 scores for 3 tokens"):
        hand(2).add_batch_shared_expert(INPUTS, SCORES)
    with pytest.raises(DataError, match="not the logits"):
        hand(2).add_batch_shared_expert(INPUTS, -SCORES[:, 0])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: GPTQMoE(torch.zeros(2, 3, 4), 0), ModelError, r"given as \(2, 3, 4\)"),
        (lambda: GPTQMoE(nn.ReLU(), 0), ModelError, "given as ReLU"),  # type: ignore[arg-type]
        (lambda: hand(route_exponent=3), ModelError, "use 0, 1 or 2"),
        (lambda: hand().fasterquant("int7"), FormatError, "int7"),
        (lambda: hand().fasterquant({"wq": "int7"}), ConfigError, "int7"),
        (lambda: hand().fasterquant("int4", blocksize=0), ConfigError, "blocksize"),
        (lambda: hand().fasterquant({"wq": "int4", "aq": "int8"}), ConfigError, "aq to bf16"),
    ],
)
def test_what_cannot_be_quantized_is_refused(
    make: Any, error: type[AlphaQuantError], words: str
) -> None:
    with pytest.raises(error, match=words):
        make()
