"""Checkpoints as others write them: numbered safetensors with an index, and what stands beside.

Tensors are written a layer at a time, so that memory holds one layer. The number of files is known
first, because their names have it: `model-00002-of-00017.safetensors`.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from alphaquant.exports.names import original_names
from alphaquant.exports.packed import PackedSource
from alphaquant.files import whole_file, writing
from alphaquant.models.quantization_config import REPORT
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.runtime.checkpoint_files import INDEX
from alphaquant.runtime.integrity import CHECKSUMS
from alphaquant.spaces.units import Matrix

_OWN = ("config.json", REPORT, CHECKSUMS, INDEX)
"""Files of a packed checkpoint that an export writes anew or leaves out."""


@dataclass
class ShardWriter:
    """Writes numbered safetensors into a directory that is there.

    Attributes:
        folder: the directory.
        n_files: how many there will be.
        places: tensor -> its file, so far.
        n_bytes: of the tensors so far.
    """

    folder: Path
    n_files: int
    places: dict[str, str] = field(default_factory=dict)
    n_bytes: int = 0
    _n_written: int = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the next file.

        Raises:
            StoreError: the disk is full, or the directory cannot be written.
        """
        self._n_written += 1
        file = f"model-{self._n_written:05d}-of-{self.n_files:05d}.safetensors"
        n_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
        with writing(self.folder / file, n_bytes), whole_file(self.folder / file, n_bytes) as part:
            save_file({n: t.contiguous() for n, t in tensors.items()}, part, {"format": "pt"})
            part.chmod(0o644)  # safetensors makes files that only their owner can read
        self.n_bytes += n_bytes
        self.places |= dict.fromkeys(tensors, file)

    def finish(self) -> None:
        """Write the index."""
        assert self._n_written == self.n_files, f"{self._n_written} of {self.n_files} files"
        index = {
            "metadata": {"total_size": self.n_bytes},
            "weight_map": dict(sorted(self.places.items())),
        }
        write_json(self.folder / INDEX, index)


def write_layers(
    source: PackedSource,
    names: Mapping[str, str],
    tensors_of: Callable[[PackedMatrix], Mapping[str, Tensor]],
    out: Path,
) -> int:
    """Write every tensor of a checkpoint: a file per layer, then one with what is not quantized.

    Args:
        source: the packed checkpoint.
        names: original name of every matrix.
        tensors_of: the tensors of a matrix, by the last part of their names.
        out: the directory.

    Returns:
        Bytes of all tensors.

    Raises:
        StoreError: the disk is full, or the packed checkpoint is damaged.
    """
    layers = list(_layers_of(source.model_map.inventory.matrices))
    writer = ShardWriter(out, len(layers) + 1)
    for layer in layers:
        writer.add(
            {
                f"{names[matrix.name]}.{part}": tensor
                for matrix in layer
                for part, tensor in tensors_of(source.matrix(matrix.name)).items()
            }
        )
    original = original_names(source.model_map)
    writer.add({original.tensor(name): source.tensor(name) for name in source.others()})
    writer.finish()
    return writer.n_bytes


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of text, whole or not at all.

    Raises:
        StoreError: the disk is full, or the directory cannot be written.
    """
    text = json.dumps(content, indent=1) + "\n"
    with writing(path, len(text)), whole_file(path, len(text)) as part:
        part.write_text(text)


def write_config(source: PackedSource, entry: Mapping[str, Any], out: Path) -> None:
    """Write config.json: every key of the source's, and how it is quantized.

    Args:
        source: the packed checkpoint.
        entry: `quantization_config`.
        out: the directory.

    Raises:
        StoreError: the disk is full, or the directory cannot be written.
    """
    config = dict(source.config)
    # vLLM takes a model without it for one that embeds texts.
    config["architectures"] = config.get("architectures") or [
        type(source.model_map.model).__name__
    ]
    write_json(out / "config.json", config | {"quantization_config": dict(entry)})


def copy_beside(source: PackedSource, out: Path) -> None:
    """Copy the tokenizer, chat template, processors and generation settings.

    Raises:
        StoreError: the disk is full, or the directory cannot be written.
    """
    for file in sorted(source.directory.iterdir()):
        if file.is_file() and file.suffix != ".safetensors" and file.name not in _OWN:
            with writing(out / file.name, file.stat().st_size):
                shutil.copy(file, out / file.name)


def _layers_of(matrices: Iterable[Matrix]) -> Iterator[list[Matrix]]:
    """Matrices a layer at a time, in order."""
    layers: dict[int, list[Matrix]] = {}
    for matrix in matrices:
        layers.setdefault(matrix.layer, []).append(matrix)
    return (layers[index] for index in sorted(layers))
