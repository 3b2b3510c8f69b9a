"""Packed models that kernels run: same outputs, same stored tensors, and every exception is told.

Without a GPU the kernels run in Triton's interpreter; with one, the same tests run on it.
"""

import importlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompileConfig

from alphaquant.errors import FormatError, ModelError
from alphaquant.evaluators.routes import keep_routes
from alphaquant.models.mapping import map_model
from alphaquant.runtime import kernel_use
from alphaquant.runtime.checkpoint import load
from alphaquant.runtime.expert_parallel import keep_rank
from alphaquant.runtime.kernel_modules import KernelExperts, KernelLinear
from alphaquant.runtime.kernel_use import kernel_uses, use_kernels
from alphaquant.runtime.modules import PackedExperts, PackedLinear
from alphaquant.runtime.pipeline import PackingJob, quantize_to_checkpoint
from alphaquant.spaces.assignment import Assignment
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.models import tiny_model, tiny_tokens

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = (
    *("int4-g64", "mxfp4", "int3-g64-asym", "nvfp4", "fp8-e4m3-row", "int2-g128", "int8-row"),
    *("bf16", "fp6-e3m2-g32"),
)
TOKENS = tiny_tokens(2, 7)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    interpreted = {} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}
    with mock.patch.dict(os.environ, interpreted):
        importlib.import_module("alphaquant.kernels.ops_triton")
        yield


