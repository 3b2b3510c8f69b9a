"""Every decoder with routed experts of transformers: right in every step, or refused by name.

Nothing is listed by hand but what is refused. The fast test takes the architectures that each
found a fault of their own; `-m slow` takes all of them. docs/models.md lists the same.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import alphaquant
from alphaquant.commands.quantize import quantize
from alphaquant.costs.gradients import trace_layers
from alphaquant.costs.labels import SampledLabels
from alphaquant.errors import ModelError
from alphaquant.models.loading import load_model
from alphaquant.models.mapping import map_model
from alphaquant.models.sites import ModelMap
from alphaquant.models.walk import check_walk, relative_error
from alphaquant.specs.quantize import QuantizeSpec
from alphaquant.testing.any_model import routed_architectures, save_any
from alphaquant.testing.cost_cases import totals_of

REFUSED = {
    "doge": "promises routed experts",
    "jetmoe": "unsupported layout",
}
"""Refused by name, and a part of the message."""

FAST = {
    "afmoe": {},  # its router is a module of its own; loading touches its weight
    "dbrx": {},  # experts in 2-D parameters
    "deepseek_v4": {},  # a subclass of nn.Linear, token ids and state among the arguments
    "gemma4": {"hidden_size_per_layer_input": 16},  # a vision tower as deep as the decoder
    "llama4_text": {},  # every expert gets every token, most times a score of zero
    "nemotron_h": {"moe_latent_size": 32},  # experts without gate, in a latent space
    "glm_moe_dsa": {"indexer_types": ["full", "shared", "full", "shared"]},  # handed-on indices
    "inkling_text": {},  # shared experts in 3-D parameters
    "longcat_flash": {},  # two attentions per layer, experts without weights
    "zaya": {},  # a linear that is called twice, a router of several layers
}
ALIKE = ("afmoe", "gemma4", "inkling_text", "longcat_flash", "zaya")
"""Of those, the dear ones: slow here, and in the slow test of every architecture."""

CONFIG = {
    "default": {"wq": "int4", "group_size": 32},
    "overrides": [
        {"pattern": "*experts*down_proj", "wq": "int3"},
        {"pattern": "*attn*", "wq": "int8"},
    ],
}


def windows(n_windows: int, n_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, 4000, (n_windows, n_tokens), generator=generator)


def routers(model_map: ModelMap) -> list[str]:
    """Quantized linears whose name says that they route; names decide only in this test."""
    words = (".router.", ".gate.", ".indexer.", ".shared_expert_gate.")
    return [m.name for m in model_map.inventory.matrices if any(w in f"{m.name}." for w in words)]


def assert_walk_and_gradients(model_map: ModelMap) -> None:
    check_walk(model_map, [windows(3, 40)[:2], windows(3, 40)[2:]])
    batches, labels = list(windows(3, 24).split(2)), SampledLabels(n_draws=1, seed=0)
    got = {
        name: torch.einsum("sto,sti->oi", trace.gradients[0], trace.inputs)
        for layer in trace_layers(model_map, batches, [labels])
        if layer.layer.index < 2
        for name, trace in layer.linears.items()
    }
    model: Any = model_map.model
    weights = {s.matrix.name: s.module.weight for x in model_map.layers[:2] for s in x.linears}
    for weight in weights.values():
        weight.requires_grad_(True)
    log_probs = [torch.log_softmax(model(b, use_cache=False).logits.float(), -1) for b in batches]
    total = sum(
        totals_of(labels, p, b, first)[0]
        for p, b, first in zip(log_probs, batches, (0, 2), strict=True)
    )
    wanted = torch.autograd.grad(total, list(weights.values()), allow_unused=True)  # type: ignore
    for (name, weight), gradient in zip(weights.items(), wanted, strict=True):
        expected = torch.zeros_like(weight) if gradient is None else gradient
        assert relative_error(got[name], expected) <= 1e-3, name


def assert_packed(source: Path, folder: Path) -> None:
    """Quantize (which runs the result against the dequantized reference), generate, save again."""
    config = folder / "config.json"
    config.write_text(json.dumps(CONFIG))
    out = folder / "packed"
    quantize(QuantizeSpec.of(model=str(source), config=config, out=out, method="rtn"))
    report = json.loads((out / "quantize_report.json").read_text())
    assert report["first_run"]["max_relative_error"] <= report["first_run"]["tolerance"]
    assert not report["carried"]
    written, given = (json.loads((p / "config.json").read_text()) for p in (out, source))
    assert {key: written[key] for key in given} == given
    model: Any = alphaquant.load(out)
    tokens = windows(1, 8)
    assert model.generate(tokens, max_new_tokens=2, do_sample=False).shape == (1, 10)
    logits = model(tokens, use_cache=False).logits
    model.save_pretrained(folder / "again")
    again: Any = alphaquant.load(folder / "again")
    assert torch.equal(again(tokens, use_cache=False).logits, logits)


def assert_right(arch: str, folder: Path, extra: dict[str, Any]) -> None:
    source = save_any(arch, folder / "model", extra)
    model_map = map_model(load_model(source))
    assert not routers(model_map)
    assert_walk_and_gradients(model_map)
    assert_packed(source, folder)


@pytest.mark.parametrize(
    "arch",
    [pytest.param(arch, marks=[pytest.mark.slow] * (arch in ALIKE)) for arch in FAST],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_architecture_that_found_a_fault_is_right(arch: str, tmp_path: Path) -> None:
    assert_right(arch, tmp_path, FAST[arch])


def test_the_table_of_models_lists_what_works_and_what_is_refused() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    works = sorted(set(routed_architectures()) - REFUSED.keys())
    for title, wanted in (("work", works), ("refused by name", sorted(REFUSED))):
        row = re.search(rf"^\| {title} \((\d+)\) \| (.*) \|$", text, re.M)
        assert row is not None
        without_reasons = re.sub(r" \(.*?\)", "", row[2])
        assert re.split(", | and ", without_reasons) == wanted
        assert int(row[1]) == len(wanted)
    assert "not tried" not in text


@pytest.mark.slow
@pytest.mark.parametrize("arch", routed_architectures())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_architecture_is_right_or_refused_by_name(arch: str, tmp_path: Path) -> None:
    if arch in REFUSED:
        source = save_any(arch, tmp_path)
        with pytest.raises(ModelError, match=REFUSED[arch]):
            map_model(load_model(source))
    else:
        assert_right(arch, tmp_path, {})
