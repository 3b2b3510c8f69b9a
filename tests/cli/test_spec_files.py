"""`--print-spec` writes what `--spec` reads; wrong files are in tests/corpus."""

import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

from alphaquant.cli.application import spec_text
from alphaquant.specs.flat import flat, options_of, read_file
from alphaquant.specs.search import SearchSpec
from tests.programs import parse

COMMANDS = (
    "aq-search --budget 4.25bits --formats int4,mxfp4 --timeout 1.5 --overwrite --out a/b",
    "aq-search --budget 4bits --model 'a\"b\\c' --study '# no comment' --trials 3 --cache k",
    "aq-quantize --model m --config c.json --nsamples 4 --no-actorder --n-starts 1",
    "aq-eval --model m --reference r --tasks kl,drift --bos never --shots 0 --task-data d",
    "aq-sensitivity --format int2-g64 --out o.json --percdamp 0.5 --route-exponent 0",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_printed_file_is_the_same_specification(command: str, run: Any, tmp_path: Path) -> None:
    name, *options = shlex.split(command)
    first = run(name, *options, "--print-spec")
    assert (first.code, first.err) == (0, "")
    file = tmp_path / "s.toml"
    file.write_text(first.out)
    needed = ("--out", "o.json") if name == "aq-sensitivity" else ()
    again = run(name, *needed, "--spec", str(file), "--print-spec")
    assert (again.code, again.err, again.out) == (0, "", first.out)
    spec = parse(command).arguments["spec"]
    given = {k: str(v) if isinstance(v, Path) else v for k, v in flat(spec).items()}
    assert tomllib.loads(first.out) == {k: v for k, v in given.items() if v is not None}


def test_a_number_for_a_text_is_the_same_on_a_command_line_in_a_file_and_in_python(
    run: Any, tmp_path: Path
) -> None:
    file = tmp_path / "s.toml"
    file.write_text("budget = 4.25\n")
    from_file = run("aq-search", "--spec", str(file), "--print-spec")
    on_line = run("aq-search", "--budget", "4.25", "--print-spec")
    assert (from_file.code, from_file.out) == (on_line.code, on_line.out) == (0, on_line.out)
    python = SearchSpec.of(**read_file(file))
    assert (
        python == SearchSpec.of(budget=4.25) == parse("aq-search --budget 4.25").arguments["spec"]
    )


def test_every_option_stands_in_the_file_with_its_meaning() -> None:
    text = spec_text(SearchSpec.of(budget="4bits"))
    assert max(map(len, text.splitlines())) <= 99
    joined = " ".join(text.replace("\n# ", " ").split())
    for option in options_of(SearchSpec):
        assert f"{option.name} =" in text
        assert option.text in joined
    assert "\n# trials =\n" in text
    assert "\n# ---- Budget\n" in f"\n{text}"
