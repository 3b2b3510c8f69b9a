"""Names to things: models, devices, texts and the cache directory that a command line asks for."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alphaquant import demo
from alphaquant.errors import ConfigError, DataError, ModelError
from alphaquant.models.gguf.converted import converted, find_gguf, origin_of
from alphaquant.models.loading import check_device, load_model, load_tokenizer, tokenizer_missing
from alphaquant.models.mapping import check_finite, map_model, weights_digest
from alphaquant.models.pages.opening import Opened, open_weights
from alphaquant.models.pages.prepared import remembered
from alphaquant.models.pages.scratch import Scratch
from alphaquant.models.rotation.derived import rotated, rotation_of
from alphaquant.models.sites import ModelMap
from alphaquant.models.source_files import carried_text, with_source
from alphaquant.models.walk import releasing
from alphaquant.progress import Progress, Stage, no_progress
from alphaquant.studies.self_sampling import Asked, WriterModel, written_text
from alphaquant.texts.windows import TextRequest, TokenSet, Write, load_tokens
from alphaquant.work.tasks import Workers

SOURCE_STEPS = 3
"""Steps of loading a model: its weights, what is in them, their digest."""

USERS = ".users"
"""Folder of the cache with the claims of processes that use it."""

DEMO = "demo"
DEMO_SEQ_LEN = 256
DEFAULT_SEQ_LEN = 512

_LARGE = 200
"""A parameter that stays is told from one 200th of all decoder layers' weights on."""


@dataclass(frozen=True)
class Source:
    """A loaded model with its tokenizer.

    Attributes:
        name: as asked for.
        map: the model and its matrices.
        tokenizer: of transformers; None where the model's directory has none.
        digest: sha256 of the weights.
        scratch: copies on this machine of what is read often; None for none.
        cache: the folder of all caches, as asked for.
        workers: have opened the same model and take tasks; None where all is done here.
    """

    name: str
    map: ModelMap
    tokenizer: Any
    digest: str
    scratch: Scratch | None = None
    cache: Path | None = None
    workers: Workers | None = None

    @property
    def runs_as(self) -> str:
        """Dtype and device type that the model computes with: `float32-cpu`."""
        parameter = next(self.map.model.parameters())
        return f"{str(parameter.dtype).removeprefix('torch.')}-{parameter.device.type}"

    def facts(self) -> dict[str, Any]:
        """Provenance: name, architecture, digest, rotation, and the GGUF file it was made from."""
        rotation = rotation_of(self.map.source)
        return {
            "model": self.name,
            "model_type": self.map.inventory.model_type,
            "model_digest": self.digest,
            **gguf_facts(self.map.source),
            **({} if rotation is None else {"rotation": asdict(rotation)}),
        }


def load_source(
    name: str,
    device: str,
    dtype: str,
    *,
    include: Sequence[str] = (),
    cache: Path | None = None,
    rotate: int | None = None,
    progress: Progress = no_progress,
    scratch: Path | None = None,
) -> Source:
    """Load a model and its tokenizer.

    On the CPU its weights stay in files: the checkpoint's own, or a copy in the cache.

    Args:
        name: `demo`, a directory, a GGUF file or a hub id.
        device: `cpu`, `cuda`, ...
        dtype: of the computation.
        include: what is quantized beside the layers, see `map_model`.
        cache: where a GGUF file is decoded to, and copies of weights are, see `cache_dir`.
        rotate: seed of a rotation of the residual stream; None for the weights as they are.
        progress: told how far these are, as the stages `convert`, `rotate` and `prepare`, and the
            steps of `load`, which are `SOURCE_STEPS`.
        scratch: directory of this machine for copies of weights and of the bank; None for none.

    Raises:
        ModelError: it cannot be found, read, rotated or quantized.
        StoreError: the copy cannot be written.
    """
    path = model_location(name, cache, progress)
    near = None if scratch is None else Scratch(scratch)
    if rotate is not None:
        path = str(rotated(path, name, rotate, cache_dir(cache), progress))
    if device == "cpu":
        opened = open_weights(path, dtype, cache_dir(cache) / "weights", progress, near)
    else:
        opened = Opened(load_model(path, device, dtype))
    progress(Stage.LOAD, 1, SOURCE_STEPS)
    model_map = with_source(map_model(opened.model, pages=opened.pages, include=include), path)
    check_finite(model_map)
    model_map.release()
    tokenizer = load_tokenizer(path)
    progress(Stage.LOAD, 2, SOURCE_STEPS)
    digest = _digest(opened, model_map)
    progress(Stage.LOAD, 3, SOURCE_STEPS)
    return Source(name, model_map, tokenizer, digest, near, cache)


def _digest(opened: Opened, model_map: ModelMap) -> str:
    """The digest of the weights, of an earlier run where they come from files."""
    if opened.folder is None:
        return weights_digest(model_map)
    own = model_map.inventory.digest
    return remembered(opened.folder, own, lambda: weights_digest(model_map))


def model_notes(model_map: ModelMap) -> list[str]:
    """What a user should know of a model: what it was made from, what stays, what is carried."""
    layers = [p for layer in model_map.layers for p in layer.module.parameters()]
    n_all = sum(p.numel() for p in layers)
    large = [s for s in model_map.staying if s.n_weights * _LARGE > n_all]
    origin = origin_of(model_map.source)
    notes = [] if origin is None else origin.notes
    if large:
        share = 100 * sum(s.n_weights for s in large) / n_all
        first = max(large, key=lambda s: s.n_weights)
        notes.append(
            f"{len(large)} large parameters of decoder layers stay unquantized, {share:.1f} % of "
            f"their weights, e.g. {first.name} ({first.n_weights} weights: {first.reason})"
        )
    if model_map.not_probed is not None:
        notes.append(
            "the model's code could not be run without numbers, so routers were told by their "
            f"place and size ({model_map.not_probed}); look at the dry run"
        )
    carried = carried_text(model_map)
    return notes if carried is None else [*notes, carried]


