"""Workers on a Ray cluster: what each gets, and the same order and faults as of processes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alphaquant.errors import StoreError
from alphaquant.work.ray_cluster import RayWorkers, Share, share_of
from alphaquant.work.tasks import WorkError
from tests.work.fake_tasks import FakeTask, open_badly, open_nothing


def node(n_cpus: int, n_gpus: int = 0, is_alive: bool = True) -> dict[str, Any]:
    resources = {"CPU": float(n_cpus)} | ({"GPU": float(n_gpus)} if n_gpus else {})
    return {"Alive": is_alive, "Resources": resources}


def test_a_worker_gets_a_gpu_or_a_node_and_its_share_of_the_cores() -> None:
    gpus = [node(32, 4), node(64, 4), node(8), node(32, 8, is_alive=False)]
    assert share_of(gpus, None, "cuda") == Share(8, 2, 8, 1)
    assert share_of(gpus, 3, "cuda") == Share(3, 2, 8, 1)
    assert share_of(gpus, 100, "cuda").n_workers == 8
    assert share_of([node(32), node(32)], None, "cpu") == Share(2, 2, 32, 0)
    assert share_of([node(32), node(32)], 6, "cpu") == Share(6, 2, 10, 0)
    assert share_of([node(2)], 6, "cpu") == Share(6, 1, 1, 0)
    assert share_of(gpus, None, "cuda").n_together == 4


@pytest.mark.parametrize(
    ("nodes", "device"), [([node(4)], "cuda"), ([node(0)], "cpu"), ([], "cpu")]
)
def test_a_cluster_without_room_is_refused(nodes: list[dict[str, Any]], device: str) -> None:
    with pytest.raises(WorkError, match=r"^none of the cluster's \d nodes has a [CG]PU; add"):
        share_of(nodes, None, device)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Ray nodes of one core each on this machine, beside a head without cores."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 * 2**20}
    head = {"num_cpus": 0, "include_dashboard": False, **small}
    found = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        found.add_node(num_cpus=1, **small)
    found.wait_for_nodes()
    yield found
    found.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own, of files that it leaves open
def test_tasks_on_a_cluster_come_in_order_and_are_run_again(cluster: Any, tmp_path: Path) -> None:
    with RayWorkers(cluster.address, None, open_nothing, silence_seconds=12.0) as workers:
        assert workers.share == Share(2, 2, 1, 0)
        assert workers.text.startswith("2 workers on 2 nodes of a Ray cluster")
        tasks = [FakeTask(n, tmp_path, seconds=0.5 * (n == 0)) for n in range(5)]
        assert [n for n, _ in workers.map(tasks)] == list(range(5))
        dying = FakeTask(10, tmp_path, "once die")
        hanging = FakeTask(11, tmp_path, "once hang")
        assert [n for n, _ in workers.map([dying, hanging])] == [10, 11]
        assert (dying.begun(), hanging.begun()) == (2, 2)
        with pytest.raises(StoreError, match="^file 12 is damaged; delete it$"):
            list(workers.map([FakeTask(12, tmp_path, "fail")]))
        with pytest.raises(WorkError, match="^task 13 was lost 3 times"):
            list(workers.map([FakeTask(13, tmp_path, "die")]))
        assert list(workers.map([FakeTask(14, tmp_path, "run_out")])) == [(14, True)]
        assert workers.n_workers == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_lost_node_costs_its_tasks_and_a_damaged_model_is_told(
    cluster: Any, tmp_path: Path
) -> None:
    with (
        RayWorkers(cluster.address, None, open_badly) as workers,
        pytest.raises(StoreError, match="^the model is damaged"),
    ):
        list(workers.map([FakeTask(0, tmp_path)]))
    with RayWorkers(cluster.address, None, open_nothing) as workers:
        assert [n for n, _ in workers.map([FakeTask(n, tmp_path) for n in range(2)])] == [0, 1]
        results = workers.map([FakeTask(n, tmp_path, seconds=3.0) for n in range(2, 6)])
        cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
        assert [n for n, _ in results] == [2, 3, 4, 5]


def test_no_cluster_is_told_in_one_line_and_at_once() -> None:
    pytest.importorskip("ray")
    with pytest.raises(WorkError, match="^there is no Ray cluster at 127.0.0.1:1 "):
        RayWorkers("127.0.0.1:1", None, open_nothing)
