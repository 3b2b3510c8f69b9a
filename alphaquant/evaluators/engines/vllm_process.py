"""vLLM, in a process of the environment that it is installed in.

It pins other versions of torch and transformers than ours, so its environment is usually one of
its own; `vllm_worker.py` runs there, which imports nothing of this package. Windows and logits go
through files of a temporary folder, one line of JSON says that they are there.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from alphaquant.errors import ModelError
from alphaquant.evaluators.engines.protocol import EngineRequest

WORKER = Path(__file__).with_name("vllm_worker.py")
_LAST_LINES = 3
"""Of the engine's own log, in an error."""
_MOST_SECONDS = 60
"""For an interpreter to say whether it has vLLM. The engine itself has no limit: a large model
loads for long, and Ctrl-C ends both processes."""


@dataclass(frozen=True)
class Vllm:
    """A running engine; see `alphaquant.evaluators.engines.protocol.Engine`.

    Attributes:
        folder: for files between the two processes, and the engine's log.
        process: the engine.
        answers: what it tells.
        facts: engine, version, dtype.
    """

    folder: Path
    process: "subprocess.Popen[bytes]"
    answers: IO[str]
    facts: Mapping[str, Any]

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Of every position of a window, int64 [T] -> float32 [T, V].

        Raises:
            ModelError: the engine stopped.
        """
        np.save(self.folder / "tokens.npy", tokens)
        _tell(self.process, {"run": 1})
        answer = _hear(self.process, self.answers, self.folder)
        found: np.ndarray = np.load(self.folder / answer["logits"])
        return found


def check_vllm(model: Path, python: Path | None = None) -> None:
    """Refuse an environment without vLLM; whether it loads the model, only it knows.

    Args:
        model: what it will load.
        python: of its environment, None for this one.

    Raises:
        ModelError: the model is a directory without config.json; the interpreter cannot be run,
            or has no vLLM.
    """
    if model.is_dir() and not (model / "config.json").is_file():
        raise ModelError(
            f"--engine vllm: {model} has no config.json; give the directory that aq-quantize "
            "wrote, without --export or with --export compressed-tensors or gptq"
        )
    interpreter = str(python or sys.executable)
    command = [interpreter, "-c", "from importlib.util import find_spec as f; print(f('vllm'))"]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, timeout=_MOST_SECONDS, env=_environment()
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _no_python(python, error) from error
    if not found.stdout.startswith("ModuleSpec"):
        said = found.stderr.strip().splitlines()[-1:] or [f"exit code {found.returncode}"]
        why = "" if found.stdout else f" ({said[0]})"
        raise ModelError(
            f"{interpreter} has no vLLM{why}; give the python of the environment that vLLM is "
            "installed in as --engine-python, docs/vllm.md says how to make one"
        )


def _environment() -> dict[str, str]:
    """Ours, but modules beside the worker or in the working directory are none of vLLM's."""
    return {**os.environ, "PYTHONSAFEPATH": "1"}


def _no_python(python: Path | None, error: Exception) -> ModelError:
    return ModelError(
        f"--engine-python {python} cannot be run ({error}); give the python of the environment "
        "that vLLM is installed in"
    )


@contextmanager
def open_vllm(request: EngineRequest) -> Iterator[Vllm]:
    """Start vLLM with a model.

    Args:
        request: what it loads and how.

    Raises:
        ModelError: there is no vLLM in the environment, or it does not load the model.
    """
    with tempfile.TemporaryDirectory(prefix="alphaquant-vllm-") as name:
        folder = Path(name)
        asked = {"model": str(request.model), "dtype": request.dtype, "seq_len": request.seq_len}
        with _started(request.python, folder) as (process, answers):
            _tell(process, asked)
            facts = _hear(process, answers, folder)
            yield Vllm(folder, process, answers, {"engine": "vllm", **facts})


@contextmanager
def _started(
    python: Path | None, folder: Path
) -> Iterator[tuple["subprocess.Popen[bytes]", IO[str]]]:
    """The worker's process, and the end of a pipe that it writes answers to."""
    reading, writing = os.pipe()
    command = [str(python or sys.executable), str(WORKER), str(folder), str(writing)]
    with (folder / "log").open("w") as log, os.fdopen(reading) as answers:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                bufsize=0,  # nothing is left to be written to a process that has stopped
                pass_fds=[writing],
                env=_environment(),
            )
        except OSError as error:
            raise _no_python(python, error) from error
        finally:
            os.close(writing)
        try:
            yield process, answers
        finally:
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()


def _tell(process: "subprocess.Popen[bytes]", words: Mapping[str, Any]) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has stopped, so `_hear`, which follows, raises
        process.stdin.write(json.dumps(words).encode() + b"\n")


def _hear(process: "subprocess.Popen[bytes]", answers: IO[str], folder: Path) -> dict[str, Any]:
    """The next answer.

    Raises:
        ModelError: the engine stopped, or says what is wrong.
    """
    line = answers.readline()
    answer: dict[str, Any] = json.loads(line) if line else {}
    if "error" in answer:
        raise ModelError(f"vllm: {answer['error']}")
    if not line:
        code = process.wait()
        log = [text.strip() for text in (folder / "log").read_text(errors="replace").splitlines()]
        words = " / ".join([text for text in log if text][-_LAST_LINES:])[:400]
        raise ModelError(f"vllm stopped with exit code {code}; its last words: {words}")
    return answer
