"""Many clients of one study, by the functions of the benchmark: nothing is lost or doubled."""

from pathlib import Path
from types import ModuleType

import pytest

from alphaquant.testing.storages.servers import BINARIES
from tests.benches import import_benchmark


@pytest.fixture(scope="module")
def clients() -> ModuleType:
    return import_benchmark("storage_clients")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("kind", ["journal", "postgresql"])
def test_64_clients_lose_and_double_nothing(
    kind: str, clients: ModuleType, tmp_path: Path
) -> None:
    if kind == "postgresql" and not BINARIES:
        pytest.skip("PostgreSQL is not installed")
    with clients.storage_of(kind, tmp_path) as url:
        found = clients.run_clients(url, kind, 64, 128)
    assert (found.n_trials, found.n_lost, found.n_doubled, found.n_failed) == (128, 0, 0, 0)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_trial_that_is_lost_or_doubled_is_counted(clients: ModuleType, tmp_path: Path) -> None:
    with clients.storage_of("journal", tmp_path) as url:
        found = clients.run_clients(url, "journal", 2, 4)
        assert (found.n_lost, found.n_doubled, found.n_failed) == (0, 0, 0)
        assert clients.counted(url, 3, 2) == (2, 0)  # a third client would have told two more
        assert clients.counted(url, 2, 1) == (0, 2)  # and these two were not asked to tell both
    row = clients.table([found]).splitlines()[-1]
    assert row.startswith("| journal | 2 | 4 | ")
    assert row.endswith("| 1.00 | 0 | 0 |")
