"""A model in place: what goes in, what comes out, what its layers saw."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphaquant.errors import AlphaQuantError, ConfigError, DataError, ModelError
from alphaquant.gptq import GPTQConfig, get_layers_for_model, gptq_quantize_model
from alphaquant.gptq.model import stack_windows
from alphaquant.models.mapping import map_model
from alphaquant.quant.stacks import QuantizedMatrix
from alphaquant.testing.models import FAMILIES, tiny_model, tiny_tokens

INT4 = {"default": {"wq": "int4", "group_size": 32}}
WINDOWS = tiny_tokens(4, 16)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def codes_of(made: dict[str, QuantizedMatrix]) -> dict[str, Tensor]:
    return {name: item.packed.tensors["codes"] for name, item in made.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_the_model_are_those_of_the_packed_matrices(family: str) -> None:
    model = tiny_model(family)
    before, names = weights_of(model), list(map_model(model).inventory.by_name)
    original = map_model(tiny_model(family))
    made = gptq_quantize_model(model, list(WINDOWS.split(1)), INT4, device="cpu")
    assert list(made) == names
    after = map_model(model)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    for name, item in made.items():
        assert item.matrix.name == item.record.matrix == name
        assert item.record.format == "int4-g32"
        assert torch.equal(after.view(name), item.packed.dequantize())
        assert not torch.equal(after.view(name), original.view(name))
    assert not any(word in name for name in changed for word in ("embed", "norm", "lm_head"))
    assert torch.isfinite(model(WINDOWS).logits).all()


def test_records_of_experts_say_that_routing_weighted_them() -> None:
    made = gptq_quantize_model(tiny_model("olmoe"), WINDOWS, INT4)
    records = {name: item.record for name, item in made.items()}
    expert = records["model.layers.0.mlp.experts.3.up_proj"]
    assert (expert.method, expert.hessian) == ("gptq", "routing_weighted+pooled")
    assert records["model.layers.0.self_attn.q_proj"].hessian == "plain"
    tokens = [r.n_tokens or 0 for n, r in records.items() if n.endswith("down_proj")]
    assert sum(tokens) == 2 * WINDOWS.numel() * 3


FORMS: dict[str, Callable[[], Any]] = {
    "tensor": lambda: WINDOWS,
    "list": lambda: list(WINDOWS.split(1)),
    "windows": lambda: list(WINDOWS),
    "batches": lambda: list(WINDOWS.split(3)),
    "generator": lambda: (window for window in WINDOWS.split(1)),
    "pairs": lambda: [(window, window.clone().fill_(-100)) for window in WINDOWS.split(1)],
    "mappings": lambda: [
        {"input_ids": window, "attention_mask": torch.ones_like(window)}
        for window in WINDOWS.split(2)
    ],
    "loader": lambda: torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(WINDOWS.int()), batch_size=3
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_the_same_windows(form: str) -> None:
    found = stack_windows(FORMS[form]())
    assert found.dtype == torch.int64
    assert torch.equal(found, WINDOWS)


def test_a_generator_that_is_read_once_gives_the_codes_of_a_list() -> None:
    made = [gptq_quantize_model(tiny_model("olmoe"), FORMS[f](), INT4) for f in FORMS]
    expected = codes_of(made[0])
    for other in map(codes_of, made[1:]):
        assert all(torch.equal(other[name], codes) for name, codes in expected.items())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "no windows"),
        ([WINDOWS[:0]], "no windows"),
        ([WINDOWS, WINDOWS[:, :9]], "item 1 .* windows of 9 tokens, the ones before have 16"),
        ([WINDOWS.float()], r"item 0 .* torch.float32 \(4, 16\)"),
        ([WINDOWS > 3], "torch.bool"),
        ([WINDOWS[None]], r"\(1, 4, 16\)"),
        (["text"], "give token ids"),
        ([()], "give token ids"),
        ([{"ids": WINDOWS}], "mapping with input_ids"),
        (
            [{"input_ids": WINDOWS, "attention_mask": torch.ones(4, 16).tril()}],
            "item 0 .* is padded",
        ),
    ],
)
def test_what_is_no_calibration_data_is_refused(data: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        stack_windows(data)


@contextmanager
def recorded(layers: nn.ModuleList) -> Iterator[list[list[Tensor]]]:
    """Hidden states that every call of each layer starts from."""
    seen: list[list[Tensor]] = [[] for _ in layers]

    def hook(index: int) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[index].append((args[0] if args else kwargs["hidden_states"]).clone())

        return keep

    handles = [
        layer.register_forward_pre_hook(hook(i), with_kwargs=True)
        for i, layer in enumerate(layers)
    ]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "deepseek"])
def test_a_layer_sees_the_outputs_of_the_quantized_layers_before_it(family: str) -> None:
    model = tiny_model(family, num_hidden_layers=3)
    layers = get_layers_for_model(model)
    with recorded(layers) as original:
        model(WINDOWS)
    with recorded(layers) as walked:
        gptq_quantize_model(model, WINDOWS, {"default": {"wq": "int2", "group_size": 32}})
    with recorded(layers) as final:
        model(WINDOWS)
    for index in range(3):
        # The last call of a layer is the one whose outputs the next layer gets.
        assert torch.equal(walked[index][-1], final[index][0])
        assert torch.equal(final[index][0], original[index][0]) == (index == 0)
        assert torch.equal(walked[index][-2], walked[index][-1])


@pytest.mark.parametrize(("family", "n_experts"), [("olmoe", 4), ("olmoe", 32), ("listed_moe", 8)])
def test_layers_run_a_few_times_per_batch_however_many_experts(
    family: str, n_experts: int
) -> None:
    model = tiny_model(family, num_experts=n_experts)
    windows, calls = tiny_tokens(48, 8), Counter[int]()  # three batches of 16
    for i, layer in enumerate(get_layers_for_model(model)):
        layer.register_forward_pre_hook(lambda *_, i=i: calls.update([i]))
    gptq_quantize_model(model, windows, INT4)
    # The check of the walk: two ordinary passes, and two windows that arrive and run twice. Then
    # each batch arrives, runs to see the inputs of its matrices, and runs for its outputs.
    check = 2 + 2 * (1 + 2)
    assert calls == dict.fromkeys((0, 1), check + 3 * 3)


def test_an_expert_format_reaches_that_expert_and_kept_matrices_stay() -> None:
    model = tiny_model("mixtral")
    before = map_model(tiny_model("mixtral"))
    names = before.inventory.by_name
    config = {
        "default": {"wq": "bf16"},
        "overrides": [{"pattern": "*.block_sparse_moe.experts.2.w2", "wq": "int3"}],
    }
    made = gptq_quantize_model(model, WINDOWS, config, GPTQConfig(groupsize=8))
    after = map_model(model)
    quantized = {n for n in names if not torch.equal(after.view(n), before.view(n))}
    assert quantized == {f"model.layers.{i}.mlp.experts.2.down_proj" for i in range(2)}
    assert {made[name].record.format for name in quantized} == {"int3-g8"}
    assert {made[n].record.method for n in names if n not in quantized} == {"none"}


def test_matrices_in_bf16_are_not_even_rounded_to_it() -> None:
    model = tiny_model("llama")
    for parameter in model.parameters():
        parameter.data.add_(1e-5)
    before = weights_of(model)
    gptq_quantize_model(model, WINDOWS, {"default": {"wq": "bf16"}})
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())


def test_gptq_leaves_less_output_error_than_rounding() -> None:
    made = gptq_quantize_model(tiny_model("olmoe"), WINDOWS, INT4)
    plain = gptq_quantize_model(tiny_model("olmoe"), WINDOWS, INT4, GPTQConfig(percdamp=1e4))
    # A huge damping makes the Hessian a multiple of the identity.
    name = "model.layers.0.self_attn.o_proj"
    found, rounded = made[name].record.output_error, plain[name].record.output_error
    assert found is not None and rounded is not None and found < 0.8 * rounded


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((WINDOWS, {"default": {"wq": "int7"}}), ConfigError),
        (([], INT4), DataError),
        ((WINDOWS, INT4, GPTQConfig(), "quantum"), ModelError),
        ((WINDOWS, INT4, GPTQConfig(percdamp=float("1e-30"))), None),
    ],
)
def test_errors_leave_the_model_as_it_was(
    arguments: tuple[Any, ...], error: type[AlphaQuantError] | None
) -> None:
    model = tiny_model("olmoe")
    before = weights_of(model)
    if error is None:  # a weight in the last layer that no format holds
        error = AlphaQuantError
        model.state_dict()["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("inf")
        before = weights_of(model)
    with pytest.raises(error):
        gptq_quantize_model(model, *arguments)
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())


def test_training_mode_is_off_while_it_runs_and_comes_back() -> None:
    model = tiny_model("llama", attention_dropout=0.9)
    expected = codes_of(gptq_quantize_model(tiny_model("llama"), WINDOWS, INT4))
    model.train()
    model.get_submodule("lm_head").eval()
    found = codes_of(gptq_quantize_model(model, WINDOWS, INT4))
    assert all(torch.equal(found[name], codes) for name, codes in expected.items())
    assert model.training and not model.get_submodule("lm_head").training
