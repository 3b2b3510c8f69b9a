"""Gradients layer by layer against autograd through the whole model."""

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softmax
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from alphaquant.costs.gradients import LayerTrace, trace_layers
from alphaquant.costs.labels import SampledLabels, TextLabels
from alphaquant.costs.shelf import Shelf
from alphaquant.costs.tape import Tape
from alphaquant.errors import ModelError
from alphaquant.models.mapping import map_model
from alphaquant.models.pages.opening import open_weights
from alphaquant.models.sites import ModelMap
from alphaquant.testing.checkpoints import save_tiny
from alphaquant.testing.cost_cases import totals_of
from alphaquant.testing.models import FAMILIES, tiny_model, tiny_tokens

N_DRAWS, SEED = 2, 7
LABELS = [SampledLabels(N_DRAWS, SEED)]
BATCHES = [tiny_tokens(2, 9, 0), tiny_tokens(1, 9, 1)]


class Taps:
    """Inputs and outputs of every quantizable module in one forward pass of the whole model."""

    def __init__(self, model_map: ModelMap) -> None:
        self.inputs: dict[str, tuple[Tensor, ...]] = {}
        self.outputs: dict[str, Tensor] = {}
        for layer in model_map.layers:
            for linear in layer.linears:
                linear.module.register_forward_hook(self._keep(linear.matrix.name))
            for experts in layer.experts:
                keep = self._keep_block if experts.hooked is experts.block else self._keep
                experts.hooked.register_forward_hook(keep(experts.name))

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[name] = tuple(a.detach() for a in args)
            self.outputs[name] = output

        return hook

    def _keep_block(self, name: str) -> Callable[..., None]:
        """Experts whose block is hooked: what it was called with, and routes."""

        def hook(
            block: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor]
        ) -> None:
            inputs, (made, logits) = args[0].detach().flatten(0, 1), output
            score = torch.sigmoid if isinstance(block, Llama4TextMoe) else partial(softmax, dim=-1)
            weights, ids = score(logits.detach()).topk(block.top_k, -1)
            self.inputs[name] = (inputs, ids, weights)
            self.outputs[name] = made

        return hook


def expected_gradients(model_map: ModelMap) -> Iterator[tuple[Taps, list[dict[str, Tensor]]]]:
    """For every batch: what the modules saw, and the gradient at each output for every draw."""
    model = model_map.model
    model.get_input_embeddings().weight.requires_grad_(True)  # so that there is a graph
    taps = Taps(model_map)
    n_before = 0
    for batch in BATCHES:
        with torch.enable_grad():
            log_probs = torch.log_softmax(model(batch).logits, -1)
        drawn = []
        for total in totals_of(LABELS[0], log_probs, batch, n_before):
            found = torch.autograd.grad(total, list(taps.outputs.values()), retain_graph=True)
            drawn.append(dict(zip(taps.outputs, found, strict=True)))
        n_before += len(batch)
        yield taps, drawn


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def traces(family: str) -> list[LayerTrace]:
    return list(trace_layers(map_model(tiny_model(family)), BATCHES, LABELS))


def close(found: Tensor, expected: Tensor) -> bool:
    """Equal up to the order of float32 sums through two layers."""
    assert found.shape == expected.shape
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_gradients_equal_autograd_through_the_whole_model(
    family: str, traces: list[LayerTrace]
) -> None:
    first_sequence = 0
    for batch, (taps, drawn) in zip(
        BATCHES, expected_gradients(map_model(tiny_model(family))), strict=True
    ):
        n, t = batch.shape
        sequences = slice(first_sequence, first_sequence + n)
        tokens = slice(first_sequence * t, (first_sequence + n) * t)
        first_sequence += n
        for trace in traces:
            for name, linear in trace.linears.items():
                expected = torch.stack([d[name].reshape(n, t, -1) for d in drawn])
                assert close(linear.gradients[:, sequences], expected), name
                assert close(linear.inputs[sequences], taps.inputs[name][0].reshape(n, t, -1))
            for name, experts in trace.experts.items():
                expected = torch.stack([d[name].reshape(n * t, -1) for d in drawn])
                assert close(experts.gradients[:, tokens], expected), name
                x, ids, weights = taps.inputs[name]
                assert close(experts.inputs[tokens], x)
                assert torch.equal(experts.expert_ids[tokens], ids)
                assert close(experts.weights[tokens], weights)


def test_layers_come_from_the_last_to_the_first_with_their_own_inputs(
    family: str, traces: list[LayerTrace]
) -> None:
    assert [trace.layer.index for trace in traces] == [1, 0]
    model = tiny_model(family)
    with torch.no_grad():
        states = model(BATCHES[0], output_hidden_states=True).hidden_states
    for trace in traces:
        assert [len(h) for h in trace.hidden] == [2, 1]
        assert close(trace.hidden[0], states[trace.layer.index])


