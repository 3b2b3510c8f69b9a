"""Calls of the Python API: wrong types, wrong names, wrong files; and natural spellings."""

from pathlib import Path
from typing import Any

import alphaquant
from alphaquant.errors import BudgetError, ConfigError, FormatError, ModelError, StoreError
from alphaquant.spaces.budget import parse_budget
from alphaquant.spaces.config import load_config
from alphaquant.spaces.formats import parse_format, parse_menu
from alphaquant.specs.evaluate import EvaluateSpec
from alphaquant.specs.flat import replaced
from alphaquant.specs.quantize import QuantizeSpec
from alphaquant.specs.search import SearchSpec
from alphaquant.specs.sensitivity import SensitivitySpec
from tests.corpus.engine import Call, Place
from tests.corpus.packed import LAYER, copied, tensors


def _search(name: str, says: str, budget: Any = "4bits", **settings: Any) -> Call:
    """`alphaquant.search` with what it refuses."""
    return Call(name, lambda place: alphaquant.search(budget, **settings), says)


def _spec(name: str, kind: Any, says: str, **fields: Any) -> Call:
    """A specification with a field that makes no sense."""
    return Call(name, lambda place: kind(**fields), says, error=ConfigError)


def _quantize(place: Place, **changes: Any) -> Any:
    spec: dict[str, Any] = {
        "model": str(place.tiny),
        "config": place.int4,
        "out": place.here / "out",
        "quant": {"method": "rtn"},
    }
    return alphaquant.quantize(QuantizeSpec(**{**spec, **changes}))


def _loaded(place: Place, **options: Any) -> str:
    return type(alphaquant.load(place.packed, **options)).__name__


QUANTIZE: dict[str, Any] = {"model": "m", "config": Path("c"), "out": Path("o")}

SEARCHES = (
    _search("budget of None", "budget is None; give str", None),
    _search("budget that is a number", "budget is 4.25 (float); give str", 4.25),
    _search("budget that is bytes", "budget is b'4bits' (bytes)", b"4bits"),
    _search("trials in a text", "trials is '5' (str); give int", trials="5"),
    _search("trials that are true", "trials is True (bool); give int", trials=True),
    _search("trials below one", "trials is 0; use 1 or more", trials=0),
    _search("timeout in words", "timeout is '1h' (str); give float or None", timeout="1h"),
    _search("timeout of NaN", "timeout is nan", timeout=float("nan")),
    _search("output that is a number", "out is 3 (int); give Path", out=3),
    _search("model of None", "model is None; give str", model=None),
    _search("formats that are numbers", "formats is [4] (list); give names", formats=[4]),
    _search("formats in a dict", "formats is {'int4': 1} (dict)", formats={"int4": 1}),
    _search("no formats in a list", "format", formats=[]),
    _search("windows of a fraction", "seq_len is 2.5 (float)", seq_len=2.5),
    _search("one window of evaluation", "n_evaluation is 1; use 2", n_evaluation=1),
    _search("objectives in a list", "objectives is ['kl'] (list)", objectives=["kl"]),
    _search("setting of nobody", "search has no setting 'data'", data="x"),
    _search("setting with a slip", "perhaps trials", trails=3),
    _search("damping in a text", "percdamp", percdamp="x"),
    _search("seed below none in Python", "seed", seed=-1),
    _search("damping of NaN", "percdamp is nan", percdamp=float("nan")),
    _search("setting under both names", "also and reported are one", also="a", reported="b"),
    _search("sequential search", "use it with aq-quantize", sequential=True),
    _search("mode of nobody", "use one of auto, knobs, groups", mode="manual"),
    _search("study of blanks", "--study NAME", study=" "),
)

SPECS = (
    _spec(
        "configuration in a dict", QuantizeSpec, "config is {} (dict)", **QUANTIZE | {"config": {}}
    ),
    _spec("configuration in a text", QuantizeSpec, "config is 'c'", **QUANTIZE | {"config": "c"}),
    _spec("quant in a text", QuantizeSpec, "quant is 'rtn'", **QUANTIZE, quant="rtn"),
    _spec("strict in words", QuantizeSpec, "strict is 'yes'", **QUANTIZE, strict="yes"),
    _spec("tasks in a text", EvaluateSpec, "tasks is 'kl'", model="m", tasks="kl"),
    _spec("samples in a text", EvaluateSpec, "n_samples is '4'", model="m", n_samples="4"),
    _spec("task data in a text", EvaluateSpec, "task_data is 'x'", model="m", task_data="x"),
    _spec("output in a text", SearchSpec, "out is 'text' (str); give Path", out="text"),
    _spec("device of None", EvaluateSpec, "device is None", model="m", device=None),
    _spec("format of None", SensitivitySpec, "format is None", format=None),
    _spec("sensitivity of a Path", SensitivitySpec, "model", format="int4", model=Path("m")),
    _spec("search of a Path", SearchSpec, "model is", model=Path("m")),
    _spec("data in a text", SearchSpec, "data is 'x'", data="x"),
    _spec("layer minimum in words", SearchSpec, "layer_minimum_bits", layer_minimum_bits="3"),
)

