"""The PTX of every body, executed statement by statement on random words.

What it must equal goes another way: the words are unpacked by `from_kernel_order` and decoded by
the grids.
"""

import re

import pytest
import torch
from torch import Tensor

from alphaquant.errors import FormatError
from alphaquant.kernels import order
from alphaquant.kernels.bodies import (
    FLOATS,
    Body,
    Target,
    is_foldable,
    left_out_power,
    lent_power,
    make_body,
)
from alphaquant.kernels.reference import grid_of

TARGETS: dict[Target, torch.dtype] = {"f16": torch.float16, "bf16": torch.bfloat16}


def run_body(body: Body, words: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Registers that a body leaves, as bits: int64 of any shape, below 2^32, in and out."""
    registers = {f"${body.n_outputs + i}": word for i, word in enumerate(words)}
    statements = [s.strip() for s in body.text.strip().strip("{}").split(";") if s.strip()]
    for statement in statements:
        name, _, rest = statement.partition(" ")
        if name == ".reg":
            continue
        operands = [o.strip() for o in rest.split(",")]
        values = [read(operand, registers, words[0]) for operand in operands[1:]]
        registers[operands[0]] = execute(name, values, dtype)
    return [registers[f"${r}"] for r in range(body.n_outputs)]


def read(operand: str, registers: dict[str, Tensor], like: Tensor) -> Tensor:
    if re.fullmatch(r"(0x[0-9A-F]+|\d+)", operand):
        return torch.full_like(like, int(operand, 0))
    return registers[operand]


def execute(name: str, values: list[Tensor], dtype: torch.dtype) -> Tensor:
    """One PTX instruction on 32-bit words."""
    kind, *modifiers = name.split(".")
    if kind in ("add", "sub", "mul", "fma"):
        assert modifiers[1] == {torch.float16: "f16x2", torch.bfloat16: "bf16x2"}[dtype]
        return arithmetic(kind, values, dtype)
    if kind == "lop3":
        return lop3(values)
    if kind == "prmt":
        return permute(values)
    if kind == "mov":
        return values[0]
    function = {"and": torch.bitwise_and, "shl": torch.bitwise_left_shift}
    function["shr"] = torch.bitwise_right_shift
    return function[kind](values[0], values[1]) & 0xFFFFFFFF


def lop3(values: list[Tensor]) -> Tensor:
    """Bitwise function of three inputs, entry 4a + 2b + c of the table (PTX ISA, lop3)."""
    a, b, c = values[:3]
    table = int(values[3].flatten()[0])
    result = torch.zeros_like(a)
    for entry in range(8):
        if table >> entry & 1:
            picked = [v if entry & bit else ~v for v, bit in ((a, 4), (b, 2), (c, 1))]
            result |= picked[0] & picked[1] & picked[2]
    return result & 0xFFFFFFFF


def permute(values: list[Tensor]) -> Tensor:
    """Bytes of b:a by the nibbles of a selector (PTX ISA, prmt, default mode)."""
    low, high, selector = values
    whole = low | high << 32  # as int64: the top bit is a sign, and only bytes are read
    result = torch.zeros_like(low)
    for k in range(4):
        nibble = selector >> 4 * k & 15
        assert bool((nibble < 8).all()), "signs are not repeated here"
        result |= (whole >> 8 * nibble & 255) << 8 * k
    return result


def arithmetic(kind: str, values: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Both halves in float64, where sums of products of 16-bit numbers here are exact, rounded."""
    halves = []
    for half in range(2):
        x = [as_numbers(v >> (16 * half) & 0xFFFF, dtype).double() for v in values]
        if kind in ("add", "sub"):
            y = x[0] + (x[1] if kind == "add" else -x[1])
        else:
            y = x[0] * x[1] + (x[2] if kind == "fma" else 0.0)
        halves.append(y.to(dtype).view(torch.int16).long() & 0xFFFF)
    return halves[0] | halves[1] << 16


def as_numbers(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return bits.to(torch.int32).to(torch.int16).view(dtype)


def run_on_random_words(element: str, target: Target, is_folded: bool) -> tuple[Tensor, Tensor]:
    """What a body makes of all codes, float32 [128, 384], and their grid values."""
    layout, dtype = order.LAYOUTS[element], TARGETS[target]
    generator = torch.Generator().manual_seed(0)
    shape = (layout.n_planes, 3, 128, layout.row_bytes)
    words = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    codes = order.from_kernel_order(words, element, 128, 384)
    if element == "e5m2":  # exponents of infinity and NaN, which no format writes
        codes &= 0xFB
        words = order.to_kernel_order(codes, element)
    sets = words.view(torch.int32).long() & 0xFFFFFFFF  # [P, T, N, t Q]
    body = make_body(element, target, is_folded=is_folded)
    registers = torch.stack(run_body(body, list(sets), dtype), -1)  # [T, N, t Q, R]
    halves = torch.stack([registers & 0xFFFF, registers >> 16], -1)
    found = as_numbers(halves, dtype).float()  # [T, N, t Q, R, b]
    by_place = found.reshape(3, 128, 4, layout.sets_per_lane, layout.n_registers, 2)
    by_column = by_place.permute(1, 0, 3, 4, 2, 5).reshape(128, 384)
    return by_column, grid_of(element, is_signed=True).to_values(codes)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("element", sorted(order.LAYOUTS))
def test_a_body_gives_the_grid_values_of_all_codes(element: str, target: Target) -> None:
    found, expected = run_on_random_words(element, target, is_folded=False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("element", sorted(order.LAYOUTS))
def test_a_folded_body_leaves_a_power_of_two_out(element: str, target: Target) -> None:
    found, expected = run_on_random_words(element, target, is_folded=True)
    power = left_out_power(element, target)
    assert torch.equal(found.double() * 2.0**power, expected.double())
    text, whole = make_body(element, target, is_folded=True).text, make_body(element, target).text
    assert (text == whole) == (power == 0)
    assert "mul" not in text


def test_the_power_that_is_left_out_is_the_known_one() -> None:
    """The largest exponent of the target, 127 or 15, minus the bias of the element."""
    powers = {element: left_out_power(element, "bf16") for element in FLOATS}
    assert powers == {"e2m1": 126, "e2m3": 126, "e3m2": 124, "e4m3": 120, "e5m2": 112}
    powers = {element: left_out_power(element, "f16") for element in FLOATS}
    assert powers == {"e2m1": 14, "e2m3": 14, "e3m2": 12, "e4m3": 8, "e5m2": 0}
    assert left_out_power("int4", "bf16") == 0


def test_what_a_global_factor_takes_over_keeps_the_largest_scale_finite() -> None:
    for element in FLOATS:
        lent = lent_power(element)
        for target, dtype in TARGETS.items():
            largest = 448.0 * 2.0 ** (left_out_power(element, target) - lent)
            assert largest <= torch.finfo(dtype).max
        assert lent == 0 or 2 * largest > torch.finfo(dtype).max  # no more than is needed


@pytest.mark.parametrize(
    ("element", "scale", "foldable"),
    [
        ("e2m1", torch.tensor(128, dtype=torch.uint8), True),  # 2^1, the bias of e2m1
        ("e2m1", torch.tensor(129, dtype=torch.uint8), False),
        ("e2m1", torch.tensor(255, dtype=torch.uint8), False),  # not a number
        ("e4m3", torch.tensor(134, dtype=torch.uint8), True),  # 2^7
        ("e4m3", torch.tensor(135, dtype=torch.uint8), False),
        ("e2m1", torch.tensor(2.0, dtype=torch.float16), True),
        ("e2m1", torch.tensor(-2.002, dtype=torch.float16), False),
        ("e2m1", torch.tensor(float("nan"), dtype=torch.float16), False),
        ("e5m2", torch.tensor(32768.0, dtype=torch.float16), True),
        ("int4", torch.tensor(1.0, dtype=torch.float16), False),  # nothing to gain
        ("bf16", torch.tensor(1.0, dtype=torch.float16), False),
    ],
)
def test_the_largest_scale_decides_what_is_foldable(
    element: str, scale: Tensor, foldable: bool
) -> None:
    scales = torch.zeros(3, 128, 2, dtype=scale.dtype)
    scales[1, 5, 1] = scale
    assert is_foldable(element, scales) == foldable
    assert not is_foldable(element, scale.reshape(1, 1, 1).expand(3, 128, 1))


@pytest.mark.parametrize(("factor", "foldable"), [(2.0**-8, True), (2.0**-7, False)])
def test_a_global_factor_counts_in_what_is_foldable(factor: float, foldable: bool) -> None:
    scales = torch.full((1, 128, 8), 448.0).to(torch.float8_e4m3fn)
    assert is_foldable("e2m1", scales, torch.tensor([-factor])) == foldable


def test_the_body_of_int4_in_float16_is_the_known_one() -> None:
    text = make_body("int4", "f16").text
    work = [s.split(" ", 1)[0] for s in text.split("\n") if s[:3] in ("lop", "shr", "add", "fma")]
    # One shift for eight weights: fields at bits 0 and 4 of the word, then of the word >> 8.
    assert sorted(work) == ["add.rn.f16x2"] * 2 + ["fma.rn.f16x2"] * 2 + ["lop3.b32"] * 4 + [
        "shr.u32"
    ]
    assert "mov.u32 c1, 0x2C002C00" in text and "mov.u32 c2, 0xD480D480" in text  # 1/16, -72


@pytest.mark.parametrize(
    ("element", "n_inputs", "n_outputs"), [("int8", 1, 2), ("int3", 3, 16), ("e3m2", 3, 8)]
)
def test_constraints_name_every_register(element: str, n_inputs: int, n_outputs: int) -> None:
    body = make_body(element, "bf16")
    assert (body.n_inputs, body.n_outputs) == (n_inputs, n_outputs)
    assert body.constraints.split(",") == ["=&r"] * n_outputs + ["r"] * n_inputs
    named = {int(n) for n in re.findall(r"\$(\d+)", body.text)}
    assert named == set(range(n_inputs + n_outputs))


def test_an_unknown_element_has_no_body() -> None:
    with pytest.raises(FormatError, match="'e1m2'"):
        make_body("e1m2", "f16")