def test_every_matrix_has_a_gradient_that_is_not_zero(traces: list[LayerTrace]) -> None:
    for trace in traces:
        assert set(trace.linears) == {s.matrix.name for s in trace.layer.linears}
        assert set(trace.experts) == {s.name for s in trace.layer.experts}
        for linear in trace.linears.values():
            assert linear.gradients.shape[:3] == (N_DRAWS, 3, 9)
            assert bool((linear.gradients.flatten(1).abs().sum(-1) > 0).all())


def test_a_linear_that_sees_no_hidden_states_has_its_gradient_too() -> None:
    model: Any = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    n_hidden = model.config.hidden_size
    attention.table = nn.Linear(9, n_hidden, bias=False)
    own = attention.forward

    def with_table(*args: Any, **kwargs: Any) -> Any:
        output, weights = own(*args, **kwargs)
        return output + attention.table(torch.eye(9).expand(len(output), 9, 9)), weights

    attention.forward = with_table
    model.requires_grad_(False)
    model_map = map_model(model)
    trace = next(iter(trace_layers(model_map, BATCHES[:1], [TextLabels()])))
    seen = trace.linears["model.layers.1.self_attn.table"]
    found = torch.einsum("sto,sti->oi", seen.gradients[0], seen.inputs)
    weight = attention.table.weight.requires_grad_(True)
    log_probs = torch.log_softmax(model(BATCHES[0], use_cache=False).logits.float(), -1)
    (total,) = totals_of(TextLabels(), log_probs, BATCHES[0], 0)
    (expected,) = torch.autograd.grad(total, weight)
    assert bool(expected.any()) and close(found, expected)


def test_draws_are_seeded() -> None:
    model_map = map_model(tiny_model("olmoe"))

    def gradients(seed: int) -> Tensor:
        last = next(trace_layers(model_map, BATCHES, [SampledLabels(1, seed)]))
        return last.linears["model.layers.1.self_attn.o_proj"].gradients

    assert torch.equal(gradients(1), gradients(1))
    assert not torch.equal(gradients(1), gradients(2))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_labels_do_not_depend_on_batches(batch_size: int) -> None:
    model_map, tokens = map_model(tiny_model("olmoe")), torch.cat(BATCHES)

    def gradients(batches: list[Tensor]) -> Tensor:
        last = next(trace_layers(model_map, batches, LABELS))
        return last.linears["model.layers.1.self_attn.o_proj"].gradients

    assert close(gradients(list(tokens.split(batch_size))), gradients([tokens]))


def test_gradients_of_the_text_are_those_at_the_layers_outputs(family: str) -> None:
    model_map = map_model(tiny_model(family))
    model, outputs = model_map.model, []
    traces = trace_layers(model_map, BATCHES, LABELS, [TextLabels()])
    found = [trace.at_output for trace in traces][::-1]
    model.get_input_embeddings().weight.requires_grad_(True)  # so that there is a graph
    for layer in model_map.layers:
        layer.module.register_forward_hook(
            lambda _, args, made: outputs.append(made[0] if isinstance(made, tuple) else made)
        )
    for i, batch in enumerate(BATCHES):
        outputs.clear()
        logits = model(batch).logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum")
        for layer, expected in enumerate(torch.autograd.grad(-loss, outputs)):
            assert close(found[layer][i], expected[None])


