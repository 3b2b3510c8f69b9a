"""Menus: formats under one name, and which of them a search chooses from where nobody says."""

from alphaquant.errors import FormatError
from alphaquant.spaces.formats import GGML_BLOCKS, GGML_REPLACED, GGML_TWINS, parse_format
from alphaquant.spaces.profiles import Profile, narrow_menu

REFERENCE_FORMATS = ("int4-g64", "mxfp4")
"""Uniform formats of exactly 4.25 bits that every search is compared with, whatever its menu."""

SERVING_MENU = (
    *("int2-row", "int2-g256-asym", "int2-g128", "int2-g128-asym", "int2-g64", "int2-g32"),
    *("int3-row", "int3-g256-asym", "int3-g128", "int3-g64", "int3-g32"),
    *("int4-g128", "int4-g128-asym", "int4-g64", "int4-g32"),
    *("int5-g128", "int6-g128", "int8-g128", "fp8-e4m3-row", "mxfp4", "nvfp4", "bf16"),
)
"""Default menu of the profiles of serving engines, narrowed to what each loads.

Units are large there, and a unit of all experts can only step from format to format: so there are
steps of a quarter of a bit, and rows, which begin at 2 bits.
"""

_INT_MENU: tuple[str, ...] = (
    *("int1-g256", "int1-g64"),
    *("int2-g256-asym", "int2-g128", "int2-g128-asym"),
    *("int3-g256-asym", "int3-g128", "int3-g64"),
    *("int4-g128", "int4-g128-asym", "int4-g64"),
    *("int5-g128-asym", "int5-g64-asym", "int6-g128-asym", "int8-g128"),
)

DEFAULT_MENU: tuple[str, ...] = (
    *("int1-g256", "int1-g64"),
    *("nl2-g128", "nl2-g32-s256", "nl2-g16-s256"),
    *("nl3-g128", "nl3-g64-s256", "nl3-g32-s256", "nl3-g16-s256"),
    *("nl4-g32-s256", "int4-g64", "mxfp4", "nl4-g16-s256"),
    *("int5-g64-asym", "int6-g128-asym", "int8-g128"),
)
"""Formats that a search considers unless told otherwise.

Chosen by measurement: benchmarks/allocation.md. int4-g64 and mxfp4 are uniform formats of exactly
4.25 bits, which people use: as part of the menu they are trials, so a search at that budget cannot
end above them.
"""

GGUF_MENU: tuple[str, ...] = (
    *(kind for kind in GGML_BLOCKS if kind not in GGML_REPLACED),
    *GGML_REPLACED.values(),
    *GGML_TWINS.values(),
    *("mxfp4", "bf16"),
)
"""Types of llama.cpp, each once: its own and those that are ours. IQ1, TQ and NVFP4 are not."""

MENUS: dict[str, tuple[str, ...]] = {
    "default": DEFAULT_MENU,
    "int": _INT_MENU,
    "nl": tuple(name for name in DEFAULT_MENU if name.startswith("nl")),
    "gguf": GGUF_MENU,
    "mx": ("mxfp4", "mxfp6", "mxfp8"),
    "fp": ("fp4-e2m1-g128", "fp6-e3m2-g128", "fp8-e4m3-g128"),
    "all": (
        *dict.fromkeys((*DEFAULT_MENU, *_INT_MENU)),
        "mxfp6",
        "mxfp8",
        "nvfp4",
        "fp4-e2m1-g128",
        "fp6-e3m2-g128",
        "fp8-e4m3-g128",
        "bf16",
    ),
}


def parse_menu(text: str) -> tuple[str, ...]:
    """Read `--formats`: menu names and format names, separated by commas.

    Returns:
        Canonical names without duplicates, sorted by nominal bits.

    Raises:
        FormatError: an unknown name, or nothing given.
    """
    names: set[str] = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        names |= {parse_format(n).name for n in MENUS.get(part, (part,))}
    if not names:
        raise FormatError(
            f"no formats in {text!r}; give names such as int4-g128,mxfp4 or a menu: "
            f"{', '.join(MENUS)}"
        )
    return tuple(sorted(names, key=lambda n: (parse_format(n).nominal_bits, n)))


def menu_of(formats: str, profile: Profile) -> tuple[str, ...]:
    """The menu that `--formats` stands for under a profile.

    Raises:
        FormatError: unknown names, or nothing that the profile loads.
    """
    if formats != "auto":
        return narrow_menu(parse_menu(formats), profile)
    if profile.name == "gguf":
        return narrow_menu(parse_menu("gguf"), profile)
    default = DEFAULT_MENU if profile.is_own_runtime else SERVING_MENU
    return narrow_menu(parse_menu(",".join(default)), profile)
