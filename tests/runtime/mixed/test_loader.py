"""One model from five checkpoints: every weight, every byte, every refusal."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alphaquant.errors import ConfigError, ModelError
from alphaquant.models.loading import load_model
from alphaquant.models.mapping import map_model
from alphaquant.runtime.mixed.compressed_modules import CompressedExperts, CompressedLinear
from alphaquant.runtime.mixed.loader import (
    TrueMixedPrecisionLoader,
    load_mixed_precision,
    replace_all_with_mixed_precision,
)
from alphaquant.runtime.mixed.mapping_file import MixedPrecisionConfig
from alphaquant.testing.checkpoints import save_tiny
from alphaquant.testing.foreign.encoders import (
    awq,
    compressed,
    fp8,
    gptq,
    int8,
    save_foreign,
)
from alphaquant.testing.models import tiny_tokens

LAYOUTS = {
    "fp8": fp8(),
    "gptq_int4": gptq(4, 32, symmetric=False),
    "awq_int4": awq(32),
    "int8": int8(),
    "int4": compressed("int4-g32"),
}
ATTENTION = "model.layers.0.self_attn"
EXPERTS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
MAPPING = {
    f"{ATTENTION}.q_proj.weight": "fp8",
    f"{ATTENTION}.k_proj.weight": "gptq_int4",
    f"{ATTENTION}.v_proj.weight": "awq_int4",
    f"{ATTENTION}.o_proj.weight": "fp16",
    f"{EXPERTS[0]}.0.w13_weight": "fp8",
    f"{EXPERTS[0]}.0.w2_weight": "gptq_int4",
    f"{EXPERTS[0]}.1.w13_weight": "awq_int4",
    f"{EXPERTS[0]}.1.w2_weight": "fp8",
    f"{EXPERTS[1]}.3.w13_weight": "int8",
    f"{EXPERTS[1]}.3.w2_weight": "int4",
    f"{EXPERTS[1]}.2.gate_proj.weight": "int8",
}


class Sources(NamedTuple):
    """A base checkpoint, five others, and what their matrices stand for."""

    config: MixedPrecisionConfig
    right: dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return make_sources(tmp_path_factory.mktemp("sources"))


def make_sources(root: Path, family: str = "olmoe", **sizes: Any) -> Sources:
    base = save_tiny(root / "base", family, hidden_size=128, intermediate_size=64, **sizes)
    right = {n: save_foreign(base, root / n, layout) for n, layout in LAYOUTS.items()}
    # The plain checkpoint has other numbers than the base, so that its weights can be told.
    shutil.copytree(base, root / "fp16")
    plain = {n: t * 2 for n, t in load_file(base / "model.safetensors").items()}
    save_file(plain, root / "fp16" / "model.safetensors", metadata={"format": "pt"})
    right["fp16"] = {n.removesuffix(".weight"): t.float() for n, t in plain.items()}
    paths = {name: root / name for name in ("fp16", *LAYOUTS)}
    return Sources(MixedPrecisionConfig(base, paths, MAPPING), right)


def parts_of(weight: str) -> list[str]:
    """Names of a weight's matrices in the files."""
    name = weight.removesuffix(".weight")
    if name.endswith(".w13_weight"):
        return [name.replace("w13_weight", end) for end in ("gate_proj", "up_proj")]
    return [name.replace("w2_weight", "down_proj")]


def planned_weights(sources: Sources) -> dict[str, Tensor]:
    return {
        part: sources.right[precision][part]
        for weight, precision in MAPPING.items()
        for part in parts_of(weight)
    }


def dequantized_model(sources: Sources) -> nn.Module:
    """The base model with the dequantized weights of the others in its plain modules."""
    model = load_model(sources.config.base_model_path, dtype="float32")
    views = map_model(model).views
    for name, weight in planned_weights(sources).items():
        views[name].copy_(weight)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tiny_tokens(2, 12)).logits
    return found


def compressed_linears(model: nn.Module) -> dict[str, CompressedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, CompressedLinear)}


def test_every_mapped_weight_is_that_of_its_source_and_every_other_the_base_models(
    sources: Sources,
) -> None:
    """Capabilities 78, 84: w13 is gate above up, each expert and matrix from its own source."""
    model, statistics = load_mixed_precision(sources.config, dtype="float32")
    assert statistics["loaded"] == statistics["total"] == len(MAPPING)
    assert statistics["failed"] == {}
    planned = planned_weights(sources)
    base = map_model(load_model(sources.config.base_model_path, dtype="float32")).views
    linears = compressed_linears(model)
    assert planned.keys() <= linears.keys()
    for name, linear in linears.items():
        right = planned.get(name, base[name])
        # int4 was decoded by compressed-tensors, which multiplies in bfloat16.
        near = 2**-7 if linear.storage.startswith("compressed-tensors") else 0.0
        found = linear.dequantized(torch.float32)
        torch.testing.assert_close(found, right, rtol=near, atol=0, msg=name)
    untouched = {n: p for n, p in model.named_parameters()}
    for name, parameter in load_model(
        sources.config.base_model_path, dtype="float32"
    ).named_parameters():
        if name in untouched:
            assert torch.equal(untouched[name], parameter), name


