"""Random blocks of llama.cpp's types."""

import torch
from torch import Tensor

from alphaquant.spaces.formats import GGML_BLOCKS

_HALVES = {"q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}
_HALVES |= {"q4_1": (0, 2), "q5_1": (0, 2)}
"""Bytes of a block at which float16 numbers are; of all other types at 0."""


def drawn_blocks(kind: str) -> Tensor:
    """Blocks of 16 rows, uint8 [16, 4 blocks]: any bytes, but finite float16 numbers."""
    block, n_bytes = GGML_BLOCKS[kind]
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (64, n_bytes), generator=generator, dtype=torch.uint8)
    for at in _HALVES.get(kind, (0,)):
        numbers = torch.randn(64, 1, generator=generator).half()
        blocks[:, at : at + 2] = numbers.view(torch.uint8)
    return blocks.view(16, 4 * n_bytes)
