"""The workers of a search or quantization: they open the model that the driver has opened."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from alphaquant.errors import ConfigError
from alphaquant.models.sites import ModelMap
from alphaquant.provenance import versions
from alphaquant.studies.inputs import Source, cache_dir, load_source
from alphaquant.work.processes import Processes, visible_gpus
from alphaquant.work.ray_cluster import RayWorkers
from alphaquant.work.tasks import WorkError, Workers

_SAME_VERSIONS = ("aq-search", "torch", "transformers", "numba")
"""Packages whose versions decide numbers."""


@dataclass(frozen=True)
class WorkerSource:
    """Opens the driver's model in a worker; can be pickled.

    Attributes:
        name: of the model, as asked for.
        device: type of the device.
        dtype: of the computation, as asked for.
        include: what is quantized beside the layers.
        cache: where weights are.
        rotate: seed of a rotation of the residual stream; None for none.
        scratch: directory of the worker's machine for copies of what is read often.
        digest: of the driver's weights.
        versions: of the driver's packages.
    """

    name: str
    device: str
    dtype: str
    include: tuple[str, ...]
    cache: Path
    digest: str
    versions: Mapping[str, str]
    rotate: int | None = None
    scratch: Path | None = None

    def __call__(self) -> ModelMap:
        """The model.

        Raises:
            WorkError: packages or weights are not those of the driver.
        """
        own = versions()
        for package, version in self.versions.items():
            if own[package] != version:
                raise WorkError(
                    f"a worker has {package} {own[package]} and the driver {version}; numbers may "
                    "differ: install the same versions everywhere"
                )
        found = load_source(
            *(self.name, self.device, self.dtype),
            include=self.include,
            cache=self.cache,
            rotate=self.rotate,
            scratch=self.scratch,
        )
        if found.digest != self.digest:
            raise WorkError(
                f"{self.name} has other weights in a worker ({found.digest[:12]}) than in the "
                f"driver ({self.digest[:12]}); give a path that is the same file everywhere"
            )
        return found.map


def check_workers(n_workers: int | None, cluster: str | None, device: str) -> None:
    """Refuse workers that cannot be, before anything is loaded.

    Args:
        n_workers: how many are asked for; None for those that there are.
        cluster: address of a Ray cluster; None for this machine.
        device: of the model.

    Raises:
        ConfigError: more workers than GPUs, or a certain GPU for all.
    """
    if n_workers is None and cluster is None:
        return
    if device.partition(":")[2]:
        raise ConfigError(
            f"--device {device} is one GPU, and every worker has one of its own; use --device "
            "cuda, and CUDA_VISIBLE_DEVICES for some of them"
        )
    n_gpus = len(visible_gpus()) if device == "cuda" else None
    if cluster is None and n_gpus is not None and n_workers is not None and n_workers > n_gpus:
        raise ConfigError(
            f"--workers {n_workers} on {n_gpus} GPUs; give {n_gpus} at most, one for each"
        )


@contextmanager
def with_workers(
    source: Source,
    n_workers: int | None,
    cluster: str | None,
    asked: WorkerSource,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[Source]:
    """The source with its workers, who are gone on leaving; as it is where none are asked for.

    Args:
        source: of the driver.
        n_workers: how many; None for one per GPU or node of a cluster.
        cluster: address of a Ray cluster; None for this machine.
        asked: opens the model in a worker.
        tell: called with a line for people, of a cluster.

    Raises:
        WorkError: they cannot be started.
    """
    with _started(n_workers, cluster, asked) as workers:
        if isinstance(workers, RayWorkers):
            tell(workers.text)
        yield source if workers is None else replace(source, workers=workers)


def worker_source(
    source: Source,
    dtype: str,
    include: tuple[str, ...],
    cache: Path | None,
    *,
    rotate: int | None = None,
    scratch: Path | None = None,
) -> WorkerSource:
    """What opens a source in a worker.

    Args:
        source: of the driver.
        dtype: of the computation, as asked for.
        include: what is quantized beside the layers.
        cache: as asked for.
        rotate: seed of a rotation, None for none.
        scratch: as asked for.
    """
    found = versions()
    device: torch.device = next(source.map.model.parameters()).device
    is_path = Path(source.name).exists()
    return WorkerSource(
        str(Path(source.name).resolve()) if is_path else source.name,
        device.type,
        dtype,
        include,
        cache_dir(cache),
        source.digest,
        {name: found[name] for name in _SAME_VERSIONS},
        rotate,
        scratch,
    )


def _started(
    n_workers: int | None, cluster: str | None, asked: WorkerSource
) -> AbstractContextManager[Workers | None]:
    if cluster is not None:
        return RayWorkers(cluster, n_workers, asked, asked.device)
    if n_workers is None:
        return nullcontext()
    return Processes(n_workers, asked, asked.device)
