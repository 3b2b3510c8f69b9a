"""Options and budgets: numbers, names, and what contradicts each other."""

import os

from alphaquant.testing.checkpoints import save_tiny
from tests.corpus.engine import EVALUATE, QUANTIZE, SEARCH, SENSITIVITY, Case, Place

GPTQ = QUANTIZE.replace("--method rtn", "--calibration {calibration} --nsamples 4 --seqlen 16")
HUGE = "9" * 30
RANGE = "Must be "
"""Of what is said about a number that an option does not take."""


def _without_matrices(place: Place) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": None}
    save_tiny(place.here / "model", "gpt2", **sizes)


def _folders(place: Place) -> None:
    (place.here / "folder").mkdir()


def _file(place: Place) -> None:
    (place.here / "file").write_text("mine")


def _foreign_out(place: Place) -> None:
    (place.here / "out").mkdir()
    (place.here / "out" / "notes.txt").write_text("mine")


def _foreign_part(place: Place) -> None:
    (place.here / "out.part").mkdir()
    (place.here / "out.part" / "precious").write_text("mine")


def _link_to_nothing(place: Place) -> None:
    os.symlink("nowhere", place.here / "out")


def _taken_out(place: Place) -> None:
    os.symlink(place.packed, place.here / "out")


USAGE = (
    Case("search without a budget", "aq-search", "--budget", 2, own_process=True),
    Case("option with a slip", f"{SEARCH} --trails 3", "Did you mean --trials?", 2),
    Case("option of another command", f"{SEARCH} --sequential", "--sequential", 2),
    Case("no trials", f"{SEARCH} --trials 0", RANGE, 2),
    Case(
        "trials in words",
        f"{SEARCH} --trials many",
        "no whole number",
        2,
        own_process=True,
    ),
    Case("trials as a fraction", f"{SEARCH} --trials 1.5", "no whole number", 2),
    Case("trials of nothing", f"{SEARCH} --trials ''", "no whole number", 2),
    Case("negative seed", f"{SEARCH} --seed -1", RANGE, 2),
    Case("a bank of another kind", f"{SEARCH} --bank tiny", "full", 2),
    Case("negative timeout", f"{SEARCH} --timeout -1", RANGE, 2),
    Case("no formats in a layer", f"{SEARCH} --max-formats-per-layer 0", RANGE, 2),
    Case("one evaluation window", f"{SEARCH} --evaluation-samples 1", RANGE, 2),
    Case("search windows of one token", f"{SEARCH} --seq-len 1", RANGE, 2),
    Case("negative shots", f"{SEARCH} --shots -1", RANGE, 2),
    Case("no documents of a task", f"{SEARCH} --task-limit 0", RANGE, 2),
    Case("quantize without a configuration", "aq-quantize --model demo", "--config", 2),
    Case(
        "quantize without an output",
        "aq-quantize --model x --config y",
        "--out",
        2,
        own_process=True,
    ),
    Case("columns by none", f"{QUANTIZE} --blocksize 0", RANGE, 2),
    Case("no calibration windows", f"{QUANTIZE} --nsamples 0", RANGE, 2),
    Case("negative damping", f"{QUANTIZE} --percdamp -1", RANGE, 2),
    Case("damping in words", f"{QUANTIZE} --percdamp much", "into float", 2),
    Case("three starts", f"{QUANTIZE} --n-starts 3", RANGE, 2),
    Case("cubed routing weights", f"{QUANTIZE} --route-exponent 3", RANGE, 2),
    Case("negative pooled tokens", f"{QUANTIZE} --pooled-tokens -1", RANGE, 2),
    Case("negative sweeps", f"{QUANTIZE} --refine-sweeps -1", RANGE, 2),
    Case("an argument too many", f"{QUANTIZE} again", "again", 2),
    Case("eval without a model", "aq-eval", "--model", 2, own_process=True),
    Case("eval of one window", f"{EVALUATE} --samples 1", RANGE, 2),
    Case("batches of none", f"{EVALUATE} --batch-size 0", RANGE, 2),
    Case("limit of none", f"{EVALUATE} --limit 0", RANGE, 2),
    Case("sensitivity without a format", "aq-sensitivity --out o", "--format", 2),
    Case("sensitivity without a file", "aq-sensitivity --format int4", "--out", 2),
    Case(
        "inspect without a configuration",
        "aq-inspect --model demo",
        "CONFIG",
        2,
        own_process=True,
    ),
    Case("compare with nothing", "aq-compare {int4}", "B", 2),
    Case("verify with a model", "aq-inspect {packed} --verify --model demo", "files only", 2),
)

