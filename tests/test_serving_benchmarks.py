"""The benchmarks of serving: the table of engines, and what llama.cpp's quantizer is told."""

from pathlib import Path

import torch

from alphaquant.spaces.menus import MENUS
from alphaquant.testing.models import tiny_model
from tests.benches import import_benchmark

ROOT = Path(__file__).parent.parent


def test_the_page_of_engines_has_the_table_of_the_result_files() -> None:
    engines = import_benchmark("engines_table")
    page, results = (ROOT / "docs" / "engines.md").read_text(), engines.read_results()
    assert {result["engine"] for result in results} >= {"transformers", "llama.cpp"}
    table = engines.table(results)
    assert engines.page_with(table, page) == page
    assert all(f"| `{name}` |" in table for name in MENUS["gguf"])  # also one that was not run


def test_a_format_that_was_not_run_or_did_not_load_is_told_from_one_that_is_not_there() -> None:
    runs = [
        {"format": "int4-g64", "kind": "linears", "dtype": "bfloat16", "difference": 0.012},
        {"format": "nvfp4", "kind": "linears", "dtype": "bfloat16", "difference": None},
    ]
    result = {"engine": "vllm", "profile": "vllm", "version": "0", "commit": "abcdefghi"}
    lines = import_benchmark("engines_table").table([result | {"runs": runs}]).splitlines()
    assert "| `int4-g64` | 1.2e-02, bf16 | not run |" in lines
    assert "| `nvfp4` | does not load |  |" in lines
    assert "- vllm: 0, at commit abcdefg." in lines


def test_importance_is_the_mean_of_squared_inputs() -> None:
    quantizer = import_benchmark("llama_quantizer")
    model = tiny_model("llama")
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    named = quantizer.tensor_names("llama", 2, names)
    assert list(named.values()) == ["blk.0.attn_q", "blk.1.ffn_down"]
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(names[1]).register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    windows = torch.arange(24).reshape(3, 8)
    found = quantizer.importance_of(model, named, windows)
    handle.remove()
    right = torch.cat(seen).flatten(0, -2).square().mean(0)
    torch.testing.assert_close(found["blk.1.ffn_down"], right, rtol=1e-5, atol=0)
    hooks = [h for m in model.modules() for h in m._forward_pre_hooks]
    assert not hooks
