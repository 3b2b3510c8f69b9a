"""A checkpoint whose residual stream is rotated, derived from another one and kept in the cache.

    CACHE/rotated/KEY/        config.json, safetensors, tokenizer, rotation.json
    CACHE/rotated/KEY.part/   while it is made; removed by the next who makes it

KEY is a digest of the source's files, its configuration, the seed and the versions that made it.
`rotation.json` says what was done, see `RotationFacts`. To all who come after it is an ordinary
checkpoint: gains of the norms are 1, every weight that reads the residual stream is W Q, every one
that writes it Q^T W, and the function is the same.

The work is done in float32, a layer at a time: the model walks over probe windows, each layer is
rotated, run and written before the next, and its changes are given back. At the end its
predictions are compared with those of the original. A wrong rotation differs on every window; a
token whose experts are nearly tied can differ by rounding alone, so the middle one of `_N_WINDOWS`
windows decides.

Rotated weights are rounded to the dtype in which the original stores them, but for routers and
other small ones that are never quantized: these keep float32. On the demo model that is half of
what rounding costs, because routing flips; they are 0.2 % of its weights.

Tied embeddings are untied where the last norm has a gain: the head takes it, the embeddings do
not. The checkpoint grows by the head then.
"""

import hashlib
import json
import os
import shutil
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.files import locked, writing
from alphaquant.models.ends import find_ends, head_of
from alphaquant.models.loading import load_skeleton
from alphaquant.models.mapping import checkpoint_dtype, map_model, stored_dtype
from alphaquant.models.pages.file_digests import file_digests
from alphaquant.models.pages.opening import open_weights
from alphaquant.models.rotation.hadamard import Rotation
from alphaquant.models.rotation.streams import StreamNorm, as_norm, find_streams, is_norm
from alphaquant.models.sites import ModelMap
from alphaquant.models.source_files import INDEX, locate, weight_files, with_source
from alphaquant.models.walk import TOLERANCE, batches_of, relative_error, releasing, walk
from alphaquant.progress import Progress, Stage, no_progress
from alphaquant.spaces.json_files import JsonError, read_object

ROTATION_FILE = "rotation.json"
_VERSION = 1
"""Raised when this file's own work changes."""

_N_WINDOWS, _N_TOKENS = 3, 32
"""Of the comparison; experts that no token reaches are rotated as all others are."""

