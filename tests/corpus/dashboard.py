"""The dashboard: what is no study, and addresses that cannot be listened on."""

import sqlite3

import optuna

from tests.corpus.engine import Case, Place


def _foreign_study(place: Place) -> None:
    url = f"sqlite:///{place.here / 'other.db'}"
    study = optuna.create_study(storage=url, study_name="other")
    study._storage.remove_session()
    study._storage._backend.engine.dispose()  # type: ignore[attr-defined]


def _foreign_database(place: Place) -> None:
    with sqlite3.connect(place.here / "other.db") as database:
        database.execute("CREATE TABLE recipes (name TEXT)")
    database.close()


def _folder(place: Place) -> None:
    (place.here / "other.db").mkdir()


CASES = (
    Case("dashboard of nothing", "aq-dashboard", "aq-out does not exist"),
    Case("dashboard of an empty folder", "aq-dashboard .", "holds no search of ours"),
    Case("dashboard of a file", "aq-dashboard {int4}", "no search of ours"),
    Case("dashboard of a checkpoint", "aq-dashboard {packed}", "no search of ours"),
    Case("study that is not there", "aq-dashboard sqlite:///none.db", "run aq-search first"),
    Case("journal that is not there", "aq-dashboard journal:none", "run aq-search first"),
    Case(
        "study of somebody else",
        "aq-dashboard sqlite:///other.db",
        "no study of aq-search",
        make=_foreign_study,
    ),
    Case(
        "database without studies",
        "aq-dashboard sqlite:///other.db",
        "other.db",
        make=_foreign_database,
    ),
    Case(
        "study that is a text",
        "aq-dashboard sqlite:///other.db",
        "other.db",
        files={"other.db": "once upon a time " * 99},
    ),
    Case(
        "study of no bytes",
        "aq-dashboard sqlite:///other.db",
        "other.db",
        files={"other.db": ""},
    ),
    Case("study's name for a folder", "aq-dashboard sqlite:///other.db", "other.db", make=_folder),
    Case(
        "journal that is a text",
        "aq-dashboard journal:other.log",
        "other.log",
        files={"other.log": "once upon a time\n" * 9},
    ),
    Case("server of another kind", "aq-dashboard . --storage mongodb://x", "mongodb://x"),
    Case("password in a wrong address", "aq-dashboard . --storage mysql://u:secret@h/d", "mysql"),
    Case("port above all", "aq-dashboard {found} --port 99999", "Must be ", 2),
    Case("port below none", "aq-dashboard {found} --port -1", "Must be ", 2),
    Case("host of nobody", "aq-dashboard {found} --host nowhere.invalid", "nowhere.invalid"),
    Case("address of another machine", "aq-dashboard {found} --host 192.0.2.1", "192.0.2.1"),
)
