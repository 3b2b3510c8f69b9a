"""llama.cpp: the logits of a GGUF file, and what it writes.

Through the C interface of llama.h, release b11549 (xllamacpp 2026.10.11549). Structures that are
passed by value are read as numbers; those that are set are found by their places, which are
checked against the defaults. Keys and values are kept in float32 and attention is not fused, so
that a file of float32 computes what transformers does to 1e-6.
"""

import ctypes
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from alphaquant.errors import ModelError
from alphaquant.evaluators.engines.protocol import EngineRequest
from alphaquant.quant.ggml.library import open_library

_RELEASE = "2026.10.11549"
_N_CTX, _N_BATCH, _N_UBATCH, _THREADS, _FLASH, _KV_TYPES = 0, 1, 2, (7, 8), 13, (26, 27)
"""Places of 32-bit numbers in llama_context_params."""
_F32, _F16 = 0, 1
_PTR, _I32 = ctypes.c_void_p, ctypes.c_int32


class _Params(ctypes.Structure):
    """Any structure of parameters: larger than all of them, passed by value."""

    _fields_ = [("numbers", _I32 * 128)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", _I32),
        ("token", ctypes.POINTER(_I32)),
        ("embd", _PTR),
        ("pos", ctypes.POINTER(_I32)),
        ("n_seq_id", ctypes.POINTER(_I32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(_I32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_PTR, _PTR]),
    "llama_model_default_params": (_Params, []),
    "llama_context_default_params": (_Params, []),
    "llama_model_load_from_file": (_PTR, [ctypes.c_char_p, _Params]),
    "llama_model_free": (None, [_PTR]),
    "llama_init_from_model": (_PTR, [_PTR, _Params]),
    "llama_free": (None, [_PTR]),
    "llama_batch_init": (_Batch, [_I32, _I32, _I32]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (_I32, [_PTR, _Batch]),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [_PTR, _I32]),
    "llama_model_get_vocab": (_PTR, [_PTR]),
    "llama_vocab_n_tokens": (_I32, [_PTR]),
    "llama_tokenize": (
        _I32,
        [_PTR, ctypes.c_char_p, _I32, ctypes.POINTER(_I32), _I32, ctypes.c_bool, ctypes.c_bool],
    ),
}

_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _PTR)


_ERROR = 4  # GGML_LOG_LEVEL_ERROR


@cache
def _errors() -> deque[str]:
    """What the library said last of errors."""
    return deque(maxlen=4)


@cache
def _listener() -> Any:
    """What takes the library's messages, and must live as long as it."""

    def listen(level: int, text: bytes, data: Any) -> None:
        if level == _ERROR:
            _errors().append(text.decode(errors="replace").strip())

    return _LOG(listen)


@cache
def _llama() -> ctypes.CDLL:
    library = open_library()
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(ctypes.cast(_listener(), _PTR), None)
    library.llama_backend_init()
    return library


@contextmanager
def _model(file: str | Path) -> Iterator[int]:
    """A loaded model.

    Raises:
        ModelError: llama.cpp does not load the file.
    """
    llama = _llama()
    model = llama.llama_model_load_from_file(
        str(file).encode(), llama.llama_model_default_params()
    )
    if not model:
        raise ModelError(
            f"llama.cpp does not load {file} ({'; '.join(_errors())}); give a GGUF file that "
            "aq-quantize --export gguf wrote, or another release of xllamacpp"
        )
    try:
        yield model
    finally:
        llama.llama_model_free(model)


@contextmanager
def _context(model: int, n_tokens: int, n_threads: int) -> Iterator[int]:
    llama = _llama()
    params = llama.llama_context_default_params()
    if [params.numbers[i] for i in _KV_TYPES] != [_F16, _F16]:
        raise ModelError(
            f"xllamacpp {version('xllamacpp')} has other structures than {_RELEASE}, which this "
            f"was written for; install xllamacpp=={_RELEASE}"
        )
    for place in (_N_CTX, _N_BATCH, _N_UBATCH):
        params.numbers[place] = max(n_tokens, 32)
    for place in _THREADS:
        params.numbers[place] = n_threads
    for place in _KV_TYPES:
        params.numbers[place] = _F32
    params.numbers[_FLASH] = 0
    context = llama.llama_init_from_model(model, params)
    if not context:
        raise ModelError(
            f"llama.cpp makes no context of {n_tokens} tokens ({'; '.join(_errors())}); give a "
            "smaller --seq-len, or a machine with more memory"
        )
    try:
        yield context
    finally:
        llama.llama_free(context)


