"""Quantize a model in memory with GPTQ and look at what it cost.

    python examples/gptq_quantization_example.py

Uses the demo model and a few windows of its calibration text, offline, in seconds. The model stays
a plain transformers model with dequantized weights; `aq-quantize` writes packed checkpoints.
"""

from typing import Any

import torch
from torch import Tensor

from alphaquant import demo
from alphaquant.gptq import GPTQConfig, detect_moe_architecture, gptq_quantize_model
from alphaquant.models.loading import load_model, load_tokenizer

LAYER_CONFIG = {
    "default": {"wq": "int4", "aq": "bf16", "group_size": 64},
    "overrides": [
        {"pattern": "*.self_attn.*", "wq": "mxfp6"},
        {"pattern": "*.mlp.experts.*.down_proj", "wq": "int3"},
    ],
}


def windows(part: str, n_windows: int, n_tokens: int) -> list[Tensor]:
    """The first windows of a demo text, token ids [1, T] each."""
    text = demo.text_path(part).read_text(encoding="utf-8")
    tokenizer = load_tokenizer(demo.model_path())
    ids = tokenizer(text[: 5 * n_windows * n_tokens])["input_ids"][: n_windows * n_tokens]
    return list(torch.tensor(ids).reshape(n_windows, n_tokens).split(1))


@torch.no_grad()
def loss(model: Any, texts: list[Tensor]) -> float:
    """Mean cross-entropy per token, in nats."""
    return sum(float(model(text, labels=text).loss) for text in texts) / len(texts)


def main() -> None:
    """Quantize the demo model and print what became of it."""
    model = load_model(demo.model_path())
    heldout = windows("heldout", 4, 128)
    print(f"architecture: {detect_moe_architecture(model)}")
    print(f"loss before: {loss(model, heldout):.4f}")

    quantizers = gptq_quantize_model(
        model=model,
        dataloader=windows("calibration", 4, 128),
        layer_config=LAYER_CONFIG,
        gptq_config=GPTQConfig(),
        device="cpu",
    )

    print(f"loss after:  {loss(model, heldout):.4f}")
    print(f"matrices: {len(quantizers)}")
    name = "model.layers.0.mlp.experts.3.down_proj"
    record = quantizers[name].record
    print(f"{name}: {record.format}, {record.hessian}, {record.n_tokens} tokens")


if __name__ == "__main__":
    main()
