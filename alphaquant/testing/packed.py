"""Packed checkpoints with many formats, for tests of what loads, serves or exports them.

save_packed(tiny_model("olmoe"), folder)
"""

from pathlib import Path

from torch import nn

from alphaquant.models.mapping import map_model
from alphaquant.models.sites import ModelMap
from alphaquant.quant.engine import QuantizedMatrix, quantize_layer
from alphaquant.quant.matrix import PackedMatrix, pack_bf16
from alphaquant.quant.rounding import quantize_rtn
from alphaquant.runtime.checkpoint import CheckpointWriter
from alphaquant.runtime.integrity import write_checksums
from alphaquant.runtime.parts import open_part
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.formats import MENUS, parse_format
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.formats import draw_weights

_RTN = QuantSettings(method="rtn")


def draw_packed(name: str, rows: int, cols: int) -> PackedMatrix:
    """A random matrix in a format, rounded to nearest; the same for the same sizes."""
    weight, fmt = draw_weights(rows, cols), parse_format(name)
    if not fmt.is_quantized:
        return pack_bf16(weight)
    return quantize_rtn(weight[None], fmt, "minmax").pack_all()[0]


def mixed_assignment(model_map: ModelMap) -> Assignment:
    """Every format of the menus, one matrix after the other."""
    formats = sorted(MENUS["all"])
    matrices = model_map.inventory.matrices
    return Assignment({m.name: formats[i % len(formats)] for i, m in enumerate(matrices)})


def quantize_mixed(model_map: ModelMap) -> dict[int, list[QuantizedMatrix]]:
    """The matrices of every layer, rounded to nearest in the formats of `mixed_assignment`."""
    assignment = mixed_assignment(model_map)
    names = sorted(set(assignment.formats.values()))
    return {
        layer.index: list(
            quantize_layer(
                model_map, layer, None, names, _RTN, lambda m, n: assignment.formats[m.name] == n
            )
        )
        for layer in model_map.layers
    }


def save_packed(model: nn.Module, folder: Path) -> Path:
    """Write a packed checkpoint of a model in the formats of `mixed_assignment`.

    Args:
        model: from `tiny_model`, not changed.
        folder: directory to make.

    Returns:
        The folder.
    """
    model_map = map_model(model)
    with open_part(folder) as part:
        writer = CheckpointWriter(part.checkpoint)
        for index, items in quantize_mixed(model_map).items():
            writer.add_layer(index, items)
        writer.finish(model_map)
        writer.write_json("quantize_report.json", {"matrices": []})
        write_checksums(part.checkpoint)
        return part.place()