BUDGETS = (
    Case("budget of nothing", f"{SEARCH} --budget ''", "no budget; give one such as 4.25bits"),
    Case("budget in words", f"{SEARCH} --budget big", "cannot read the budget 'big'"),
    Case("budget nan", f"{SEARCH} --budget nan", "cannot read the budget 'nan'"),
    Case("budget inf", f"{SEARCH} --budget inf", "cannot read the budget 'inf'"),
    Case("budget zero", f"{SEARCH} --budget 0bits", "above zero"),
    Case("negative budget", f"{SEARCH} --budget=-4bits", "cannot read the budget '-4bits'"),
    Case("budget with a comma", f"{SEARCH} --budget 4,25bits", "'4,25bits'"),
    Case("budget with an exponent", f"{SEARCH} --budget 4e0bits", "'4e0bits'"),
    Case("budget of an unknown unit", f"{SEARCH} --budget 4nibbles", "'4nibbles'"),
    Case("budget of thirty digits", f"{SEARCH} --budget {HUGE}GiB", "cannot read the budget"),
    Case("budget below the formats", f"{SEARCH} --budget 1bits", "1bits cannot be reached"),
    Case("budget below what stays", f"{SEARCH} --budget 1KiB", "below what stays unquantized"),
    Case("active budget in bits", f"{SEARCH} --active-budget 3bits", "active budget '3bits'"),
    Case("active budget of nothing", f"{SEARCH} --active-budget ''", "active budget ''"),
    Case(
        "active budget out of reach",
        f"{SEARCH} --active-budget 1KiB",
        "active budget of 1024 bytes",
    ),
)

NUMBERS = (
    Case("time limit without a unit", f"{SEARCH} --time-limit 90", "give a duration such as"),
    Case("time limit of nothing", f"{SEARCH} --time-limit 0min", "time_limit is '0min'"),
    Case("time limit that nothing fits", f"{SEARCH} --time-limit 0.01s", "is estimated at"),
    Case("an effort that does not exist", f"{SEARCH} --effort huge", "Choose from", 2),
    Case("plan of a budget below all", f"{SEARCH} --plan --budget 1bits", "cannot be reached"),
    Case("timeout nan", f"{SEARCH} --timeout nan", RANGE, 2),
    Case("layer minimum nan", f"{SEARCH} --layer-minimum-bits nan", RANGE, 2),
    Case("layer minimum inf", f"{SEARCH} --layer-minimum-bits inf", "layer_minimum_bits is inf"),
    Case("negative layer minimum", f"{SEARCH} --layer-minimum-bits -1", RANGE, 2),
    Case("layer minimum above all", f"{SEARCH} --layer-minimum-bits 1e9", "layer 0 reaches 8.5"),
    Case("damping nan", f"{QUANTIZE} --percdamp nan", RANGE, 2),
    Case("damping inf", f"{QUANTIZE} --percdamp 1e999", "percdamp is inf"),
    Case("search damping nan", f"{SEARCH} --percdamp nan", RANGE, 2),
    Case("sensitivity damping inf", f"{SENSITIVITY} --percdamp inf", "percdamp is inf"),
    Case("seed of thirty digits", f"{SEARCH} --seed {HUGE}", "seed"),
    Case("quantize seed of thirty digits", f"{GPTQ} --seed {HUGE}", "seed"),
    Case("eval seed of thirty digits", f"{EVALUATE} --seed {HUGE}", "seed"),
    Case("windows beyond the model", f"{SEARCH} --seq-len 4000", "lower --seq-len"),
    Case("windows of thirty digits", f"{EVALUATE} --seq-len {HUGE}", "lower --seq-len"),
    Case("more windows than text", f"{SEARCH} --calibration-samples 99999", "too short"),
    Case("samples of thirty digits", f"{EVALUATE} --samples {HUGE}", "too short"),
)

