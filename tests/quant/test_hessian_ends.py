"""Hessians of lm_head and embeddings, and their matrices in banks and layer by layer."""

from pathlib import Path

import pytest
import torch

from alphaquant.models.mapping import map_model
from alphaquant.models.sites import ModelMap
from alphaquant.models.walk import walk
from alphaquant.quant.bank import open_bank
from alphaquant.quant.filling import BankRequest, fill_bank
from alphaquant.quant.hessian import EndStep
from alphaquant.quant.layerwise import quantize_layers
from alphaquant.spaces.assignment import uniform_assignment
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.models import tiny_model, tiny_tokens

TOKENS = tiny_tokens(6, 8)
BOTH = ("head", "embeddings")


def step_of(model_map: ModelMap) -> EndStep:
    batches, outputs = [TOKENS[:4], TOKENS[4:]], []
    for step in walk(model_map, batches):
        step.run()
        outputs = step.outputs
    return EndStep(model_map, batches, outputs)


def head_inputs(model_map: ModelMap) -> torch.Tensor:
    """Hidden states behind the last norm, by an ordinary pass, [n, K]."""
    body = model_map.model.model
    with torch.no_grad():
        return body(TOKENS).last_hidden_state.flatten(0, 1)


def test_the_head_s_hessian_is_of_what_it_is_given_and_the_embeddings_one_of_nothing_else() -> (
    None
):
    found = map_model(tiny_model("olmoe"), include=BOTH)
    embeddings, head = step_of(found).hessians(QuantSettings())
    x = head_inputs(found)
    assert torch.allclose(head.hessian[0], x.T @ x, rtol=1e-4)
    assert (head.source, head.n_tokens) == (("plain",), (48,))
    assert torch.equal(embeddings.hessian[0], torch.eye(40))
    assert embeddings.source == ("identity",)


def test_tied_weights_get_both_with_the_same_mean_diagonal() -> None:
    found = map_model(tiny_model("gemma2"), include=("head",))
    (tied,) = step_of(found).hessians(QuantSettings())
    x = head_inputs(found)
    inputs = x.T @ x
    expected = inputs / inputs.diagonal().mean() + torch.eye(len(inputs))
    assert torch.allclose(tied.hessian[0], expected, rtol=1e-3, atol=1e-4)
    assert tied.hessian.diagonal(dim1=-2, dim2=-1).mean() == pytest.approx(2.0)


@pytest.mark.parametrize(("family", "method"), [("olmoe", "gptq"), ("gemma2", "rtn")])
def test_a_bank_and_a_run_through_the_layers_give_the_same_codes(
    family: str, method: str, tmp_path: Path
) -> None:
    found, settings = map_model(tiny_model(family), include=BOTH), QuantSettings(method=method)
    bank = open_bank(tmp_path, "key", found.inventory, {})
    assert fill_bank(bank, found, TOKENS, BankRequest(["int4-g32-asym"], settings)) == 3
    assert fill_bank(bank, found, TOKENS, BankRequest(["int4-g32-asym"], settings)) == 0
    assignment = uniform_assignment(found.inventory, "int4-g32-asym")
    *_, last = quantize_layers(found, assignment, settings, TOKENS)
    assert last.layer is found.ends and not last.utilization
    for item in last.items:
        stored = bank.read(item.matrix, "int4-g32-asym")
        assert all(torch.equal(stored.tensors[k], t) for k, t in item.packed.tensors.items())
        assert item.record.fallback is None
    (held,) = (
        done
        for done in quantize_layers(found, assignment, settings, TOKENS, bank=bank)
        if done.layer is found.ends
    )
    assert [i.matrix for i in held.items] == [i.matrix for i in last.items]


def test_some_rows_of_a_packed_matrix_are_those_of_the_whole() -> None:
    found = map_model(tiny_model("olmoe"), include=("embeddings",))
    ids = torch.tensor([5, 0, 95, 5])
    for name in ("int3-g32-asym", "nl3-g16-s256", "mxfp4", "nvfp4", "fp8-row", "bf16", "int1-g32"):
        settings = QuantSettings(method="rtn")
        *_, last = quantize_layers(
            found, uniform_assignment(found.inventory, name), settings, None
        )
        (item,) = last.items
        assert torch.equal(item.packed.rows_at(ids), item.packed.dequantize()[ids]), name
