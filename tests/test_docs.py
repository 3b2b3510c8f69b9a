"""What the documentation and the project files say is what the code does."""

import re
import tomllib
from pathlib import Path

from alphaquant.spaces.formats import FORMAT_KINDS, MENUS, parse_format, parse_menu

ROOT = Path(__file__).parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pinned_versions() -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==(\S+)$", read("constraints.txt"), re.MULTILINE))


def test_table_of_nominal_bits_is_what_its_command_prints() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \|$", read("docs/formats.md"), re.MULTILINE)
    names = parse_menu(",".join(MENUS))
    assert rows == [(name, f"{parse_format(name).nominal_bits:g}") for name in names]


def test_every_kind_of_format_is_in_the_table() -> None:
    assert {parse_format(name).kind for name in parse_menu("all")} == set(FORMAT_KINDS)


def test_worked_example_of_the_format_page_is_right() -> None:
    fmt = parse_format("int3-g64-asym")
    n_bits = fmt.storage_bits(256, 128)
    assert f"{n_bits // 8} bytes, {n_bits / (256 * 128):.3f} bits" in read("docs/formats.md")


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *(one for extra in extras for one in extra)]
    names = {re.split(r"[<>=\[ ]", requirement)[0] for requirement in requirements}
    assert names <= set(pinned_versions())


def test_make_installs_the_torch_that_constraints_pin() -> None:
    assert f"torch=={pinned_versions()['torch']}\n" in read("Makefile")
