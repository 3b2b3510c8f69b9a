"""The column loops and the engine on a GPU, against the CPU.

None of this has run yet: the project has had no GPU. `pytest -m gpu tests/quant/columns`.
"""

from dataclasses import replace

import pytest
import torch

from alphaquant.models.mapping import map_model
from alphaquant.quant.columns.column_loops import NumbaLoops, triton_loops
from alphaquant.quant.descent import ColumnPlan, Rounder
from alphaquant.quant.factor import factorize
from alphaquant.quant.format_rules import rule_of
from alphaquant.quant.layerwise import quantize_layers
from alphaquant.quant.stacks import QuantizedMatrix
from alphaquant.spaces.assignment import uniform_assignment
from alphaquant.spaces.formats import parse_format
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.columns import CHECKS, FORMATS, Check, Limits
from alphaquant.testing.formats import draw_weights
from alphaquant.testing.models import tiny_model, tiny_tokens

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

LIMITS = Limits(codes=0.01, relative=1e-4, device="cuda")
"""Sums are fused otherwise: a tie, or one of two scales of equal error, may fall elsewhere."""


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", FORMATS)
def test_loops_keep_their_contract_on_a_gpu(name: str, check: Check) -> None:
    check(triton_loops(), name, "hessian", LIMITS)


@pytest.mark.parametrize("name", ["int4-g128", "int3-g64-asym", "int4-g256", "mxfp4", "nvfp4"])
def test_the_objective_is_that_of_the_cpu(name: str) -> None:
    n_stacks, n_rows, n_cols = 3, 200, 300
    fmt = parse_format(name)
    weight = torch.stack([draw_weights(n_rows, n_cols, s).T for s in range(n_stacks)])
    inputs = torch.randn(n_stacks, 900, n_cols, generator=torch.Generator().manual_seed(1))
    plan = ColumnPlan(n_cols, fmt.columns_per_scale(n_cols))
    found = []
    for device, loops in (("cpu", NumbaLoops()), ("cuda", triton_loops())):
        own = weight.contiguous().to(device)
        shared = torch.ones(n_stacks, n_rows, device=device)
        rounder = Rounder(rule_of(fmt, "hessian"), plan, shared, loops)
        damped = factorize((inputs.mT @ inputs).to(device), 0.01, (False, True))
        for factor in damped.factors:
            inverses = factor.diagonal_inverses(plan.blocks)
            start = rounder.gptq(own, factor, inverses, static=False)
            end = rounder.refine(start, damped, 2)
            found.append((float(start.objective.sum()), float(end.objective.sum())))
    cpu, gpu = found[:2], found[2:]
    for (start, end), (gpu_start, gpu_end) in zip(cpu, gpu, strict=True):
        assert gpu_start == pytest.approx(start, rel=1e-4)
        # descent may end in another minimum where a tie falls elsewhere
        assert gpu_end == pytest.approx(end, rel=1e-3)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_model_on_a_gpu_is_quantized_there_with_the_same_records(method: str) -> None:
    assignment = uniform_assignment(map_model(tiny_model("olmoe")).inventory, "int4-g32")
    settings = replace(QuantSettings(), method=method)

    def quantized(device: str) -> dict[str, QuantizedMatrix]:
        model_map = map_model(tiny_model("olmoe").to(device))
        tokens = tiny_tokens(4, 16).to(device)
        layers = quantize_layers(model_map, assignment, settings, tokens)
        return {item.matrix.name: item for done in layers for item in done.items}

    cpu, gpu = quantized("cpu"), quantized("cuda")
    assert list(cpu) == list(gpu)
    for name, item in cpu.items():
        wanted, made = item.record, gpu[name].record
        assert made.weight_error == pytest.approx(wanted.weight_error, rel=0.02), name
        facts = ("format", "method", "fallback", "hessian", "n_tokens", "damp")
        assert all(getattr(made, f) == getattr(wanted, f) for f in facts), name
        assert all(t.device.type == "cpu" for t in gpu[name].packed.tensors.values())
