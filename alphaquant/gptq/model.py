"""A whole model, quantized in place with GPTQ, decoder layer by decoder layer."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alphaquant.errors import DataError, ModelError
from alphaquant.gptq.config import GPTQConfig, LayerConfig, choose_formats, read_layer_config
from alphaquant.models.mapping import map_model
from alphaquant.quant.layerwise import quantize_layers
from alphaquant.quant.stacks import QuantizedMatrix
from alphaquant.spaces.assignment import Assignment

_DEFAULT = GPTQConfig()


@torch.no_grad()
def gptq_quantize_model(
    model: nn.Module,
    dataloader: Iterable[Any],
    layer_config: LayerConfig,
    gptq_config: GPTQConfig = _DEFAULT,
    device: str | torch.device | None = None,
) -> dict[str, QuantizedMatrix]:
    """Quantize a model in place; it stays a plain model with dequantized weights.

    A layer's inputs are the outputs of the quantized layers before it. Experts are weighted by
    their routing. Weights are written once all layers are done, so an error leaves the model as it
    was; what resolves to bf16 is never written.

    Args:
        model: a transformers causal language model.
        dataloader: calibration windows of one length T, read once: token ids int64 [T] or [B, T],
            tuples that start with them, or mappings with `input_ids`.
        layer_config: a configuration (see `alphaquant.spaces.config`), JSON data or a path.
        gptq_config: options of the loop.
        device: where to move the model and work; None for where it is.

    Returns:
        Matrix name (`model.layers.0.mlp.experts.3.up_proj`) -> its packed form, with a record of
        how it was made; every matrix of the decoder layers, in their order.

    Raises:
        ConfigError: a bad configuration.
        DataError: no windows, windows of different lengths, or what is no window.
        ModelError: a model that cannot be quantized, or a device that cannot be used.
    """
    config = read_layer_config(layer_config)
    model_map = map_model(_moved(model, device))
    formats = choose_formats(config, model_map.inventory, gptq_config.groupsize)
    tokens = stack_windows(dataloader)
    made: dict[str, QuantizedMatrix] = {}
    with _evaluating(model):
        settings = gptq_config.settings()
        for layer in quantize_layers(model_map, Assignment(formats), settings, tokens):
            made |= {item.matrix.name: item for item in layer.items}
    for name, item in made.items():
        if item.packed.format.is_quantized:
            model_map.view(name).copy_(item.packed.dequantize())
    return {name: made[name] for name in formats}


def stack_windows(dataloader: Iterable[Any]) -> Tensor:
    """All windows of a data loader, int64 [N, T] on the CPU; arguments and errors as above."""
    windows: list[Tensor] = []
    for index, item in enumerate(dataloader):
        tokens = _tokens_of(item, index)
        if windows and tokens.shape[-1] != windows[0].shape[-1]:
            raise DataError(
                f"item {index} of the data loader has windows of {tokens.shape[-1]} tokens, the "
                f"ones before have {windows[0].shape[-1]}; all windows have one length: cut the "
                "text into windows of that length, or drop the short ones"
            )
        windows.append(tokens)
    if not sum(len(tokens) for tokens in windows):
        raise DataError(
            "the data loader gave no windows; GPTQ needs at least one: give a list, or a "
            "generator that was not read before"
        )
    return torch.cat(windows)


def _tokens_of(item: Any, index: int) -> Tensor:
    """Token ids of one item, int64 [B, T]."""
    mask = None
    if isinstance(item, Mapping):
        mask, item = item.get("attention_mask"), item.get("input_ids")
    elif isinstance(item, tuple | list) and item:
        item = item[0]
    is_ids = isinstance(item, Tensor) and not (item.is_floating_point() or item.is_complex())
    if not is_ids or item.dim() not in (1, 2) or not item.shape[-1] or item.dtype == torch.bool:
        found = f"{item.dtype} {tuple(item.shape)}" if isinstance(item, Tensor) else type(item)
        raise DataError(
            f"item {index} of the data loader holds {found}; give token ids, integers [T] or "
            "[B, T], a tuple that starts with them, or a mapping with input_ids"
        )
    if isinstance(mask, Tensor) and not bool(mask.all()):
        raise DataError(
            f"item {index} of the data loader is padded (zeros in attention_mask); padding would "
            "count as text: give windows that are full"
        )
    tokens: Tensor = item.to("cpu", torch.int64)
    return tokens.reshape(-1, tokens.shape[-1])


def _moved(model: nn.Module, device: str | torch.device | None) -> nn.Module:
    if device is None:
        return model
    try:
        return model.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"device {str(device)!r} cannot be used ({str(error).splitlines()[0]}); use cpu, cuda "
            "or None"
        ) from error


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; modules that were in training mode are so again on leaving."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
