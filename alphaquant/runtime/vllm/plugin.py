"""What vLLM calls in each of its processes: `quant_method: alphaquant` becomes known to it.

The entry point `vllm.general_plugins` names `register`. An exception in it would end every start
of the engine, also for models that have nothing to do with us, so what can be refused is refused
by the configuration (`alphaquant.runtime.vllm.engine_config`), when a checkpoint of ours is
opened. Nothing but that configuration is imported here: layers are, when a model has some.
"""

from alphaquant.models.quantization_config import QUANT_METHOD


def register() -> None:
    """Make packed checkpoints known to vLLM; again is nothing."""
    from vllm.model_executor.layers import quantization

    from alphaquant.runtime.vllm.engine_config import PackedConfig

    if QUANT_METHOD not in quantization.QUANTIZATION_METHODS:
        quantization.register_quantization_config(QUANT_METHOD)(PackedConfig)
