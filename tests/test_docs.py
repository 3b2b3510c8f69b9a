"""What the documentation and the project files say is what the code does."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from alphaquant.cli.reference import COMMANDS, reference
from alphaquant.spaces.formats import FORMAT_KINDS, GGML_REPLACED, parse_format
from alphaquant.spaces.menus import MENUS, parse_menu

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "alphaquant"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("benchmarks/*.md")])
SOURCES = sorted(
    p for f in ("alphaquant", "benchmarks", "examples") for p in (ROOT / f).rglob("*.py")
)
ROOMS = sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py"))

# Dotted names that are no modules: a group of entry points, and operators of torch.
NOT_MODULES = {"alphaquant.experts", "alphaquant.packed_linear", "alphaquant.grouped_moe"}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pinned_versions() -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==(\S+)$", read("constraints.txt"), re.MULTILINE))


def test_table_of_nominal_bits_is_what_its_command_prints() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \|$", read("docs/formats.md"), re.MULTILINE)
    names = parse_menu(",".join(MENUS))
    assert rows == [(name, f"{parse_format(name).nominal_bits:g}") for name in names]


def test_every_kind_of_format_is_in_the_table() -> None:
    kinds = {parse_format(name).kind for name in parse_menu("all,gguf")}
    assert kinds == set(FORMAT_KINDS) - GGML_REPLACED.keys()


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


def missing_names(text: str) -> Iterator[str]:
    """Paths of the project, dotted names of the package and file names that a text says and that
    do not exist."""
    for path in re.findall(r"\b(?:alphaquant|tests|benchmarks|docs|examples)/[\w/.-]+\.\w+", text):
        if not (ROOT / path).exists():
            yield path
    for name in re.findall(r"\balphaquant(?:\.[a-z]\w*)+", text):
        if name not in NOT_MODULES and not is_name(name):
            yield name
    known = {path.name for path in [*SOURCES, *(ROOT / "tests").rglob("*.py")]}
    for name in re.findall(r"`(\w+\.py)`", text):
        if name not in known:
            yield name


def is_name(dotted: str) -> bool:
    """Whether a dotted name is a module of the package, or stands in the module before it."""
    *parts, last = dotted.split(".")
    here, before = ROOT.joinpath(*parts, last), ROOT.joinpath(*parts)
    if here.is_dir() or here.with_suffix(".py").is_file():
        return True
    file = before / "__init__.py" if before.is_dir() else before.with_suffix(".py")
    if not file.is_file():  # a member of a class
        return len(parts) > 1 and is_name(".".join(parts))
    tree = ast.parse(file.read_text(encoding="utf-8"))
    words = {getattr(n, "id", getattr(n, "name", getattr(n, "value", ""))) for n in ast.walk(tree)}
    return last in words


def test_names_of_files_and_modules_exist() -> None:
    for path in (*PAGES, *SOURCES):
        missing = list(missing_names(path.read_text(encoding="utf-8")))
        assert missing == [], path.relative_to(ROOT)


@pytest.mark.parametrize(
    "text",
    [
        "see `alphaquant/quant/nothing.py`",
        "see `alphaquant.quant.nothing`",
        "see `alphaquant.quant.bank.nothing`",
        "see `tests/nothing.py`",
        "see `nothing.py`",
    ],
)
def test_a_name_that_does_not_exist_is_seen(text: str) -> None:
    assert len(list(missing_names(text))) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        found = (page.parent / path) if path else page
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found.read_text(encoding="utf-8")), target


def anchors(text: str) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_every_room_is_on_the_page(page: str) -> None:
    text = read(page)
    assert [room for room in ROOMS if not re.search(rf"\b{room}\b", text)] == []


def test_page_of_options_is_what_the_specifications_say() -> None:
    assert read("docs/options.md") == reference()


def test_page_of_options_has_every_program() -> None:
    scripts = tomllib.loads(read("pyproject.toml"))["project"]["scripts"]
    assert {command.name for command in COMMANDS} == set(scripts)


def test_architecture_is_short() -> None:
    assert len(read("docs/architecture.md").splitlines()) <= 90


def test_every_benchmark_is_on_the_page_of_benchmarks() -> None:
    files = sorted((ROOT / "benchmarks").glob("*.py"))
    programs = [p.name for p in files if "__main__" in p.read_text(encoding="utf-8")]
    text = read("benchmarks/README.md")
    assert len(programs) > 10
    assert [name for name in programs if f"`{name}`" not in text] == []
