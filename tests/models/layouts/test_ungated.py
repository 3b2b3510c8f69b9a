"""Experts without gate: transposed and biased ones too, and what is refused."""

from typing import Any

import pytest
import torch
from torch import nn

from alphaquant.errors import ModelError
from alphaquant.models.layouts.ungated import UngatedExperts
from alphaquant.models.mapping import map_model
from alphaquant.models.quantization_config import PackedFormats
from alphaquant.runtime.modules import PackedExperts
from alphaquant.spaces.formats import BF16
from alphaquant.testing.models import tiny_model

pytestmark = pytest.mark.usefixtures("probed_each_time")

N_EXPERTS, HIDDEN, WIDTH = 3, 8, 6


class Biased(nn.Module):
    """Transposed and with biases, as the flags of transformers' experts interface say."""

    has_gate, is_transposed, has_bias = False, True, True

    def __init__(self) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(0)
        self.up_proj = nn.Parameter(torch.randn(N_EXPERTS, HIDDEN, WIDTH, generator=drawn))
        self.down_proj = nn.Parameter(torch.randn(N_EXPERTS, WIDTH, HIDDEN, generator=drawn))
        self.up_proj_bias = nn.Parameter(torch.randn(N_EXPERTS, WIDTH, generator=drawn))
        self.down_proj_bias = nn.Parameter(torch.randn(N_EXPERTS, HIDDEN, generator=drawn))
        self.act_fn = nn.ReLU()


def site_of(module: nn.Module) -> UngatedExperts:
    site = UngatedExperts.make(0, "m.experts", module, nn.Module())
    assert isinstance(site, UngatedExperts)
    return site


def packed_of(site: UngatedExperts) -> PackedExperts:
    matrices = [m for e in range(N_EXPERTS) for m in site.matrices(e)]
    packed = PackedExperts(site, PackedFormats({m.name: BF16 for m in matrices}))
    for e in range(N_EXPERTS):
        for linear, weight in zip(packed.expert(e).linears(), site.weights(e), strict=True):
            linear.weight = weight.to(torch.bfloat16)
    return packed


def test_the_matrices_of_an_expert_are_up_and_down() -> None:
    site = map_model(tiny_model("nemotron_h")).layers[1].experts[0]
    assert site.gate == () and len(site.up) == len(site.down) == 6
    assert [m.projection for m in site.matrices(2)] == ["up_proj", "down_proj"]
    assert [tuple(w.shape) for w in site.weights(2)] == [(24, 40), (40, 24)]
    assert site.views(2).gate is None


@torch.no_grad()
def test_transposed_and_biased_experts_are_computed_as_their_flags_say() -> None:
    module = Biased()
    site, x = site_of(module), torch.ones(2, HIDDEN)
    features = torch.relu(x @ module.up_proj[1] + module.up_proj_bias[1])
    assert torch.allclose(site.apply_gate(site.gate_up(1, x)), features)
    expected = features @ module.down_proj[1] + module.down_proj_bias[1]
    packed = packed_of(site)
    found = packed(x, torch.ones(2, 1, dtype=torch.int64), torch.ones(2, 1))
    # bfloat16 rounds each weight by at most 2^-9 of it; sums of 8 and of 6.
    assert torch.allclose(found, expected, rtol=0.02, atol=0.05)
    assert not torch.allclose(found, features @ module.down_proj[1], rtol=0.02, atol=0.05)


def without_activation(module: nn.Module) -> None:
    del module.act_fn


def with_a_norm(module: nn.Module) -> None:
    module.has_post_expert_norm = True


@pytest.mark.parametrize("change", [without_activation, with_a_norm])
def test_other_experts_without_gate_are_refused_by_name(change: Any) -> None:
    module = Biased()
    change(module)
    with pytest.raises(ModelError, match=r"m\.experts \(Biased\) keeps experts without gate"):
        UngatedExperts.sizes(module, "m.experts")


def test_experts_that_do_not_say_that_they_have_no_gate_are_left_to_other_layouts() -> None:
    module = Biased()
    module.has_gate = True
    assert UngatedExperts.sizes(module, "m.experts") is None
    assert UngatedExperts.sizes(nn.Linear(2, 2), "m") is None


def test_an_error_in_an_expert_names_its_parts() -> None:
    packed, too_wide = packed_of(site_of(Biased())), torch.ones(1, HIDDEN + 1)
    with pytest.raises(RuntimeError) as caught:
        packed(too_wide, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    assert "in m.experts, expert 0 (up, down: bf16, bf16)" in caught.value.__notes__
