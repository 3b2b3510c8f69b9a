"""Sizes in words, as every output of a search prints them."""

from alphaquant.spaces.assignment import BitCount


def bit_lines(counts: BitCount) -> list[str]:
    """The three bit counts, one per line."""
    routed = counts.routed_bits_per_weight
    return [
        f"routed experts   {'none' if routed is None else f'{routed:.4f} bits per weight'}",
        f"all quantizable  {counts.bits_per_weight:.4f} bits per weight, "
        f"{counts.quantized_bytes} bytes",
        f"whole checkpoint {counts.checkpoint_bits_per_weight:.4f} bits per weight, "
        f"{counts.checkpoint_bytes} bytes",
    ]


def of_original(n_bytes: int, bf16_bytes: int) -> str:
    """A size beside that of the original: `8.14 MB of 18.94 MB in bf16`."""
    return f"{n_bytes / 1e6:,.2f} MB of {bf16_bytes / 1e6:,.2f} MB in bf16"