_ROUGH = 0.5
"""Relative difference of predictions in the stored dtype; wrong weights give about 1.

Of bfloat16 it is at most 0.20 over the tiny random models of all architectures, whose routers
choose among near ties, and 0.001 on the demo model."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
"""Ends of names of files that the rotated checkpoint has its own of, or none."""


@dataclass(frozen=True)
class RotationFacts:
    """What was done to a checkpoint.

    Attributes:
        seed: of the signs.
        matrix: how Q is built, see `alphaquant.models.rotation.hadamard`.
        source: name of the model that was rotated.
        error: relative difference of float32 predictions, of the rotated weights before they were
            rounded to their stored dtype.
        stored_error: the same of the checkpoint's files.
        is_untied: whether a head was made of tied embeddings.
    """

    seed: int
    matrix: str
    source: str
    error: float
    stored_error: float
    is_untied: bool


def rotated(
    path: str | Path, name: str, seed: int, cache: Path, progress: Progress = no_progress
) -> Path:
    """The rotated checkpoint of a model: found in the cache, or made there.

    Args:
        path: directory or hub id of the original.
        name: what the user calls it.
        seed: of the signs.
        cache: the folder of all caches.
        progress: told how far it is, in layers, as the stage `rotate`.

    Raises:
        ModelError: it cannot be read, or not be rotated, naming why.
        StoreError: the copy cannot be written.
    """
    directory = locate(path)
    files = [] if directory is None else weight_files(directory)
    if directory is None or not files:
        raise ModelError(
            f"--rotate: {name} has no safetensors here that could be rotated; give a local "
            "directory with config.json and safetensors, or leave --rotate out"
        )
    target = cache / "rotated" / _key(directory, files, seed, cache)
    if rotation_of(target) is None:
        with locked(cache / "rotated" / f"{target.name}.lock", f"the copy {target}", waits=True):
            if rotation_of(target) is None:  # nobody was quicker
                shutil.rmtree(target, ignore_errors=True)
                _make(directory, name, seed, target, progress)
    return target


def rotation_of(directory: Path | None) -> RotationFacts | None:
    """What was done to a checkpoint; None for one that was not rotated."""
    if directory is None:
        return None
    try:
        return RotationFacts(**read_object(directory / ROTATION_FILE))
    except (OSError, JsonError, TypeError):
        return None


def _key(directory: Path, files: list[Path], seed: int, cache: Path) -> str:
    memory = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    digests = file_digests(files, cache / "rotated" / "read" / f"{memory}.json")
    facts = {
        "version": _VERSION,
        "transformers": version("transformers"),
        "files": [digests[file] for file in files],
        "config": (directory / "config.json").read_text(),
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _make(directory: Path, name: str, seed: int, target: Path, progress: Progress) -> None:
    """Write the checkpoint under another name, `rotation.json` last, then rename it."""
    opened = open_weights(directory, "float32", target.parent.parent / "weights", progress)
    model_map = map_model(opened.model, pages=opened.pages)
    is_dequantized = "quantization_config" in read_object(directory / "config.json")
    namer = load_skeleton(directory) if is_dequantized else opened.model
    # A dequantized model has forgotten whose scales it does not load.
    _check_whole(with_source(map_model(namer) if is_dequantized else model_map, directory))
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        with writing(part):
            work = _Work(model_map, Rotation(_width(model_map), seed), part, progress, namer)
            error = work.run()
            _copy_others(directory, part, work)
            stored = _stored_error(part, work.expected, target.parent.parent, progress)
            matrix = work.rotation.shape.text
            facts = RotationFacts(seed, matrix, name, error, stored, work.is_untied)
            (part / ROTATION_FILE).write_text(json.dumps(asdict(facts), indent=1) + "\n")
            os.rename(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@dataclass
class _Work:
    """One rotation.

    Attributes:
        model_map: the original in float32; its weights are rotated on the way, and given back.
        rotation: Q.
        folder: where files go.
        progress: told how far it is.
        namer: tells transformers how checkpoints call its tensors: the model, or one without
            weights where what transformers did on loading dequantized them.
        is_untied: whether a head was made of tied embeddings.
        places: tensor -> file, so far.
        n_bytes: of these tensors.
        expected: the original's predictions of `_windows`, [1, T, V] each.
    """

    model_map: ModelMap
    rotation: Rotation
    folder: Path
    progress: Progress
    namer: Any
    is_untied: bool = False
    places: dict[str, str] = field(default_factory=dict)
    n_bytes: int = 0
    expected: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def run(self) -> float:
        """Rotate and write every part; the relative difference of the predictions.

        Raises:
            ModelError: it is too large, or a part cannot be rotated.
        """
        layers, model = self.model_map.layers, self.model_map.model
        staying = {one.name for one in self.model_map.staying}
        windows = _windows(model)
        final = self._original(windows)
        rest = _state_of(model, "", [f"{layer.name}." for layer in layers])
        dtypes = self._dtypes(rest)
        self._rotate_ends(final)
        results: list[Any] = []
        for done, step in enumerate(walk(self.model_map, windows, results)):
            self.progress(Stage.ROTATE, done, len(layers))
            state = _state_of(model, f"{step.layer.name}.")
            own = self._dtypes(state)
            find_streams(step.layer, step.calls[0]).rotate(self.rotation)
            step.run()
            small = {name: state[name] for name in state.keys() & staying}
            self._write(state, own | self._dtypes(small))
            if step.layer.pages is not None:
                step.layer.pages.restore()
        rest = _state_of(model, "", [f"{layer.name}." for layer in layers])
        head = next((n for n in rest if n not in dtypes), None)  # of tied embeddings
        if head is not None:
            dtypes[head] = checkpoint_dtype(model)
        self._write(rest, dtypes)
        self._finish()
        self.progress(Stage.ROTATE, len(layers), len(layers))
        error = _middle_error([result.logits for result in results], self.expected)
        if not error <= TOLERANCE:
            raise ModelError(
                f"--rotate: predictions of {type(model).__name__} with a rotated residual stream "
                f"differ by {error:.1e} relative to them, at most {TOLERANCE:.0e} is rounding; "
                "something else reads or writes its stream: leave --rotate out for this "
                "architecture"
            )
        return error

    def _original(self, windows: list[Tensor]) -> StreamNorm:
        """Find the original's predictions, and the norm in front of its head."""
        model = self.model_map.model
        with _watch_last_norm(self.model_map) as seen, releasing(self.model_map):
            self.expected = [model(window, use_cache=False).logits for window in windows]
        name, module = seen.get("norm", (None, None))
        if name is None or module is None:
            raise ModelError(
                f"--rotate: no norm gives what the head of {type(model).__name__} reads, so its "
                "gain cannot be folded; leave --rotate out for this architecture"
            )
        return as_norm(name, module, self.rotation.size)

    def _rotate_ends(self, final: StreamNorm) -> None:
        """Rotate the embeddings, and the head with the gain of the last norm."""
        model: Any = self.model_map.model
        table, head, is_tied = _ends(model)
        gain = final.gain().expand(self.rotation.size)
        if is_tied and bool((gain != 1).any()):
            head.weight = nn.Parameter(table.weight.detach().clone(), requires_grad=False)
            self.is_untied, is_tied = True, False
        self.rotation.rotate_columns(table.weight.data)
        if not is_tied:
            head.weight.data.mul_(gain.to(head.weight.device))
            self.rotation.rotate_columns(head.weight.data)
            final.clear()

    def _dtypes(self, state: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
        """What tensors are stored in: the model's dtype where that is exact."""
        dtype = checkpoint_dtype(self.model_map.model)
        return {name: stored_dtype(tensor, dtype) for name, tensor in state.items()}

    def _write(self, state: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
        """Write a file of tensors, under the names that checkpoints of this model have."""
        from transformers.core_model_loading import revert_weight_conversion

        cast = {name: tensor.to(dtypes[name]) for name, tensor in state.items()}
        named = revert_weight_conversion(self.namer, cast)
        number, total = len(set(self.places.values())) + 1, len(self.model_map.layers) + 1
        file = f"model-{number:05d}-of-{total:05d}.safetensors"
        tensors = {name: tensor.contiguous().clone() for name, tensor in named.items()}
        save_file(tensors, self.folder / file, metadata={"format": "pt"})
        self.n_bytes += sum(t.nbytes for t in tensors.values())
        self.places |= dict.fromkeys(tensors, file)

    def _finish(self) -> None:
        index = {
            "metadata": {"total_size": self.n_bytes},
            "weight_map": dict(sorted(self.places.items())),
        }
        (self.folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


@torch.no_grad()
def _stored_error(folder: Path, expected: list[Tensor], cache: Path, progress: Progress) -> float:
    """Relative difference of the predictions of files that were just written.

    Raises:
        ModelError: it is too large to be rounding.
    """
    opened = open_weights(folder, "float32", cache / "weights", progress)
    model_map = map_model(opened.model, pages=opened.pages)
    with releasing(model_map):
        found = [opened.model(window, use_cache=False).logits for window in _windows(opened.model)]
    error = _middle_error(found, expected)
    if not error <= _ROUGH:
        raise ModelError(
            f"--rotate: the files of the rotated {type(opened.model).__name__} predict otherwise "
            f"than the original, by {error:.1e} relative to it, at most {_ROUGH} is rounding to "
            "their dtype; transformers does not read back what it names here: leave --rotate out "
            "for this architecture"
        )
    return error


def _middle_error(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return statistics.median(relative_error(a, b) for a, b in pairs)


def _check_whole(model_map: ModelMap) -> None:
    """Refuse what reads or writes the residual stream beside the language model.

    Raises:
        ModelError: naming it.
    """
    config: Any = model_map.model.config
    if config.get_text_config() is not config:
        raise ModelError(
            f"--rotate: {type(model_map.model).__name__} has towers for images or sound that "
            "write the residual stream, and they are not rotated; leave --rotate out for this "
            "model"
        )
    if model_map.carried:
        raise ModelError(
            f"--rotate: {len(model_map.carried)} tensors of the checkpoint are no part of the "
            f"model ({model_map.carried[0].name}) and may read its residual stream; leave "
            "--rotate out, or remove them from the checkpoint"
        )


def _width(model_map: ModelMap) -> int:
    return int(_ends(model_map.model)[0].weight.shape[-1])


def _ends(model: nn.Module) -> tuple[nn.Embedding, nn.Linear, bool]:
    """Embeddings, head, and whether they are tied.

    Raises:
        ModelError: one of them is no plain one.
    """
    try:
        rows = find_ends(model, 0, ("embeddings",))
        head = find_ends(model, 0, ("head",))
    except ModelError as error:
        raise ModelError(
            f"--rotate: {type(model).__name__} has no plain embeddings or head that could be "
            "rotated (an nn.Embedding and an nn.Linear are); leave --rotate out for this "
            "architecture"
        ) from error
    assert rows is not None and head is not None
    linear = head_of(head)
    assert linear is not None
    return rows.embeddings[0].module, linear, bool(head.embeddings)


@contextmanager
def _watch_last_norm(model_map: ModelMap) -> Iterator[dict[str, tuple[str, nn.Module]]]:
    """Find the norm outside of the layers that gives what the head reads."""
    model: Any = model_map.model
    inside = tuple(f"{layer.name}." for layer in model_map.layers)
    made: list[tuple[str, nn.Module, Tensor]] = []
    found: dict[str, tuple[str, nn.Module]] = {}

    def on_norm(name: str) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
            if is_norm(module, args, outputs):
                made.append((name, module, outputs))

        return see

    def on_head(_: nn.Module, args: tuple[Any, ...]) -> None:
        for name, module, outputs in made:
            if outputs.shape == args[0].shape and torch.equal(outputs, args[0]):
                found["norm"] = (name, module)
        made.clear()

    outer = [(name, m) for name, m in model.named_modules() if not f"{name}.".startswith(inside)]
    handles = [m.register_forward_hook(on_norm(name)) for name, m in outer]
    handles.append(model.get_output_embeddings().register_forward_pre_hook(on_head))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _windows(model: nn.Module) -> list[Tensor]:
    """Random windows of ids, int64 [1, T] each."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    generator = torch.Generator().manual_seed(0)
    length = min(_N_TOKENS, getattr(config, "max_position_embeddings", None) or _N_TOKENS)
    shape = (_N_WINDOWS, length)
    return batches_of(torch.randint(0, config.vocab_size, shape, generator=generator), 1)


def _state_of(model: nn.Module, prefix: str, others: list[str] | None = None) -> dict[str, Tensor]:
    """Tensors of the state under a prefix and not under others; tied ones once."""
    known = {name for name, _ in model.named_parameters()}
    known |= {name for name, _ in model.named_buffers()}
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name in known
        and name.startswith(prefix)
        and not any(name.startswith(other) for other in others or ())
    }


def _copy_others(directory: Path, folder: Path, work: _Work) -> None:
    """Copy what stands beside the weights, and write the configuration."""
    for file in sorted(directory.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHTS) and file.name != "config.json":
            shutil.copy(file, folder / file.name)
    config = read_object(directory / "config.json")
    for name in ("quantization_config", "torch_dtype"):  # dequantized, and under its new name
        config.pop(name, None)
    dtype = checkpoint_dtype(work.model_map.model)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if work.is_untied:
        config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
