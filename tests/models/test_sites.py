"""Layouts of routed experts: what listed experts measure, and a layout that a user adds."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.models import mapping
from alphaquant.models.layouts.standard import LAYOUTS, ListedExperts
from alphaquant.models.mapping import known_layouts, map_model
from alphaquant.models.sites import ExpertSizes, ExpertsSite, ExpertViews
from alphaquant.models.walk import observe_layer, walk
from alphaquant.runtime.checkpoint import load
from alphaquant.runtime.pipeline import PackingJob, quantize_to_checkpoint
from alphaquant.spaces.assignment import uniform_assignment
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.listed import ListedBlock, ListedConfig, ListedExpert
from alphaquant.testing.models import tiny_model, tiny_tokens

pytestmark = pytest.mark.usefixtures("probed_each_time")

N_EXPERTS, TOP_K, HIDDEN, WIDTH = 6, 2, 16, 24
TOKENS = tiny_tokens(4, 16)


def listed_block(dtype: torch.dtype = torch.float32) -> ListedBlock:
    config = ListedConfig(
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_experts=N_EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    torch.manual_seed(0)
    block = ListedBlock(config).to(dtype)
    return block.requires_grad_(False)


def listed_site(block: ListedBlock) -> ListedExperts:
    return ListedExperts.make(0, "m.experts", block.experts, block)


def router_choice(block: ListedBlock, x: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = torch.softmax(block.gate(x), -1).topk(TOP_K, -1)
    return ids, weights


# bfloat16 rows: a routing weight is rounded to 8 bits where the block multiplies by it.
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("n_tokens", [1, 33])
def test_measured_routing_is_the_routers(dtype: torch.dtype, limit: float, n_tokens: int) -> None:
    block = listed_block(dtype)
    x = torch.randn(1, n_tokens, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    inputs, ids, weights = listed_site(block).route((x,), {})
    expected_ids, expected = router_choice(block, x[0])
    assert torch.equal(inputs, x[0]) and ids.shape == (n_tokens, TOP_K)
    dense, wanted = torch.zeros(2, n_tokens, N_EXPERTS)
    dense.scatter_(1, ids, weights.float())
    wanted.scatter_(1, expected_ids, expected.float())
    assert bool((dense - wanted).abs().max() <= limit)


def test_a_choice_of_weight_zero_belongs_to_no_expert() -> None:
    block = listed_block()
    block.gate.weight.zero_()
    block.gate.weight[2] = 1000.0  # all the weight of a token with a positive sum
    ids, weights = listed_site(block).route((torch.ones(1, 3, HIDDEN),), {})[1:]
    assert ids.tolist() == [[2]] * 3 and torch.equal(weights, torch.ones(3, 1))


def test_measuring_leaves_the_block_as_it_was() -> None:
    block, x = listed_block(), torch.randn(1, 5, HIDDEN)
    before = block(x)[0]
    listed_site(block).route((x,), {})
    assert torch.equal(block(x)[0], before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())


def test_what_runs_while_routing_is_measured_is_not_observed() -> None:
    model_map = map_model(tiny_model("listed_moe"))
    step, calls = next(walk(model_map, [TOKENS])), []
    layer = step.layer

    class Counter:
        def on_linear(self, site: object, inputs: Tensor) -> None:
            calls.append(site)

        def on_experts(self, site: object, inputs: Tensor, ids: Tensor, weights: Tensor) -> None:
            calls.append(site)

    with observe_layer(layer, Counter()):
        step.run()
    assert len(calls) == len(layer.linears) + 1


def test_experts_whose_outputs_get_lost_are_refused() -> None:
    block = listed_block()
    block.register_forward_hook(lambda *_: None)
    block.forward = lambda x: torch.zeros_like(x)  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="do not reach the output of ListedBlock"):
        listed_site(block).route((torch.ones(1, 3, HIDDEN),), {})


class Swapped(ListedExpert):
    """Activation on the wrong half."""

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.w2(self.act_fn(self.w3(inputs)) * self.w1(inputs))
        return outputs


def test_experts_that_compute_something_else_are_refused() -> None:
    block = listed_block()
    block.experts[0] = Swapped(HIDDEN, WIDTH)
    with pytest.raises(ModelError, match=r"m\.experts\.0 \(Swapped\) does not compute"):
        listed_site(block)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: delattr(b.experts[0], "act_fn"), "no activation called act_fn"),
        (lambda b: delattr(b.experts[3], "w3"), r"m\.experts\.3 .* has no nn\.Linear called"),
        (
            lambda b: setattr(b.experts, "3", ListedExpert(HIDDEN, 8)),
            r"m\.experts\.3 has other shapes than m\.experts\.0",
        ),
    ],
)
def test_other_lists_are_refused_by_name(change: object, message: str) -> None:
    block = listed_block()
    change(block)  # type: ignore[operator]
    with pytest.raises(ModelError, match=message):
        listed_site(block)


def test_more_experts_than_features_cannot_be_measured() -> None:
    experts = nn.ModuleList(ListedExpert(4, 8) for _ in range(5))
    with pytest.raises(ModelError, match="lists 5 experts of 4 features"):
        ListedExperts.sizes(experts, "m.experts")


def test_a_list_of_another_name_holds_experts_if_its_members_are() -> None:
    experts = listed_block().experts
    assert ListedExperts.sizes(experts, "m.mlps") == (N_EXPERTS, HIDDEN, WIDTH)
    assert ListedExperts.sizes(experts[:1], "m.mlps") is None
    assert ListedExperts.sizes(nn.ModuleList([nn.Linear(4, 4)] * 2), "m.mlps") is None


def test_a_list_of_another_name_holds_experts_only_beside_a_router() -> None:
    block = listed_block()
    block.mlps = block.experts
    del block.experts
    assert ListedExperts.is_called_by(block, block.mlps)
    block.gate = nn.Linear(HIDDEN, N_EXPERTS + 2, bias=False)  # two experts without weights
    assert ListedExperts.is_called_by(block, block.mlps)
    del block.gate
    assert not ListedExperts.is_called_by(block, block.mlps)
    block.experts = block.mlps
    assert ListedExperts.is_called_by(block, block.experts)


def test_both_names_of_a_listed_expert_are_known() -> None:
    name = "model.layers.0.mlp.block_sparse_moe.experts"
    matrix = map_model(tiny_model("listed_moe")).inventory.by_name[f"{name}.3.w1"]
    assert f"{name}.3.gate_proj" in matrix.aliases


# A layout as CONTRIBUTING.md's recipe describes it: one tensor per projection, inputs first.


class SplitModule(nn.Module):
    """OLMoE's experts with three tensors [E, K, N] instead of two fused ones."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        both, down = fused.gate_up_proj.data, fused.down_proj.data
        half = both.shape[1] // 2
        self.w_gate = nn.Parameter(both[:, :half].transpose(1, 2).contiguous())
        self.w_up = nn.Parameter(both[:, half:].transpose(1, 2).contiguous())
        self.w_down = nn.Parameter(down.transpose(1, 2).contiguous())

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        output = torch.zeros_like(x)
        for e in range(len(self.w_down)):
            token, slot = torch.where(ids == e)
            features = nn.functional.silu(x[token] @ self.w_gate[e]) * (x[token] @ self.w_up[e])
            output.index_add_(0, token, features @ self.w_down[e] * weights[token, slot, None])
        return output


