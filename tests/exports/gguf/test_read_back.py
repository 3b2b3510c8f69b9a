"""What we write, transformers reads from GGUF files as the model it was."""

from pathlib import Path
from typing import Any

import pytest
import torch

from alphaquant.exports.gguf.writer import MODEL_FILE, GgufExport
from alphaquant.exports.packed import open_packed
from alphaquant.models.gguf.converted import converted
from alphaquant.models.loading import load_model
from alphaquant.testing.llama.exported import add_tokenizer, save_rounded


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "qwen3_moe"])
def test_a_file_is_converted_back_to_the_dequantized_model(family: str, tmp_path: Path) -> None:
    formats = {"down_proj": "mxfp4", "q_proj": "int8-g32"}
    model: Any = save_rounded(
        family,
        tmp_path / "packed",
        lambda m: formats.get(m.projection, "int4-g32"),
        vocab_size=4096,
    )
    add_tokenizer(tmp_path / "packed")
    (tmp_path / "out").mkdir()
    GgufExport().write(open_packed(tmp_path / "packed"), tmp_path / "out")
    found: Any = load_model(converted(tmp_path / "out" / MODEL_FILE, tmp_path / "cache"))
    assert type(found) is type(model)
    own = found.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(own[name].bfloat16(), tensor.bfloat16()), name
