"""report.html: the tables of report.md in one file, and how it behaves in a browser."""

import json
import math
import re
import shlex
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from alphaquant.reports.bits import bit_lines
from alphaquant.reports.figures.plots import figures
from alphaquant.reports.html import commands, report_html
from alphaquant.reports.report import report_text, write_report
from alphaquant.reports.sections import (
    costs_text,
    coverage_text,
    domain_text,
    model_name,
    search_text,
    withheld_text,
)
from alphaquant.reports.verdict import headline, why_text, winner_text
from alphaquant.spaces.profiles import find_profile
from alphaquant.specs.flat import replaced
from alphaquant.studies.result import SearchResult

pytest_plugins = ("tests.browser",)

HOSTILE = "<script>alert(1)</script> & </title>"
CLIPBOARD = ["clipboard-read", "clipboard-write"]


class Tags(HTMLParser):
    """Collects tags, and cells of tables as text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.is_in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.is_in_cell = tag in ("td", "th")
        if self.is_in_cell:
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.is_in_cell:
            self.cells[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.is_in_cell = False


def data_of(text: str) -> dict[str, Any]:
    """What the page's script reads."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None
    content: dict[str, Any] = json.loads(found[1])
    return content


@pytest.fixture(scope="module")
def page_file(long: SearchResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """report.html of the finished search of all steps."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report_html(long), encoding="utf-8")
    return path


def test_it_is_written_beside_the_other_reports(found: SearchResult, tmp_path: Path) -> None:
    folder = replace(found.folder, path=tmp_path)
    write_report(replace(found, folder=folder))
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def typeset(text: str) -> str:
    """A text of report.md as it reads in HTML."""
    return text.replace(" +- ", " \N{PLUS-MINUS SIGN} ")


def test_every_cell_of_report_md_is_in_it(long: SearchResult) -> None:
    rows = [r for r in report_text(long).splitlines() if r.startswith("| ")]
    cells = [cell for row in rows for cell in row[2:-2].split(" | ")]
    assert sorted(Tags(report_html(long)).cells) == sorted(map(typeset, cells))


def test_every_section_of_report_md_is_in_it(found: SearchResult) -> None:
    text = unescape(report_html(found))
    for part in (
        winner_text,
        why_text,
        withheld_text,
        domain_text,
        costs_text,
        coverage_text,
        search_text,
    ):
        for said in part(found).split("\n\n"):
            assert said.startswith("| ") or typeset(said) in text, part.__name__
    for line in bit_lines(found.counts):
        assert line in text


def test_the_page_has_a_language_a_title_one_h1_and_a_policy_against_requests(
    found: SearchResult,
) -> None:
    tags = Tags(report_html(found)).tags
    assert ("html", {"lang": "en"}) in tags
    assert [tag for tag, _ in tags].count("h1") == 1
    assert [tag for tag, _ in tags].count("title") == 1
    policy = next(a["content"] for t, a in tags if a.get("http-equiv", "") and t == "meta")
    assert policy is not None and policy.startswith("default-src 'none';")
    assert not [a for _, a in tags if "src" in a or "href" in a]


def test_the_script_gets_the_figures_and_a_command_for_every_published_point(
    found: SearchResult,
) -> None:
    content = data_of(report_html(found))
    assert list(content["figures"]) == list(figures(found))
    assert content["commands"] == commands(found)
    assert len(commands(found)) == len(found.gate.points)
    for name, command in commands(found).items():
        path = str(found.folder.path / name)
        assert shlex.split(command) == [
            *(
                "aq-quantize",
                "--model",
                found.spec.checkpoint.model,
                "--config",
                path,
                "--out",
                "DIR",
            )
        ]


def test_commands_quote_what_a_shell_would_split(found: SearchResult) -> None:
    spec = replaced(found.spec, model="my models/$HOME")
    command = next(iter(commands(replace(found, spec=spec)).values()))
    assert "'my models/$HOME'" in command


def test_profiles_of_engines_export_their_files_and_say_how_far_that_was_checked(
    found: SearchResult,
) -> None:
    said = "files that vLLM 0.32.0 loads (run on its CPU engine"
    assert said not in report_html(found) and "--export" not in report_html(found)
    profile = find_profile("vllm")
    spec = replaced(found.spec, profile="vllm")
    told = replace(found, space=replace(found.space, profile=profile), spec=spec)
    text = report_html(told)
    assert said in text and "The profile is vllm (stock vLLM:" in text
    assert all("--export compressed-tensors" in command for command in commands(told).values())


def test_names_that_users_chose_are_escaped(found: SearchResult) -> None:
    told = replace(found.provenance, model=HOSTILE)
    text = report_html(replace(found, provenance=told, spec=replaced(found.spec, model=HOSTILE)))
    assert HOSTILE not in text
    assert "<script>alert" not in text
    assert f"<h1>{escape(model_name(HOSTILE))} at 5.2bits</h1>" in text
    assert HOSTILE in next(iter(data_of(text)["commands"].values()))


def test_plotly_is_inside_once(page_file: Path) -> None:
    text = page_file.read_text(encoding="utf-8")
    assert text.count("* plotly.js v") == 1
    assert len(text) < 6_000_000


def test_the_page_begins_with_headline_picture_and_what_to_run(found: SearchResult) -> None:
    text = unescape(report_html(replace(found, original_perplexity=56.03)))
    text = re.sub('<span class="word">(.*?)</span>', r"\1", text)
    said = headline(found)
    order = [
        text.index(part)
        for part in (
            *(
                said.claim[1:],
                "Perplexity 56.03 \N{RIGHTWARDS ARROW} ",
                said.size,
                "KL to the original",
            ),
            *('id="figure-front"', "What to run", "aq-quantize --model", "Published points"),
        )
    ]
    assert order == sorted(order)
    unknown = replace(found, original_perplexity=None)
    assert "Perplexity" not in report_html(unknown).partition("</header>")[0]


def test_warnings_are_in_one_box_and_provenance_is_folded(found: SearchResult) -> None:
    text = report_html(found)
    assert text.count('class="warnings"') == 1
    assert "Only 6 windows of held-out text" in text
    folded = re.search(r"<details><summary>Provenance</summary><pre>(.*?)</pre>", text, re.S)
    assert folded is not None
    facts = json.loads(unescape(folded[1]))
    assert facts["settings"]["budget"] == "5.2bits"
    assert facts["provenance"]["model_digest"] == found.provenance.model_digest


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 700)])
def test_all_is_drawn_the_first_screen_says_it_and_nothing_is_cut(
    page_file: Path, long: SearchResult, open_page: Any, width: int, height: int
) -> None:
    """No errors, no requests, no scrolling sideways."""
    opened = open_page(page_file.as_uri(), width=width, height=height)
    page = opened.page
    claim, first = page.locator(".claim"), page.locator(".cards div").first
    said = headline(long).claim
    assert claim.inner_text() == f"{said[0].upper()}{said[1:]}"
    assert re.search(
        rf"{long.gate.published_row.kl:.6f}\s+95 % interval 0\.\d+ to", first.inner_text()
    )
    for place in (claim, first):
        box = place.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
        assert box["y"] + box["height"] <= height
    for name in ("front", "trials", "layers", "experts", "costs", "stages"):
        place = page.locator(f"#figure-{name}")
        assert place.locator("svg.main-svg").count() > 0, name
        assert place.bounding_box()["width"] <= width
    assert page.locator("#figure-front .scatterlayer .point").count() > 5
    assert page.locator("#figure-trials .scatterlayer .point").count() > 10
    if width == 1280:
        hidden = (
            "[...document.querySelectorAll('.scroll')].map(t => t.scrollWidth - t.clientWidth)"
        )
        assert set(page.evaluate(hidden)[:2]) == {0}
    else:
        cells = page.locator("table").first.locator("tr").nth(1).locator("td")
        box = cells.nth(1).bounding_box()
        assert box["x"] + box["width"] <= 390  # the KL with its error
    for folded in page.locator("summary").all():
        folded.click()
    assert opened.errors == []
    assert opened.requests == [page_file.as_uri()]
    assert opened.overflow == 0


def test_it_is_readable_without_javascript(page_file: Path, open_page: Any) -> None:
    opened = open_page(page_file.as_uri(), java_script_enabled=False)
    assert opened.page.get_by_role("heading", name="Published points").is_visible()
    assert opened.page.get_by_text("This figure needs JavaScript.").count() == 6


def click_point(page: Any) -> str:
    """Click the published point that is farthest from all others; returns its configuration."""
    place = page.locator("#figure-front")
    place.scroll_into_view_if_needed()
    points = place.evaluate(
        """(place) => {
            const { xaxis, yaxis } = place._fullLayout;
            const box = place.getBoundingClientRect();
            return place.data.filter((trace) => trace.customdata).flatMap((trace) =>
                trace.x.map((x, i) => ({
                    x: box.left + xaxis._offset + xaxis.d2p(x),
                    y: box.top + yaxis._offset + yaxis.d2p(trace.y[i]),
                    config: trace.customdata[i],
                })));
        }"""
    )

    def room(point: dict[str, Any]) -> float:
        others = [p for p in points if p["config"] != point["config"]]
        return min(math.dist((p["x"], p["y"]), (point["x"], point["y"])) for p in others)

    lonely = max((p for p in points if p["config"] is not None), key=room)
    page.mouse.move(lonely["x"] - 3, lonely["y"])
    page.mouse.move(lonely["x"], lonely["y"])
    page.mouse.click(lonely["x"], lonely["y"])
    return str(lonely["config"])


def test_a_command_is_copied_by_a_click_by_the_button_or_shown_to_be_copied_by_hand(
    page_file: Path, long: SearchResult, open_page: Any
) -> None:
    page = open_page(page_file.as_uri(), permissions=CLIPBOARD).page
    command = commands(long)[click_point(page)]
    page.locator("#said").wait_for(state="visible")
    assert page.locator("#said").inner_text() == f"Copied: {command}"
    assert page.evaluate("navigator.clipboard.readText()") == command
    hide = {"value": None, "configurable": True}
    page.evaluate("(hide) => Object.defineProperty(navigator, 'clipboard', hide)", hide)
    page.get_by_text("Commands", exact=True).click()
    page.locator("details button.copy").last.click()
    last = list(commands(long).values())[-1]
    assert last != command
    assert page.locator("#said").inner_text() == f"Copied: {last}"
    page.evaluate("document.execCommand = () => false")
    command = commands(long)[click_point(page)]
    assert page.locator("#said").inner_text() == f"Copy this: {command}"
    assert page.evaluate("delete navigator.clipboard && navigator.clipboard.readText()") == last


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("demo", "demo"),
        ("allenai/OLMoE-1B-7B", "allenai/OLMoE-1B-7B"),
        ("/home/me/my models/olmoe/", "olmoe"),
        ("../olmoe", "olmoe"),
        ("a/b/olmoe", "olmoe"),
        (r"C:\\models\\olmoe", "olmoe"),
        ("/", "/"),
    ],
)
def test_name_of_a_model_has_no_folders_of_this_machine(model: str, name: str) -> None:
    assert model_name(model) == name


def test_title_and_heading_are_without_the_path(found: SearchResult) -> None:
    page = report_html(found)
    for part in (r"<title>(.*?)</title>", r"<h1>(.*?)</h1>"):
        text = re.findall(part, page)[0]
        assert "/" not in text
        assert text.startswith(model_name(found.spec.checkpoint.model))
    assert not report_text(found).splitlines()[0].startswith("# /")
