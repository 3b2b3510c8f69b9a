"""The dashboard answers to its own names only, and gives artifacts away as files."""

import logging
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from alphaquant.commands.dashboard import DashboardSpec, _listening, address_of
from alphaquant.commands.dashboard_guard import Guarded, is_own


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    if environ["PATH_INFO"] == "/broken":
        raise RuntimeError("a bug of the page")
    start_response("200 OK", [("Content-Type", "text/html"), ("Access-Control-Allow-Origin", "*")])
    return [b"page"]


def ask(path: str, **headers: str) -> tuple[str, dict[str, str], bytes]:
    found: list[Any] = []
    environ = {"PATH_INFO": path, **headers}
    body = b"".join(Guarded(app, "127.0.0.1")(environ, lambda *given: found.extend(given)))
    return found[0], dict(found[1]), body


@pytest.mark.parametrize(
    ("named", "host", "expected"),
    [
        ("localhost", "127.0.0.1", True),
        ("LocalHost.:8080", "127.0.0.1", True),
        ("127.0.0.1:1", "127.0.0.1", True),
        ("[::1]:80", "127.0.0.1", True),
        ("evil.example", "127.0.0.1", False),
        ("evil.example:8080", "127.0.0.1", False),
        ("127.0.0.1.evil.example", "127.0.0.1", False),
        ("", "127.0.0.1", False),
        ("null", "127.0.0.1", False),
        ("192.168.0.7", "127.0.0.1", False),
        ("box.lan:80", "Box.lan", True),
        ("192.168.0.7:80", "0.0.0.0", True),
        ("evil.example", "0.0.0.0", False),
        (f"{socket.gethostname()}:80", "0.0.0.0", True),
        ("", "", False),
    ],
)
def test_own_names_are_loopback_the_host_and_addresses_where_it_listens_on_all(
    named: str, host: str, expected: bool
) -> None:
    assert is_own(named, host) == expected


def test_request_for_another_name_or_from_another_site_is_refused_in_one_line() -> None:
    for headers in (
        {},
        {"HTTP_HOST": "evil.example"},
        {"HTTP_HOST": "localhost", "HTTP_ORIGIN": "https://evil.example"},
    ):
        status, _, body = ask("/api/studies", **headers)
        assert status == "403 Forbidden"
        assert body.count(b"\n") == 1
    same = {"HTTP_HOST": "localhost:8", "HTTP_ORIGIN": "http://localhost:8"}
    assert ask("/api/studies", **same)[0] == "200 OK"


def test_artifact_is_a_file_and_no_page() -> None:
    _, headers, body = ask("/artifacts/1/2/abc", HTTP_HOST="localhost")
    assert body == b"page"
    assert headers == {
        "Content-Type": "text/html",
        "Content-Disposition": "attachment",
        "X-Content-Type-Options": "nosniff",
    }
    assert "Content-Disposition" not in ask("/dashboard", HTTP_HOST="localhost")[1]


def test_real_server_refuses_other_hosts_and_keeps_tracebacks_off_the_terminal(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG, "alphaquant")
    spec = DashboardSpec(tmp_path)
    with _listening(spec, Guarded(app, spec.host)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        codes = {}
        for path, host in (("ok", None), ("ok", "evil.example"), ("broken", None)):
            headers = {} if host is None else {"Host": host}
            request = urllib.request.Request(address_of(server) + path, headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=20) as answer:
                    codes[path, host] = answer.status
            except urllib.error.HTTPError as error:
                codes[path, host] = error.code
                error.close()
        with socket.create_connection(server.server_address[:2]) as connection:
            connection.sendall(b"\xff\x00 nonsense\r\n\r\n")
            connection.recv(1000)
        server.shutdown()
        thread.join(20)
    assert codes == {("ok", None): 200, ("ok", "evil.example"): 403, ("broken", None): 500}
    assert capfd.readouterr() == ("", "")
    assert "a bug of the page" in caplog.text
