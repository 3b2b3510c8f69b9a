"""Runs one other quantizer on one model and writes its weights, dequantized, for `quantizer.py`.

The worker of the comparison: it runs in the interpreter that has the peers installed, imports
nothing of this project, and talks through files only. Peers that choose a format per matrix are in
`choosers.py`, which shares the functions here.

    python benchmarks/peers.py JOB.json FOLDER

`JOB.json` holds `peer` (a key of `PEERS`), `options` (of that peer), `model` (a directory),
`tokens` (a safetensors file with `tokens` [N, T]) and `format` (`family` int, mxfp or nvfp,
`bits`, `group_size`, `symmetric`). FOLDER gets `weights.safetensors`, float32 [rows, cols] under
each matrix's path, and `report.json`.

All peers get the model in float32, the same windows in the same order, and quantize every linear
of the decoder layers; router, embeddings and head stay. transformers keeps a layer's experts in
fused tensors; the three peers unfuse them to one linear per projection by their own means. Their
random seeds are fixed.
"""

import importlib
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SEED = 42
BATCH_SIZE = 8
_DISTRIBUTIONS = (
    *("auto-round", "llmcompressor", "compressed-tensors", "gptqmodel", "defuser"),
    *("nvidia-modelopt", "torch", "transformers"),
)


class Clock:
    """Wall time and processor time of all threads, from its making to `stop`, seconds."""

    def __init__(self) -> None:
        """Start."""
        self._started = time.perf_counter(), time.process_time()
        self.seconds = self.cpu_seconds = 0.0

    def stop(self) -> "Clock":
        """Take the times."""
        self.seconds = time.perf_counter() - self._started[0]
        self.cpu_seconds = time.process_time() - self._started[1]
        return self


def auto_round(job: dict[str, Any]) -> tuple[Any, Clock]:
    """AutoRound: round-to-nearest with `iters` 0, else rounding learnt by signed gradients."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    asked = job["format"]
    data_type = {"int": "int", "mxfp": "mx_fp", "nvfp": "nv_fp"}[asked["family"]]
    tokens = read_tokens(job)
    clock = Clock()
    rounder = AutoRound(
        load_model(job),
        AutoTokenizer.from_pretrained(job["model"]),
        bits=asked["bits"],
        group_size=asked["group_size"],
        sym=asked["symmetric"],
        data_type=data_type,
        act_bits=16,
        dataset=torch.utils.data.DataLoader(tokens, batch_size=BATCH_SIZE),
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        batch_size=BATCH_SIZE,
        seed=SEED,
        amp=False,
        device_map="cpu",
        disable_model_free=True,
        **job["options"],
    )
    model, _ = rounder.quantize()
    return model, clock.stop()


def llm_compressor(job: dict[str, Any]) -> tuple[Any, Clock]:
    """llm-compressor's GPTQ, with its own defaults; `options` go to `oneshot`."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    asked = job["format"]
    presets = {"mxfp": "MXFP4A16", "nvfp": "NVFP4A16"}
    scheme: dict[str, Any]
    if asked["family"] == "int":
        weights = {
            "num_bits": asked["bits"],
            "type": "int",
            "symmetric": asked["symmetric"],
            "strategy": "group",
            "group_size": asked["group_size"],
        }
        scheme = {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}}
    else:
        scheme = {"targets": ["Linear"], "scheme": presets[asked["family"]]}
    tokens = read_tokens(job)
    windows = {
        "input_ids": tokens.tolist(),
        "attention_mask": torch.ones_like(tokens).tolist(),
    }
    model = load_model(job)
    clock = Clock()
    oneshot(
        model=model,
        dataset=Dataset.from_dict(windows),
        recipe=GPTQModifier(ignore=["lm_head", "re:.*mlp.gate$"], **scheme),
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
        batch_size=BATCH_SIZE,
        **job["options"],
    )
    return model, clock.stop()


