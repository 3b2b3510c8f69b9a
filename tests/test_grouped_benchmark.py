"""The benchmark of layers of experts: what it compares, with timers that make times up."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import benches
from tests.benches import FakeTimer, bench_with

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")

load = benches.load


def test_a_layer_with_wrong_outputs_ends_the_run(load: Callable[[str], Any]) -> None:
    bench = bench_with(load, load("kernel_timing").run_once)
    right = bench.kernels.grouped_moe
    wrong = replace(bench.kernels, grouped_moe=lambda *given: right(*given).roll(1, 0))
    grouped, shapes = load("kernel_grouped"), load("kernel_shapes")
    with pytest.raises(RuntimeError, match="int2-g128 tiny-layer with 3 tokens: rel"):
        list(grouped.measure_grouped(replace(bench, kernels=wrong), shapes.TINY_MOE[0], [3]))


@pytest.mark.slow
def test_the_mix_is_compared_with_bfloat16_and_the_slowest_format(
    load: Callable[[str], Any],
) -> None:
    grouped, shapes = load("kernel_grouped"), load("kernel_shapes")
    linear = bench_with(load, None).kernels.grouped_moe
    times = {1: 1e-6, 2: 2e-6, 3: 3e-6, 4: 2e-6, 5: 4e-6}  # the four formats, and the mix
    order: list[int] = []

    def made_up(call: Any) -> float:
        if call.func is linear:
            stacked = call.args[3]
            if not order or order[-1] != id(stacked):
                order.append(id(stacked))
            return times[len(order)]
        is_batched = call.func is grouped.batched_mm_experts_forward
        return 12e-6 if is_batched else 10e-6

    bench = bench_with(load, FakeTimer(made_up))
    rows = list(grouped.measure_grouped(bench, shapes.TINY_MOE[0], (17,)))
    mix = rows[-1]
    assert [row.speedup for row in rows] == pytest.approx([10.0, 5.0, 10 / 3, 5.0, 2.5])
    scaled = [r.packed.seconds * mix.n_bytes / r.n_bytes for r in rows[:4]]
    assert mix.of_slowest == pytest.approx(4e-6 / max(scaled))
    assert mix.is_even == (mix.of_slowest <= 1.15)
    assert all(row.of_slowest is None for row in rows[:4])
    assert [row.target for row in rows] == [None] * 5  # more than 16 tokens
    cells = load("kernel_tables").grouped_cells(mix)
    assert len(cells) == len(load("kernel_tables").GROUPED_HEAD)
    # All five experts are active with 17 tokens: the bytes are those of the whole layer.
    experts = grouped.pack_experts(
        grouped.draw_layer(shapes.TINY_MOE[0], "cpu"), ("int4-g128",) * 5
    )
    assert rows[2].n_bytes == sum(map(grouped.bytes_of_expert, experts))


def test_the_mix_has_a_target_with_few_tokens(load: Callable[[str], Any]) -> None:
    grouped, shapes = load("kernel_grouped"), load("kernel_shapes")
    run = bench_with(load, None).kernels.grouped_moe
    timer = FakeTimer(lambda call: 1.0 if call.func is run else 2.0)
    rows = list(grouped.measure_grouped(bench_with(load, timer), shapes.TINY_MOE[0], (3,), ()))
    assert [(r.format, r.target, r.is_met, r.of_slowest) for r in rows] == [
        ("mix", 2.0, True, None)
    ]
    slow = FakeTimer(lambda call: 1.0 if call.func is run else 1.9)
    rows = list(grouped.measure_grouped(bench_with(load, slow), shapes.TINY_MOE[0], (3,), ()))
    assert [row.is_met for row in rows] == [False]


def test_a_layer_that_gathers_too_much_is_left_out(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    grouped, shapes = load("kernel_grouped"), load("kernel_shapes")
    shape = shapes.TINY_MOE[0]
    layer = grouped.draw_layer(shape, "cpu")
    x = torch.ones(3, shape.hidden, dtype=torch.bfloat16)
    gathered = 2 * 3 * shape.hidden * shape.width * 3 * shape.n_choices
    for limit, is_timed in ((gathered, True), (gathered - 1, False)):
        monkeypatch.setattr(grouped, "MAX_GATHERED_BYTES", limit)
        found = grouped.time_bfloat16(bench_with(load, FakeTimer(lambda call: 1.0)), layer, x)
        assert (found["batched"] is not None) == is_timed
        assert found["grouped"] and found["products"]


def test_the_bfloat16_layers_compute_the_same(load: Callable[[str], Any]) -> None:
    grouped, shapes = load("kernel_grouped"), load("kernel_shapes")
    shape = shapes.TINY_MOE[0]
    layer = grouped.draw_layer(shape, "cpu")
    (routing,) = grouped.draw_routings(shape, 7, 1, "cpu")
    x = torch.randn(7, shape.hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    module = grouped.experts_module(layer)
    given = (module, x, routing.ids, routing.weights)
    one, other = (
        grouped.grouped_mm_experts_forward(*given),
        grouped.batched_mm_experts_forward(*given),
    )
    torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    # The bare products, weighted and added: the rows of slot t k + j are sorted by expert.
    rows = grouped.sorted_call(module, x, routing)()
    order = routing.ids.flatten().argsort(stable=True)
    slots = torch.empty_like(rows)
    slots[order] = rows
    total = (slots.view(7, shape.n_choices, -1) * routing.weights[..., None]).sum(1)
    torch.testing.assert_close(total, one, rtol=2e-2, atol=2e-2)


def test_routings_choose_different_experts_for_a_token(load: Callable[[str], Any]) -> None:
    grouped, shapes = load("kernel_grouped"), load("kernel_shapes")
    found = grouped.draw_routings(shapes.MOE_SHAPES[0], 64, 3, "cpu")
    assert len(found) == 3 and not torch.equal(found[0].ids, found[1].ids)
    assert all(len(set(row)) == 8 for row in found[0].ids.tolist())
    # 512 choices of 64 experts: none is left out but with a chance of 64 (7/8)^64 = 1 %.
    assert len(found[0].ids.unique()) == 64


def test_a_bfloat16_layer_that_fails_is_told_once(
    load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grouped, shapes, speed = load("kernel_grouped"), load("kernel_shapes"), load("kernel_speed")

    def fail(*given: Any) -> None:
        raise RuntimeError("cannot be\ncaptured")

    monkeypatch.setattr(grouped, "grouped_mm_experts_forward", fail)
    timer = FakeTimer(lambda call: 1.0)
    args = SimpleNamespace(moe_shapes=shapes.TINY_MOE, moe_tokens=[1])
    monkeypatch.setattr(grouped, "UNIFORM", ("int4-g128",))
    record = speed.Record(tmp_path / "result.json", {})
    rows = speed.run_grouped(bench_with(load, timer), args, record)
    assert {row.grouped for row in rows} == {None} and all(row.speedup == 1.0 for row in rows)
    notes = json.loads((tmp_path / "result.json").read_text())["notes"]
    assert notes == ["bfloat16 grouped tiny-layer, 1 tokens: cannot be captured"]
