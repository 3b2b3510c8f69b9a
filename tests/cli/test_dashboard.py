"""`aq-dashboard` on a finished search: in a browser, until Ctrl-C, with clear errors."""

import os
import re
import signal
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from alphaquant.cli import dashboard
from alphaquant.commands.dashboard import DashboardSpec, address_of, open_dashboard
from alphaquant.commands.search import search
from alphaquant.specs.search import SearchSpec

pytest_plugins = ("tests.browser",)

# A page computes importances of parameters, and warns each time where trials are few.
pytestmark = pytest.mark.filterwarnings("ignore:::optuna")


@pytest.fixture(scope="module")
def out(
    tiny: Path, texts: dict[str, Path], cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Directory of a finished search; read it only."""
    out = tmp_path_factory.mktemp("dashboard") / "out"
    search(
        SearchSpec.of(
            model=str(tiny),
            budget="5.2bits",
            formats="int3-g32,int4-g32,int8-row",
            trials=4,
            calibration=str(texts["calibration"]),
            evaluation=str(texts["search"]),
            heldout=str(texts["heldout"]),
            calibration_samples=8,
            evaluation_samples=4,
            heldout_samples=4,
            seq_len=32,
            out=out,
            cache=cache,
        )
    )
    return out


@pytest.fixture(scope="module")
def address(out: Path) -> Iterator[str]:
    """Where the dashboard of the search answers."""
    with open_dashboard(DashboardSpec(out)) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield address_of(server)
        server.shutdown()
        thread.join()


def test_a_study_is_looked_at_from_the_list_to_its_trials_without_the_network(
    address: str, open_page: Any
) -> None:
    opened = open_page(address)
    page = opened.page
    page.get_by_text("aq-search").first.click()
    page.wait_for_url("**/studies/1")
    page.get_by_text("Pareto Front").wait_for()
    for title in ("Front: size and divergence", "Predicted and measured divergence"):
        page.locator(".gtitle", has_text=title).wait_for()
    found = page.locator(".gtitle", has_text="Front: size and divergence")
    front = page.locator(".js-plotly-plot").filter(has=found)
    assert front.locator(".scatterlayer path.point").count() >= 4
    assert opened.overflow == 0
    page.goto(f"{address}dashboard/studies/1/note")
    page.get_by_role("cell", name="configs/").first.wait_for()
    assert page.get_by_role("heading", name="Found").count() == 1
    page.goto(f"{address}dashboard/studies/1/trials?numbers=1")
    page.get_by_role("heading", name="Trial 1 of the search").wait_for()
    assert page.get_by_role("cell", name="predicted KL").count() == 1
    page.get_by_text("config.json", exact=True).last.wait_for()
    assert page.get_by_text("checkpoint_bytes").count() == 1
    assert opened.overflow == 0, "no attribute is wider than the page"
    assert opened.errors == []
    assert all(r.startswith((address, "data:", "blob:")) for r in opened.requests)


def test_ctrl_c_is_the_way_it_ends(out: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = []

    def ask_and_interrupt(address: str) -> None:
        with urllib.request.urlopen(f"{address}api/studies") as answer:
            answered.append(answer.status)
        os.kill(os.getpid(), signal.SIGINT)

    announce = dashboard._announce

    def announce_and_ask(address: str) -> None:
        announce(address)
        Thread(target=ask_and_interrupt, args=(address,)).start()

    monkeypatch.setattr(dashboard, "_announce", announce_and_ask)
    # Jobs in the background of a shell ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = run("aq-dashboard", str(out))
    finally:
        signal.signal(signal.SIGINT, before)
    assert answered == [200]
    assert (done.code, done.err) == (0, "Ctrl-C stops it\n\nstopped\n")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\n", done.out)


def test_taken_port_is_refused(out: Path, run: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run("aq-dashboard", str(out), "--port", port)
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert f"port {port} (" in done.err
    assert "--port (0 is any free one)" in done.err