def gptq_model(job: dict[str, Any]) -> tuple[Any, Clock]:
    """GPTQModel's GPTQ, with its own defaults; `options` go to `QuantizeConfig`."""
    # Its thread pool asks for two workers but sizes itself to one on two cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    asked = job["format"]
    if asked["family"] != "int":
        raise ValueError(f"{asked['family']} is not among the formats of this peer")
    config = QuantizeConfig(
        bits=asked["bits"],
        group_size=asked["group_size"],
        sym=asked["symmetric"],
        device="cpu",
        offload_to_disk=False,
        **job["options"],
    )
    wrapper = GPTQModel.load(job["model"], config, dtype=torch.float32)
    windows = [{"input_ids": w, "attention_mask": [1] * len(w)} for w in read_tokens(job).tolist()]
    clock = Clock()
    wrapper.quantize(windows, batch_size=BATCH_SIZE)
    return wrapper.model, clock.stop()


PEERS = {"auto-round": auto_round, "llmcompressor": llm_compressor, "gptqmodel": gptq_model}
"""Distribution name -> function that quantizes a model: (job) -> (model, its time)."""


_MODULES = {"auto-round": "auto_round"}


def read_tokens(job: dict[str, Any]) -> Any:
    """The calibration windows, int64 [N, T]."""
    from safetensors.torch import load_file

    return load_file(job["tokens"])["tokens"]


def load_model(job: dict[str, Any]) -> Any:
    """The model in float32 on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)


def layer_weights(model: Any) -> dict[str, Any]:
    """Weights of all linears in decoder layers, packed ones dequantized: path -> [rows, cols]."""
    import torch

    found = {}
    for name, module in model.named_modules():
        if ".layers." not in name:
            continue
        if hasattr(module, "gate_up_proj") and module.gate_up_proj.ndim == 3:
            for expert, (fused, down) in enumerate(
                zip(module.gate_up_proj, module.down_proj, strict=True)
            ):
                found[f"{name}.{expert}.gate_proj"], found[f"{name}.{expert}.up_proj"] = (
                    half.detach().to(torch.float32).clone() for half in fused.chunk(2)
                )
                found[f"{name}.{expert}.down_proj"] = down.detach().to(torch.float32).clone()
            continue
        if hasattr(module, "dequantize_weight"):
            weight = module.dequantize_weight().T  # [cols, rows] -> [rows, cols]
        elif isinstance(module, torch.nn.Linear):
            weight = module.weight
        else:
            continue
        found[name] = weight.detach().to(torch.float32).contiguous().clone()
    return found


def peak_memory() -> int:
    """Most memory that this process has held since it started, bytes.

    `ru_maxrss` survives exec, so in a child it is at least what its parent held; Linux has a count
    per address space beside it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def installed() -> dict[str, str]:
    """Versions of the peers that this interpreter has, and of what they run on."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def times(clock: Clock) -> dict[str, float]:
    """A stopped clock as a report holds it."""
    return {"seconds": clock.seconds, "cpu_seconds": clock.cpu_seconds}


def write_result(folder: Path, model: Any, facts: Mapping[str, Any]) -> None:
    """Write `weights.safetensors` and, last, `report.json`: facts, memory, threads, versions."""
    import torch
    from safetensors.torch import save_file

    report = {
        **facts,
        "peak_memory_bytes": peak_memory(),
        "threads": torch.get_num_threads(),
        "versions": installed(),
    }
    save_file(layer_weights(model), folder / "weights.safetensors")
    (folder / "report.json").write_text(json.dumps(report))


def read_job(modules: Mapping[str, str]) -> dict[str, Any]:
    """The job named on the command line; imports its peer, so that a missing one fails at once.

    Args:
        modules: peer -> module, where they differ.
    """
    job = dict(json.loads(Path(sys.argv[1]).read_text()))
    importlib.import_module(modules.get(job["peer"], job["peer"]))
    import torch

    torch.manual_seed(SEED)
    return job


def main() -> None:
    """Run the job, or print `installed()` as JSON when called with `versions`."""
    if sys.argv[1:] == ["versions"]:
        print(json.dumps(installed()))
        return
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    job = read_job(_MODULES)
    model, clock = PEERS[job["peer"]](job)
    write_result(Path(sys.argv[2]), model, times(clock))


if __name__ == "__main__":
    main()
