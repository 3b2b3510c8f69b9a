"""Configuration files: what is no JSON, what is of another tool, and what makes no sense."""

import json
import os
from typing import Any

from tests.corpus.engine import DRY_RUN, Case, Place

INSPECT = "aq-inspect c.json --model {tiny}"
GOOD: dict[str, Any] = {"default": {"wq": "int4", "group_size": 32}}
NAME = "model.layers.1.self_attn.q_proj"


def _inspected(name: str, content: Any, says: str, code: int = 1) -> Case:
    """A file that aq-inspect is given; text as it is, anything else as JSON."""
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    return Case(name, INSPECT, says, code, files={"c.json": text})


def _planned(name: str, content: Any, says: str, *options: str) -> Case:
    """A file that aq-quantize makes a plan of."""
    command = " ".join((DRY_RUN, *options))
    return Case(name, command, says, files={"c.json": json.dumps(content)})


def _default(name: str, says: str, **fields: Any) -> Case:
    return _planned(name, {"default": fields}, says)


def _override(name: str, says: str, *overrides: Any) -> Case:
    return _planned(name, {**GOOD, "overrides": overrides}, says)


def _summary(name: str, says: str, **parts: Any) -> Case:
    return _planned(name, {**GOOD, "summary": parts}, says)


def _folder(place: Place) -> None:
    (place.here / "c.json").mkdir()


def _loop(place: Place) -> None:
    os.symlink("c.json", place.here / "c.json")


NO_JSON = (
    _inspected("configuration of nothing", "", "not JSON"),
    _inspected("configuration of blanks", " \n\n", "not JSON"),
    _inspected("configuration cut short", '{"default": {"wq": "int4"', "not JSON"),
    _inspected("wrong bracket", "{]", "line 1, column 2: not JSON"),
    _inspected("comment", "{} // ours", "JSON has no // comments"),
    _inspected("single quotes", "{'default': {}}", "not JSON"),
    _inspected("utf-16", json.dumps(GOOD).encode("utf-16"), "UTF-8"),
    _inspected("zeros", b"\0" * 99, "not JSON"),
    _inspected("key that stands twice", '{"default": {}, "default": {}}', "stands twice"),
    _inspected("lists in 1000 lists", '{"default": ' + "[" * 1000 + "]" * 1000 + "}", "64 deep"),
    _inspected("lists in 99999 lists", "[" * 99999, "64 deep"),
    _inspected("a list", [GOOD], "top level"),
    _inspected("null", None, "top level"),
    _inspected("a text", '"int4"', "top level"),
    _inspected(
        "recipe of YAML", "quant_stage:\n  quant_modifiers:\n    GPTQModifier:\n", "llm-compressor"
    ),
    Case("configuration that is not there", INSPECT, "c.json"),
    Case("configuration that is a folder", INSPECT, "c.json", make=_folder),
    Case("configuration that is a circle of links", INSPECT, "c.json", make=_loop),
    Case("configuration without an end", "aq-inspect /dev/zero --model {tiny}", "longer than"),
    Case("configuration of nothing at all", "aq-inspect '' --model {tiny}", "without best.json"),
    Case("configuration without a model", "aq-inspect {int4}", "give --model"),
)

VALUES = (
    _default("unknown format in a default", "int7", wq="int7"),
    _default("format of null", "default.wq", wq=None),
    _default("format that is a list", "default.wq", wq=["int4"]),
    _default("format of nothing", "default.wq", wq=""),
    _default("group of none", "8 to 16777216", wq="int4", group_size=0),
    _default("negative group", "8 to 16777216", wq="int4", group_size=-2),
    _default("group of a fraction", "group_size", wq="int4", group_size=32.5),
    _default("group in words", "group_size", wq="int4", group_size="32"),
    _default("group that is true", "group_size", wq="int4", group_size=True),
    _default("group of thirty digits", "8 to 16777216", wq="int4", group_size=10**30),
    _default("group of NaN", "group_size", wq="int4", group_size=float("nan")),
    _default("group of infinity", "group_size", wq="int4", group_size=float("inf")),
    _default("unknown field", "did you mean wq", wqq="int4"),
    _planned("default that is a list", {"default": ["int4"]}, "default"),
    _planned("unknown key", {"defaults": {}}, "did you mean default?"),
    _planned("overrides that are an object", {**GOOD, "overrides": {}}, "overrides"),
    _override("override that is a text", "overrides", "int4"),
    _override("override without a pattern", "pattern", {"wq": "int8"}),
    _override("pattern of nothing", "pattern", {"pattern": "", "wq": "int8"}),
    _override("pattern that is a number", "pattern", {"pattern": 5, "wq": "int8"}),
    _planned(
        "pattern that matches nothing, strictly",
        {**GOOD, "overrides": [{"pattern": "*.nothing", "wq": "int8"}]},
        "matches nothing",
        "--strict",
    ),
    _inspected(
        "configuration of another model",
        {"overrides": [{"pattern": "h.*", "wq": "int4"}]},
        "of another model than",
    ),
)

SUMMARIES = (
    _planned("summary that is a text", {**GOOD, "summary": "x"}, "summary"),
    _summary("unknown setting", "summary.quantization", quantization={"damping": 1}),
    _summary("setting of null", "is null", quantization={"method": None}),
    _summary("setting of NaN", "percdamp is nan", quantization={"percdamp": float("nan")}),
    _summary("settings that are a list", "summary.quantization", quantization=["gptq"]),
    _summary("too few windows", "n_samples is -4", calibration={"n_samples": -4}),
    _summary("windows in words", "summary.calibration.n_samples", calibration={"n_samples": "4"}),
    _summary("seed below none", "seed is -1", calibration={"seed": -1}),
    _summary("calibration that is a text", "summary.calibration", calibration="wikitext2"),
)

FOREIGN = (
    _planned(
        "configuration of GPTQModel",
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
        "GPTQModel",
    ),
    _planned(
        "configuration of AutoRound",
        {"quant_method": "auto-round", "bits": 4, "layer_config": {NAME: {"bits": 8}}},
        "AutoRound",
    ),
    _planned(
        "configuration of compressed-tensors",
        {"quant_method": "compressed-tensors", "config_groups": {}},
        "compressed-tensors",
    ),
)

COMPARED = (
    Case("compare with no file", "aq-compare {int4} /nowhere.json --model {tiny}", "/nowhere"),
    Case("compare on no model", "aq-compare {int4} {int4} --model /nowhere", "/nowhere"),
    Case("compare without a model", "aq-compare {int4} {int4}", "--model"),
    Case("compare with a text", "aq-compare {int4} {heldout} --model {tiny}", "heldout.txt"),
    Case("compare with a model", "aq-compare {int4} {tiny} --model {tiny}", "tiny"),
    Case(
        "compare with a checkpoint of another model",
        "aq-compare {packed} {int4} --model {dense}",
        "of another model",
    ),
)

RIGHT = (
    _inspected(
        "byte order mark",
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
        "4.5000 bits per weight",
        0,
    ),
    _inspected(
        "control characters",
        {**GOOD, "summary": {"model": "\x1b[1mbold\x1b[0m"}},
        "4.5000 bits per weight",
        0,
    ),
    Case("compare with itself", "aq-compare {packed} {packed}", "equal: 32 matrices", 0),
    Case("inspect of a search", "aq-inspect {found}", "bits per weight", 0),
)

CASES = (*NO_JSON, *VALUES, *SUMMARIES, *FOREIGN, *COMPARED, *RIGHT)
