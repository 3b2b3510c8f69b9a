"""From configurations to packed checkpoints: flags over summary over default."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alphaquant.commands import quantize as command
from alphaquant.commands.quantize import dry_run, plan_text, quantize, result_json
from alphaquant.errors import ConfigError, DataError, ModelError, StoreError
from alphaquant.quant import layerwise
from alphaquant.runtime import pipeline
from alphaquant.runtime.checkpoint import quantized_bytes
from alphaquant.runtime.checkpoint_files import read_tensors
from alphaquant.specs.quantize import QuantizeSpec
from alphaquant.studies.result import SearchResult

MakeQuantize = Callable[..., QuantizeSpec]


@pytest.fixture
def make(tiny: Path, texts: dict[str, Path], tmp_path: Path) -> MakeQuantize:
    """Make a small quantization of a configuration given as JSON data."""

    def make_spec(content: Any, **changes: Any) -> QuantizeSpec:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(content))
        values = {
            "model": str(tiny),
            "config": path,
            "out": tmp_path / "out",
            "calibration": str(texts["calibration"]),
            "calibration_samples": 4,
            "seq_len": 32,
        }
        return QuantizeSpec.of(**{**values, **changes})

    return make_spec


INT4 = {"default": {"wq": "int4", "group_size": 32}}


def report_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "quantize_report.json").read_text())
    return content


def test_bytes_on_disk_are_those_that_the_summary_says(
    make: MakeQuantize, found: SearchResult, tmp_path: Path
) -> None:
    best = found.folder.path / "best.json"
    summary = json.loads(best.read_text())["summary"]
    spec = make(INT4, config=best, calibration=None, calibration_samples=None, seq_len=None)
    result = quantize(spec)
    assert result.quantized_bytes == summary["quantized_bytes"] == quantized_bytes(spec.out)
    assert result.checkpoint_bytes == summary["checkpoint_bytes"]
    assert report_of(spec.out)["calibration"] == summary["calibration"]
    assert report_of(spec.out)["assignment_digest"] == summary["assignment_digest"]
    (row,) = summary["heldout"]
    scores = ("kl", "kl_stderr", "same_top", "perplexity")
    expected = {**{name: row[name] for name in scores}, "text": summary["heldout_text"]}
    assert report_of(spec.out)["searched"] == expected
    assert not list(tmp_path.glob("*.part"))


def test_what_its_search_quantized_is_taken_from_the_bank(
    make: MakeQuantize, found: SearchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best, cache = found.folder.path / "best.json", found.spec.run.cache
    unset = dict.fromkeys(("calibration", "calibration_samples", "seq_len"))
    made = quantize(make(INT4, config=best, **unset, cache=tmp_path / "empty"))
    monkeypatch.setattr(layerwise, "quantize_layer", None)  # nothing is quantized anew
    taken = quantize(make(INT4, config=best, **unset, cache=cache, out=tmp_path / "taken"))
    for file in sorted(made.path.glob("*.safetensors")):
        assert (taken.path / file.name).read_bytes() == file.read_bytes()
    reports = [report_of(x.path) for x in (made, taken)]
    assert reports[0]["bank"] is None
    assert reports[1]["bank"]["key"] == found.provenance.bank
    assert reports[1]["bank"]["versions"] == found.provenance.versions
    assert {r["rounded_on"] for r in (*reports, reports[1]["bank"])} == {"cpu"}
    assert reports[0]["utilization"] == reports[1]["utilization"]
    rows = [[{**m, "seconds": 0} for m in r["matrices"]] for r in reports]
    by_name = [sorted(r, key=lambda m: m["matrix"]) for r in rows]
    assert by_name[0] == by_name[1]


def test_a_damaged_bank_is_refused(
    make: MakeQuantize, found: SearchResult, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(found.spec.run.cache, cache)
    for file in (cache / "banks").rglob("layer-000*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    unset = dict.fromkeys(("calibration", "calibration_samples", "seq_len"))
    with pytest.raises(StoreError, match="its sha256 differs from the one written with it"):
        quantize(make(INT4, config=found.folder.path / "best.json", **unset, cache=cache))
    assert not (tmp_path / "out").exists()


def test_flags_win_over_the_summary_and_the_summary_over_defaults(
    make: MakeQuantize, texts: dict[str, Path], tmp_path: Path
) -> None:
    calibration = {"source": str(texts["search"]), "n_samples": 3, "seq_len": 16, "seed": 5}
    summary = {"calibration": calibration, "quantization": {"pooled_tokens": 7}}
    unset = dict.fromkeys(("calibration", "calibration_samples", "seq_len"))
    report = report_of(quantize(make({**INT4, "summary": summary}, **unset)).path)
    assert {k: report["calibration"][k] for k in calibration} == calibration
    assert report["settings"]["pooled_tokens"] == 7
    changes = {"calibration_samples": 2, "seed": 1, "method": "gptq"}
    spec = make({**INT4, "summary": summary}, out=tmp_path / "b", **{**unset, **changes})
    changed = report_of(quantize(spec).path)
    assert changed["calibration"]["n_samples"] == 2
    assert changed["calibration"]["seed"] == 1
    assert changed["calibration"]["seq_len"] == 16


@pytest.mark.parametrize(
    ("recorded", "flag", "found"),
    [
        ({}, None, None),  # auto: the demo's tokenizer puts nothing
        ({"bos": [0]}, None, [0]),
        ({"bos": None}, None, None),
        ({"bos": [0]}, "never", None),
        ({}, "always", [0]),
    ],
)
def test_windows_start_as_the_flag_then_as_the_summary_says(
    make: MakeQuantize, recorded: dict[str, Any], flag: str | None, found: object
) -> None:
    config = {**INT4, "summary": {"calibration": recorded}}
    report = report_of(quantize(make(config, bos=flag)).path)
    assert report["calibration"]["bos"] == found


def test_summaries_of_versions_without_bos_give_their_windows(
    make: MakeQuantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def read(*arguments: Any) -> Any:
        asked.append(arguments[-1])
        raise DataError("read")

    monkeypatch.setattr(command, "read_text", read)
    for calibration in ({"digest": "abc"}, {"seed": 1}):
        with pytest.raises(DataError, match="read"):
            quantize(make({**INT4, "summary": {"calibration": calibration}}))
    assert asked == ["never", "auto"]


def test_rtn_needs_no_text(make: MakeQuantize) -> None:
    result = quantize(make(INT4, method="rtn", calibration="nothing.txt"))
    assert report_of(result.path)["calibration"] is None
    assert result_json(result)["fallbacks"] == {}


def test_settings_are_flag_over_summary_over_default(make: MakeQuantize, tmp_path: Path) -> None:
    summary = {"quantization": {"percdamp": 0.05, "route_exponent": 1}}
    flags = {"route_exponent": 0, "refine_sweeps": None}
    found = report_of(quantize(make({**INT4, "summary": summary}, **flags)).path)["settings"]
    assert (found["percdamp"], found["route_exponent"], found["refine_sweeps"]) == (0.05, 0, 3)


def test_rounding_is_two_sided_where_nothing_else_was_said(
    make: MakeQuantize, tmp_path: Path
) -> None:
    searched = {**INT4, "summary": {"quantization": {"two_sided": True}}}
    one_sided = {**INT4, "summary": {"quantization": {"percdamp": 0.02}}}
    cases: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
        (INT4, {}, True),
        (INT4, {"two_sided": False}, False),
        (one_sided, {}, False),
        (searched, {}, True),
        (searched, {"method": "rtn"}, False),
    ]
    for number, (config, flags, expected) in enumerate(cases):
        report = report_of(quantize(make(config, out=tmp_path / str(number), **flags)).path)
        assert report["settings"]["two_sided"] is expected
        assert {row["is_two_sided"] for row in report["matrices"]} == {expected}
    with pytest.raises(ConfigError, match="two_sided with method rtn"):
        quantize(make(INT4, out=tmp_path / "x", method="rtn", two_sided=True))


@pytest.mark.parametrize("written", [0, 1, 1.0, 0.5])
def test_a_real_number_may_be_written_as_a_whole_one(make: MakeQuantize, written: float) -> None:
    summary = {"quantization": {"percdamp": written}}
    found = report_of(quantize(make({**INT4, "summary": summary})).path)["settings"]
    assert found["percdamp"] == written and type(found["percdamp"]) is float


def test_a_given_model_type_is_reported_and_changes_no_byte(
    make: MakeQuantize, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = quantize(make(INT4))
    renamed = make(INT4, model_type="mixtral", out=tmp_path / "b")
    dry_run(renamed)
    assert caplog.text.count("looks like olmoe") == 1
    other = quantize(renamed)
    first, second = report_of(found.path), report_of(other.path)
    assert (first["architecture"], second["architecture"]) == ("olmoe", "mixtral")
    assert (first["warnings"], len(second["warnings"])) == ([], 1)
    assert first["utilization"] == second["utilization"] != {}
    timeless = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in report["matrices"]]
        for report in (first, second)
    ]
    assert timeless[0] == timeless[1]


def test_layers_see_the_quantized_ones_before_them_when_asked(make: MakeQuantize) -> None:
    report = report_of(quantize(make(INT4, sequential=True)).path)
    assert report["settings"]["sequential"] is True
    assert report["settings"]["correction"] == 0.25


def test_a_correction_is_of_layers_that_see_the_quantized_ones(make: MakeQuantize) -> None:
    with pytest.raises(ConfigError, match=r"correction 0\.5 asked, .*; add --sequential"):
        quantize(make(INT4, correction=0.5))
    with pytest.raises(ConfigError, match=r"correction is 1\.5; must be <= 1"):
        make(INT4, sequential=True, correction=1.5)


def test_an_unknown_setting_is_refused(make: MakeQuantize) -> None:
    with pytest.raises(ConfigError, match="no setting 'sweeps'; perhaps refine_sweeps"):
        quantize(make(INT4, sweeps=3))


def test_dry_run_counts_without_weights(make: MakeQuantize, tmp_path: Path) -> None:
    config = {**INT4, "overrides": [{"pattern": "*.down_proj", "wq": "int8"}]}
    found = dry_run(make(config))
    assert found.counts == found.plan.assignment.count_bits(found.inventory)
    text = plan_text(found)
    assert "attention q  int4-g32         2" in text
    assert "routed down  int8-g32         8" in text
    assert f"{found.counts.quantized_bytes} bytes" in text
    assert not (tmp_path / "out").exists()


def test_existing_out_is_refused_before_the_model_is_loaded(
    make: MakeQuantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(make(INT4, method="rtn"))
    before = (tmp_path / "out" / "config.json").read_bytes()

    with monkeypatch.context() as patch:
        patch.setattr(command, "load_source", no_load)
        with pytest.raises(StoreError, match="exists already.*--overwrite"):
            quantize(make(INT4, method="rtn"))
    assert (tmp_path / "out" / "config.json").read_bytes() == before
    int8 = make({"default": {"wq": "int8"}}, method="rtn", overwrite=True)
    assert quantize(int8).quantized_bytes == quantized_bytes(tmp_path / "out")


def test_overwrite_replaces_packed_checkpoints_only(make: MakeQuantize, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="no packed checkpoint"):
        quantize(make(INT4, overwrite=True))
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_stopped_quantization_is_gone_on_with_and_another_is_refused_before_loading(
    make: MakeQuantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "quantize" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(make(INT4), progress=stop)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["config.json", "out.part"]
    with monkeypatch.context() as patch:
        patch.setattr(command, "load_source", no_load)
        with pytest.raises(StoreError, match="another job .settings.percdamp was 0.01, now 0.5"):
            quantize(make(INT4, percdamp=0.5))
        with pytest.raises(StoreError, match="another job .calibration.seed was None, now 3"):
            quantize(make(INT4, seed=3))
        with pytest.raises(StoreError, match="another job .configuration.default.wq was int4"):
            quantize(make({"default": {"wq": "int8", "group_size": 32}}))
    stages: list[tuple[str, int, int]] = []
    quantize(make(INT4), progress=lambda *step: stages.append(step))
    assert [s for s in stages if s[0] == "quantize"] == [("quantize", 1, 2), ("quantize", 2, 2)]
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["config.json", "out"]


def no_load(*args: Any) -> Any:
    raise AssertionError("loaded")


@pytest.mark.parametrize(
    ("out", "changes", "error", "words"),
    [
        ("config.json", {}, StoreError, "exists and is no packed checkpoint"),
        ("config.json/x", {}, StoreError, "config.json is a file"),
        ("config.json/x/y", {}, StoreError, "config.json is a file"),
        (".", {}, StoreError, "is the working directory"),
        (".", {"overwrite": True}, StoreError, "is the working directory"),
        ("..", {"overwrite": True}, StoreError, "is the working directory"),
        ("/", {"overwrite": True}, StoreError, "is the working directory or holds it"),
        ("/proc", {"overwrite": True}, StoreError, "is the root of a file system"),
        ("/proc/x", {}, StoreError, "/proc"),
        ("theirs", {}, StoreError, "theirs.part is in the way"),
        ("theirs", {"overwrite": True}, StoreError, "theirs.part is in the way"),
        ("loop", {}, StoreError, "cannot be used"),
        ("a" * 300, {}, StoreError, "cannot be used"),
        ("a/" * 2500, {}, StoreError, "bytes"),
        ("new", {"dtype": "foo"}, ModelError, "unknown dtype 'foo'"),
        ("new", {"device": "foo"}, ModelError, "device 'foo'"),
    ],
)
def test_what_cannot_be_written_is_refused_before_loading(
    out: str,
    changes: dict[str, Any],
    error: type[Exception],
    words: str,
    make: MakeQuantize,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "load_source", no_load)
    spec = make(INT4, out=Path(out), config=tmp_path / "config.json", **changes)
    (tmp_path / "theirs.part").mkdir()
    (tmp_path / "theirs.part" / "precious").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(error, match=words) as caught:
        quantize(spec)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_empty_directories_links_and_deep_places_are_written(
    make: MakeQuantize, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    quantize(make(INT4, method="rtn", out=tmp_path / "empty"))
    assert quantized_bytes(tmp_path / "empty")
    (tmp_path / "link").symlink_to("empty")
    with pytest.raises(StoreError, match="link exists already"):
        quantize(make(INT4, method="rtn", out=tmp_path / "link"))
    int8 = make({"default": {"wq": "int8"}}, method="rtn", out=tmp_path / "link", overwrite=True)
    result = quantize(int8)
    assert result.path == tmp_path / "link" and (tmp_path / "link").is_symlink()
    assert quantized_bytes(tmp_path / "empty") == result.quantized_bytes
    (tmp_path / "later").symlink_to("not/yet")
    quantize(make(INT4, method="rtn", out=tmp_path / "later"))
    assert quantized_bytes(tmp_path / "not" / "yet")
    deep = tmp_path.joinpath(*["a"] * 1200)
    try:
        assert quantize(make(INT4, method="rtn", out=deep)).path == deep
    finally:  # too deep for what cleans up after tests, which ends them with an error
        subprocess.run(["rm", "-rf", str(tmp_path / "a")], check=True)


def test_the_old_checkpoint_stays_until_the_new_one_is_complete(
    make: MakeQuantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(make(INT4, method="rtn"))
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    int8 = make({"default": {"wq": "int8"}}, method="rtn", overwrite=True)

    def fail(*args: Any) -> Any:
        raise ModelError("wrong numbers")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "first_run", fail)
        with pytest.raises(ModelError, match="wrong numbers"):
            quantize(int8)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert quantize(int8).quantized_bytes == quantized_bytes(tmp_path / "out")
    assert not list(tmp_path.glob("*.part"))


def test_pattern_that_matches_nothing_is_warned_of_and_strictly_an_error(
    make: MakeQuantize, caplog: pytest.LogCaptureFixture
) -> None:
    config = {**INT4, "overrides": [{"pattern": "*.nothing", "wq": "int8"}]}
    with pytest.raises(ConfigError, match=r"\*\.nothing.*matches nothing"):
        quantize(make(config, strict=True, method="rtn"))
    result = quantize(make(config, method="rtn"))
    assert "matches nothing" in caplog.text
    assert "matches nothing" in report_of(result.path)["warnings"][0]


def test_activations_reach_the_checkpoint_and_the_plan(make: MakeQuantize) -> None:
    overrides = [{"pattern": "*.self_attn.*", "wq": "int4", "aq": "int8", "group_size": 64}]
    spec = make({**INT4, "overrides": overrides}, method="rtn")
    text = plan_text(dry_run(spec))
    assert "attention" in text and "int8-row" in text and "bf16" in text
    path = quantize(spec).path
    names = report_of(path)["activations"]
    assert set(names.values()) == {"int8-row"} and all(".self_attn." in n for n in names)
    assert (
        json.loads((path / "config.json").read_text())["quantization_config"]["activations"]
        == names
    )


def test_an_export_takes_the_place_of_the_packed_checkpoint(make: MakeQuantize) -> None:
    export = "compressed-tensors"
    result = quantize(make(INT4, method="rtn", export=export))
    entry = json.loads((result.path / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == export
    assert {"tokenizer.json", "SHA256SUMS", "model.safetensors.index.json"} <= {
        file.name for file in result.path.iterdir()
    }
    told = result_json(result)["export"]
    assert told["format"] == export and told["loads_in"]["vllm"]["engine"] == "vLLM 0.32.0"
    assert told.pop("run") == f"vllm serve {result.path}"
    stored = report_of(result.path)["export"]
    assert stored.pop("run") == "vllm serve {directory}"
    assert stored == told
    tensors = read_tensors(result.path).values()
    assert told["tensor_bytes"] == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("export", ["compressed-tensors", "gptq", "gguf"])
def test_a_plan_that_an_export_cannot_hold_is_refused_before_weights_are_loaded(
    export: str, make: MakeQuantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mix = {**INT4, "overrides": [{"pattern": "*.experts.1.*", "wq": "int8", "group_size": 32}]}
    monkeypatch.setattr("alphaquant.commands.quantize.load_source", None)
    spec = make(mix, method="rtn", export=export)
    for ask in (dry_run, quantize):
        with pytest.raises(ConfigError, match=f"--export {export}: .*int4-g32"):
            ask(spec)
    assert not list(tmp_path.glob("out*"))


def test_what_was_finished_before_an_export_failed_is_exported_by_the_next_run(
    make: MakeQuantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make(INT4, method="rtn", export="gguf")

    def fail(*args: Any) -> Any:
        raise StoreError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("alphaquant.exports.gguf.writer.write_file", fail)
        with pytest.raises(StoreError, match="disk is full"):
            quantize(spec)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "quantize_layers", lambda *args, **kwargs: iter(()))
        result = quantize(spec)
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]
    assert (result.path / "model.gguf").exists()
    again = make(INT4, method="rtn", export="compressed-tensors", overwrite=True)
    assert not (quantize(again).path / "model.gguf").exists()


def test_rounded_inputs_are_refused_in_an_export_before_anything_is_quantized(
    make: MakeQuantize, tmp_path: Path
) -> None:
    overrides = [{"pattern": "*.self_attn.*", "wq": "int4", "aq": "int8", "group_size": 32}]
    spec = make({**INT4, "overrides": overrides}, method="rtn", export="compressed-tensors")
    with pytest.raises(ConfigError, match=r"8 matrices round their inputs.*--export alphaquant"):
        quantize(spec)
    assert not (tmp_path / "out").exists()


def test_a_mix_that_no_engine_loads_is_refused_in_an_export(
    make: MakeQuantize, tmp_path: Path
) -> None:
    mix = {**INT4, "overrides": [{"pattern": "*.experts.1.*", "wq": "int8", "group_size": 32}]}
    with pytest.raises(ConfigError, match=r"none of vllm, sglang, transformers loads this.*int8"):
        quantize(make(mix, method="rtn", export="compressed-tensors"))
    assert not (tmp_path / "out").exists()


def test_configuration_of_other_weights_is_warned_of(
    make: MakeQuantize, caplog: pytest.LogCaptureFixture
) -> None:
    quantize(make({**INT4, "summary": {"model_digest": "abc"}}, method="rtn"))
    assert "searched on other weights" in caplog.text


@pytest.mark.parametrize(
    ("config", "changes", "error", "words"),
    [
        ({"defualt": {}}, {}, ConfigError, "defualt"),
        ({"default": {"wq": "int9"}}, {}, ConfigError, "int9"),
        (INT4, {"method": "awq"}, ConfigError, "awq.*gptq or rtn"),
        (INT4, {"model": "/nowhere"}, ModelError, "/nowhere"),
        (INT4, {"device": "quantum"}, ModelError, "quantum"),
        (INT4, {"calibration": "nothing.txt"}, DataError, "nothing.txt"),
        (INT4, {"calibration": ""}, DataError, "source ''"),
        (INT4, {"bos": ""}, ConfigError, "bos is '' .*use auto or always or never"),
        (INT4, {"bos": "on"}, ConfigError, "bos is 'on'"),
        (INT4, {"calibration_samples": 100_000}, DataError, "too short"),
        (INT4, {"config": Path("/nowhere.json")}, ConfigError, "/nowhere.json"),
        (
            {"summary": {"quantization": {"x": 1}}},
            {},
            ConfigError,
            "quantization: a quantization has no setting 'x'",
        ),
        ({"summary": {"quantization": {"method": 3}}}, {}, ConfigError, "method is 3"),
        (
            {"summary": {"quantization": {"method": "x"}}},
            {},
            ConfigError,
            "method is 'x' .*use gptq or rtn",
        ),
        ({"summary": {"quantization": {"scale_search": "x"}}}, {}, ConfigError, "hessian"),
        ({"summary": {"quantization": {"base": 1}}}, {}, ConfigError, "has no setting 'base'"),
        ({"summary": {"quantization": "x"}}, {}, ConfigError, "is an object"),
        ({"summary": {"quantization": {"percdamp": -1}}}, {}, ConfigError, "percdamp is -1"),
        ({"summary": {"quantization": {"percdamp": True}}}, {}, ConfigError, "percdamp is True"),
        ({"summary": {"quantization": {"percdamp": None}}}, {}, ConfigError, "percdamp is null"),
        ({"summary": {"quantization": {"blocksize": 0}}}, {}, ConfigError, "blocksize is 0"),
        ({"summary": {"quantization": {"actorder": 1}}}, {}, ConfigError, "actorder is 1"),
        (
            {"summary": {"quantization": {"route_exponent": 3}}},
            {},
            ConfigError,
            "route_exponent is 3; must be <= 2",
        ),
        (INT4, {"pooled_tokens": -1}, ConfigError, "pooled_tokens is -1"),
        (INT4, {"model_type": "olmo"}, ModelError, "unknown model type 'olmo'"),
        (INT4, {"model_type": "standard"}, ModelError, "has routed experts"),
        ({"summary": {"calibration": "demo"}}, {}, ConfigError, "summary.calibration is 'demo'"),
        ({"summary": {"calibration": {"seed": "x"}}}, {}, ConfigError, "seed is 'x'"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    config: Any,
    changes: dict[str, Any],
    error: type[Exception],
    words: str,
    make: MakeQuantize,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=words):
        quantize(make(config, **changes))
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_calibration_text_that_changed_since_the_search_is_refused(
    make: MakeQuantize, texts: dict[str, Path]
) -> None:
    stated = {"source": str(texts["calibration"]), "n_samples": 4, "seq_len": 32, "digest": "ab"}
    config = {**INT4, "summary": {"calibration": stated}}
    unset = dict.fromkeys(("calibration", "calibration_samples", "seq_len"))
    with pytest.raises(ConfigError, match="other calibration text"):
        quantize(make(config, **unset))
    quantize(make(config))


@pytest.mark.parametrize(
    ("summary", "words"),
    [
        ({"quantization": {"x": 1}}, "quantization: a quantization has no setting 'x'"),
        ({"calibration": {"n_samples": -4}}, "n_samples is -4; use 1 or more"),
        ({"calibration": {"seq_len": 1}}, "seq_len is 1; use 2 or more"),
    ],
)
def test_dry_run_refuses_the_summary_that_a_run_refuses(
    summary: dict[str, Any], words: str, make: MakeQuantize
) -> None:
    spec = make({**INT4, "summary": summary})
    for ask in (dry_run, quantize):
        with pytest.raises(ConfigError, match=words):
            ask(spec)