@dataclass(frozen=True)
class SplitExperts(ExpertsSite):
    """The layout of `SplitModule`."""

    @classmethod
    def sizes(cls, module: nn.Module, name: str) -> ExpertSizes | None:
        return ExpertSizes(*module.w_gate.shape) if isinstance(module, SplitModule) else None  # type: ignore[arg-type]

    def views(self, expert: int) -> ExpertViews:
        parts = (self.module.w_gate, self.module.w_up, self.module.w_down)
        return ExpertViews(*(part.data[expert].T for part in parts))  # type: ignore[operator,union-attr]

    def apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return nn.functional.silu(gate) * up

    def state_names(self) -> set[str]:
        return {f"{self.name}.{part}" for part in ("w_gate", "w_up", "w_down")}


def split_model() -> nn.Module:
    model = tiny_model("olmoe")
    for layer in model.model.layers:
        layer.mlp.experts = SplitModule(layer.mlp.experts)
    return model.requires_grad_(False)


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.experts\.w_gate .* CONTRIBUTING"):
        map_model(split_model())


def quantized(model: nn.Module, folder: Path, layouts: tuple[type[ExpertsSite], ...]) -> Path:
    model_map = map_model(model, layouts)
    assignment = uniform_assignment(model_map.inventory, "int4-g32")
    settings = QuantSettings(refine_sweeps=1)
    job = PackingJob(model_map, assignment, settings, TOKENS, batch_size=2)
    return quantize_to_checkpoint(job, folder, facts={}).path


def test_a_layout_that_a_user_adds_is_quantized_like_the_projects_own(tmp_path: Path) -> None:
    own = load(quantized(tiny_model("olmoe"), tmp_path / "own", LAYOUTS))
    # The packed experts have no trace of the layout, so the plain architecture loads both.
    added = load(quantized(split_model(), tmp_path / "added", (SplitExperts, *LAYOUTS)))
    difference = (own(TOKENS).logits - added(TOKENS).logits).abs().max()
    assert float(difference) <= 1e-4
    assert float((own(TOKENS).logits - tiny_model("olmoe")(TOKENS).logits).abs().max()) > 0.1


def test_installed_packages_add_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("split", f"{__name__}:SplitExperts", mapping.LAYOUT_GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: SplitExperts)
    monkeypatch.setattr(mapping, "entry_points", lambda group: [entry])
    assert known_layouts() == (SplitExperts, *LAYOUTS)
    assert len(map_model(split_model()).inventory.matrices) == 56


def test_an_entry_point_that_names_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = EntryPoint("wrong", "pathlib:Path", mapping.LAYOUT_GROUP)
    monkeypatch.setattr(mapping, "entry_points", lambda group: [entry])
    with pytest.raises(ModelError, match=r"entry point wrong of group alphaquant\.experts"):
        known_layouts()
