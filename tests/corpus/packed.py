"""Packed checkpoints: damaged, of another quantizer, or of another model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.corpus.engine import EVALUATE, Case, Make

LAYER, KEPT, INDEX = (
    "model-layer-001.safetensors",
    "model-kept.safetensors",
    "model.safetensors.index.json",
)
RUN = f"{EVALUATE} --model copy"
VERIFY = "aq-inspect copy --verify"


def copied(change: Callable[[Path], object]) -> Make:
    """A copy of the packed checkpoint, with one change, in `copy`."""

    def make(place: Any) -> None:
        change(Path(shutil.copytree(place.packed, place.here / "copy")))

    return make


def _case(name: str, change: Callable[[Path], object], says: str, command: str = RUN) -> Case:
    return Case(name, command, says, make=copied(change))


def tensors(file: str, change: Callable[[dict[str, Tensor]], object]) -> Make:
    """A copy whose tensors in one file are changed, without its list of checksums."""

    def rewrite(folder: Path) -> None:
        found = load_file(folder / file)
        change(found)
        save_file(found, folder / file, metadata={"format": "pt"})
        (folder / "SHA256SUMS").unlink()

    return copied(rewrite)


def _scales(value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda t: t[min(n for n in t if n.endswith(".scales"))].fill_(value)


def _flipped(file: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        content[-5] ^= 4
        (folder / file).write_bytes(content)

    return change


def _cut(folder: Path) -> None:
    content = (folder / LAYER).read_bytes()
    (folder / LAYER).write_bytes(content[:-100])


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def rewrite(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        change(content)
        (folder / "config.json").write_text(json.dumps(content))
        (folder / "SHA256SUMS").unlink()

    return rewrite


def _stated(value: Any) -> Callable[[Path], object]:
    """Another quantization_config."""
    return _config(lambda c: c.update(quantization_config=value))


def _index(content: Any) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / INDEX).write_text(json.dumps(content))
        (folder / "SHA256SUMS").unlink()

    return write


FILES = (
    _case("bit that flipped in a layer", _flipped(LAYER), LAYER),
    _case("bit that flipped in what stays", _flipped(KEPT), KEPT),
    _case("bit that flipped, verified", _flipped(LAYER), "not what aq-quantize wrote", VERIFY),
    _case("layer cut short", _cut, LAYER),
    _case("layer cut short, verified", _cut, LAYER, VERIFY),
    _case("layer that is missing", lambda f: (f / LAYER).unlink(), LAYER),
    _case("layer that is missing, verified", lambda f: (f / LAYER).unlink(), LAYER, VERIFY),
    _case("index that is missing", lambda f: (f / INDEX).unlink(), INDEX),
    _case("index that is no object", _index([]), INDEX),
    _case("index with a number", _index({"weight_map": {"lm_head.weight": 5}}), INDEX),
    _case("index that leaves", _index({"weight_map": {"a": "../x.safetensors"}}), "outside"),
    _case(
        "checksums of nothing",
        lambda f: (f / "SHA256SUMS").write_text(""),
        "SHA256SUMS",
        VERIFY,
    ),
    _case(
        "checksums of zeros",
        lambda f: (f / "SHA256SUMS").write_bytes(b"\0" * 99),
        "SHA256SUMS",
        VERIFY,
    ),
    Case("verify what is no checkpoint", "aq-inspect {tiny} --verify", "tiny"),
    Case("verify what is not there", "aq-inspect /nowhere --verify", "/nowhere"),
    Case("verify a file", "aq-inspect {int4} --verify", "int4.json"),
)

TENSORS = (
    Case("scales of NaN", VERIFY, LAYER, make=tensors(LAYER, _scales(torch.nan))),
    Case("scales without end", VERIFY, LAYER, make=tensors(LAYER, _scales(torch.inf))),
    Case(
        "codes that are missing",
        RUN,
        "codes",
        make=tensors(LAYER, lambda t: t.pop(min(n for n in t if n.endswith(".codes")))),
    ),
    Case(
        "codes of another shape",
        RUN,
        "codes",
        make=tensors(
            LAYER,
            lambda t: t.update({min(n for n in t if n.endswith(".codes")): torch.ones(2, 2)}),
        ),
    ),
    Case(
        "norm that is gone", RUN, "norm", make=tensors(KEPT, lambda t: t.pop("model.norm.weight"))
    ),
)

CONFIGS = (
    _case("checkpoint of AWQ", _stated({"quant_method": "awq"}), "copy"),
    _case("checkpoint of no quantization", _stated(None), "copy"),
    _case("quantization that is a list", _stated([]), "quantization_config"),
    _case("quantization without formats", _stated({"quant_method": "alphaquant"}), "copy"),
    _case(
        "checkpoint of a later version",
        _config(lambda c: c["quantization_config"].update(version=99)),
        "99",
    ),
    _case(
        "format of nobody",
        _config(lambda c: c["quantization_config"].update(default="int9")),
        "copy",
    ),
    _case("one layer less", _config(lambda c: c.update(num_hidden_layers=1)), "copy"),
    _case("two experts more", _config(lambda c: c.update(num_experts=6)), "copy"),
    Case(
        "inspect on another model",
        "aq-inspect {packed} --model {dense}",
        "of another model",
    ),
)

RIGHT = (
    Case("verify a whole one", "aq-inspect {packed} --verify", "are what was written", 0),
    Case("inspect a packed one", "aq-inspect {packed}", "4.5000 bits per weight", 0),
    Case(
        "packed one in float64", f"{EVALUATE} --model {{packed}} --dtype float64", "perplexity", 0
    ),
    Case("scores of a packed one", f"{EVALUATE} --model {{packed}}", "perplexity", 0),
)

CASES = (*FILES, *TENSORS, *CONFIGS, *RIGHT)
