"""What an export is: a packed checkpoint of ours written again as another program's files.

An export changes no number where the other format can hold it; where it cannot, the plan is
refused by name before any weight is loaded (`alphaquant.exports.checker`). Nothing is rounded
again in silence: what is not exact is in the facts that `write` returns.
"""

from pathlib import Path
from typing import Any, Protocol

from alphaquant.exports.packed import PackedSource
from alphaquant.models.sites import ModelMap
from alphaquant.spaces.assignment import Assignment


class Exporter(Protocol):
    """One kind of files.

    Attributes:
        name: what `--export` calls it.
        profiles: names of the profiles whose results it can hold, the first is named in messages.
    """

    @property
    def name(self) -> str:
        """What `--export` calls it."""

    @property
    def profiles(self) -> tuple[str, ...]:
        """Profiles whose results it can hold; the first is named in messages."""

    def check(self, assignment: Assignment, model_map: ModelMap) -> None:
        """Refuse a plan that the files cannot hold, before anything is quantized.

        Args:
            assignment: format of every matrix.
            model_map: the model: its inventory, its modules and its configuration.

        Raises:
            ConfigError: naming the matrices, what is possible and the profile to search with.
        """

    def write(self, source: PackedSource, out: Path) -> dict[str, Any]:
        """Write every file into a directory that is there and empty.

        Args:
            source: the packed checkpoint.
            out: the directory.

        Returns:
            Facts for the report, ready for JSON: versions, what is not exact, and as `run` the
            command that serves the files, with `{directory}` where they are.

        Raises:
            StoreError: the disk is full, or the packed checkpoint is damaged.
        """

    def verify(self, out: Path) -> None:
        """Check the files that were written as the engine would read them.

        Raises:
            StoreError: naming the tensors that do not fit together.
        """
