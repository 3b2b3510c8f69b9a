"""Experts that give their input back, beside experts with weights."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaquant.errors import ModelError
from alphaquant.evaluators.footprint import active_shares
from alphaquant.evaluators.routes import find_routed
from alphaquant.models.layouts.zero_experts import ZeroExperts
from alphaquant.models.loading import load_model
from alphaquant.models.mapping import find_layers, map_model
from alphaquant.models.pages.opening import open_weights
from alphaquant.models.quantization_config import PackedFormats
from alphaquant.models.sites import ModelMap
from alphaquant.runtime.modules import PackedExperts
from alphaquant.spaces.formats import BF16
from alphaquant.testing.any_model import N_LAYERS, save_any, tiny_model_of

pytestmark = pytest.mark.usefixtures("probed_each_time")

N_EXPERTS, N_ZERO, HIDDEN = 8, 4, 64


@pytest.fixture(scope="module")
def longcat() -> ModelMap:
    return map_model(tiny_model_of("longcat_flash").requires_grad_(False))


def site_of(model_map: ModelMap) -> ZeroExperts:
    (site,) = model_map.layers[0].experts
    assert isinstance(site, ZeroExperts)
    return site


def test_zero_experts_are_no_matrices_and_a_list_of_dense_parts_is_no_experts(
    longcat: ModelMap,
) -> None:
    assert len(find_layers(longcat.model)) == N_LAYERS // 2 == len(longcat.layers)
    assert site_of(longcat).n_experts == N_EXPERTS and site_of(longcat).n_zero == N_ZERO
    kinds = {m.name: m.kind for m in longcat.inventory.matrices}
    assert kinds["model.layers.0.mlps.1.down_proj"] == "dense"
    assert [site.name for site in find_routed(longcat.model)] == [
        "model.layers.0.mlp.experts",
        "model.layers.1.mlp.experts",
    ]


def test_the_worked_example(longcat: ModelMap) -> None:
    inputs = torch.ones(2, HIDDEN)
    ids = torch.tensor([[3, 9], [8, N_EXPERTS + N_ZERO]])  # the last is padding
    passed = site_of(longcat).passed(inputs, ids, torch.tensor([[0.5, 0.25], [2.0, 1.0]]))
    assert passed is not None and torch.equal(passed, torch.tensor([[0.25], [2.0]]) * inputs)


def test_packed_experts_pass_inputs_on_once_for_all_ranks(longcat: ModelMap) -> None:
    site, generator = site_of(longcat), torch.Generator().manual_seed(0)
    names = [m.name for part in (site.gate, site.up, site.down) for m in part]
    packed = PackedExperts(site, PackedFormats(dict.fromkeys(names, BF16)))
    for e in range(N_EXPERTS):
        for linear, weight in zip(packed.expert(e).children(), site.views(e), strict=True):
            linear.weight = weight.to(torch.bfloat16)
    inputs = torch.randn(21, HIDDEN, generator=generator)
    ids = torch.rand(21, N_EXPERTS + N_ZERO, generator=generator).topk(3).indices
    weights = torch.rand(21, 3, generator=generator)
    expected = site.module(inputs, ids, weights)
    assert torch.allclose(packed(inputs, ids, weights), expected, rtol=1e-4, atol=1e-5)
    packed.reduce = lambda partial: 2 * partial  # two ranks that hold the same
    passed = site.passed(inputs, ids, weights)
    doubled = 2 * (expected - passed) + passed
    assert torch.allclose(packed(inputs, ids, weights), doubled, rtol=1e-4, atol=1e-5)


def test_a_token_reads_fewer_experts_where_it_may_choose_those_without_weights(
    longcat: ModelMap,
) -> None:
    shares = active_shares(longcat.inventory, longcat.model, None)
    assert shares["model.layers.0.mlp.experts.3.up_proj"] == 2 / (N_EXPERTS + N_ZERO)


def test_files_without_rows_for_zero_experts_are_read(tmp_path: Path) -> None:
    whole = save_any("longcat_flash", tmp_path / "whole")
    tensors = load_file(whole / "model.safetensors")
    unread = [n for n in tensors for e in range(N_EXPERTS, 12) if f".experts.{e}." in n]
    assert len(unread) == 2 * N_ZERO * 2  # layers, gate and up
    published = tmp_path / "published"
    shutil.copytree(whole, published)
    file = published / "model.safetensors"
    left = {name: tensor for name, tensor in tensors.items() if name not in unread}
    save_file(left, file, metadata={"format": "pt"})
    tokens = torch.arange(3, 20)[None]
    models = [load_model(p) for p in (whole, published)]
    models += [open_weights(published, "auto", tmp_path / "cache").model for _ in range(2)]
    logits = [model(tokens, use_cache=False).logits for model in models]
    assert all(torch.equal(found, logits[0]) for found in logits[1:])
    lacking = {n: t for n, t in left.items() if ".experts.7.gate_proj" not in n}
    save_file(lacking, file, metadata={"format": "pt"})
    with pytest.raises(ModelError):
        load_model(published)


def test_rows_of_another_file_layout_are_an_error_and_no_guess(tmp_path: Path) -> None:
    model = save_any("longcat_flash", tmp_path / "model")
    file = model / "model.safetensors"
    tensors = load_file(file)
    experts = sorted({n.partition(".experts.")[0] for n in tensors if ".experts." in n})
    for layer in experts:
        pairs = [
            torch.cat([tensors[f"{layer}.experts.{e}.{p}_proj.weight"] for p in ("gate", "up")])
            for e in range(N_EXPERTS)
        ]
        tensors[f"{layer}.experts.gate_up_proj"] = torch.stack(pairs)
    parts = (".gate_proj.", ".up_proj.")
    fused = {
        name: tensor
        for name, tensor in tensors.items()
        if ".experts." not in name or not any(p in name for p in parts)
    }
    save_file(fused, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="gate_up_proj"):
        load_model(model)
