"""Packed experts: every pair of precisions, grouping by expert, routing, errors with a place."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphaquant.errors import FormatError
from alphaquant.models.mapping import map_model
from alphaquant.models.sites import RoutedTokens
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.runtime.checkpoint import load
from alphaquant.runtime.modules import PackedExpert, PackedExperts, PackedLinear
from alphaquant.runtime.pipeline import PackingJob, quantize_to_checkpoint
from alphaquant.spaces.assignment import Assignment
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.models import ROUTED_EXPERTS, tiny_model
from alphaquant.testing.packed import save_packed

HIDDEN, TOP_K = 40, 3
PRECISIONS = ("bf16", "fp8-e4m3-row", "int8-row", "int4-g32", "int4-g32-asym")
PAIRS = [(w13, w2) for w13 in PRECISIONS for w2 in PRECISIONS]
"""Formats of gate and up, and of down."""


def save_pairs(folder: Path, layers: Mapping[int, list[tuple[str, str]]]) -> Path:
    """An OLMoE with these pairs of formats per layer and expert, all else bf16."""
    model_map = map_model(tiny_model("olmoe", num_experts=len(layers[0])))
    formats = {}
    for matrix in model_map.inventory.matrices:
        formats[matrix.name] = "bf16"
        if matrix.expert is not None:
            w13, w2 = layers[matrix.layer][matrix.expert]
            formats[matrix.name] = w2 if matrix.name.endswith("down_proj") else w13
    settings = QuantSettings(method="rtn")
    done = quantize_to_checkpoint(
        PackingJob(model_map, Assignment(formats), settings), folder, facts={}
    )
    return done.path


def experts_of(model: nn.Module) -> list[PackedExperts]:
    return [module for module in model.modules() if isinstance(module, PackedExperts)]


def expert_of(experts: PackedExperts, index: int) -> PackedExpert:
    expert = experts.get_submodule(str(index))
    assert isinstance(expert, PackedExpert)
    return expert


def reference(experts: PackedExperts, index: int, x: Tensor) -> Tensor:
    """(silu(x G^T) * x U^T) D^T in float32 from the dequantized weights."""
    expert = expert_of(experts, index)
    parts = (expert.gate_proj, expert.up_proj, expert.down_proj)
    gate, up, down = (part.packed().dequantize() for part in parts)
    return (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


@torch.no_grad()
def test_every_pair_of_precisions_is_what_its_dequantized_weights_give(tmp_path: Path) -> None:
    layers = {0: PAIRS, 1: PAIRS[::-1]}  # two layers with different maps
    model = load(save_pairs(tmp_path / "packed", layers), dtype="bfloat16")
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for layer, experts in enumerate(experts_of(model)):
        for index, (w13, w2) in enumerate(layers[layer]):
            expert = expert_of(experts, index)
            found = tuple(part.format.name for part in expert.children())  # type: ignore[union-attr]
            assert found == (w13, w13, w2)
            ids = torch.full((9, 1), index)
            output = experts(x, ids, torch.ones(9, 1, dtype=torch.bfloat16)).float()
            expected = reference(experts, index, x.float())
            # Four roundings to bfloat16 (weights, features, outputs), 2^-9 each, in random
            # directions: 2 * 2^-9 / sqrt(3) = 0.0023 of the output.
            assert float((output - expected).norm()) <= 0.01 * float(expected.norm()), (w13, w2)


@torch.no_grad()
def test_another_precision_of_w2_changes_only_the_tokens_of_that_expert(tmp_path: Path) -> None:
    pairs = [("int4-g32", "int8-row")] * 8
    changed = [*pairs[:3], ("int4-g32", "int4-g32"), *pairs[4:]]
    paths = [
        save_pairs(tmp_path / name, {0: one, 1: pairs})
        for name, one in (("before", pairs), ("after", changed))
    ]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, HIDDEN, generator=generator)
    ids = torch.rand(40, 8, generator=generator).topk(TOP_K).indices
    weights = torch.rand(40, TOP_K, generator=generator)
    first, second = ([e(x, ids, weights) for e in experts_of(load(path))] for path in paths)
    assert torch.equal((first[0] != second[0]).any(-1), (ids == 3).any(-1))
    assert torch.equal(first[1], second[1])


def routed(block: nn.Module, experts: nn.Module, site: Any, x: Tensor) -> RoutedTokens:
    """What an experts module is called with in a call of its block."""
    seen: list[RoutedTokens] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(site.route(args, kwargs))

    handle = experts.register_forward_pre_hook(hook, with_kwargs=True)
    block(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", [f for f in ROUTED_EXPERTS if f != "listed_moe"])
@torch.no_grad()
def test_routing_is_that_of_the_unpacked_block_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    packed = load(save_packed(model, tmp_path / "packed"))
    x = torch.randn(2, 7, HIDDEN, generator=torch.Generator().manual_seed(0))
    sites = [site for layer in map_model(model).layers for site in layer.experts]
    assert sites
    for site in sites:
        block = packed.get_submodule(site.name.rpartition(".")[0])
        ours = packed.get_submodule(site.name)
        before, after = routed(site.block, site.module, site, x), routed(block, ours, site, x)
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one, other)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> PackedExperts:
    """64 experts with all formats."""
    model = tiny_model("olmoe", num_experts=64, num_experts_per_tok=8)
    return experts_of(load(save_packed(model, tmp_path_factory.mktemp("modules") / "packed")))[0]


def routings() -> dict[str, Tensor]:
    """Expert ids, int64 [n, k], for 64 experts."""
    generator = torch.Generator().manual_seed(0)
    return {
        "4096 tokens": torch.rand(4096, 64, generator=generator).topk(8).indices,
        "empty experts": torch.rand(50, 5, generator=generator).topk(3).indices * 7 + 2,
        "one token": torch.tensor([[63, 0, 5]]),
        "no token": torch.zeros(0, 3, dtype=torch.int64),
        "all to one expert": torch.full((33, 1), 17),
        "all to the same experts": torch.tensor([[9, 4]] * 33),
    }


@pytest.mark.parametrize("routing", routings())
@torch.no_grad()
def test_each_expert_with_tokens_runs_once_on_all_of_them(
    routing: str, wide: PackedExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = routings()[routing]
    rows: list[int] = []
    n_dequantized: list[str] = []
    forward, dequantize = PackedLinear.forward, PackedMatrix.dequantize

    def counted(self: PackedLinear, inputs: Tensor) -> Tensor:
        rows.append(len(inputs))
        return forward(self, inputs)

    def recorded(self: PackedMatrix) -> Tensor:
        n_dequantized.append(self.format.name)
        return dequantize(self)

    monkeypatch.setattr(PackedLinear, "forward", counted)
    monkeypatch.setattr(PackedMatrix, "dequantize", recorded)
    output = wide(torch.randn(len(ids), HIDDEN), ids, torch.ones(ids.shape))
    assert output.shape == (len(ids), HIDDEN)
    # Three matrices per expert with a token; a loop over tokens has three per token and expert.
    n_active = len(set(ids.flatten().tolist()))
    assert len(rows) == len(n_dequantized) == 3 * n_active
    assert sum(rows) == 3 * ids.numel()


@pytest.mark.parametrize("routing", routings())
@torch.no_grad()
def test_a_token_gets_what_it_gets_alone(routing: str, wide: PackedExperts) -> None:
    ids = routings()[routing]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(ids), HIDDEN, generator=generator)
    weights = torch.rand(ids.shape, generator=generator)
    together = wide(x, ids, weights)
    for t in range(0, len(ids), max(1, len(ids) // 16)):
        alone = wide(x[t : t + 1], ids[t : t + 1], weights[t : t + 1])[0]
        # Products of 40 and 24 terms in another order, 2^-24 each.
        assert torch.allclose(together[t], alone, rtol=0, atol=1e-5 * float(alone.abs().max()))
        direct = sum(
            w * reference(wide, int(e), x[t : t + 1])[0]
            for e, w in zip(ids[t], weights[t], strict=True)
        )
        assert torch.allclose(alone, direct, rtol=0, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("error", [RuntimeError, FormatError])
def test_an_error_inside_an_expert_names_layer_expert_and_formats(
    error: type[Exception], wide: PackedExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = expert_of(wide, 5)

    def fails(self: PackedMatrix) -> Tensor:
        raise error("no kernel")

    monkeypatch.setattr(PackedMatrix, "dequantize", fails)
    with pytest.raises(error, match="no kernel") as caught:
        wide(torch.ones(1, HIDDEN), torch.tensor([[5]]), torch.ones(1, 1))
    formats = [part.format.name for part in (bad.gate_proj, bad.up_proj, bad.down_proj)]
    assert caught.value.__notes__ == [
        f"in model.layers.0.mlp.experts, expert 5 (gate, up, down: {', '.join(formats)})"
    ]


def test_damaged_codes_in_memory_are_an_error_that_names_the_expert(tmp_path: Path) -> None:
    experts = experts_of(load(save_packed(tiny_model("olmoe"), tmp_path / "packed")))[1]
    gate = expert_of(experts, 6).gate_proj
    gate.register_buffer("codes", gate.get_buffer("codes")[:-1])
    with pytest.raises(RuntimeError) as caught:
        experts(torch.ones(1, HIDDEN), torch.tensor([[6]]), torch.ones(1, 1))
    assert "in model.layers.1.mlp.experts, expert 6 " in caught.value.__notes__[0]
