"""`aq-quantize --workers`: layers are quantized by workers into the bank, and taken from there."""

from alphaquant.errors import ConfigError
from alphaquant.progress import Progress
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.units import Matrix
from alphaquant.specs.quantize import QuantizeSpec
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.studies.costing import fill_source_bank, states_folder
from alphaquant.studies.inputs import Source
from alphaquant.studies.shared.staffing import check_workers, with_workers, worker_source
from alphaquant.texts.windows import TokenSet
from alphaquant.work.walked import folder_of_states


def check_shared(spec: QuantizeSpec, settings: QuantSettings, device: str) -> None:
    """Refuse workers that would have nothing to do, before anything is loaded.

    Raises:
        ConfigError: rounding without data, or layers that wait for each other.
    """
    if spec.workers is None and spec.cluster is None:
        return
    check_workers(spec.workers, spec.cluster, device)
    if settings.method != "gptq" or settings.sequential:
        why = "layer after layer (--sequential)" if settings.sequential else "without data"
        raise ConfigError(
            f"--workers and --cluster share layers, and this quantizes {why}; leave them out, or "
            "use --method gptq without --sequential"
        )


def fill_by_workers(
    spec: QuantizeSpec,
    source: Source,
    tokens: TokenSet,
    assignment: Assignment,
    settings: QuantSettings,
    progress: Progress,
    rotate: int | None = None,
) -> None:
    """Let workers quantize what the bank lacks of an assignment, where some are asked for.

    Args:
        spec: says who.
        source: the model.
        tokens: calibration windows.
        assignment: format of every matrix.
        settings: of the quantizer.
        progress: called with a stage's name, steps done, steps.
        rotate: seed of the model's rotation, None for none.

    Raises:
        StoreError: a file of the bank is damaged.
    """
    if spec.workers is None and spec.cluster is None:
        return
    include = source.map.inventory.include
    own = worker_source(source, spec.dtype, include, spec.cache, rotate=rotate)

    def wanted(matrix: Matrix, name: str) -> bool:
        return assignment.formats[matrix.name] == name

    names = sorted(set(assignment.formats.values()))
    folder = states_folder(source, tokens, spec.cache)
    with (
        folder_of_states(folder),
        with_workers(source, spec.workers, spec.cluster, own) as staffed,
    ):
        fill_source_bank(staffed, tokens, names, settings, spec.cache, progress, wanted)
