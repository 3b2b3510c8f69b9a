"""Names to things: models, devices, texts and the cache directory that a command line asks for."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alphaquant import demo
from alphaquant.errors import ModelError
from alphaquant.evaluators.data import TextRequest, TokenSet, load_tokens
from alphaquant.quant.models import ModelMap, load_model, load_tokenizer, map_model, weights_digest

DEMO = "demo"
DEMO_SEQ_LEN = 256
DEFAULT_SEQ_LEN = 1024


@dataclass(frozen=True)
class Source:
    """A loaded model with its tokenizer.

    Attributes:
        name: as asked for.
        map: the model and its matrices.
        tokenizer: of transformers.
        digest: sha256 of the weights.
    """

    name: str
    map: ModelMap
    tokenizer: Any
    digest: str

    def facts(self) -> dict[str, str]:
        """Provenance: name, architecture, digest."""
        return {"model": self.name, "model_type": self.map.inventory.model_type, "model_digest": self.digest}


def load_source(name: str, device: str, dtype: str) -> Source:
    """Load a model and its tokenizer.

    Raises:
        ModelError: it cannot be found, read or quantized.
    """
    path = model_location(name)
    model_map = map_model(load_model(path, device, dtype))
    return Source(name, model_map, load_tokenizer(path), weights_digest(model_map))


def model_location(name: str) -> str:
    """The directory or hub id of a model; `demo` is the embedded one."""
    return str(demo.model_path()) if name == DEMO else name


def find_device(name: str) -> str:
    """`auto` is the first CUDA device if there is one, else the CPU.

    Raises:
        ModelError: the device does not exist.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {name!r} cannot be used ({str(error).splitlines()[0]}); use cpu, cuda or auto") from error
    return name


def default_seq_len_of(name: str, model: nn.Module) -> int:
    """Tokens per window when none are asked for: 256 for the demo model, else 1024 or what the model can take."""
    if name == DEMO:
        return DEMO_SEQ_LEN
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    return min(DEFAULT_SEQ_LEN, int(getattr(config, "max_position_embeddings", DEFAULT_SEQ_LEN)))


def read_text(source: Source, text: str, role: str, n_samples: int, seq_len: int | None, seed: int) -> TokenSet:
    """Token windows of one text for a model.

    Raises:
        DataError: the text cannot be found or is too short.
    """
    length = seq_len or default_seq_len_of(source.name, source.map.model)
    return read_windows(source.tokenizer, text, role, n_samples, length, seed)


def read_windows(tokenizer: Any, text: str, role: str, n_samples: int, seq_len: int, seed: int) -> TokenSet:
    """Token windows of one text.

    Raises:
        DataError: the text cannot be found or is too short.
    """
    return load_tokens(TextRequest(text, role, n_samples, seq_len, seed), tokenizer)


def cache_dir(asked: Path | None) -> Path:
    """Where banks and teachers are kept: as asked, `$ALPHAQUANT_CACHE`, or `~/.cache/alphaquant`."""
    return asked or Path(os.environ.get("ALPHAQUANT_CACHE") or Path.home() / ".cache" / "alphaquant")
