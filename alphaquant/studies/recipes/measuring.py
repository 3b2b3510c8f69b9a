"""From a recipe to the divergence of an assignment that is quantized as it says."""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alphaquant.errors import ConfigError, DataError, ModelError
from alphaquant.evaluators.divergence import Divergence
from alphaquant.progress import Progress, no_progress
from alphaquant.quant.bank import Bank
from alphaquant.quant.swap import Swapper
from alphaquant.spaces.assignment import Assignment, BitCount
from alphaquant.spaces.budget import Budget
from alphaquant.spaces.units import Matrix
from alphaquant.studies.costing import fill_source_bank, states_folder
from alphaquant.studies.inputs import Source, cache_dir, read_text
from alphaquant.studies.objective import EvaluationSet, Objective
from alphaquant.studies.recipes.choices import CALIBRATION, ROTATE, Choice, Recipe
from alphaquant.studies.shared.spread_rounds import SpreadRounds
from alphaquant.texts.windows import TokenSet
from alphaquant.work.walked import folder_of_states

FOLDER = "recipes"
"""Folder of the cache with what is being compared."""

OpenSource = Callable[[int | None], Source]
"""Loads the model, rotated with a seed or as it is; the weights are the original's."""


@dataclass
class RecipeBench:
    """Quantizes an assignment by recipes and measures it.

    What a recipe makes is removed when it was measured: matrices in the formats of one assignment,
    which `aq-quantize` makes again. Where that was stopped, it goes on with the layers that are
    missing.

    Attributes:
        own: the recipe of the search.
        assignment: a format for every matrix.
        budget: of the search.
        calibration: the text of the search, whose number and length of windows all others have.
        open_source: gives the model.
        cache: where texts and output Hessians are, and banks meanwhile; None for the default
            place.
        owner: path of the search's output, which is claimed: no other process is at its recipes.
        progress: called with the stages of loading, writing and quantizing.
    """

    own: Recipe
    assignment: Assignment
    budget: Budget
    calibration: TokenSet
    open_source: OpenSource
    cache: Path | None
    owner: Path
    progress: Progress = no_progress
    _sources: dict[int | None, Source] = field(default_factory=dict)

    def usable(self, choices: Sequence[Choice], seed: int) -> tuple[list[Choice], dict[str, str]]:
        """The choices that this model can make, and why it cannot make the others.

        Texts are written and the model is rotated here, once.

        Args:
            choices: from `choices_of`.
            seed: of a rotation.

        Returns:
            Choices with more than one option, and reasons by name of the others.
        """
        kept, left_out = list[Choice](), dict[str, str]()
        for choice in choices:
            try:
                if choice.name == CALIBRATION:
                    for option in choice.options:
                        self.text(replace(self.own, calibration=str(option)))
                elif choice.name == ROTATE:
                    self._check_rotation(seed)
            except (ModelError, ConfigError, DataError) as error:
                left_out[choice.name] = str(error)
            else:
                kept.append(choice)
        return kept, left_out

    def source(self, rotate: int | None) -> Source:
        """The model that a recipe quantizes.

        Raises:
            ModelError: it cannot be rotated.
        """
        if rotate not in self._sources:
            self._sources[rotate] = self.open_source(rotate)
        return self._sources[rotate]

    def text(self, recipe: Recipe) -> TokenSet:
        """The calibration windows of a recipe.

        Raises:
            AlphaQuantError: the model cannot write them.
        """
        if recipe.calibration == self.calibration.name:
            return self.calibration
        n_samples, seq_len = self.calibration.tokens.shape
        return read_text(
            *(self.source(self.own.rotate), recipe.calibration, "calibration"),
            *(n_samples, seq_len, self.calibration.seed),
            "always" if self.calibration.bos else "never",
            self.progress,
        )

    def counts(self, recipe: Recipe) -> BitCount:
        """Bits and bytes of the assignment on the model that a recipe quantizes."""
        return self.assignment.count_bits(self.source(recipe.rotate).map.inventory)

    def divergence(
        self, recipe: Recipe, on: EvaluationSet, progress: Progress = no_progress
    ) -> Divergence:
        """Of the assignment, quantized by a recipe, on a text.

        Args:
            recipe: how it is quantized.
            on: the text.
            progress: called with the stages of quantizing.

        Raises:
            AlphaQuantError: this recipe cannot quantize this model.
        """
        source = self.source(recipe.rotate)
        with self._quantized(recipe, source, progress) as bank:
            workers = source.workers
            spread = None if workers is None else SpreadRounds(workers, bank.path)
            objective = Objective(Swapper(source.map, bank.layer), spread=spread)
            return objective.divergence(self.assignment, on)

    def close(self) -> None:
        """Remove what runs that were stopped have left."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with suppress(OSError):  # others are at their recipes, or nobody ever was
            self._folder.parent.rmdir()

    @contextmanager
    def _quantized(self, recipe: Recipe, source: Source, progress: Progress) -> Iterator[Bank]:
        """A bank with every matrix in the assignment's format, and nothing else."""
        text, formats = self.text(recipe), self.assignment.formats

        def wanted(matrix: Matrix, name: str) -> bool:
            """Whether this is the format that was chosen."""
            return formats[matrix.name] == name

        names = sorted(set(formats.values()))
        given = (source, text, names, recipe.settings, self.cache, progress, wanted)
        if source.workers is None:
            bank = fill_source_bank(*given, root=self._folder)
        else:
            with folder_of_states(states_folder(source, text, self.cache)):
                bank = fill_source_bank(*given, root=self._folder)
        yield bank
        shutil.rmtree(bank.path, ignore_errors=True)

    @property
    def _folder(self) -> Path:
        """Of this search's recipes alone."""
        name = hashlib.sha256(str(self.owner.absolute()).encode()).hexdigest()[:16]
        return cache_dir(self.cache) / FOLDER / name

    def _check_rotation(self, seed: int) -> None:
        """Rotate the model, unless its file would not be what was asked for.

        Raises:
            ModelError: it cannot be rotated, a rotation unties embeddings and head, or its
                routers, which stay in float32, are beyond a budget of the whole file.
        """
        own = self.source(self.own.rotate).map
        config: Any = own.model.config
        if config.get_text_config().tie_word_embeddings:
            raise ModelError("a rotation unties embeddings and head, and the file grows by one")
        other = self.source(seed).map.inventory
        if other.matrices != own.inventory.matrices:
            raise ModelError("a rotated copy has other matrices")
        if self.assignment.storage_bits(other) > self.budget.limit_bits(other):
            raise ModelError("routers of a rotated copy are in float32, which is over the budget")
