"""URLs of studies: refused before anything is opened, shown and kept without a password."""

from pathlib import Path

import pytest

from alphaquant.errors import StoreError
from alphaquant.studies.store import urls
from alphaquant.studies.store.urls import check_storage, is_served, is_storage, kept_url


@pytest.mark.parametrize("text", ["sqlite:///s.db", "journal:s", "postgresql://h/d", "grpc://h"])
def test_storages_are_told_from_directories(text: str) -> None:
    assert is_storage(text)
    assert not is_storage("aq-out")
    assert not is_storage("journal/of/mine")


def test_kept_url_has_whole_paths_and_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert kept_url("sqlite:///s.db") == f"sqlite:///{tmp_path}/s.db"
    assert kept_url("journal:s.log") == f"journal:{tmp_path}/s.log"
    expected = "postgresql+psycopg://u@h:5/d?a=1"
    assert kept_url("postgresql://u:p%40w@h:5/d?password=x&a=1") == expected
    assert kept_url("postgresql+psycopg://u:p%40w@h:5/d?a=1") == expected


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mongodb://u:secret@h/d", "mongodb:.* not one of sqlite, postgresql, grpc, journal"),
        ("postgresql://u:secret@1@h/d", "cannot be read.*%40"),
        ("postgresql://u:secret@h:port/d", "cannot be read"),
        ("postgresql+nodriver://u:secret@h/d", "cannot be read|nodriver"),
        ("journal:", "names no file"),
        ("grpc://u:secret@h:13000", "host with a port alone.*grpc://HOST:PORT"),
        ("grpc://h:1/secret", "host with a port alone"),
        ("grpc://", "host with a port alone"),
    ],
)
def test_url_that_cannot_be_used_is_refused_before_anything_is_opened(
    url: str, words: str
) -> None:
    with pytest.raises(StoreError, match=words) as caught:
        check_storage(url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "find_spec", lambda name: None)
    with pytest.raises(
        StoreError, match=r"package psycopg.*pip install 'aq-search\[postgresql\]'"
    ):
        check_storage("postgresql://u:secret@h/d")
    with pytest.raises(StoreError, match=r"package grpc, .*pip install 'aq-search\[grpc\]'"):
        check_storage("grpc://h")
    check_storage("sqlite:///s.db")


def test_a_proxy_has_a_port_and_is_a_server() -> None:
    assert kept_url("grpc://h") == "grpc://h:13000"
    assert kept_url("grpc://h:5") == "grpc://h:5"
    assert is_served("grpc://h")
    assert is_served("postgresql://h/d")
    assert not is_served("sqlite:///s.db")
    assert not is_served("journal:s")