def test_outputs_are_those_of_the_dequantized_model(sources: Sources) -> None:
    """Capability 94 across sources; the reference is the plain model with their weights."""
    model, _ = load_mixed_precision(sources.config, dtype="float32", use_cache=True)
    expected = logits(dequantized_model(sources))
    # One matrix is int4, whose reference was rounded to bfloat16 by compressed-tensors.
    assert float((logits(model) - expected).norm() / expected.norm()) < 1e-3
    first = logits(model)
    assert torch.equal(logits(model), first)  # from the cache
    base = logits(load_model(sources.config.base_model_path, dtype="float32"))
    assert float((base - expected).abs().max()) > 0.5


def test_compressed_forms_are_what_is_kept(sources: Sources) -> None:
    """Capability 79: no mapped weight is in memory as floats, but for the plain one."""
    model, _ = load_mixed_precision(sources.config)
    for name in planned_weights(sources):
        linear = compressed_linears(model)[name]
        codes = {"qweight", "weight", "weight_packed"} & linear._buffers.keys()
        dtypes = {linear.stored().tensors[part].dtype for part in codes}
        allowed = {torch.int32, torch.int8, torch.float8_e4m3fn}
        if name == f"{ATTENTION}.o_proj":
            allowed = {torch.bfloat16}
        assert dtypes and dtypes <= allowed, name
        assert not list(linear.parameters()), name


def test_statistics_are_the_bytes_that_are_there(sources: Sources) -> None:
    """Capability 86: with scales, zero points and orders of inputs."""
    model, statistics = load_mixed_precision(sources.config)
    planned = planned_weights(sources)
    held = sum(
        t.numel() * t.element_size()
        for name, linear in compressed_linears(model).items()
        if name in planned
        for t in linear.buffers()
    )
    files = sum(
        t.numel() * t.element_size()
        for weight, precision in MAPPING.items()
        for name, t in load_file(sources.config.sources[precision] / "model.safetensors").items()
        if name.rpartition(".")[0] in parts_of(weight)
    )
    full = 2 * sum(w.numel() for w in planned.values())
    assert held == files == statistics["stored_bytes"]
    assert statistics["bf16_bytes"] == full
    assert statistics["memory_saved_mb"] == (full - held) / 2**20
    assert sum(statistics["forms"].values()) == len(planned)


def test_replacing_and_loading_go_in_either_order_and_again(sources: Sources) -> None:
    """Capability 88: idempotent, experts first, the same model in the end."""

    def fresh() -> tuple[nn.Module, TrueMixedPrecisionLoader]:
        model = load_model(sources.config.base_model_path, dtype="float32")
        return model, TrueMixedPrecisionLoader(model.config, sources.config)

    model, loader = fresh()
    replaced = replace_all_with_mixed_precision(model, loader, use_cache=True)
    assert replaced.model is model
    assert replaced.n_replaced == 2 + 4  # experts of two layers, linears of one
    assert isinstance(model.get_submodule(EXPERTS[0]), CompressedExperts)
    assert replace_all_with_mixed_precision(model, loader).n_replaced == 0
    assert loader.load_model_weights(model)["loaded"] == len(MAPPING)
    one = logits(model)
    assert replace_all_with_mixed_precision(model, loader, use_cache=False).n_replaced == 0
    assert loader.load_model_weights(model)["loaded"] == len(MAPPING)
    assert torch.equal(logits(model), one)
    other, loader = fresh()
    loader.load_model_weights(other)
    assert replace_all_with_mixed_precision(other, loader).n_replaced == 0
    assert torch.equal(logits(other), one)