NAMES = (
    Case("format with a slip", f"{SEARCH} --formats mxpf4", "did you mean mxfp4"),
    Case("unknown format", f"{SEARCH} --formats int9", "int9"),
    Case("no format", f"{SEARCH} --formats ''", "format"),
    Case("only commas", f"{SEARCH} --formats ,", "format"),
    Case("groups of none", f"{SEARCH} --formats int4-g0", "group size 0"),
    Case("profile with a slip", f"{SEARCH} --profile vlm", "vllm"),
    Case("unknown mode", f"{SEARCH} --mode manual", '"knobs", "groups"', 2),
    Case("unknown grouping", f"{SEARCH} --grouping name", '"layer", "utilization"', 2),
    Case("unknown sampler", f"{SEARCH} --sampler cma", '"tpe"', 2),
    Case("allocator with a slip", f"{SEARCH} --allocator fischer", "fisher"),
    Case("study without a name", f"{SEARCH} --study ''", "the study has no name"),
    Case("search by an unknown method", f"{SEARCH} --method awq", '"gptq", "rtn"', 2),
    Case("search on an unknown device", f"{SEARCH} --device quantum", "use cpu, cuda or auto"),
    Case("device of nothing", f"{EVALUATE} --device ''", "use cpu, cuda or auto"),
    Case("search in an unknown dtype", f"{SEARCH} --dtype int8", "unknown dtype 'int8'"),
    Case("eval in an unknown dtype", f"{EVALUATE} --dtype half-full", "unknown dtype"),
    Case("sensitivity in an unknown dtype", f"{SENSITIVITY} --dtype int8", "unknown dtype"),
    Case("quantize with an unknown bos", f"{GPTQ} --bos perhaps", '"auto", "always", "never"', 2),
    Case("search with an unknown bos", f"{SEARCH} --bos perhaps", '"auto", "always", "never"', 2),
    Case(
        "unknown scale search", f"{QUANTIZE} --scale-search best", '"minmax", "mse", "hessian"', 2
    ),
    Case("unknown method", f"{QUANTIZE} --method awq", '"gptq", "rtn"', 2),
    Case("model type with a slip", f"{QUANTIZE} --model-type olmo", "olmoe"),
    Case("model type of a dense model", f"{QUANTIZE} --model-type standard", "routed experts"),
    Case("sensitivity to an unknown format", f"{SENSITIVITY} --format int9", "int9"),
    Case("sensitivity to nothing", f"{SENSITIVITY} --format ''", "''"),
    Case("sensitivity that saves nothing", f"{SENSITIVITY} --against int3-g32", "no fewer bits"),
    Case("objective with a slip", f"{SEARCH} --objectives bits,kl,perplexty", "perplexity"),
    Case("objectives without bits", f"{SEARCH} --objectives kl", "bits,kl"),
    Case("objectives of nothing", f"{SEARCH} --objectives ''", "bits,kl"),
    Case("score asked for twice", f"{SEARCH} --also drift,drift", "drift asked for twice"),
    Case("score that does not exist", f"{SEARCH} --also foo", "foo"),
    Case("eval task with a slip", f"{EVALUATE} --tasks drfit", "did you mean drift?"),
    Case("eval of no task", f"{EVALUATE} --tasks ''", "tasks: none"),
    Case("eval task that does not exist", f"{EVALUATE} --tasks foo", "foo"),
)

CONTRADICTIONS = (
    Case(
        "groups with a limit of formats",
        f"{SEARCH} --mode groups --max-formats-per-layer 2",
        "mode groups",
    ),
    Case("latency without a table", f"{SEARCH} --objectives bits,kl,latency", "--latency-table"),
    Case("table without latency", f"{SEARCH} --latency-table t.csv", "without latency"),
    Case("shots without a task", f"{SEARCH} --shots 2", "none is asked for"),
    Case("task data without a task", f"{SEARCH} --task-data .", "none is asked for"),
    Case("kl without a reference", f"{EVALUATE} --tasks kl", "--reference"),
    Case("limit without a task", f"{EVALUATE} --limit 3", "--limit 3 given"),
    Case(
        "task data that are not there",
        f"{EVALUATE} --tasks mmlu_anatomy --task-data /nowhere",
        "anatomy_test.csv",
    ),
    Case(
        "task data of another task", f"{EVALUATE} --tasks perplexity,foo --task-data .", "for mmlu"
    ),
)

LATENCY = f"{SEARCH} --also latency --latency-table"

