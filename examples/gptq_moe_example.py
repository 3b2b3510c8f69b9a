"""Quantize one expert by hand, its Hessian weighted by what the router really decided.

    python examples/gptq_moe_example.py

Uses the demo model and its calibration text, offline, in seconds. `gptq_quantize_model` does this
for every matrix of a model; see `gptq_quantization_example.py`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from alphaquant import demo
from alphaquant.gptq import GPTQMoE, MoEGPTQContext, get_layers_for_model
from alphaquant.models.loading import load_model, load_tokenizer

LAYER, EXPERT = 1, 0
LENGTHS = (128, 96, 160)


def texts() -> list[Tensor]:
    """Passages of different lengths, token ids [1, T] each."""
    text = demo.text_path("calibration").read_text(encoding="utf-8")
    ids = load_tokenizer(demo.model_path())(text[: 5 * sum(LENGTHS)])["input_ids"][: sum(LENGTHS)]
    return [part.unsqueeze(0) for part in torch.tensor(ids).split(LENGTHS)]


def squared_error(delta: Tensor, hessian: Tensor) -> float:
    """Sum over tokens of |c D x|^2, given the sum of c^2 x x'."""
    return float(((delta @ hessian) * delta).sum())


def main() -> None:
    """Quantize gate and up of one expert with three powers of the routing weight."""
    model = load_model(demo.model_path())
    layer = get_layers_for_model(model)[LAYER]
    # transformers keeps the experts of a layer in one tensor [E, 2 * width, hidden].
    experts: Any = layer.get_submodule("mlp.experts")
    weight: Tensor = experts.gate_up_proj[EXPERT]
    original = weight.clone()
    inputs: list[Tensor] = []

    def remember(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0].detach())  # [tokens, hidden]

    context = MoEGPTQContext(model_type="olmoe")
    context.register_routing_hooks(layer, layer_idx=LAYER)
    handle = experts.register_forward_pre_hook(remember)
    with torch.no_grad():
        for text in texts():
            model(text)
    handle.remove()
    context.clear_hooks()

    routing = context.get_routing_info()
    experts_by_exponent = {}
    for exponent in (0, 1, 2):
        expert = GPTQMoE(weight, expert_id=EXPERT, route_exponent=exponent)
        expert.add_batch_with_routing(
            inp=inputs,
            routing_scores=routing["routing_scores"],
            selected_experts=routing["selected_experts"],
            expert_num=EXPERT,
            num_experts=len(experts.gate_up_proj),
        )
        experts_by_exponent[exponent] = expert
    # The error of what the expert adds to its layer's output weighs tokens by the square.
    exact = experts_by_exponent[2].H
    for exponent, expert in experts_by_exponent.items():
        weight.copy_(original)
        made = expert.fasterquant(quantizer="int3-g64")
        error = squared_error(original - weight, exact) / squared_error(original, exact)
        print(
            f"routing weight ^ {exponent}: {expert.utilization_count} of {sum(LENGTHS)} tokens, "
            f"{made.record.hessian}, relative squared error {error:.2e}"
        )
    print(f"written in place: {torch.equal(weight, made.packed.dequantize())}")


if __name__ == "__main__":
    main()
