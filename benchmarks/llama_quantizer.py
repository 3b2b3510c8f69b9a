"""llama.cpp's own quantizer: its mixes of types, its fallbacks, its importance matrix.

xllamacpp's library does not export it. Any folder with `libllama*.so` and the libraries of ggml
beside it does, such as the one in the package `@node-llama-cpp/linux-x64` of npm:

    npm pack @node-llama-cpp/linux-x64@3.22.1 && tar xzf node-llama-cpp-linux-x64-3.22.1.tgz
    ls package/bins/linux-x64

Structures as in llama.h of release v0.5.0; the defaults are checked before any is used. It runs in
a process of its own: two releases of ggml in one process take each other's functions, and free
each other's memory.
"""

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor, nn

_BF16 = 30
_COUNT = 43
"""GGML_TYPE_COUNT, which stands for no type of its own."""


class _Importance(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.POINTER(ctypes.c_float)),
        ("size", ctypes.c_size_t),
    ]


class _Params(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("n_threads", "mix", "output", "embedding")),
        ("allow_requantize", ctypes.c_bool),
        ("quantize_output", ctypes.c_bool),
        ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("importance", ctypes.POINTER(_Importance)),
        ("overrides", ctypes.c_void_p),
        ("types", ctypes.c_void_p),
        ("pruned", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class LlamaQuantizer:
    """The quantizer of a folder of libraries."""

    folder: Path

    def write(
        self,
        source: Path,
        target: Path,
        mix: str,
        importance: Mapping[str, Tensor],
        keep_embedding: bool,
    ) -> None:
        """Quantize a GGUF file with one thread, in a process of its own.

        Args:
            source: in bf16.
            target: to write.
            mix: as `llama-quantize` calls it: Q2_K, IQ4_XS.
            importance: by tensor of the file, float32 [inputs].
            keep_embedding: whether the embedding stays in bf16; else it is as the mix has it.

        Raises:
            CalledProcessError: the library has other structures, or does not quantize.
        """
        with tempfile.TemporaryDirectory() as scratch:
            rows = Path(scratch) / "importance.safetensors"
            save_file({name: row.float() for name, row in importance.items()}, rows)
            words = [str(self.folder), str(source), str(target), mix, str(rows)]
            words += ["keep"] if keep_embedding else []
            subprocess.run([sys.executable, __file__, *words], check=True)

    def quantize(
        self, files: tuple[str, str], mix: str, rows: Mapping[str, Any], keep_embedding: bool
    ) -> None:
        """The same in this process."""
        from gguf.constants import LlamaFileType

        library = self._library()
        params = library.llama_model_quantize_default_params()
        found = (params.output, params.embedding, params.quantize_output, params.pure)
        if found != (_COUNT, _COUNT, True, False):
            raise RuntimeError(f"{self.folder} has other structures: its defaults are {found}")
        params.n_threads, params.mix = 1, int(LlamaFileType[f"MOSTLY_{mix}"])
        if keep_embedding:
            params.embedding = _BF16
        listed = (_Importance * (len(rows) + 1))()  # the last has no name
        for entry, (name, row) in zip(listed, rows.items(), strict=False):
            entry.name, entry.size = f"{name}.weight".encode(), row.size
            entry.data = row.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        if rows:
            params.importance = listed
        failed = library.llama_model_quantize(*map(str.encode, files), ctypes.byref(params))
        if failed:
            raise RuntimeError(f"llama_model_quantize returned {failed} for {mix} of {files[0]}")

    def _library(self) -> Any:
        loaded = [self._open(name, ctypes.RTLD_GLOBAL) for name in ("libggml-base*", "libggml.*")]
        loaded[1].ggml_backend_load_all_from_path(ctypes.c_char_p(str(self.folder).encode()))
        library = self._open("libllama.*", ctypes.RTLD_LOCAL)
        library.llama_log_set(None, None)
        library.llama_model_quantize_default_params.restype = _Params
        library.llama_model_quantize.restype = ctypes.c_uint32
        library.llama_model_quantize.argtypes = [
            ctypes.c_char_p,
            ctypes.c_char_p,
            ctypes.POINTER(_Params),
        ]
        return library

    def _open(self, pattern: str, mode: int) -> Any:
        (file,) = self.folder.glob(f"{pattern}so*")
        return ctypes.CDLL(str(file), mode)


@torch.no_grad()
def importance_of(
    model: nn.Module, names: Mapping[str, str], windows: Tensor
) -> dict[str, Tensor]:
    """What llama.cpp's `imatrix` has: the mean of an input's squares over all tokens.

    Args:
        model: dense, of transformers.
        names: of its matrices -> as the file calls their tensors.
        windows: int64 [W, T].

    Returns:
        By tensor of the file, float32 [inputs].
    """
    sums: dict[str, Tensor] = {}

    def add(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].float().square().flatten(0, -2).sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    with _hooked(model, {own: add(theirs) for own, theirs in names.items()}):
        for window in windows:
            model(window[None])
    return {name: total / windows.numel() for name, total in sums.items()}


@contextmanager
def _hooked(model: nn.Module, hooks: Mapping[str, Callable[..., None]]) -> Iterator[None]:
    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensor_names(architecture: str, n_layers: int, names: list[str]) -> dict[str, str]:
    """How a file of llama.cpp calls matrices: `model.layers.0.mlp.up_proj` is `blk.0.ffn_up`."""
    from gguf.constants import MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    (arch,) = [arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture]
    found = get_tensor_name_map(arch, n_layers)
    return {name: str(found.get_name(name)) for name in names}


def types_in(file: Path) -> dict[str, str]:
    """Types of the tensors of a file, in lower case, by their names without `.weight`."""
    from gguf import GGUFReader

    tensors = GGUFReader(file).tensors
    return {t.name.removesuffix(".weight"): t.tensor_type.name.lower() for t in tensors}


if __name__ == "__main__":
    own, plain, made, name, file, *more = sys.argv[1:]
    LlamaQuantizer(Path(own)).quantize((plain, made), name, load_file(file), "keep" in more)
