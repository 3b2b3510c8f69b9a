"""What tokenizers put before a text."""

import pytest

from alphaquant.errors import DataError
from alphaquant.texts.tokens import starting_tokens


class FrameTokenizer:
    """Characters as ids, with ids before and behind when special tokens are asked for."""

    def __init__(self, before: list[int], behind: list[int], bos: int | None = None) -> None:
        self.before, self.behind, self.bos_token_id = before, behind, bos
        self.eos_token_id = None

    def __len__(self) -> int:
        return 256

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        ids = [ord(char) for char in text]
        return [*self.before, *ids, *self.behind] if add_special_tokens else ids


@pytest.mark.parametrize(
    ("before", "behind", "bos", "mode", "start"),
    [
        ([], [], None, "auto", ()),  # Qwen3
        ([1], [], 1, "auto", (1,)),  # Llama
        ([1], [2], 1, "auto", (1,)),  # with an end of text, which a window does not have
        ([], [2], None, "auto", ()),
        ([7, 8], [], None, "auto", (7, 8)),  # GLM-4
        ([1], [], 1, "never", ()),
        ([1], [], 1, "always", (1,)),
        ([], [], 5, "always", (5,)),
        ([], [], 5, "auto", ()),
    ],
)
def test_a_window_starts_with(
    before: list[int], behind: list[int], bos: int | None, mode: str, start: tuple[int, ...]
) -> None:
    assert starting_tokens(FrameTokenizer(before, behind, bos), mode) == start


def test_a_start_that_does_not_exist_is_refused() -> None:
    with pytest.raises(DataError, match="no beginning-of-text token"):
        starting_tokens(FrameTokenizer([], []), "always")
    with pytest.raises(
        DataError, match="--bos 'yes' is not known; use one of auto, always, never"
    ):
        starting_tokens(FrameTokenizer([], []), "yes")