RUNS = (
    Call("search of None", lambda p: alphaquant.run_search(None), "SearchSpec"),
    Call("quantize a text", lambda p: alphaquant.quantize("m"), "QuantizeSpec"),
    Call("evaluate a text", lambda p: alphaquant.evaluate("m"), "EvaluateSpec"),
    Call(
        "unknown setting of quantize",
        lambda p: _quantize(p, quant={"methd": "rtn"}),
        "methd",
        error=ConfigError,
    ),
    Call(
        "method of nobody",
        lambda p: _quantize(p, quant={"method": "awq"}),
        "gptq or rtn",
        error=ConfigError,
    ),
    Call(
        "model type of nobody",
        lambda p: _quantize(p, model_type="olmo"),
        "olmoe",
        error=ModelError,
    ),
    Call(
        "windows of one token in Python",
        lambda p: _quantize(p, seq_len=1),
        "seq_len is 1; use 2 or more",
    ),
    Call(
        "no window in Python",
        lambda p: _quantize(p, n_calibration=0),
        "n_calibration is 0; use 1 or more",
    ),
    Call(
        "device of nobody",
        lambda p: _quantize(p, device="quantum"),
        "use cpu, cuda or auto",
        error=ModelError,
    ),
    Call(
        "evaluate in batches of none",
        lambda p: alphaquant.evaluate(EvaluateSpec(str(p.tiny), tasks=("ppl",), batch_size=0)),
        "batch_size is 0",
        error=ConfigError,
    ),
    Call(
        "evaluate one window less than one",
        lambda p: alphaquant.evaluate(EvaluateSpec(str(p.tiny), tasks=("ppl",), n_samples=0)),
        "n_samples",
    ),
)

LOADS = (
    Call("load what is not there", lambda p: alphaquant.load("/nowhere"), "/nowhere"),
    Call("load None", lambda p: alphaquant.load(None), "None"),
    Call("load a number", lambda p: alphaquant.load(5), "5"),
    Call("load a model", lambda p: alphaquant.load(p.tiny), "tiny", error=ModelError),
    Call("load a file", lambda p: alphaquant.load(p.int4), "int4.json"),
    Call("load in int8", lambda p: _loaded(p, dtype="int8"), "unknown dtype", error=ModelError),
    Call("load in a number", lambda p: _loaded(p, dtype=16), "unknown dtype", error=ModelError),
    Call("load on CUDA", lambda p: _loaded(p, device="cuda"), "CUDA", error=ModelError),
    Call("load on nothing", lambda p: _loaded(p, device="quantum"), "quantum"),
    Call("kernels on a CPU", lambda p: _loaded(p, kernels=True), "kernels"),
    Call("negative cache", lambda p: _loaded(p, dequant_cache=-1), "-1"),
    Call(
        "load a layer that is missing",
        lambda p: alphaquant.load(p.here / "copy"),
        LAYER,
        make=copied(lambda folder: (folder / LAYER).unlink()),
        error=StoreError,
    ),
    Call(
        "load without a norm",
        lambda p: alphaquant.load(p.here / "copy"),
        "norm",
        make=tensors("model-kept.safetensors", lambda t: t.pop("model.norm.weight")),
        error=StoreError,
    ),
)

PARTS = (
    Call("format with a blank", lambda p: parse_format("int4 g64"), "int4 g64", error=FormatError),
    Call("format of seven", lambda p: parse_format("int7"), "int7", error=FormatError),
    Call("menu of nothing", lambda p: parse_menu(""), "format", error=FormatError),
    Call("budget of half", lambda p: parse_budget("bits"), "'bits'", error=BudgetError),
    Call("load no configuration", lambda p: load_config(p.here / "c"), "c", error=ConfigError),
    Call("spec of a slip", lambda p: make_spec("4bits", {"modle": "m"}), "perhaps mode, model"),
    Call(
        "name of nobody",
        lambda p: alphaquant.serach,
        "no attribute 'serach'",
        error=AttributeError,
    ),
)

RIGHT = (
    Call("load a checkpoint", _loaded, None, "OlmoeForCausalLM"),
    Call(
        "load in a torch dtype", lambda p: _loaded(p, dtype="bfloat16"), None, "OlmoeForCausalLM"
    ),
    Call(
        "formats in a list",
        lambda p: make_spec("4bits", {"formats": ["int4-g64", "int8-row"]}).formats,
        None,
        "int4-g64,int8-row",
    ),
    Call(
        "model in a Path",
        lambda p: make_spec("4bits", {"model": Path("a"), "out": "b"}).model,
        None,
        "a",
    ),
    Call("quantize in Python", lambda p: _quantize(p).quantized_bytes, None, 18432),
    Call(
        "budget in other words",
        lambda p: parse_budget("1.5GiB").canonical,
        None,
        "1536MiB",
    ),
)

CALLS = (*SEARCHES, *SPECS, *RUNS, *LOADS, *PARTS, *RIGHT)