def test_base_weights_that_are_replaced_leave_memory(sources: Sources) -> None:
    """Capability 85: fused experts are let go of; the rest keeps its own memory only."""
    model = load_model(sources.config.base_model_path)
    before = {n for n, _ in model.named_parameters()}
    loader = TrueMixedPrecisionLoader(model.config, sources.config)
    loader.load_model_weights(model)
    gone = before - {n for n, _ in model.named_parameters()}
    assert f"{EXPERTS[0]}.gate_up_proj" in gone
    experts = model.get_submodule(EXPERTS[0])
    assert isinstance(experts, CompressedExperts)
    assert all(p.is_meta for p in experts.site.module.parameters())
    for name, linear in compressed_linears(model).items():
        for tensor in linear.buffers():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_a_model_that_is_cast_keeps_its_compressed_weights(sources: Sources) -> None:
    """Capability 79: `.to(bfloat16)` changes no scale, and the output is of that dtype."""
    model, _ = load_mixed_precision(sources.config, dtype="float32")
    linear = compressed_linears(model)[f"{ATTENTION}.k_proj"]
    before = linear.dequantized(torch.float32)
    model.to(torch.bfloat16)
    assert linear.get_buffer("scales").dtype == torch.float16
    assert torch.equal(linear.dequantized(torch.float32), before)
    assert linear.weight.dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["mixtral", "listed_moe", "llama", "qwen2_moe"])
def test_other_layouts_of_experts_are_filled_too(tmp_path: Path, family: str) -> None:
    """Capability 84: w1/w3/w2, experts in a list, dense layers, biases."""
    sizes = {"num_experts": 4} if family == "listed_moe" else {}
    base = save_tiny(tmp_path / "base", family, hidden_size=128, **sizes)
    right = save_foreign_any(base, tmp_path / "gptq")
    inventory = map_model(load_model(base)).inventory
    mapping = {f"{m.name}.weight": "gptq_int4" for m in inventory.matrices if m.layer == 0}
    experts = [m for m in inventory.matrices if m.layer == 0 and m.expert == 0]
    for matrix in experts:
        mapping.pop(f"{matrix.name}.weight")
    if experts:
        module = experts[0].name.rpartition(".")[0]
        mapping |= dict.fromkeys((f"{module}.w13_weight", f"{module}.w2_weight"), "gptq_int4")
    config = MixedPrecisionConfig(base, {"gptq_int4": tmp_path / "gptq"}, mapping)
    model, statistics = load_mixed_precision(config, dtype="float32")
    assert statistics["loaded"] == statistics["total"] == len(mapping)
    reference = load_model(base, dtype="float32")
    views, by_name = map_model(reference).views, inventory.by_name
    for name in [m.name for m in inventory.matrices if m.layer == 0]:
        names = (name, *by_name[name].aliases)
        views[name].copy_(next(right[n] for n in names if n in right))
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-3, atol=2e-3)