def _decode(context: int, tokens: Sequence[int], start: int) -> None:
    llama = _llama()
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
        batch.seq_id[i][0], batch.logits[i] = 0, 1
    failed = llama.llama_decode(context, batch)
    llama.llama_batch_free(batch)
    if failed:
        raise ModelError(
            f"llama.cpp cannot run a window of {len(tokens)} tokens (llama_decode returned "
            f"{failed}); give a smaller --seq-len"
        )


def _row(model: int, context: int, index: int) -> npt.NDArray[np.float32]:
    llama = _llama()
    n_tokens = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    found = llama.llama_get_logits_ith(context, index)
    return np.ctypeslib.as_array(found, (n_tokens,)).copy()


@dataclass(frozen=True)
class LlamaCpp:
    """A loaded file; see `alphaquant.evaluators.engines.protocol.Engine`.

    Attributes:
        model: llama.cpp's pointer.
        n_threads: that compute.
        facts: engine, version, how it computes.
    """

    model: int
    n_threads: int = 1
    facts: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def logits(self, tokens: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Of every position of a window, int64 [T] -> float32 [T, V].

        Raises:
            ModelError: it does not run.
        """
        with _context(self.model, len(tokens), self.n_threads) as context:
            _decode(context, [int(t) for t in tokens], 0)
            return np.stack([_row(self.model, context, i) for i in range(len(tokens))])


def check_llama_cpp(model: Path, python: Path | None = None) -> None:
    """Refuse what is no file, and an environment without llama.cpp.

    Args:
        model: a GGUF file, or the directory of an export.
        python: None; llama.cpp runs in this process.

    Raises:
        ModelError: xllamacpp is not installed, or there is no such file.
    """
    open_library()  # says what to install
    _file_of(model)


def _file_of(model: Path) -> Path:
    files = [model] if model.is_file() else sorted(model.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(
            f"--engine llama.cpp: {model} holds {len(files)} GGUF files, and one is run; "
            "give the file, or the directory that aq-quantize --export gguf wrote"
        )
    return files[0]


@contextmanager
def open_llama_cpp(request: EngineRequest) -> Iterator[LlamaCpp]:
    """Load a GGUF file in this process.

    Args:
        request: a file, or the directory of an export.

    Raises:
        ModelError: as in `check_llama_cpp`, or it does not load.
    """
    check_llama_cpp(request.model)
    file = _file_of(request.model)
    facts = {
        "engine": "llama.cpp",
        "version": f"xllamacpp {version('xllamacpp')}",
        "file": file.name,
        "keys and values": "float32",
    }
    with _model(file) as model:
        yield LlamaCpp(model, len(os.sched_getaffinity(0)), MappingProxyType(facts))


def logits(
    file: str | Path, windows: Sequence[Sequence[int]], n_threads: int = 1
) -> npt.NDArray[np.float32]:
    """Logits of windows of one length, float32 [windows, tokens, vocabulary].

    Args:
        file: the GGUF file.
        windows: token numbers.
        n_threads: that compute.

    Raises:
        ModelError: the file does not load, or does not run.
    """
    with _model(file) as model:
        engine = LlamaCpp(model, n_threads)
        return np.stack([engine.logits(np.array(tokens)) for tokens in windows])


def generate(file: str | Path, tokens: Sequence[int], n_new: int) -> list[int]:
    """The most likely tokens that follow, one at a time over the kept keys and values."""
    found: list[int] = []
    with _model(file) as model, _context(model, len(tokens) + n_new, 1) as context:
        _decode(context, tokens, 0)
        last = len(tokens) - 1
        for _ in range(n_new):
            found.append(int(_row(model, context, last).argmax()))
            _decode(context, found[-1:], len(tokens) + len(found) - 1)
            last = 0
    return found


def tokenize(file: str | Path, text: str) -> list[int]:
    """A text as the file's own tokenizer reads it, with what it puts in front."""
    llama = _llama()
    with _model(file) as model:
        data = text.encode()
        into = (_I32 * (len(data) + 8))()
        vocabulary = llama.llama_model_get_vocab(model)
        n = llama.llama_tokenize(vocabulary, data, len(data), into, len(into), True, True)
        return list(into[:n])
