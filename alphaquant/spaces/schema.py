"""The configuration file as data: its objects, their keys, and what each key may hold.

Unknown keys, other types, null, and fields that cannot stand together are errors; nothing is
converted. What the fields mean together is in `alphaquant.spaces.config`.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from alphaquant.errors import AlphaQuantError, ConfigError
from alphaquant.spaces.formats import (
    ACTIVATION_KINDS,
    ELEMENTS,
    FORMAT_KINDS,
    GROUP_SIZES,
    SUPER_GROUPS,
    SUPER_SIZE,
    is_group_size,
    make_format,
)
from alphaquant.spaces.patterns import compile_pattern


def _check_kind(value: str) -> str:
    return _check_member(value, FORMAT_KINDS)


def _check_activation(value: str) -> str:
    return _check_member(value, ACTIVATION_KINDS)


def _check_element(value: str) -> str:
    return _check_member(value, tuple(ELEMENTS))


def _check_member(value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"unknown value {value!r}; known are {', '.join(known)}; use one of them")
    return value


def _check_group_size(value: int) -> int:
    if not is_group_size(value):
        raise ValueError(f"{value} is not possible; use {GROUP_SIZES}")
    return value


def _check_pattern(value: str) -> str:
    try:
        compile_pattern(value)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return value


def _check_super_block(value: int) -> int:
    if value not in (0, SUPER_SIZE):
        raise ValueError(f"{value} is no super-block; use {SUPER_SIZE}, or 0 for none")
    return value


Kind = Annotated[str, AfterValidator(_check_kind)]
ActivationKind = Annotated[str, AfterValidator(_check_activation)]
Element = Annotated[str, AfterValidator(_check_element)]
GroupSize = Annotated[int, AfterValidator(_check_group_size)]
SuperBlock = Annotated[int, AfterValidator(_check_super_block)]
Pattern = Annotated[str, Field(min_length=1), AfterValidator(_check_pattern)]


class _Part(BaseModel):
    """A part of the file: unknown keys, other types and null are errors, nothing is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_null(cls, value: object) -> object:
        if value is None:
            raise ValueError("null is not a value; leave the key out")
        return value


class Extra(_Part):
    """What only some formats have.

    Attributes:
        format: element of a floating-point format with variants: e2m3, e3m2, e4m3, e5m2.
    """

    format: Element | None = None


class Scheme(_Part):
    """How matrices are stored; every field may be absent.

    Attributes:
        wq: kind of the weights, one of `FORMAT_KINDS`.
        aq: kind of the activations, one of `ACTIVATION_KINDS`; anything but bf16 is dynamic fake
            quantization per token.
        group_size: inputs per scale, -1 for one scale per row.
        symmetric: False gives integers a zero point.
        super_block: 256 makes scales multiples of one float16 per 256 inputs; 0 does not.
        skip: True leaves weights and activations as they are.
        extra: element of the weights.
        comment: for readers.
        alpha_hill: annotation.
        category: annotation.
        precision: annotation.
    """

    wq: Kind | None = None
    aq: ActivationKind | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None
    super_block: SuperBlock | None = None
    skip: bool | None = None
    extra: Extra | None = None
    comment: str | None = None
    alpha_hill: int | float | None = None
    category: str | None = None
    precision: str | None = None

    @model_validator(mode="after")
    def _check_together(self) -> "Scheme":
        if self.wq is None:
            return self
        try:
            make_format(
                self.wq,
                # a default's group may hold for a super-block
                (self.group_size or SUPER_GROUPS[0]) if self.super_block else None,
                symmetric=self.symmetric is not False,
                element=self.extra.format if self.extra else None,
                super_size=self.super_block or 0,
            )
        except AlphaQuantError as error:
            raise ValueError(str(error)) from error
        return self


class Override(Scheme):
    """A scheme for the matrices whose names a pattern matches.

    Attributes:
        pattern: glob over canonical names and aliases, see `alphaquant.spaces.patterns`.
    """

    pattern: Pattern


class Config(_Part):
    """A whole configuration file.

    Attributes:
        description: for readers.
        comment: for readers.
        default: scheme of matrices that no override matches.
        overrides: applied in order.
        include: what is quantized beside the decoder layers, `head` and `embeddings`.
        rotate: seed of the rotation of the residual stream that the formats are for; absent for
            the weights as they are.
        summary: what the search wrote about its result.
        search_summary: the same, as older files call it.
    """

    description: str | None = None
    comment: str | None = None
    default: Scheme = Scheme()
    overrides: Annotated[tuple[Override, ...], Field(strict=False)] = ()
    include: Annotated[tuple[Literal["head", "embeddings"], ...], Field(strict=False)] = ()
    rotate: Annotated[int, Field(ge=0)] | None = None
    summary: dict[str, Any] | None = None
    search_summary: dict[str, Any] | None = None


KNOWN_KEYS: dict[str, tuple[str, ...]] = {
    "": tuple(Config.model_fields),
    "default": tuple(Scheme.model_fields),
    "overrides": tuple(Override.model_fields),
    "extra": tuple(Extra.model_fields),
}
"""Keys of each object, by the name of the object; the file itself is ""."""
