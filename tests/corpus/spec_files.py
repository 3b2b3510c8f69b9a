"""Files of options: what cannot be read, what is no option, and values that make no sense."""

import contextlib
import io

from alphaquant.cli.application import start
from tests.corpus.engine import EVALUATE, QUANTIZE, SEARCH, SENSITIVITY, Case, Place
from tests.programs import program

FILE = "aq-search --spec s.toml"
UNREAD = "give a TOML file of options"


def _read(name: str, content: str | bytes, says: str, code: int = 2) -> Case:
    """A file that aq-search is given; where it is right, all options are printed."""
    command = f"{FILE} --print-spec" if code == 0 else FILE
    return Case(name, command, says, code, files={"s.toml": content})


def _option(name: str, line: str, says: str, code: int = 2) -> Case:
    """A line below a budget."""
    return _read(name, f'budget = "4bits"\n{line}\n', says, code)


def _folder(place: Place) -> None:
    (place.here / "s.toml").mkdir()


def _printed(place: Place) -> None:
    """What --print-spec writes of a quantization."""
    options = ["--model", str(place.tiny), "--config", str(place.int4), "--method", "rtn"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert start(program("aq-quantize"), [*options, "--print-spec"]) == 0
    (place.here / "s.toml").write_text(printed.getvalue())


UNREADABLE = (
    Case("file of options that is not there", FILE, "s.toml: No such file"),
    Case("file of options that is a folder", FILE, "s.toml: Is a directory", make=_folder),
    Case("file of options without a name", "aq-search --spec ''", UNREAD),
    Case("--spec of nothing", "aq-search --budget 4bits --spec", "requires an argument", 2),
    Case("--spec of a command without one", "aq-inspect {int4} --spec s.toml", "--spec", 2),
    _read("file of options that is binary", bytes(range(256)), UNREAD, 1),
    _read("file of options in utf-16", 'budget = "4bits"'.encode("utf-16"), UNREAD, 1),
    _read("file of options of zeros", b"\0" * 99, UNREAD, 1),
    _read("file of options in YAML", "budget: 4bits\n", UNREAD, 1),
    _read("file of options in JSON", '{"budget": "4bits"}', UNREAD, 1),
    _read("file of options cut short", 'budget = "4bi', UNREAD, 1),
    _read("option that stands twice", 'budget = "4bits"\nbudget = "5bits"', UNREAD, 1),
)

NAMES = (
    _read("file of options of nothing", "", "--budget is needed"),
    _option("option with a slip in a file", "trails = 3", "from s.toml. Did you mean --trials?"),
    _option("option of another command in a file", "nsamples = 3", "nsamples"),
    _option("option in a table", "[run]\ntrials = 3", "run is a table", 1),
    _option("file of options in a file", 'spec = "other.toml"', "spec is another file", 1),
    _option("control character in an option", '"\\u001b[1m" = 3', "\\x1b[1m"),
)

VALUES = (
    _option("no trials in a file", "trials = 0", "Must be >= 1"),
    _option("trials in words in a file", 'trials = "many"', "no whole number in s.toml"),
    _option("trials of a fraction in a file", "trials = 1.5", "'1.5' is no whole number"),
    _option("trials that are true in a file", "trials = true", "'True' is no whole number"),
    _option("trials in a list", "trials = [3, 4]", "[trials] from s.toml"),
    _option("flag in words", 'overwrite = "perhaps"', "[overwrite] from s.toml"),
    _option("mode of nobody in a file", 'mode = "manual"', '"knobs", "groups"'),
    _option("damping of NaN in a file", "percdamp = nan", "Must be >= 0"),
    _option("timeout of infinity in a file", "timeout = inf", "timeout is inf", 1),
    _option("layer minimum of none in a file", "layer_minimum_bits = 0", "Must be > 0"),
    _option("study without a name in a file", 'study = " "', "the study has no name", 1),
    _read("budget in a list", 'budget = ["4bits", 5]', "[budget] from s.toml"),
    Case(
        "format of nobody in a file",
        f"{SEARCH.replace('--formats int3-g32,int4-g32,int8-row', '')} --spec s.toml",
        "int9",
        files={"s.toml": 'formats = ["int4-g32", "int9"]'},
    ),
    Case(
        "wrong option beside a file",
        f"{FILE} --trials 0",
        "Must be >= 1",
        2,
        files={"s.toml": 'budget = "4bits"\ntrials = 3'},
    ),
    Case(
        "samples in words in a file",
        f"{EVALUATE} --spec s.toml",
        "no whole number",
        2,
        files={"s.toml": 'batch_size = "many"'},
    ),
    Case(
        "bos of nobody in a file",
        f"{QUANTIZE} --spec s.toml",
        '"auto", "always", "never"',
        2,
        files={"s.toml": 'bos = "perhaps"'},
    ),
    Case(
        "negative sweeps in a file",
        f"{SENSITIVITY} --spec s.toml",
        "Must be >= 0",
        2,
        files={"s.toml": "refine_sweeps = -1"},
    ),
)

RIGHT = (
    _read("file of options with a byte order mark", '\ufeffbudget = "3bits"', '"3bits"', 0),
    _option("formats in a list in a file", 'formats = ["int4", "mxfp4"]', '"int4,mxfp4"', 0),
    Case(
        "option that wins over a file",
        f"{FILE} --print-spec --trials 7",
        "trials = 7",
        0,
        files={"s.toml": 'budget = "4bits"\ntrials = 3'},
    ),
    Case(
        "quantize as printed",
        "aq-quantize --spec s.toml --out out",
        '"quantized_bytes": 18432',
        0,
        make=_printed,
    ),
)

CASES = (*UNREADABLE, *NAMES, *VALUES, *RIGHT)