def save_foreign_any(base: Path, folder: Path) -> dict[str, Tensor]:
    """All matrices of layers in GPTQ, whatever they are called."""
    tensors = load_file(base / "model.safetensors")
    renamed = {n: t for n, t in tensors.items() if ".layers." in n and t.dim() == 2}
    routers = {n for n, t in renamed.items() if n.endswith("gate.weight")}
    layout, right, out = gptq(4, 8), {}, {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if name in renamed and name not in routers and min(tensor.shape) > 1:
            encoded = layout.encode(tensor.float())
            right[module] = encoded.weight
            out |= {f"{module}.{end}": part for end, part in encoded.tensors.items()}
        else:
            out[name] = tensor
    folder.mkdir()
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = dict(layout.config)
    (folder / "config.json").write_text(json.dumps(config))
    return right


def with_mapping(sources: Sources, **mapping: str) -> MixedPrecisionConfig:
    dotted = {name.replace("__", "."): precision for name, precision in mapping.items()}
    return MixedPrecisionConfig(
        sources.config.base_model_path, sources.config.sources, {**MAPPING, **dotted}
    )


WRONG = {
    "model.layers.0.mlp.experts.98.w13_weight": ("fp8", "has experts 0 to 3"),
    "model.layers.7.mlp.experts.0.w2_weight": ("fp8", "has no experts called model.layers.7"),
    "model.layers.0.mlp.up_proj.weight": ("fp8", "has no linear or expert called"),
    "model.layers.1.self_attn.q_proj": ("fp8", "has no linear or expert called"),
    "lm_head.weight": ("awq_int4", "keeps lm_head as plain, which is not awq_int4"),
}


@pytest.mark.parametrize("weight", WRONG)
def test_a_weight_that_is_not_there_is_an_error_by_name(sources: Sources, weight: str) -> None:
    """Capability 87: nothing falls back in silence."""
    precision, said = WRONG[weight]
    config = with_mapping(sources, **{weight: precision})
    with pytest.raises(ModelError, match=f"1 of {len(MAPPING) + 1} weights.*{weight}.*{said}"):
        load_mixed_precision(config)


def test_missing_weights_that_are_allowed_are_listed_and_stay(
    sources: Sources, caplog: pytest.LogCaptureFixture
) -> None:
    """Capabilities 86, 87."""
    config = with_mapping(sources, **{weight: p for weight, (p, _) in WRONG.items()})
    model, statistics = load_mixed_precision(config, dtype="float32", allow_missing=True)
    assert statistics["total"] == len(MAPPING) + len(WRONG)
    assert statistics["loaded"] == len(MAPPING)
    assert statistics["failed"].keys() == WRONG.keys()
    warned = [r.getMessage() for r in caplog.records if "stays as in the base" in r.getMessage()]
    assert len(warned) == len(WRONG)
    assert type(model.get_submodule("lm_head")) is nn.Linear


def test_a_head_can_be_mapped(sources: Sources) -> None:
    config = with_mapping(sources, lm_head__weight="fp16")
    model, statistics = load_mixed_precision(config, dtype="float32")
    assert statistics["loaded"] == len(MAPPING) + 1
    head = compressed_linears(model)["lm_head"]
    assert torch.equal(head.dequantized(torch.float32), sources.right["fp16"]["lm_head"])


@pytest.mark.parametrize(
    ("precision", "folder", "said"),
    [
        ("fp8", "int8", "as int8 128x128, which is not fp8"),
        ("gptq_int4", "awq_int4", "as awq 4 bits g32, which is not gptq_int4"),
        ("awq_int4", "gptq_int4", "as gptq v1 4 bits g32, which is not awq_int4"),
        ("int8", "int4", "int4 g32, which is not int8"),
        ("fp16", "fp8", "as fp8 128x128, which is not fp16"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(
    sources: Sources, precision: str, folder: str, said: str
) -> None:
    swapped = {**sources.config.sources, precision: sources.config.sources[folder]}
    config = MixedPrecisionConfig(
        sources.config.base_model_path, swapped, {f"{ATTENTION}.q_proj.weight": precision}
    )
    with pytest.raises(ModelError, match=said):
        load_mixed_precision(config)


def test_a_name_of_ones_own_holds_any_checkpoint(sources: Sources) -> None:
    """Two checkpoints of one method are two names."""
    paths = {"coarse": sources.config.sources["gptq_int4"], "b": sources.config.sources["int4"]}
    mapping = {f"{ATTENTION}.q_proj.weight": "coarse", f"{ATTENTION}.k_proj.weight": "b"}
    config = MixedPrecisionConfig(sources.config.base_model_path, paths, mapping)
    _, statistics = load_mixed_precision(config)
    assert statistics["forms"] == {
        "gptq v1 4 bits g32": 1,
        "compressed-tensors int4 g32": 1,
    }


def test_a_matrix_that_is_named_twice_is_refused(sources: Sources) -> None:
    config = with_mapping(sources, **{f"{EXPERTS[0]}.0.up_proj.weight": "int8"})
    with pytest.raises(ConfigError, match=r"experts.0.up_proj twice.*w13_weight"):
        load_mixed_precision(config)


def test_a_model_of_another_class_is_refused(sources: Sources, tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path / "llama", "llama"))
    loader = TrueMixedPrecisionLoader(
        load_model(sources.config.base_model_path).config, sources.config
    )
    with pytest.raises(ModelError, match="made for OlmoeForCausalLM and got LlamaForCausalLM"):
        loader.load_model_weights(model)
    with pytest.raises(ModelError, match="made for OlmoeForCausalLM"):
        replace_all_with_mixed_precision(model, loader)


def test_ranks_of_experts_add_up(sources: Sources) -> None:
    """Capability 98: each rank holds a part, and the sum is what one process computes."""
    model, _ = load_mixed_precision(sources.config, dtype="float32")
    whole = model.get_submodule(EXPERTS[0])
    assert isinstance(whole, CompressedExperts)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(10, 128, generator=generator)
    ids = torch.randint(0, 4, (10, 2), generator=generator)
    weights = torch.rand(10, 2, generator=generator)
    expected = whole(hidden, ids, weights)
    parts = []
    for owned in (range(0, 1), range(1, 4)):
        part = copy.deepcopy(whole)
        part.keep_experts(owned)
        parts.append(part(hidden, ids, weights))
    torch.testing.assert_close(parts[0] + parts[1], expected)
    assert all(float(part.abs().max()) > 0 for part in parts)


def test_a_failure_names_layer_expert_and_forms(sources: Sources) -> None:
    """Capability 99."""
    model, _ = load_mixed_precision(sources.config, dtype="float32")
    linear = compressed_linears(model)[f"{EXPERTS[0]}.0.gate_proj"]
    linear._buffers["weight_scale_inv"] = torch.ones(0, 3)
    with pytest.raises(RuntimeError) as caught:
        logits(model)
    notes = " ".join(caught.value.__notes__)
    assert f"in {EXPERTS[0]}, expert 0 (gate, up, down: fp8 128x128, fp8 128x128" in notes