def test_hidden_states_wait_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of earlier layers memory holds none, so it does not grow with layers."""
    leaves: list[weakref.ref[Tensor]] = []
    n_alive: list[int] = []
    new_leaf = Tape._new_leaf

    def recorded(tape: Tape, x: Tensor, shelf: Shelf) -> Tensor:
        leaf = new_leaf(tape, x, shelf)
        leaves.append(weakref.ref(leaf))
        n_alive.append(sum(known() is not None for known in leaves))
        return leaf

    monkeypatch.setattr(Tape, "_new_leaf", recorded)
    model_map = map_model(tiny_model("olmoe", num_hidden_layers=6))
    traces = trace_layers(model_map, BATCHES, LABELS)
    trace = next(traces)
    assert len(leaves) == 6 * len(BATCHES)
    assert max(n_alive) <= 2 * len(BATCHES)
    assert sum(known() is not None for known in leaves) == 0
    assert trace.layer.index == 5


def test_what_waits_has_the_dtype_of_the_model() -> None:
    model_map = map_model(tiny_model("olmoe").bfloat16())
    for trace in trace_layers(model_map, BATCHES, LABELS, [TextLabels()]):
        seen = [*trace.hidden, *trace.at_output]
        for one in (*trace.linears.values(), *trace.experts.values()):
            seen += [one.inputs, one.gradients]
        assert {x.dtype for x in seen} == {torch.bfloat16}


def test_a_window_of_one_token_has_no_text_to_predict() -> None:
    model_map = map_model(tiny_model("olmoe"))
    for trace in trace_layers(model_map, [tiny_tokens(2, 1)], LABELS, [TextLabels()]):
        assert trace.at_output[0].shape == (1, 2, 1, 40)
        assert not trace.at_output[0].any()


def test_totals_are_stacked_in_order_and_do_not_change_each_other() -> None:
    model_map = map_model(tiny_model("olmoe"))
    joined = list(trace_layers(model_map, BATCHES, [TextLabels(), *LABELS]))
    for alone, rows in (([TextLabels()], slice(0, 1)), (LABELS, slice(1, 1 + N_DRAWS))):
        for trace, expected in zip(joined, trace_layers(model_map, BATCHES, alone), strict=True):
            for name, linear in expected.linears.items():
                assert torch.equal(trace.linears[name].gradients[rows], linear.gradients), name
            for name, experts in expected.experts.items():
                assert torch.equal(trace.experts[name].gradients[rows], experts.gradients), name


def test_labels_learn_which_sequence_they_are_of_and_which_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    class Seen(TextLabels):
        def draw(self, probs: Tensor, tokens: Tensor, sequence: int, positions: slice) -> Tensor:
            seen.append((sequence, tuple(probs.shape), positions.start, positions.stop))
            assert torch.equal(tokens, torch.cat(BATCHES)[sequence])
            return super().draw(probs, tokens, sequence, positions)

    monkeypatch.setattr("alphaquant.costs.endings.positions_at_once", lambda vocabulary: 5)
    list(trace_layers(map_model(tiny_model("olmoe")), BATCHES, [Seen()]))
    assert seen == [(i, (n, 96), at, at + n) for i in range(3) for at, n in ((0, 5), (5, 4))]


def test_gradients_do_not_depend_on_how_positions_are_divided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gradients() -> list[Tensor]:
        model_map = map_model(tiny_model("olmoe"))
        traces = trace_layers(model_map, BATCHES, [*LABELS, TextLabels()])
        return [one.gradients.clone() for t in traces for one in t.linears.values()]

    whole = gradients()
    monkeypatch.setattr("alphaquant.models.walk.ROW_BYTES", 4 * 96 * 2)
    assert all(map(torch.equal, gradients(), whole))
    monkeypatch.setattr("alphaquant.costs.endings.positions_at_once", lambda vocabulary: 1)
    assert all(map(close, gradients(), whole))


def test_a_head_that_is_no_linear_is_differentiated_with_all_logits_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gemma 2 caps its logits behind the head, which both ways go through."""

    def gradients(with_head: bool) -> list[Tensor]:
        model = tiny_model("gemma2")
        if not with_head:
            monkeypatch.setattr(type(model), "get_output_embeddings", lambda _: None)
        traces = trace_layers(map_model(model), BATCHES, [*LABELS, TextLabels()])
        return [one.gradients.clone() for t in traces for one in t.linears.values()]

    by_part = gradients(True)
    assert all(map(close, gradients(False), by_part))


def test_a_head_that_is_called_twice_is_refused() -> None:
    model: Any = tiny_model("llama")

    def once_more(_: nn.Module, args: object, hidden: Tensor) -> None:
        model.lm_head(hidden)

    model.model.norm.register_forward_hook(once_more)
    with pytest.raises(ModelError, match="calls its head more than once"):
        list(trace_layers(map_model(model), BATCHES, LABELS))


def test_every_draw_of_every_sequence_has_its_own_labels() -> None:
    even, tokens = torch.full((50, 8), 1 / 8), torch.zeros(50, dtype=torch.int64)

    def draw(n_draws: int, sequences: range) -> Tensor:
        labels = SampledLabels(n_draws, 0)
        drawn = [labels.draw(even, tokens, s, slice(0, 50)) for s in sequences]
        return torch.stack(drawn, 1).flatten(0, 1)

    labels = draw(2, range(4))  # [2 * 4, 50]
    equal = (labels[:, None] == labels[None]).double().mean(-1)
    # 50 labels of 8 agree in 1/8 by chance, 5 binomial sigmas are 0.234.
    assert (equal - torch.eye(8) < 1 / 8 + 0.234).all()
    assert torch.equal(labels[2:4], draw(1, range(2, 4)))


def test_nothing_is_left_on_the_model() -> None:
    model_map = map_model(tiny_model("mixtral"))
    list(trace_layers(model_map, BATCHES, LABELS, [TextLabels()]))
    for module in model_map.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(p.grad is None for p in model_map.model.parameters())


def test_the_way_back_holds_the_weights_of_one_layer(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", num_hidden_layers=4)
    opened = open_weights(source, "auto", tmp_path / "cache")
    found = map_model(opened.model, pages=opened.pages)
    seen = []
    for trace in trace_layers(found, BATCHES, LABELS):
        held = [i for i, x in enumerate(found.layers) if x.pages and x.pages.resident_bytes()]
        assert held == [trace.layer.index]
        seen.append(trace.layer.index)
    assert seen == [3, 2, 1, 0]
    assert all(x.pages and not x.pages.resident_bytes() for x in found.layers)