def save(folder: Path, family: str = "olmoe") -> Path:
    """A packed tiny model in all of FORMATS, in turns over its matrices."""
    model_map = map_model(tiny_model(family))
    matrices = model_map.inventory.matrices
    formats = {m.name: FORMATS[i % len(FORMATS)] for i, m in enumerate(matrices)}
    settings = QuantSettings(method="rtn")
    return quantize_to_checkpoint(
        PackingJob(model_map, Assignment(formats), settings), folder, facts={}
    ).path


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("kernels") / "packed")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Kernels are used without being compared first, which takes seconds in the interpreter."""
    with mock.patch.object(kernel_use, "_check", lambda *args: None):
        yield


@torch.no_grad()
def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    made: Tensor = model(tokens.to(DEVICE)).logits
    return made.float()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.contiguous().view(torch.uint8) for name, t in model.state_dict().items()}


def same_state(one: nn.Module, other: nn.Module) -> bool:
    first, second = state(one), state(other)
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


FAMILIES: list[Any] = [
    "llama",
    "olmoe",
    "gpt_oss",
]
FAMILIES += ["nemotron_h"]
LAST = ("qwen2_moe", "mixtral", "deepseek_v3", "listed_moe", "llama4_text")
FAMILIES += [pytest.param(family, marks=pytest.mark.slow) for family in LAST]
IN_TORCH = {
    "gpt_oss": "its experts have biases",
    "nemotron_h": "its experts have no gate",
}
"""Why kernels do not run the experts of a family."""


@pytest.mark.usefixtures("unchecked")  # the whole model is compared here
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_stored_tensors_are_those_of_plain_torch(family: str, tmp_path: Path) -> None:
    path = save(tmp_path / "packed", family)
    torch_only = load(path, DEVICE, "float32", kernels=False)
    model = load(path, DEVICE, "float32", kernels=True)
    expected = logits(torch_only)
    # Sums of at most 72 products in float32 in another order, over two layers.
    assert float((logits(model) - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert same_state(model, torch_only)
    assert not any(use.is_kernel for use in kernel_uses(torch_only))
    linears = [m for m in model.modules() if isinstance(m, PackedLinear) and m.format.is_quantized]
    layers = [m for m in model.modules() if isinstance(m, PackedExperts)]
    if family not in IN_TORCH:
        assert linears and all(isinstance(module, KernelLinear) for module in linears)
    has_kernels = [isinstance(module, KernelExperts) for module in layers]
    assert has_kernels == [family not in IN_TORCH] * len(layers)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("family", IN_TORCH)
def test_what_torch_runs_is_told_with_the_reason(family: str, tmp_path: Path) -> None:
    model = load(save(tmp_path / "packed", family), DEVICE, kernels=True)
    reasons = {use.name: use.reason for use in kernel_uses(model) if not use.is_kernel}
    experts = {name: reason for name, reason in reasons.items() if name.endswith(".experts")}
    assert experts and set(experts.values()) == {IN_TORCH[family]}
    others = {reason for name, reason in reasons.items() if name not in experts}
    assert others <= {"torch multiplies by bf16 matrices"}


@pytest.mark.usefixtures("unchecked")
def test_saved_and_loaded_again_it_is_the_same(packed: Path, tmp_path: Path) -> None:
    model: Any = load(packed, DEVICE, kernels=True)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", DEVICE, kernels=True)
    assert same_state(again, model)
    kinds = [{n: type(m) for n, m in one.named_modules()} for one in (model, again)]
    assert kinds[0] == kinds[1]
    assert torch.equal(logits(again, TOKENS[:1, :2]), logits(model, TOKENS[:1, :2]))


@pytest.mark.slow
def test_another_dtype_of_the_model_leaves_packed_tensors_alone(packed: Path) -> None:
    model = load(packed, DEVICE, "float32", kernels=True)
    before = {n: t for n, t in state(model).items() if "layers" in n and "norm" not in n}
    parts = {name: t.dtype for name, t in model.named_buffers() if "kernel_part" in name}
    model.to(torch.bfloat16)
    after = state(model)
    assert {name: t.dtype for name, t in model.named_buffers() if name in parts} == parts
    packed_names = [n for n in before if n.endswith(("codes", "scales", "zeros", "global_scale"))]
    assert len(packed_names) > 50
    assert all(torch.equal(after[name], before[name]) for name in packed_names)
    assert next(model.parameters()).dtype == torch.bfloat16
    # bfloat16 keeps 8 bits; two layers of rounded activations are far below a tenth.
    expected = logits(load(packed, DEVICE, "float32", kernels=False))
    assert float((logits(model) - expected).abs().max()) < 0.1 * float(expected.abs().max())


@pytest.mark.parametrize("op", ["packed_linear", "grouped_moe"])
def test_a_kernel_with_other_numbers_or_none_is_refused(
    op: str, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = {"packed_linear": "linear.product_triton", "grouped_moe": "moe.launch_triton"}[op]
    module = importlib.import_module(f"alphaquant.kernels.{file}")
    right = getattr(module, op)
    monkeypatch.setattr(module, op, lambda *args: 1.001 * right(*args))
    model = load(packed, DEVICE, "float32", kernels=False)
    with pytest.raises(ModelError, match=r"layers.0.*the kernel of .* gives other numbers .*0.0"):
        use_kernels(model)

    def broken(*args: Any) -> Tensor:
        raise RuntimeError("out of resources")

    monkeypatch.setattr(module, op, broken)
    model = load(packed, DEVICE, "float32", kernels=False)
    with pytest.raises(ModelError, match=r"layers.0.*kernel of .* RuntimeError: out of resources"):
        use_kernels(model)


def test_every_format_is_tried_in_every_place_and_no_more(packed: Path) -> None:
    model = load(packed, DEVICE, kernels=False)
    with mock.patch.object(kernel_use, "_draw", side_effect=kernel_use._draw) as draw:
        use_kernels(model)
        use_kernels(model)
    linears = [m for m in model.modules() if isinstance(m, KernelLinear)]
    layers = [m for m in model.modules() if isinstance(m, KernelExperts)]
    n_places = sum(len({e[i] for layer in layers for e in layer.formats}) for i in range(3))
    n_formats = len({m.format for m in linears})
    tried = [call.args[0].format for call in draw.call_args_list]
    assert {m.format for m in linears} <= set(tried)
    assert n_formats < len(tried) <= n_formats + n_places


def test_asked_for_where_they_cannot_run_is_an_error(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ModelError, match="is on cpu; they run on cuda: load with device"):
        load(packed, "cpu", kernels=True)
    monkeypatch.setattr(kernel_use, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"triton is not installed: pip install 'aq-search\[tri"):
        load(packed, "cpu", kernels=True)


def test_other_types_than_kernels_compute_in_are_refused(packed: Path) -> None:
    with pytest.raises(ModelError, match=r"is in torch.float64; they take bfloat16, float16 and"):
        load(packed, DEVICE, "float64", kernels=True)
    load(packed, DEVICE, "float64")  # left to plain torch without being asked for kernels


def test_a_replaced_module_does_not_stay_in_memory(packed: Path) -> None:
    model = load(packed, DEVICE, kernels=False)
    before = [weakref.ref(m) for m in model.modules() if isinstance(m, PackedLinear)]
    living: list[int] = []

    def count(*args: Any) -> None:
        living.append(sum(ref() is not None for ref in before))

    with mock.patch.object(kernel_use, "_check", count):  # a mock would keep its arguments
        use_kernels(model)
    assert living == sorted(living, reverse=True) and living[0] == len(before)
    # The last one replaced are the 24 matrices of the second layer's experts.
    n_left = sum(type(m) is PackedLinear for m in model.modules())
    assert living[-1] == 24 + n_left


@pytest.mark.usefixtures("unchecked")
def test_what_torch_runs_on_a_gpu_is_warned_of_once_per_cause(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(save(tmp_path / "packed", "gpt_oss"), DEVICE, kernels=True)
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warned == ["plain torch runs 2 packed modules: its experts have biases"]


def test_a_model_without_packed_matrices_is_refused() -> None:
    with pytest.raises(ModelError, match="no packed matrices for kernels"):
        use_kernels(tiny_model("llama"))


@pytest.mark.parametrize(
    ("implementation", "expected"),
    [("alphaquant", True), ("eager", False), (None, DEVICE == "cuda")],
)
@pytest.mark.usefixtures("unchecked")
def test_transformers_chooses_them_by_the_experts_implementation(
    implementation: str | None, expected: bool, packed: Path
) -> None:
    own = {} if implementation is None else {"experts_implementation": implementation}
    model = AutoModelForCausalLM.from_pretrained(packed, device_map=DEVICE, **own)
    found = {type(m) for m in model.modules() if isinstance(m, PackedExperts)}
    assert found == {KernelExperts if expected else PackedExperts}
    assert model.hf_quantizer.is_compileable == expected


@pytest.mark.parametrize(
    ("family", "asked", "expected"),
    [("llama", True, True), ("llama", False, False), ("listed_moe", True, False)]
    + [("gpt_oss", True, False)],
)
@pytest.mark.usefixtures("unchecked")
def test_generate_may_compile_what_is_one_graph(
    family: str, asked: bool, expected: bool, tmp_path: Path
) -> None:
    model: Any = load(save(tmp_path / "packed", family), DEVICE, kernels=asked)
    assert model.hf_quantizer.is_compileable == expected


def test_the_implementation_does_not_run_unpacked_experts() -> None:
    model: Any = tiny_model("olmoe")
    model.set_experts_implementation("alphaquant")
    with pytest.raises(ModelError, match="OlmoeExperts is not packed"):
        model(TOKENS)


@pytest.mark.usefixtures("unchecked")
def test_an_error_in_a_kernel_names_the_layer_and_its_formats(packed: Path) -> None:
    model = load(packed, DEVICE, "float32", kernels=True)
    with pytest.raises(FormatError, match="take") as caught:
        model.model.layers[1].mlp.experts(  # type: ignore[union-attr,index,operator]
            torch.zeros(2, 41, device=DEVICE),
            torch.zeros(2, 3, dtype=torch.int64, device=DEVICE),
            torch.zeros(2, 3, device=DEVICE),
        )
    (note,) = caught.value.__notes__
    assert note.startswith("in model.layers.1.mlp.experts, 8 of 8 experts: ")
    assert note.count(" x ") > 1 and "int4-g64" in note


@pytest.mark.slow
@torch.no_grad()
def test_ranks_with_kernels_sum_to_the_whole(packed: Path) -> None:
    def experts_of(model: nn.Module) -> KernelExperts:
        use_kernels(model)
        return next(m for m in model.modules() if isinstance(m, KernelExperts))

    ranks = [load(packed, DEVICE, "float32", kernels=False) for _ in range(3)]
    calls: list[int] = []

    def reduce(partial: Tensor) -> Tensor:
        calls.append(len(partial))
        return partial

    for rank, model in enumerate(ranks):
        keep_rank(model, rank, 3, reduce)
    whole = experts_of(load(packed, DEVICE, "float32", kernels=False))
    parts = map(experts_of, ranks)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 40, generator=generator).to(DEVICE)
    ids = torch.rand(9, 8, generator=generator).topk(3).indices.to(DEVICE)
    ids[4] = 8  # padding
    weights = torch.rand(9, 3, generator=generator).to(DEVICE)
    expected = whole(x, ids, weights)
    summed = torch.stack([part(x, ids, weights) for part in parts]).sum(0)
    assert torch.allclose(summed, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert not expected[4].any() and expected[5].any()
    assert calls == [9] * 3  # once per rank, and never while kernels are tried
    with pytest.raises(ModelError, match="kernels=False, divide, then call use_kernels"):
        whole.keep_experts(range(2))


@pytest.mark.slow
def test_routes_are_measured_as_in_plain_torch(packed: Path) -> None:
    found = keep_routes(load(packed, DEVICE, "float32", kernels=True), TOKENS)
    expected = keep_routes(load(packed, DEVICE, "float32", kernels=False), TOKENS)
    layers = zip(found.batches[0], expected.batches[0], strict=True)
    assert all(torch.equal(one.expert_ids, other.expert_ids) for one, other in layers)
    assert len(found.batches[0]) == 2


def generate(model: Any, **options: Any) -> Tensor:
    prompt = TOKENS[:, :4].to(DEVICE)
    made: Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        **options,
    )
    return made


@pytest.mark.slow
@pytest.mark.parametrize("family", ["olmoe", pytest.param("llama", marks=pytest.mark.slow)])
def test_generate_compiles_it_in_one_graph_with_the_static_cache(
    family: str, tmp_path: Path
) -> None:
    model: Any = load(save(tmp_path / "packed", family), DEVICE, "float32", kernels=True)
    eager = generate(model, cache_implementation="dynamic")
    options = CompileConfig(fullgraph=True, backend="eager", mode=None)
    options._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = generate(model, cache_implementation="static", compile_config=options)
    assert torch.equal(compiled, eager)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.gpu
def test_cuda_graphs_of_generate_give_the_tokens_of_single_launches(tmp_path: Path) -> None:
    model: Any = load(save(tmp_path / "packed"), "cuda", "float32", kernels=True)
    alone = generate(model, cache_implementation="static", disable_compile=True)
    torch._dynamo.reset()
    for _ in range(3):  # compiled and captured, then replayed
        assert torch.equal(generate(model, cache_implementation="static"), alone)
