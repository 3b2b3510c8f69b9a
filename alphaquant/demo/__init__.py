"""The embedded demo: a small trained MoE model and its texts, so that all runs offline.

The model (OLMoE, 4 layers, 16 experts, 9.5 M parameters) was made by `alphaquant.demo.train`.
Three texts come from different books, so that no passage is in two of them; three more of Python
modules are another domain, with no module in two of them. Terms and sources are in TERMS.md. This
module only knows where the files are; it reads none of them.
"""

from importlib.resources import files
from pathlib import Path

from alphaquant.errors import DataError

TEXT_PARTS = ("calibration", "search", "heldout")
"""For Hessians and costs; for the divergence that a search sees; for the last check only."""

CODE_PARTS = tuple(f"code-{part}" for part in TEXT_PARTS)
"""Python sources for the same three ends."""


def model_path() -> Path:
    """Folder of the demo model: a checkpoint with its tokenizer, as `from_pretrained` takes it."""
    return _folder() / "model"


def text_path(part: str) -> Path:
    """File of one demo text, UTF-8.

    Each passage starts with a heading that names its book, and books alternate; of the code, each
    module starts with a line that names it.

    Args:
        part: one of `TEXT_PARTS` or `CODE_PARTS`.

    Raises:
        DataError: there is no such part.
    """
    known = (*TEXT_PARTS, *CODE_PARTS)
    if part not in known:
        raise DataError(f"the demo has no text {part!r}; use one of {', '.join(known)}")
    return _folder() / "text" / f"{part}.txt"


def _folder() -> Path:
    return Path(str(files("alphaquant.demo")))
