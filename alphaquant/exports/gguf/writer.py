"""GGUF files of packed checkpoints: one `model.gguf` that llama.cpp runs.

    OUT/model.gguf, quantize_report.json, SHA256SUMS
    llama-server -m OUT/model.gguf

Nothing is rounded: a plan with a format that no type of llama.cpp holds exactly is refused.
"""

import logging
from collections import Counter
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from alphaquant.errors import ConfigError, ModelError, StoreError
from alphaquant.exports.checker import check_plan
from alphaquant.exports.gguf.dialects import find_dialect, inexact_of
from alphaquant.exports.gguf.entries import GgufEntry, entries_of
from alphaquant.exports.gguf.metadata import add_metadata
from alphaquant.exports.gguf.twins import WRITTEN, twin_of
from alphaquant.exports.gguf.vocabulary import (
    TOKENIZER,
    add_vocabulary,
    inexact_split,
    read_tokenizer,
)
from alphaquant.exports.packed import PackedSource
from alphaquant.files import writing
from alphaquant.models.gguf.header import NEWER_TYPES, check_package, read_header
from alphaquant.models.sites import ModelMap
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.formats import FORMAT_KINDS, SUPER_SIZE, parse_format
from alphaquant.spaces.profiles import FormatRule, Profile, find_profile

MODEL_FILE = "model.gguf"
CHECKED_WITH = "llama.cpp b11549"


@dataclass(frozen=True)
class GgufExport:
    """The exporter; see `alphaquant.exports.contract.Exporter`."""

    name: str = "gguf"
    profiles: tuple[str, ...] = ("gguf",)

    def check(self, assignment: Assignment, model_map: ModelMap) -> None:
        """Refuse a plan that the file cannot hold exactly, before weights are loaded.

        Raises:
            ConfigError: the architecture or the tokenizer is not written, experts of a stack
                differ, or a matrix is in a format without an exact twin.
        """
        check_package()
        model: Any = model_map.model
        find_dialect(model.config)
        if model_map.source is not None and (model_map.source / TOKENIZER).exists():
            read_tokenizer(model_map.source / TOKENIZER)
        check_plan(assignment, model_map.inventory, _couplings(), self.name)
        for matrix in model_map.inventory.matrices:
            fmt = parse_format(assignment.formats[matrix.name])
            if twin_of(fmt, matrix.cols) is None:
                raise ConfigError(
                    f"--export gguf: {matrix.name} ({matrix.rows} x {matrix.cols}) is {fmt.name}, "
                    f"which no type of llama.cpp holds exactly in this width; {WRITTEN} are; "
                    "search with --profile gguf, or use --export alphaquant, which holds every mix"
                )

    def write(self, source: PackedSource, out: Path) -> dict[str, Any]:
        """Write `model.gguf` into a directory.

        Raises:
            StoreError: the disk is full, or the packed checkpoint is damaged.
        """
        file = out / MODEL_FILE
        config: Any = source.model_map.model.config
        dialect = find_dialect(config)
        entries = entries_of(source, dialect)
        told = write_file(source, file, entries)
        types = Counter(entry.twin.name for entry in entries)
        return {
            "file": MODEL_FILE,
            "architecture": dialect.name,
            "tokenizer": told,
            "types": dict(types.most_common()),
            "tensor_bytes": sum(entry.n_bytes for entry in entries),
            "checked_with": CHECKED_WITH,
            "gguf": version("gguf"),
            "not_exact": [*inexact_of(config), *inexact_split(told)],
            "left_out": list(source.formats.carried),
            "run": f"llama-server -m {{directory}}/{MODEL_FILE}",
        }

    def verify(self, out: Path) -> None:
        """Read the header again: every tensor has a type and lies inside the file.

        Raises:
            StoreError: one does not.
        """
        try:
            read_header(out / MODEL_FILE)
        except ModelError as error:
            raise StoreError(f"{error}; run the same command again") from error


def write_file(source: PackedSource, file: Path, entries: list[GgufEntry]) -> str:
    """Write a GGUF file, a tensor at a time.

    Args:
        source: the packed checkpoint.
        file: to write.
        entries: all tensors.

    Returns:
        What the tokenizer is, see `add_vocabulary`.

    Raises:
        StoreError: the disk is full, or the packed checkpoint is damaged.
    """
    import gguf
    import numpy as np

    logging.getLogger("gguf").setLevel(logging.WARNING)
    config: Any = source.model_map.model.config
    dialect = find_dialect(config)
    with writing(file, sum(entry.n_bytes for entry in entries)):
        writer = gguf.GGUFWriter(file, dialect.name)
        try:
            writer.add_name(str(config.model_type))
            add_metadata(writer, config, dialect)
            told = add_vocabulary(writer, source.directory, config.vocab_size)
            for entry in entries:
                number: Any = _number(entry.twin.name)
                any_type = np.dtype(np.float32)  # that of bytes would make gguf count blocks
                writer.add_tensor_info(entry.name, entry.shape, any_type, entry.n_bytes, number)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for entry in entries:
                writer.write_tensor_data(entry.read().contiguous().numpy())
        finally:
            writer.close()
    return told


def _number(name: str) -> int:
    """The number of a type in ggml.h."""
    from gguf.constants import GGMLQuantizationType

    newer = {known: number for number, (known, *_) in NEWER_TYPES.items()}
    return newer[name] if name in newer else int(GGMLQuantizationType[name])


def _couplings() -> Profile:
    """The profile with every format, for what belongs together."""
    rules = (FormatRule(FORMAT_KINDS, needs_whole_groups=False, super_sizes=(0, SUPER_SIZE)),)
    return replace(find_profile("gguf"), linear_rules=rules, expert_rules=rules)
