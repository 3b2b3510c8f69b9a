"""A file holds every tensor once, and a plan that it cannot hold is refused by name."""

from pathlib import Path

import pytest
import torch

from alphaquant.errors import ConfigError, StoreError
from alphaquant.exports.gguf.entries import interleave_halves
from alphaquant.exports.gguf.writer import MODEL_FILE, GgufExport
from alphaquant.exports.packed import open_packed
from alphaquant.models.gguf.header import GgufTensor, read_header
from alphaquant.models.mapping import map_model
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.units import Matrix
from alphaquant.testing.llama.exported import EXPORTED, save_rounded
from alphaquant.testing.models import tiny_model


def plan_of(format_of: dict[str, str], **changes: int) -> None:
    """Check a plan of a tiny OLMoE: formats by the end of a name, int4-g32 elsewhere."""
    widths = {"hidden_size": 256, "intermediate_size": 128, **EXPORTED["olmoe"], **changes}
    model_map = map_model(tiny_model("olmoe", **widths))

    def format_for(matrix: Matrix) -> str:
        ends = (name for end, name in format_of.items() if matrix.name.endswith(end))
        return next(ends, "int4-g32")

    matrices = model_map.inventory.matrices
    GgufExport().check(Assignment({m.name: format_for(m) for m in matrices}), model_map)


def test_a_projection_of_a_layer_has_a_type_of_its_own() -> None:
    plan_of({"0.self_attn.v_proj": "bf16", "down_proj": "mxfp4", "gate_proj": "int8-g64"})


def test_experts_of_a_stack_that_differ_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"--export gguf: model.layers.1.mlp.experts.up_proj has int4-g32, int8-g32, and its "
        r"8 matrices need one format .*experts.0.up_proj.*search with --profile gguf",
    ):
        plan_of({"layers.1.mlp.experts.5.up_proj": "int8-g32"})


def test_a_format_without_an_exact_twin_is_refused_with_those_that_have_one() -> None:
    with pytest.raises(
        ConfigError,
        match=r"model.layers.1.self_attn.o_proj \(256 x 256\) is int3-g128, which no type .*"
        r"bf16, mxfp4, .* are; search with --profile gguf",
    ):
        plan_of({"layers.1.self_attn.o_proj": "int3-g128"})


def test_a_width_that_blocks_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"0.down_proj \(256 x 112\) is int4-g32, which no type"):
        plan_of({}, intermediate_size=112)


def tensors_of(folder: Path, family: str) -> dict[str, GgufTensor]:
    save_rounded(family, folder / "packed", lambda matrix: "int4-g32")
    (folder / "out").mkdir()
    facts = GgufExport().write(open_packed(folder / "packed"), folder / "out")
    GgufExport().verify(folder / "out")
    header = read_header(folder / "out" / MODEL_FILE)
    assert facts["architecture"] == header.architecture
    assert facts["tensor_bytes"] == sum(t.n_bytes for t in header.tensors)
    assert len({t.name for t in header.tensors}) == len(header.tensors)
    return {tensor.name: tensor for tensor in header.tensors}


def test_experts_are_stacked_and_routers_and_vectors_are_float32(tmp_path: Path) -> None:
    found = tensors_of(tmp_path, "qwen2_moe")
    stack = found["blk.1.ffn_down_exps.weight"]
    assert (stack.shape, stack.type) == ((6, 256, 128), "Q4_0")
    assert found["blk.1.ffn_gate_inp.weight"].type == "F32"
    assert found["blk.1.ffn_gate_inp_shexp.weight"].shape == (256,)
    assert found["blk.1.attn_q.bias"].type == "F32"
    assert found["token_embd.weight"].type == "BF16"


def test_a_file_that_was_cut_is_found(tmp_path: Path) -> None:
    tensors_of(tmp_path, "llama")
    file = tmp_path / "out" / MODEL_FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(StoreError, match="damaged or incomplete.*run the same command again"):
        GgufExport().verify(tmp_path / "out")


def test_halves_of_every_head_take_turns() -> None:
    rows = torch.arange(8).view(8, 1)
    assert interleave_halves(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
