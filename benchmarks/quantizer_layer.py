"""One decoder layer of OLMoE's size through the real engine: seconds by stage and peak memory.

Random weights and random hidden states: the numbers say what the layer costs, not how good it is.
Hidden states are made window by window and the outputs dropped, so the memory is that of the
layer's own work; what a walk over the model holds beside it (inputs and outputs of all windows) is
stated in the result as `hidden_bytes`.

Stages are the engine's functions, timed by the interpreter's profiler in processor seconds, which
other work on the machine does not change; with one thread they are the seconds of a quiet machine.
Time of the Hessians is proportional to the tokens, everything after does not depend on them.

With `--device cuda` the layer is on a GPU, and so is its quantization. Seconds are then those of a
clock on the wall, with the device idle at both ends; quantization is one stage and is done twice,
because the first time compiles. No one has run that yet.
"""

import cProfile
import pstats
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peers import peak_memory
from torch import nn

from alphaquant.models.mapping import map_model
from alphaquant.models.sites import ModelMap
from alphaquant.models.walk import LayerCall, observe_layer, walk
from alphaquant.quant.engine import quantize_layer
from alphaquant.quant.hessian import LayerHessians, observer_of
from alphaquant.reports.tables import markdown
from alphaquant.specs.quantizer import QuantSettings

TARGET_BYTES = 6 * 2**30
_STAGES = {
    "factorize": "factorization",
    "choose_shrinkage": "choosing shrinkage",
    "gptq": "GPTQ",
    "refine": "refinement",
    "_pack": "packing and errors",
}
"""The engine's functions -> stages."""
_VOCABULARY = 64


@dataclass(frozen=True)
class LayerShape:
    """Sizes of the layer and of its calibration.

    Attributes:
        hidden_size: of the residual stream.
        expert_width: of each expert.
        n_experts: routed experts.
        top_k: experts per token.
        n_heads: of attention.
        n_windows: calibration windows.
        seq_len: tokens per window.
    """

    hidden_size: int = 2048
    expert_width: int = 1024
    n_experts: int = 64
    top_k: int = 8
    n_heads: int = 16
    n_windows: int = 128
    seq_len: int = 2048


def random_model(shape: LayerShape, seed: int = 0) -> nn.Module:
    """An OLMoE of one decoder layer with random weights, float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "olmoe",
        hidden_size=shape.hidden_size,
        intermediate_size=shape.expert_width,
        num_experts=shape.n_experts,
        num_experts_per_tok=shape.top_k,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_heads,
        num_hidden_layers=1,
        vocab_size=_VOCABULARY,
        max_position_embeddings=shape.seq_len,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def measure_layer(
    shape: LayerShape, format_name: str, settings: QuantSettings, device: str = "cpu"
) -> dict[str, Any]:
    """Quantize the layer in one format.

    Args:
        shape: sizes.
        format_name: canonical name.
        settings: of the engine.
        device: where the layer is.

    Returns:
        Seconds by stage, peak memory after each part, and what was asked.
    """
    model_map = map_model(random_model(shape).to(device))
    memory = {"model": _peak(device)}
    clock = _now(device)
    observer = _observe(model_map, shape, settings, device)
    seconds = {"forward and Hessians": _now(device) - clock}
    memory["Hessians"] = _peak(device)
    clock = _now(device)
    batches = observer.batches(model_map.layers[0])
    seconds["pooling"] = _now(device) - clock
    memory["pooling"] = _peak(device)

    def quantize() -> int:
        layer, n_bytes = model_map.layers[0], 0
        for item in quantize_layer(model_map, layer, batches, [format_name], settings):
            n_bytes += sum(t.nbytes for t in item.packed.tensors.values())
        return n_bytes

    if device != "cpu":
        quantize()
    profile = cProfile.Profile(time.process_time)
    clock = _now(device)
    with profile if device == "cpu" else nullcontext():
        n_bytes = quantize()
    whole, stages = _now(device) - clock, _stages(profile) if device == "cpu" else {}
    seconds |= {**stages, "other quantization": whole - sum(stages.values())}
    memory["quantization"] = _peak(device)
    n_tokens = shape.n_windows * shape.seq_len
    return {
        "shape": asdict(shape),
        "format": format_name,
        "settings": asdict(settings),
        "device": device,
        "n_tokens": n_tokens,
        "tokens_per_expert": n_tokens * shape.top_k / shape.n_experts,
        "seconds": seconds,
        "peak_memory_bytes": memory,
        "target_bytes": TARGET_BYTES,
        "is_within_target": memory["quantization"] <= TARGET_BYTES,
        "packed_bytes": n_bytes,
        "hidden_bytes": 4 * n_tokens * shape.hidden_size,
    }


def _now(device: str) -> float:
    """Processor seconds of this process; with a GPU those of the clock, when it is idle."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak(device: str) -> int:
    """Peak memory so far in bytes, of the process or of the GPU."""
    return peak_memory() if device == "cpu" else int(torch.cuda.max_memory_allocated(device))


def _observe(
    model_map: ModelMap, shape: LayerShape, settings: QuantSettings, device: str
) -> LayerHessians:
    """The layer's Hessians of random hidden states, one window at a time."""
    layer = model_map.layers[0]
    tokens = torch.zeros(1, shape.seq_len, dtype=torch.int64, device=device)
    call = next(walk(model_map, [tokens])).calls[0]
    observer = observer_of(settings)
    generator = torch.Generator().manual_seed(0)
    with observe_layer(layer, observer):
        for _ in range(shape.n_windows):
            hidden = torch.randn(1, shape.seq_len, shape.hidden_size, generator=generator).to(
                device
            )
            LayerCall((hidden, *call.args[1:]), call.kwargs).run(layer)
    return observer


def layer_text(result: Mapping[str, Any]) -> str:
    """Stages and memory as Markdown."""
    stages = [[name, f"{s:.1f}"] for name, s in result["seconds"].items()]
    parts = [[k, f"{v / 2**30:.2f}"] for k, v in result["peak_memory_bytes"].items()]
    return "\n\n".join(
        [
            f"{result['format']}, {result['n_tokens']} tokens",
            markdown(["stage", "seconds"], stages),
            markdown(["peak memory after", "GiB"], parts),
        ]
    )


def _stages(profile: cProfile.Profile) -> dict[str, float]:
    """Seconds within the engine's functions; 0 for one that was not called."""
    found = dict.fromkeys(_STAGES.values(), 0.0)
    for (_, _, name), row in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if name in _STAGES:
            found[_STAGES[name]] += row[3]  # cumulative
    return found