def check_model_name(name: str, what: str = "model") -> None:
    """Refuse a name of blanks, which would be the working directory.

    Raises:
        ConfigError: it names nothing.
    """
    if not name.strip():
        raise ConfigError(f"{what} is {name!r}; give 'demo', a directory, a GGUF file or a hub id")


def model_location(name: str, cache: Path | None = None, progress: Progress = no_progress) -> str:
    """The directory or hub id of a model; `demo` is the embedded one.

    A GGUF file, or a folder with one and no other weights, is converted into the cache once.

    Args:
        name: `demo`, a directory, a GGUF file or a hub id.
        cache: see `cache_dir`.
        progress: called with ("convert", tensors done, tensors) while a GGUF file is converted.

    Raises:
        ConfigError: it names nothing.
        ModelError: a GGUF file cannot be read.
        StoreError: it cannot be converted here and now.
    """
    check_model_name(name)
    if name == DEMO:
        return str(demo.model_path())
    file = find_gguf(name)
    return name if file is None else str(converted(file, cache_dir(cache), progress))


def gguf_facts(directory: str | Path | None) -> dict[str, Any]:
    """`{"gguf": {...}}` of a model that was converted from a GGUF file, else nothing.

    Args:
        directory: from `model_location`.
    """
    origin = None if directory is None else origin_of(Path(directory))
    return {} if origin is None else {"gguf": asdict(origin)}


def find_device(name: str) -> str:
    """`auto` is the first CUDA device if there is one, else the CPU.

    Raises:
        ModelError: the device does not exist or cannot hold numbers.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return name


def seq_len_of(name: str, model: nn.Module, asked: int | None) -> int:
    """Tokens per window.

    Args:
        name: of the model, as asked for.
        model: the model; its configuration tells the longest text that it can take.
        asked: tokens per window; None for 256 on the demo model, else 512 or the model's limit.

    Raises:
        DataError: the model cannot take windows of the length asked for.
    """
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        default = DEMO_SEQ_LEN if name == DEMO else DEFAULT_SEQ_LEN
        return default if limit is None else min(default, int(limit))
    if limit is not None and asked > limit:
        raise DataError(
            f"windows of {asked} tokens asked; {name} takes 1 to {limit}; lower --seq-len"
        )
    return asked


def read_text(
    source: Source,
    text: str,
    role: str,
    n_samples: int,
    seq_len: int | None,
    seed: int,
    bos: str = "auto",
    progress: Progress = no_progress,
) -> TokenSet:
    """Token windows of one text for a model, which writes `ebss` itself.

    Args:
        source: the model.
        text: `demo`, a data set name or a path.
        role: `calibration`, `search` or `heldout`.
        n_samples: windows.
        seq_len: tokens per window; None as in `seq_len_of`.
        seed: of the draw.
        bos: what windows start with: `auto`, `always` or `never`.
        progress: told how far a model's own text is, as the stage `write`.

    Raises:
        DataError: the text cannot be found, is too short or of another vocabulary.
        ModelError: the model has no tokenizer, or cannot write.
        ConfigError: a model without routed experts is to write.
    """
    model = source.map.model
    length = seq_len_of(source.name, model, seq_len)
    request = TextRequest(text, role, n_samples, length, seed, bos)

    def write(count: int, start: tuple[int, ...]) -> Tensor:
        by = WriterModel(model, source.tokenizer, source.digest, source.runs_as)
        asked = Asked(count, length, start, seed)
        with releasing(source.map):
            return written_text(by, asked, cache_dir(source.cache), progress)

    is_own = role == "calibration"
    return load_windows(request, source.name, model, source.tokenizer, write if is_own else None)


def load_windows(
    request: TextRequest,
    name: str,
    model: nn.Module,
    tokenizer: Any,
    write: Write | None = None,
) -> TokenSet:
    """Token windows that a model can read.

    Args:
        request: source, role, number and length of the windows.
        name: of the model.
        model: the model.
        tokenizer: its tokenizer, None if it has none.
        write: lets the model write the source `ebss`; None where it may not.

    Raises:
        DataError: the text cannot be found, is too short or of another vocabulary.
        ModelError: there is no tokenizer.
    """
    if tokenizer is None:
        raise ModelError(tokenizer_missing(name))
    found = load_tokens(request, tokenizer, write)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    highest, n_ids = int(found.tokens.max()), int(embedding.weight.shape[0])
    if highest >= n_ids:
        raise DataError(
            f"{found.role} text {found.name!r} has token id {highest}, and {name} embeds the ids "
            f"0 to {n_ids - 1}; its tokenizer, of {len(tokenizer)} ids, is that of another model: "
            "copy the tokenizer's files of this one into its directory"
        )
    return found


def cache_dir(asked: Path | None) -> Path:
    """Where copies of weights, banks and teachers are.

    As asked, else `$ALPHAQUANT_CACHE`, else `~/.cache/alphaquant`.
    """
    stated = os.environ.get("ALPHAQUANT_CACHE")
    found = asked or Path(stated or Path.home() / ".cache" / "alphaquant")
    return found.absolute()  # workers elsewhere have other working directories
