"""Which formats a search chooses from where nobody names them."""

from alphaquant.spaces.formats import DEFAULT_MENU, parse_menu
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
