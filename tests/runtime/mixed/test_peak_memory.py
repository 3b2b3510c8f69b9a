"""Memory of loading: no checkpoint is in memory a second time.

A process of its own loads (`peak_memory.py`), and this one reads its anonymous memory every few
milliseconds: pages of mapped files, which the system can take back at any time, do not count.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from alphaquant.testing.checkpoints import save_tiny
from alphaquant.testing.foreign.encoders import fp8, save_foreign

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
SHARD = 20_000_000
SLACK = 16_000_000
"""Of what else a program takes meanwhile: headers, names, the allocator's own."""
SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 128, "intermediate_size": 128},
    "large": {
        **{"hidden_size": 512, "intermediate_size": 512},
        **{"num_experts": 16, "num_hidden_layers": 8},
    },
}


class Made(NamedTuple):
    """A base checkpoint of 226 MB and one of fp8 experts of 123 MB, in shards of 20 MB.

    Attributes:
        folder: holds them, and small ones to warm up with.
        base: bytes of all weights of the model in bfloat16.
        replaced: bytes of the experts in fp8 with their scales.
    """

    folder: Path
    base: int
    replaced: int


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("peak")
    for name, sizes in SIZES.items():
        save_tiny(folder / name / "base", **sizes)
        save_foreign(folder / name / "base", folder / name / "fp8", fp8(), is_expert)
        write_mapping(folder / name, sizes)
    base = load_file(folder / "large" / "base" / "model.safetensors")
    replaced = load_file(folder / "large" / "fp8" / "model.safetensors")
    for name in ("base", "fp8"):
        cut(folder / "large" / name)
    return Made(folder, size_of(base), size_of(replaced, ".experts."))


def is_expert(module: str) -> bool:
    return ".experts." in module


def size_of(tensors: dict[str, Tensor], part: str = "") -> int:
    return sum(t.nbytes for name, t in tensors.items() if part in name)


def write_mapping(folder: Path, sizes: dict[str, Any]) -> None:
    """A `mixed_precision` file with every expert in fp8."""
    names = (
        f"model.layers.{layer}.mlp.experts.{expert}.{end}_weight"
        for layer in range(sizes.get("num_hidden_layers", 2))
        for expert in range(sizes.get("num_experts", 4))
        for end in ("w13", "w2")
    )
    mapping = "\n".join(f"    {name}: fp8" for name in names)
    (folder / "mix.yaml").write_text(
        f"mixed_precision:\n  base_model_path: base\n  fp8_path: fp8\n  weight_mapping:\n{mapping}"
    )


def cut(folder: Path) -> None:
    """Cut a checkpoint of one file into shards."""
    whole = folder / "model.safetensors"
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in load_file(whole).items():
        if shards[-1] and size_of(shards[-1]) + tensor.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = tensor
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    whole.unlink()
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Grown(NamedTuple):
    """Bytes of anonymous memory: at most while it loads, and afterwards, beyond those before."""

    peak: int
    after: int


def grown(kind: str, small: Path, large: Path) -> Grown:
    """Load in a process of its own."""
    script = Path(__file__).with_name("peak_memory.py")
    command = [sys.executable, str(script), kind, str(small), str(large)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "warm\n"
        before, peak = anonymous(process.pid), 0
        for found in watch(process):
            peak = max(peak, found)
        after = int(process.stdout.readline())
    assert process.returncode == 0
    found = Grown(peak - before, after - before)
    print(f"{kind}: {found} bytes")  # docs/serving.md has them: pytest -s
    return found


def watch(process: "subprocess.Popen[str]") -> Iterator[int]:
    """The anonymous memory of a process, again and again until it ends."""
    while process.poll() is None:
        yield anonymous(process.pid)
        time.sleep(0.005)


def anonymous(pid: int) -> int:
    """Bytes; 0 of a process that has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(1024 * int(x.split()[1]) for x in lines if x.startswith("RssAnon:"))


def test_a_mixed_model_takes_its_base_a_shard_and_what_it_replaces(made: Made) -> None:
    """Capability 85; afterwards the replaced weights of the base are gone."""
    small, large = (made.folder / name / "mix.yaml" for name in SIZES)
    found = grown("mixed", small, large)
    assert made.base // 2 < found.peak < made.base + SHARD + made.replaced + SLACK
    assert found.after < made.base // 4 + made.replaced + SLACK


def test_a_checkpoint_that_transformers_dequantizes_is_in_memory_once(made: Made) -> None:
    small, large = (made.folder / name / "fp8" for name in SIZES)
    found = grown("quantized", small, large)
    assert made.base // 2 < found.peak < made.base + SHARD + made.replaced + SLACK