PLACES = (
    Case("latency table that is not there", f"{LATENCY} /nowhere.csv", "/nowhere.csv"),
    Case("latency table that is a folder", f"{LATENCY} folder", "folder", make=_folders),
    Case("latency table of zeros", f"{LATENCY} t.csv", "t.csv", files={"t.csv": b"\0" * 99}),
    Case("latency table of nothing", f"{LATENCY} t.csv", "t.csv", files={"t.csv": ""}),
    Case("search into a file", f"{SEARCH} --out file", "no directory", make=_file),
    Case("search below a file", f"{SEARCH} --out file/x", "no directory", make=_file),
    Case("search into others' files", SEARCH, "no search of ours", make=_foreign_out),
    Case(
        "overwrite others' files by a search",
        f"{SEARCH} --overwrite",
        "replaces searches only",
        make=_foreign_out,
    ),
    Case("search below a device", f"{SEARCH} --out /dev/null/out", "/dev/null"),
    Case("cache in a file", f"{SEARCH} --cache file", "no directory", make=_file),
    Case("search where nothing can be written", f"{SEARCH} --out /proc/x", "/proc"),
    Case("storage of another kind", f"{SEARCH} --storage mongodb://x", "mongodb://x"),
    Case("storage of nothing", f"{SEARCH} --storage ''", "storage"),
    Case("storage in no folder", f"{SEARCH} --storage sqlite:///no/s.db", "no"),
    Case("quantize into a file", f"{QUANTIZE} --out file", "file exists", make=_file),
    Case("quantize below a file", f"{QUANTIZE} --out file/x", "is a file", make=_file),
    Case("quantize into others' files", QUANTIZE, "no packed checkpoint", make=_foreign_out),
    Case(
        "overwrite others' files",
        f"{QUANTIZE} --overwrite",
        "no packed checkpoint",
        make=_foreign_out,
    ),
    Case("quantize beside others' files", QUANTIZE, "is in the way", make=_foreign_part),
    Case("quantize into a checkpoint", QUANTIZE, "exists already", make=_taken_out),
    Case("quantize here", f"{QUANTIZE} --out .", "working directory"),
    Case("quantize into nothing", f"{QUANTIZE} --out ''", "--out"),
    Case("quantize into the root", f"{QUANTIZE} --out /", "--out /"),
    Case("output of 5000 letters", f"{QUANTIZE} --out {'x' * 5000}", "give a shorter one"),
    Case("quantize where nothing can be written", f"{QUANTIZE} --out /proc/x", "/proc"),
    Case("sensitivity into a folder", f"{SENSITIVITY} --out folder", "folder", make=_folders),
    Case("sensitivity below a file", f"{SENSITIVITY} --out file/x", "file", make=_file),
    Case("sensitivity cache in a file", f"{SENSITIVITY} --cache file", "file", make=_file),
)

MODELS = (
    Case("search of no model", f"{SEARCH} --model /nowhere/model", "/nowhere/model"),
    Case(
        "search of a model without matrices",
        f"{SEARCH} --model model",
        "no quantizable matrices",
        make=_without_matrices,
    ),
    Case("quantize no model", f"{QUANTIZE} --model /nowhere", "/nowhere"),
    Case("model of nothing", f"{QUANTIZE} --model ''", "model is ''"),
    Case("model that is a file", f"{QUANTIZE} --model {{int4}}", "int4.json"),
    Case("model that is an empty folder", f"{QUANTIZE} --model .", "config.json"),
    Case("reference of nothing", f"{EVALUATE} --reference ''", "reference is ''"),
    Case("eval of no model", f"{EVALUATE} --model /nowhere", "/nowhere"),
    Case("reference that is none", f"{EVALUATE} --reference /nowhere", "/nowhere"),
    Case("sensitivity of no model", f"{SENSITIVITY} --model /nowhere", "/nowhere"),
    Case("sensitivity of a dense model", f"{SENSITIVITY} --model {{dense}}", "routed experts"),
    Case("search of a packed checkpoint", f"{SEARCH} --model {{packed}}", "quantized already"),
    Case("quantize a packed checkpoint", f"{QUANTIZE} --model {{packed}}", "quantized already"),
)

RIGHT = (
    Case("version", "aq-search --version", "torch", 0),
    Case("help", "aq-compare --help", "--all", 0),
    Case(
        "quantize into an empty folder", f"{QUANTIZE} --out folder", '"folder"', 0, make=_folders
    ),
    Case("scores on a text", f"{EVALUATE} --json", '"perplexity"', 0),
)

CASES = (
    *USAGE,
    *BUDGETS,
    *NUMBERS,
    *NAMES,
    *CONTRADICTIONS,
    *PLACES,
    *MODELS,
    *RIGHT,
)
