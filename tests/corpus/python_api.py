"""Calls of the Python API: wrong types, wrong names, wrong files; and natural spellings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import alphaquant
from alphaquant.errors import BudgetError, ConfigError, FormatError, ModelError, StoreError
from alphaquant.spaces.budget import parse_budget
from alphaquant.spaces.config import load_config
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.menus import parse_menu
from alphaquant.specs.checkpoint import CheckpointSpec
from alphaquant.specs.evaluate import EvaluateSpec
from alphaquant.specs.quantize import QuantizeSpec
from alphaquant.specs.run import RunSpec
from alphaquant.specs.search import SearchSpec
from alphaquant.specs.sensitivity import SensitivitySpec
from alphaquant.specs.texts import TextSpec
from tests.corpus.engine import Call, Place
from tests.corpus.packed import LAYER, copied, tensors


def _search(name: str, says: str, budget: Any = "4bits", **settings: Any) -> Call:
    """`alphaquant.search` with what it refuses."""
    return Call(name, lambda place: alphaquant.search(budget, **settings), says)


def _spec(name: str, make: Callable[..., Any], says: str, **fields: Any) -> Call:
    """A specification with a field that makes no sense."""
    return Call(name, lambda place: make(**fields), says, error=ConfigError)


def _file(name: str, says: str, content: str | None = None, **settings: Any) -> Call:
    """`alphaquant.search` with a file of options, and options beside it."""
    files = {} if content is None else {"s.toml": content}
    return Call(
        name, lambda place: alphaquant.search(spec="s.toml", **settings), says, files=files
    )


def _quantize(place: Place, **changes: Any) -> Any:
    spec: dict[str, Any] = {
        "model": str(place.tiny),
        "config": place.int4,
        "out": place.here / "out",
        "method": "rtn",
    }
    return alphaquant.quantize(QuantizeSpec.of(**{**spec, **changes}))


def _loaded(place: Place, **options: Any) -> str:
    return type(alphaquant.load(place.packed, **options)).__name__


QUANTIZE: dict[str, Any] = {"model": "m", "config": Path("c"), "out": Path("o")}
FOUR: dict[str, Any] = {"budget": "4bits"}

SEARCHES = (
    _search("no budget", "no budget; give one such as 4.25bits", None),
    _search("budget that is true", "budget is True (bool); give str", True),
    _search("budget of no number", "cannot read the budget 'nan'", float("nan")),
    _search("budget that is bytes", "budget is b'4bits' (bytes)", b"4bits"),
    _search("trials in a text", "trials is '5' (str); give int", trials="5"),
    _search("trials that are true", "trials is True (bool); give int", trials=True),
    _search("trials below one", "trials is 0; must be >= 1", trials=0),
    _search("timeout in words", "timeout is '1h' (str); give float or None", timeout="1h"),
    _search("timeout of NaN", "timeout is nan", timeout=float("nan")),
    _search("output that is a number", "out is 3 (int); give Path", out=3),
    _search("model of None", "model is None; give str", model=None),
    _search("formats that are numbers", "formats is [4] (list); give names", formats=[4]),
    _search("formats in a dict", "formats is {'int4': 1} (dict)", formats={"int4": 1}),
    _search("empty list of formats", "format", formats=[]),
    _search("windows of a fraction", "seq_len is 2.5 (float)", seq_len=2.5),
    _search("one window of evaluation", "evaluation_samples is 1; must", evaluation_samples=1),
    _search("objectives that are numbers", "objectives is [1] (list)", objectives=[1]),
    _search("setting of nobody", "search has no setting 'wq'", wq="x"),
    _search("setting with a slip", "perhaps trials", trails=3),
    _search("setting of former times", "perhaps calibration", n_calibration=3),
    _search("damping in a text", "percdamp", percdamp="x"),
    _search("seed below none in Python", "seed", seed=-1),
    _search("damping of NaN", "percdamp is nan", percdamp=float("nan")),
    _search("sequential search", "no setting 'sequential'", sequential=True),
    _search("mode of nobody", "use knobs or groups", mode="manual"),
    _search("study of blanks", "the study has no name", study=" "),
    _search("part in a text", "texts is 'x' (str); give a TextSpec", texts="x"),
    _search(
        "part and a field of it",
        "texts and seq_len are both given",
        texts=TextSpec(),
        seq_len=64,
    ),
)

FILES = (
    _file("file of options that is not there in Python", "spec s.toml: No such file"),
    _file("file of options that is no TOML", "spec s.toml", "budget: 4bits"),
    _file("unknown option in a file in Python", "perhaps budget", 'budgt = "4bits"'),
    _file("true for a text in a file", "budget is True (bool); give str", "budget = true"),
    _file("text for a number in a file", "trials is '3' (str)", 'budget = "4bits"\ntrials = "3"'),
    _file("wrong setting beside a file", "trials is 0", 'budget = "4bits"\ntrials = 3', trials=0),
)

SPECS = (
    _spec(
        "configuration in a dict", QuantizeSpec, "config is {} (dict)", **QUANTIZE | {"config": {}}
    ),
    _spec("configuration in a text", QuantizeSpec, "config is 'c'", **QUANTIZE | {"config": "c"}),
    _spec("quantizer in a text", QuantizeSpec, "quantizer is 'rtn'", **QUANTIZE, quantizer="rtn"),
    _spec("strict in words", QuantizeSpec, "strict is 'yes'", **QUANTIZE, strict="yes"),
    _spec("tasks in a tuple", EvaluateSpec, "tasks is ('kl',)", model="m", tasks=("kl",)),
    _spec("samples in a text", EvaluateSpec, "samples is '4'", model="m", samples="4"),
    _spec("task data in a text", EvaluateSpec, "task_data is 'x'", model="m", task_data="x"),
    _spec("output in a text", RunSpec, "out is 'text' (str); give Path", out="text"),
    _spec("device of None", EvaluateSpec, "device is None", model="m", device=None),
    _spec("format of None", SensitivitySpec, "format is None", format=None),
    _spec(
        "sensitivity without a format in Python", SensitivitySpec.of, "sensitivity needs format"
    ),
    _spec("no configuration", QuantizeSpec.of, "quantize needs config", model="m"),
    _spec("model that is true", SensitivitySpec.of, "model is True", format="int4", model=True),
    _spec("search of a Path", CheckpointSpec, "model is", model=Path("m")),
    _spec("limits in a text", SearchSpec, "limits is 'x'", limits="x"),
    _spec("parts in a dict", SearchSpec.of, "run is {}", **FOUR, run={}),
    _spec(
        "layer minimum in words",
        SearchSpec.of,
        "layer_minimum_bits",
        **FOUR,
        layer_minimum_bits="3",
    ),
    _spec("layer minimum of none", SearchSpec.of, "must be > 0", **FOUR, layer_minimum_bits=0),
)

RUNS = (
    Call("search of None", lambda p: alphaquant.run_search(None), "SearchSpec"),
    Call("quantize a text", lambda p: alphaquant.quantize("m"), "QuantizeSpec"),
    Call("evaluate a text", lambda p: alphaquant.evaluate("m"), "EvaluateSpec"),
    Call(
        "unknown setting of quantize",
        lambda p: _quantize(p, methd="rtn"),
        "perhaps method",
        error=ConfigError,
    ),
    Call(
        "method of nobody",
        lambda p: _quantize(p, method="awq"),
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
        "seq_len is 1; must be >= 2",
    ),
    Call(
        "no window in Python",
        lambda p: _quantize(p, calibration_samples=0),
        "calibration_samples is 0; must be >= 1",
    ),
    Call(
        "device of nobody",
        lambda p: _quantize(p, device="quantum"),
        "use cpu, cuda or auto",
        error=ModelError,
    ),
    Call(
        "evaluate in batches of none",
        lambda p: alphaquant.evaluate(EvaluateSpec(model=str(p.tiny), batch_size=0)),
        "batch_size is 0",
        error=ConfigError,
    ),
    Call(
        "evaluate one window less than one",
        lambda p: alphaquant.evaluate(EvaluateSpec(model=str(p.tiny), samples=0)),
        "samples is 0",
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
    Call("spec of a slip", lambda p: SearchSpec.of(**FOUR, modle="m"), "perhaps mode, model"),
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
        lambda p: SearchSpec.of(**FOUR, formats=["int4-g64", "int8-row"]).limits.formats,
        None,
        "int4-g64,int8-row",
    ),
    Call(
        "model in a Path",
        lambda p: SearchSpec.of(**FOUR, model=Path("a"), out="b").checkpoint.model,
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

CALLS = (*SEARCHES, *FILES, *SPECS, *RUNS, *LOADS, *PARTS, *RIGHT)
