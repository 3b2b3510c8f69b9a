"""Tiny checkpoints and short texts on disk, for tests that start from a path.

    save_tiny(folder)                   OLMoE: two layers, four experts, 32 hidden features
    save_tiny(folder, "llama")          another family, see `alphaquant.testing.models`

They use the demo's tokenizer, so that the demo's texts can be read with them.
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from alphaquant import demo
from alphaquant.testing.models import tiny_model

VOCABULARY = 4096
"""Of the demo's tokenizer."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_key_value_heads": 4,
}
_OLMOE = {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}


def save_tiny(folder: Path, family: str = "olmoe", **changes: Any) -> Path:
    """Save a tiny random model with the demo's tokenizer.

    Args:
        folder: directory to write.
        family: see `tiny_model`.
        changes: configuration fields to set otherwise.

    Returns:
        The folder.
    """
    own = _OLMOE if family == "olmoe" else {}
    model: Any = tiny_model(family, **{**_SIZES, **own, **changes})
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.model_path() / file, folder)
    return folder


def save_texts(folder: Path, n_chars: int = 30_000) -> dict[str, Path]:
    """Save the beginnings of the demo's three texts.

    Args:
        folder: directory to write into.
        n_chars: characters of each.

    Returns:
        Part -> file.
    """
    files = {part: folder / f"{part}.txt" for part in demo.TEXT_PARTS}
    for part, file in files.items():
        text = demo.text_path(part).read_text(encoding="utf-8")
        file.write_text(text[:n_chars], encoding="utf-8")
    return files
