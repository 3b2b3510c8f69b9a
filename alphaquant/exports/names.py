"""The names that a model's original checkpoint has, which engines know.

transformers renames tensors when it loads a checkpoint, and merges the experts of a layer into one
tensor: Mixtral's `block_sparse_moe.experts.3.w1` becomes rows of `mlp.experts.gate_up_proj`. Other
engines know the original names only. transformers can undo its own changes; that is done here on
tensors without memory, and read off by the tensors' identity.
"""

from dataclasses import dataclass
from typing import Any

from alphaquant.errors import ConfigError
from alphaquant.models.sites import ModelMap
from alphaquant.spaces.units import Matrix


@dataclass(frozen=True)
class OriginalNames:
    """Names of the original checkpoint.

    Attributes:
        renamed: name in the model -> original name, for the tensors that are called otherwise.
        all_names: every tensor of the original checkpoint.
    """

    renamed: dict[str, str]
    all_names: frozenset[str]

    def tensor(self, name: str) -> str:
        """The original name of a tensor that stays as it is."""
        return self.renamed.get(name, name)

    def matrix(self, matrix: Matrix) -> str | None:
        """The original name of a matrix, without `.weight`; None where it is none of its own."""
        known = self.tensor(f"{matrix.name}.weight").removesuffix(".weight")
        candidates = (known, *matrix.aliases)
        return next((n for n in candidates if f"{n}.weight" in self.all_names), None)


def original_names(model_map: ModelMap) -> OriginalNames:
    """The names of a model's original checkpoint.

    Args:
        model_map: the model, with or without weights; nothing is changed.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model: Any = model_map.model
    state = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    places = {id(tensor): name for name, tensor in state.items()}
    original = revert_weight_conversion(model, dict(state))
    renamed = {
        places[id(tensor)]: name
        for name, tensor in original.items()
        if places.get(id(tensor), name) != name
    }
    return OriginalNames(renamed, frozenset(original))


def matrix_names(model_map: ModelMap, export: str) -> dict[str, str]:
    """The original name of every matrix, without `.weight`, by canonical name.

    Args:
        model_map: the model.
        export: name of the export, for the message.

    Raises:
        ConfigError: the original checkpoint keeps experts fused or calls them in a way that is
            not known here.
    """
    names = original_names(model_map)
    found = {matrix.name: names.matrix(matrix) for matrix in model_map.inventory.matrices}
    fused = next((name for name, original in found.items() if original is None), None)
    if fused is not None:
        raise ConfigError(
            f"--export {export}: checkpoints of {model_map.inventory.model_type} have no matrix "
            f"of the name {fused} or like it, and this export names matrices one by one as they "
            "have them; use --export alphaquant"
        )
    return {name: original for name, original in found.items() if original is not None}
