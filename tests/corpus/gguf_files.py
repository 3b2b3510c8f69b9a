"""GGUF files as models: damaged, of another kind, or more than one."""

import struct
from collections.abc import Callable

import numpy as np

from alphaquant.testing.gguf_files import save_gguf
from tests.corpus.engine import DRY_RUN, EVALUATE, SENSITIVITY, Case, Make, Place

HERE = f"{DRY_RUN} --model tiny.gguf"
INT4 = {"c.json": '{"default": {"wq": "int4", "group_size": 32}}'}


def changed(change: Callable[[bytes], bytes]) -> Make:
    """A tiny GGUF file whose bytes are changed, `tiny.gguf`."""

    def make(place: Place) -> None:
        save_gguf(place.here / "tiny.gguf", "qwen2", "Q8_0")
        content = (place.here / "tiny.gguf").read_bytes()
        (place.here / "tiny.gguf").write_bytes(change(content))

    return make


def saved(**settings: object) -> Make:
    """A tiny GGUF file with more in its metadata."""
    return lambda place: save_gguf(place.here / "tiny.gguf", settings=settings)


def _two(place: Place) -> None:
    (place.here / "model").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (place.here / "model" / name).write_bytes(b"GGUF")


def _with_factors(place: Place) -> None:
    save_gguf(place.here / "tiny.gguf", extra={"rope_freqs.weight": np.ones(8)})


CASES = (
    Case("GGUF file that is not there", HERE, "tiny.gguf is not there", files=INT4),
    Case("GGUF file of nothing", HERE, "no GGUF file", files={**INT4, "tiny.gguf": b""}),
    Case("GGUF file that is a page", HERE, "no GGUF file", files={**INT4, "tiny.gguf": "<html>"}),
    Case(
        "GGUF header alone",
        HERE,
        "version 50529027",
        files={**INT4, "tiny.gguf": b"GGUF" + b"\3" * 40},
    ),
    Case("GGUF file cut short", HERE, "ends at byte", files=INT4, make=changed(lambda b: b[:-99])),
    Case(
        "GGUF file of an old version",
        HERE,
        "version 1",
        files=INT4,
        make=changed(lambda b: b[:4] + struct.pack("<I", 1) + b[8:]),
    ),
    Case(
        "GGUF architecture of nobody",
        HERE,
        "architecture nonex; GGUF files of llama, qwen2",
        files=INT4,
        make=changed(lambda b: b.replace(b"qwen2", b"nonex")),
    ),
    Case(
        "GGUF layers without end",
        HERE,
        "num_hidden_layers is 4294967295",
        files=INT4,
        make=changed(
            lambda b: b.replace(
                b"qwen2.block_count\4\0\0\0\2\0\0\0", b"qwen2.block_count\4\0\0\0\xff\xff\xff\xff"
            )
        ),
    ),
    Case(
        "GGUF of scaled rope",
        HERE,
        "yarn",
        files=INT4,
        make=saved(**{"llama.rope.scaling.type": "yarn"}),
    ),
    Case(
        "GGUF with factors of its rope", HERE, "rope_freqs.weight", files=INT4, make=_with_factors
    ),
    Case(
        "folder of two GGUF files", f"{DRY_RUN} --model model", "name one", files=INT4, make=_two
    ),
    Case("GGUF reference that is none", f"{EVALUATE} --reference t.gguf", "t.gguf is not there"),
    Case(
        "GGUF file of experts' sensitivities that is none",
        f"{SENSITIVITY} --model t.gguf",
        "not there",
    ),
)
