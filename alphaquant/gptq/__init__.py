"""GPTQ on a model in memory, under the names that users of the old pipeline know.

Thin modules over `alphaquant.quant`, which holds the arithmetic; nothing else of the package
imports this folder, and `import alphaquant` does not load it.

    gptq_quantize_model      quantize a model in place, layer after layer
    GPTQConfig               options of the loop
    GPTQMoE                  one matrix by hand, with routing weights
    MoEGPTQContext           what routers decide, batch by batch
    detect_moe_architecture  which family a model is of
    get_layers_for_model     its decoder layers

Worked through in `examples/gptq_quantization_example.py` and `examples/gptq_moe_example.py`.
"""

from alphaquant.gptq.config import GPTQConfig
from alphaquant.gptq.expert import GPTQMoE
from alphaquant.gptq.model import gptq_quantize_model
from alphaquant.gptq.routing import MoEGPTQContext
from alphaquant.models.architectures import detect_moe_architecture, get_layers_for_model

__all__ = [
    "GPTQConfig",
    "GPTQMoE",
    "MoEGPTQContext",
    "detect_moe_architecture",
    "get_layers_for_model",
    "gptq_quantize_model",
]
