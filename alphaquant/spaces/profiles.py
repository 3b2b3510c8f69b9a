"""Profiles: what the serving engine can load. They couple matrices and narrow the formats.

A profile is applied before anything is scored, so that every assignment of a search can be loaded
by the engine it is meant for. It knows nothing about files; exports write those.

Sources: vLLM main (CompressedTensorsMoEMethod.get_moe_method, get_moe_quant_method of GPTQ, the
Marlin shape checks), SGLang 0.4.7 (sglang/srt/layers/quantization), compressed-tensors 0.20 and
transformers 5.23 (its compressed-tensors integration). Tensor parallelism is not known here:
shapes are checked for one device.

    any           our runtime: a format per matrix of every expert
    kernels       our runtime on GPUs: gate and up of an expert share one, which saves launches
                  (alphaquant.kernels.moe.launch_triton)
    vllm          compressed-tensors: expert 0 decides for its layer and gate, up, down must agree,
                  so a layer's experts are one unit; fused qkv_proj, gate_up_proj and the MLA pair
                  fused_qkv_a_proj take one scheme
    sglang        0.4.7, GPTQ v1: FusedMoE ignores `dynamic` (neither override nor skip), so all
                  routed experts of the model are one unit and never bf16; fused linears as in vllm
    transformers  compressed-tensors: one scheme for all experts of the model; linears are free
    gguf          llama.cpp b11549: each projection of a layer's experts is one tensor of one type;
                  linears are free
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix

from alphaquant.errors import ConfigError, FormatError
from alphaquant.spaces.formats import (
    ASYMMETRIC_KINDS,
    FORMAT_KINDS,
    GGML_BLOCKS,
    PER_ROW,
    Format,
    parse_format,
)
from alphaquant.spaces.units import DOWN, GATE, UP, Inventory, Matrix, Unit


@dataclass(frozen=True)
class Coupling:
    """Matrices that must share one format.

    Attributes:
        suffix: last part of the unit's name: `w13`, `qkv`, `experts`.
        kinds: kinds of matrix that it couples, see `alphaquant.spaces.units.KINDS`.
        projections: last parts of the names that it couples; empty for all.
        scope: how far it reaches: `module` (siblings: one expert, one MLP, one attention),
            `layer` or `model`.
    """

    suffix: str
    kinds: tuple[str, ...]
    projections: tuple[str, ...] = ()
    scope: str = "module"

    def group_of(self, matrix: Matrix) -> str | None:
        """The name of the group that a matrix falls into, None when it is not coupled."""
        if matrix.kind not in self.kinds:
            return None
        if self.projections and matrix.projection not in self.projections:
            return None
        module = matrix.name.rpartition(".")[0]
        return {"module": module, "layer": str(matrix.layer), "model": ""}[self.scope]


@dataclass(frozen=True)
class FormatRule:
    """A set of formats that an engine loads, and the shapes it loads them in.

    Attributes:
        kinds: format kinds, see `alphaquant.spaces.formats.FORMAT_KINDS`.
        group_sizes: group sizes of int and fp formats; empty for all.
        symmetric_only: whether zero points are refused.
        elements: elements of fp and mxfp formats; empty for all.
        needs_whole_groups: whether the group must divide the inputs.
        rows_multiple: what must divide the outputs.
        cols_multiple: what must divide the inputs.
        inner_multiple: what must divide the inner width of routed experts (outputs of gate and up,
            inputs of down), together with the group; 0 where experts are as other matrices.
    """

    kinds: tuple[str, ...]
    group_sizes: tuple[int, ...] = ()
    symmetric_only: bool = False
    elements: tuple[str, ...] = ()
    needs_whole_groups: bool = True
    rows_multiple: int = 1
    cols_multiple: int = 1
    inner_multiple: int = 0

    def allows(self, fmt: Format) -> bool:
        """Whether a format is in the set, whatever the shape."""
        return (
            fmt.kind in self.kinds
            and (fmt.symmetric or not self.symmetric_only)
            and (not fmt.has_groups or not self.group_sizes or fmt.group_size in self.group_sizes)
            and (not fmt.element or not self.elements or fmt.element in self.elements)
        )

    def fits(self, fmt: Format, matrix: Matrix) -> bool:
        """Whether the engine loads a matrix of this shape in a format of the set."""
        if not fmt.is_quantized or not fmt.fits(matrix.cols):
            return not fmt.is_quantized
        group = max(1, fmt.group_size)  # PER_ROW is -1: any width is a whole group
        if self.needs_whole_groups and matrix.cols % group:
            return False
        if matrix.kind == "expert" and self.inner_multiple:
            inner = matrix.cols if matrix.projection in DOWN else matrix.rows
            return inner % max(self.inner_multiple, group) == 0
        return matrix.rows % self.rows_multiple == 0 and matrix.cols % self.cols_multiple == 0

    @property
    def text(self) -> str:
        """What the set holds, for messages: `int4, int8 symmetric, group 32, 64, 128, row`."""
        parts = [", ".join(self.kinds)]
        parts += ["symmetric"] if self.symmetric_only else []
        parts += [" or ".join(self.elements)] if self.elements else []
        sizes = ("row" if size == PER_ROW else str(size) for size in self.group_sizes)
        return " ".join(parts) + (f", group {', '.join(sizes)}" if self.group_sizes else "")


@dataclass(frozen=True)
class Profile:
    """What one serving engine can load.

    Attributes:
        name: key in `PROFILES`.
        description: one sentence for `--help` and reports.
        couplings: matrices that share one format; the first that takes a matrix counts.
        linear_rules: formats of everything but routed experts.
        expert_rules: formats of routed experts.
    """

    name: str
    description: str
    couplings: tuple[Coupling, ...]
    linear_rules: tuple[FormatRule, ...]
    expert_rules: tuple[FormatRule, ...]

    def rules_of(self, kind: str) -> tuple[FormatRule, ...]:
        """The rules for one kind of matrix."""
        return self.expert_rules if kind == "expert" else self.linear_rules

    @property
    def is_own_runtime(self) -> bool:
        """Whether it loads every format, as our own runtime does."""
        return self.linear_rules == self.expert_rules == _EVERYTHING

    @property
    def text(self) -> str:
        """What the engine can load, for messages."""
        linears = "; ".join(rule.text for rule in self.linear_rules)
        experts = "; ".join(rule.text for rule in self.expert_rules)
        both = f"experts {experts}; other layers {linears}"
        return f"profile {self.name} loads {linears if linears == experts else both}"


_EVERYTHING = (FormatRule(FORMAT_KINDS, needs_whole_groups=False),)
_BF16 = FormatRule(("bf16",))
_FP8_ROW = FormatRule(("fp8",), (PER_ROW,), elements=("e4m3",))
_BLOCK4 = FormatRule(("mxfp4", "nvfp4"))
# Marlin: symmetric 4 and 8 bit, these groups, inputs % 128 and outputs % 64; an expert's inner
# width % max(64, group).
_MARLIN = FormatRule(
    ("int4", "int8"),
    (32, 64, 128, PER_ROW),
    symmetric_only=True,
    rows_multiple=64,
    cols_multiple=128,
    inner_multiple=64,
)
# compressed-tensors has integers, and one bit of them is -1 and 0, not a sign: no int1.
_ANY_INT = FormatRule(ASYMMETRIC_KINDS)

# llama.cpp b11549: each of these is a type of its own, number for number. A larger group would be
# written with its scale repeated, so that its bits would be more than ours say.
_GGUF = (
    FormatRule(("int1",), (128,), symmetric_only=True),
    FormatRule(("int2",), (64,), symmetric_only=True),
    FormatRule(("int4", "int5", "int8"), (32,), symmetric_only=True),
    FormatRule(("mxfp4", *GGML_BLOCKS)),
    _BF16,
)

_MLPS = ("shared", "dense")
_FUSED_LINEARS = (
    Coupling("qkv", ("attention",), ("q_proj", "k_proj", "v_proj")),
    Coupling("qkv_a", ("attention",), ("q_a_proj", "kv_a_proj_with_mqa")),
    Coupling("w13", _MLPS, (*GATE, *UP)),
)

PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            "any",
            "our own runtime: every format, free per matrix",
            (),
            _EVERYTHING,
            _EVERYTHING,
        ),
        Profile(
            "kernels",
            "our own runtime on a GPU: gate and up of an expert tied, for fewer launches",
            (Coupling("w13", ("expert",), (*GATE, *UP)),),
            _EVERYTHING,
            _EVERYTHING,
        ),
        Profile(
            "vllm",
            "stock vLLM: one format for the experts of a layer, fused linears tied",
            (Coupling("experts", ("expert",), scope="layer"), *_FUSED_LINEARS),
            (_MARLIN, _FP8_ROW, _BLOCK4, _BF16),
            (_MARLIN, _FP8_ROW, _BLOCK4, _BF16),
        ),
        Profile(
            "sglang",
            "stock SGLang 0.4.7: one GPTQ format for all experts, fused linears tied",
            (Coupling("experts", ("expert",), scope="model"), *_FUSED_LINEARS),
            (_MARLIN, _BF16),
            (_MARLIN,),
        ),
        Profile(
            "transformers",
            "stock transformers with compressed-tensors: one format for all experts",
            (Coupling("experts", ("expert",), scope="model"),),
            (_ANY_INT, _FP8_ROW, _BLOCK4, _BF16),
            (_ANY_INT, _FP8_ROW, _BLOCK4, _BF16),
        ),
        Profile(
            "gguf",
            "llama.cpp b11549: one type for each projection of a layer's experts",
            tuple(
                Coupling(names[0], ("expert",), names, scope="layer") for names in (GATE, UP, DOWN)
            ),
            _GGUF,
            _GGUF,
        ),
    )
}
"""Every profile that `--profile` takes."""


def find_profile(name: str) -> Profile:
    """The profile of a name.

    Raises:
        ConfigError: no profile has this name.
    """
    if name not in PROFILES:
        raise ConfigError(f"unknown profile {name!r}; known are {', '.join(PROFILES)}; name one")
    return PROFILES[name]


def units_of(inventory: Inventory, profile: Profile) -> tuple[Unit, ...]:
    """Group the matrices of a model into the units that a profile allows to differ.

    Args:
        inventory: the model's matrices.
        profile: what the engine can load.

    Returns:
        Units in the order of their first matrices; each matrix is in exactly one. A unit of one
        matrix has its name, `model.layers.3.self_attn.o_proj`; a coupled one the dotted start that
        its matrices share and the coupling's suffix, `model.layers.3.mlp.experts.7.w13`.
    """
    groups: dict[tuple[str, str], list[Matrix]] = {}
    for matrix in inventory.matrices:
        groups.setdefault(_group_key(matrix, profile), []).append(matrix)
    units = tuple(
        Unit(_unit_name(suffix, members), tuple(members))
        for (suffix, _), members in groups.items()
    )
    assert len({unit.name for unit in units}) == len(units), "two units have the same name"
    return units


def narrow_menu(menu: Sequence[str], profile: Profile) -> tuple[str, ...]:
    """The formats of a menu that an engine loads for at least one kind of matrix.

    Args:
        menu: format names.
        profile: what the engine can load.

    Raises:
        FormatError: none is left; the message lists what the engine loads.
    """
    rules = (*profile.linear_rules, *profile.expert_rules)
    formats = [parse_format(name) for name in menu]
    left = tuple(fmt.name for fmt in formats if any(rule.allows(fmt) for rule in rules))
    if not left:
        raise FormatError(
            f"none of the formats {', '.join(menu)} can be loaded; {profile.text}; change "
            "--formats, or use --profile any"
        )
    return left


def allowed_formats(unit: Unit, menu: Sequence[str], profile: Profile) -> tuple[str, ...]:
    """The formats of a menu that an engine loads for one unit, kinds and shapes considered.

    Args:
        unit: one unit of the profile.
        menu: format names.
        profile: what the engine can load.

    Raises:
        FormatError: none is left for this unit.
    """
    left = tuple(name for name in menu if is_loadable(unit, parse_format(name), profile))
    if not left:
        first = unit.matrices[0]
        raise FormatError(
            f"none of the formats {', '.join(menu)} can be loaded for {unit.name} "
            f"({unit.kind}, {first.rows} x {first.cols}); {profile.text}, in widths that the "
            "group divides; add bf16 or another of these to --formats, or use --profile any"
        )
    return left


def is_loadable(unit: Unit, fmt: Format, profile: Profile) -> bool:
    """Whether an engine loads a unit in a format."""
    rules = [rule for rule in profile.rules_of(unit.kind) if rule.allows(fmt)]
    return any(all(rule.fits(fmt, matrix) for matrix in unit.matrices) for rule in rules)


def _group_key(matrix: Matrix, profile: Profile) -> tuple[str, str]:
    """(suffix, group) of the first coupling that takes a matrix, else ("", its own name)."""
    for coupling in profile.couplings:
        group = coupling.group_of(matrix)
        if group is not None:
            return coupling.suffix, group
    return "", matrix.name


def _unit_name(suffix: str, members: Sequence[Matrix]) -> str:
    if len(members) == 1:
        return members[0].name
    shared = commonprefix([matrix.name.split(".") for matrix in members])
    parts = [*shared, suffix] if shared[-1:] != [suffix] else shared
    return ".".join(parts)
