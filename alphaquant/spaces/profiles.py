"""Profiles: what the serving engine can load. They couple matrices and narrow the formats.

A profile is applied before anything is scored, so that every assignment of a search can be loaded
by the engine it is meant for. It knows nothing about files; exports write those.

Tensor parallelism is not known here: shapes are checked for one device. `Profile.checked` says
what of an engine was run and what was only read in its source.

    any           our runtime: a format per matrix of every expert
    kernels       our runtime on GPUs: gate and up of an expert share one, which saves launches
                  (alphaquant.kernels.moe.launch_triton)
    vllm          compressed-tensors: expert 0 decides for its layer and gate, up, down must agree,
                  so a layer's experts are one unit; fused qkv_proj, gate_up_proj and the MLA pair
                  fused_qkv_a_proj take one scheme. Two mixes load and compute wrong numbers
                  without a word: an fp8 row among int8 rows, in experts and in fused linears. Of
                  fused nvfp4 one global scale is taken for all, with a warning. Experts in fp8
                  need rounded inputs
    sglang        compressed-tensors, coupled as in vllm. Integer experts need a file whose one
                  format is pack-quantized, so nothing but integers and bf16
    transformers  compressed-tensors: one scheme for all experts of the model, symmetric, never
                  nvfp4 (its global scale is dropped) or bf16; anything else of experts is an error
                  or wrong without a word; linears are free, symmetric too
    gguf          each projection of a layer's experts is one tensor of one type; linears are free

Sources: CompressedTensorsMoEMethod.get_moe_method, CompressedTensorsWNA16(MoEMethod), the kernel
selection of Marlin and Humming in vLLM 0.32.0; srt/layers/quantization/compressed_tensors in
SGLang 0.5.23; integrations/compressed_tensors.py in transformers 5.23.0; compressed-tensors 0.20.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix

from alphaquant.errors import ConfigError, FormatError
from alphaquant.spaces.budget import Budget
from alphaquant.spaces.formats import (
    ASYMMETRIC_KINDS,
    FORMAT_KINDS,
    GGML_BLOCKS,
    PER_ROW,
    SUPER_SIZE,
    Format,
    parse_format,
)
from alphaquant.spaces.units import DOWN, ENDS, GATE, UP, Inventory, Matrix, Unit


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
        group_sizes: group sizes of int, nl and fp formats; empty for all.
        symmetric_only: whether zero points are refused.
        elements: elements of fp and mxfp formats; empty for all.
        needs_whole_groups: whether the group must divide the inputs.
        rows_multiple: what must divide the outputs.
        cols_multiple: what must divide the inputs.
        inner_multiple: what must divide the inner width of routed experts (outputs of gate and up,
            inputs of down), together with the group; 0 where experts are as other matrices.
        is_alone: whether only matrices that are not fused with others can have it.
        super_sizes: sizes of super-blocks; 0 is a format without them.
    """

    kinds: tuple[str, ...]
    group_sizes: tuple[int, ...] = ()
    symmetric_only: bool = False
    elements: tuple[str, ...] = ()
    needs_whole_groups: bool = True
    rows_multiple: int = 1
    cols_multiple: int = 1
    inner_multiple: int = 0
    is_alone: bool = False
    super_sizes: tuple[int, ...] = (0,)

    def allows(self, fmt: Format) -> bool:
        """Whether a format is in the set, whatever the shape."""
        return (
            fmt.kind in self.kinds
            and (fmt.symmetric or not self.symmetric_only)
            and (not fmt.has_groups or not self.group_sizes or fmt.group_size in self.group_sizes)
            and (not fmt.element or not self.elements or fmt.element in self.elements)
            and fmt.super_size in self.super_sizes
        )

    def fits(self, fmt: Format, matrix: Matrix) -> bool:
        """Whether the engine loads a matrix of this shape in a format of the set."""
        if not fmt.is_quantized or not fmt.fits(matrix.cols):
            return not fmt.is_quantized
        # PER_ROW is -1: any width is a whole group
        group = max(1, fmt.group_size, fmt.super_size)
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
        parts += ["where nothing is fused"] if self.is_alone else []
        sizes = ("row" if size == PER_ROW else str(size) for size in self.group_sizes)
        groups = f", group {', '.join(sizes)}" if self.group_sizes else ""
        in_supers = f" in super-blocks of {SUPER_SIZE}" if SUPER_SIZE in self.super_sizes else ""
        also = ", also" if in_supers and 0 in self.super_sizes else ""
        return " ".join(parts) + groups + also + in_supers


@dataclass(frozen=True)
class Profile:
    """What one serving engine can load.

    Attributes:
        name: key in `PROFILES`.
        description: one sentence for `--help` and reports.
        couplings: matrices that share one format; the first that takes a matrix counts.
        linear_rules: formats of everything but routed experts.
        expert_rules: formats of routed experts.
        engine: the engine with the version that it was checked against; empty for our own runtime.
        checked: what of this was run there, and what was only read in its source.
        export: what `aq-quantize --export` calls its files; empty for our own.
        kernels: what `--kernels` narrowed it to.
        includes: what beside the layers it loads quantized, see `alphaquant.spaces.units.ENDS`.
    """

    name: str
    description: str
    couplings: tuple[Coupling, ...]
    linear_rules: tuple[FormatRule, ...]
    expert_rules: tuple[FormatRule, ...]
    engine: str = ""
    checked: str = ""
    export: str = ""
    kernels: str = "all"
    includes: tuple[str, ...] = ()

    @property
    def option(self) -> str:
        """How to ask for it: `--profile vllm --kernels marlin`."""
        kernels = "" if self.kernels == "all" else f" --kernels {self.kernels}"
        return f"--profile {self.name}{kernels}"

    def rules_of(self, kind: str) -> tuple[FormatRule, ...]:
        """The rules for one kind of matrix; what is not among `includes` stays in bf16."""
        if kind in ENDS.values() and kind not in {ENDS[name] for name in self.includes}:
            return (_BF16,)
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
        engine = f" ({self.engine})" if self.engine else ""
        return f"profile {self.name}{engine} loads {linears if linears == experts else both}"


_EVERYTHING = (FormatRule(FORMAT_KINDS, needs_whole_groups=False, super_sizes=(0, SUPER_SIZE)),)
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
# compressed-tensors has integers, and one bit of them is -1 and 0, not a sign: no int1. vLLM
# slices packed zero points and experts in whole words of 32 bits: both sides are multiples of 32.
_PACKED = FormatRule(
    ASYMMETRIC_KINDS,
    (32, 64, 128, 256, PER_ROW),
    rows_multiple=32,
    cols_multiple=32,
)
_SYMMETRIC_INT = FormatRule(ASYMMETRIC_KINDS, symmetric_only=True)
_MXFP4 = FormatRule(("mxfp4",))
# vLLM takes one global scale for what it fuses: the largest of q, k, v, and the gate's for gate
# and up, with no more than a warning; ours are per matrix.
_NVFP4_ALONE = FormatRule(("nvfp4",), is_alone=True)

# llama.cpp b11549: each of these is a type of its own, number for number. A larger group would be
# written with its scale repeated, so that its bits would be more than ours say.
_GGUF = (
    FormatRule(("int1",), (128,), symmetric_only=True),
    FormatRule(("int2",), (64,), symmetric_only=True),
    FormatRule(("int4", "int5", "int8"), (32,), symmetric_only=True),
    FormatRule(("int3",), (16,), symmetric_only=True, super_sizes=(SUPER_SIZE,)),
    FormatRule(("nl4",), (32,), super_sizes=(0, SUPER_SIZE)),
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
            includes=tuple(ENDS),
        ),
        Profile(
            "kernels",
            "our own runtime on a GPU: gate and up of an expert tied, for fewer launches",
            (Coupling("w13", ("expert",), (*GATE, *UP)),),
            _EVERYTHING,
            _EVERYTHING,
            includes=tuple(ENDS),
        ),
        Profile(
            "vllm",
            "stock vLLM: one format for the experts of a layer, fused linears tied",
            (Coupling("experts", ("expert",), scope="layer"), *_FUSED_LINEARS),
            (_PACKED, _FP8_ROW, _MXFP4, _NVFP4_ALONE, _BF16),
            (_PACKED, _MXFP4, _BF16),
            "vLLM 0.32.0",
            "run on its CPU engine: couplings, int4 in groups of 64 and 128, of linears also in "
            "rows and with zero points, and bf16; all other formats and GPU kernels were read in "
            "its source, not run; --kernels marlin keeps to what needs no Humming kernels",
            "compressed-tensors",
        ),
        Profile(
            "sglang",
            "stock SGLang: one format for the experts of a layer, fused linears tied",
            (Coupling("experts", ("expert",), scope="layer"), *_FUSED_LINEARS),
            (_MARLIN, _BF16),
            (_MARLIN, _BF16),
            "SGLang 0.5.23",
            "read in its source, not run: it has no engine for CPUs",
            "compressed-tensors",
        ),
        Profile(
            "transformers",
            "stock transformers with compressed-tensors: one format for all experts",
            (Coupling("experts", ("expert",), scope="model"),),
            (_SYMMETRIC_INT, _FP8_ROW, _BLOCK4, _BF16),
            (_SYMMETRIC_INT, _FP8_ROW, _MXFP4),
            "transformers 5.23.0 with compressed-tensors 0.20.0",
            "run on a CPU: every format of its menu, experts and linears; linears in mxfp4 or "
            "nvfp4 need dtype bfloat16",
            "compressed-tensors",
        ),
        Profile(
            "gguf",
            "llama.cpp: one type for each projection of a layer's experts",
            tuple(
                Coupling(names[0], ("expert",), names, scope="layer") for names in (GATE, UP, DOWN)
            ),
            _GGUF,
            _GGUF,
            "llama.cpp b11549",
            "run on a CPU: every type of its menu",
            "gguf",
            includes=tuple(ENDS),
        ),
    )
}
"""Every profile that `--profile` takes."""


KERNELS = ("all", "marlin")
"""What `--kernels` takes."""

_NARROWED = ("vllm", "sglang")
"""Profiles of engines that choose among kernels."""


def find_profile(name: str, kernels: str = "all") -> Profile:
    """The profile of a name.

    Args:
        name: key in `PROFILES`.
        kernels: `all`, or `marlin`: only what the Marlin kernels compute, which every engine for
            NVIDIA GPUs has.

    Raises:
        ConfigError: no profile has this name, or its engine does not choose among kernels.
    """
    if name not in PROFILES:
        raise ConfigError(f"unknown profile {name!r}; known are {', '.join(PROFILES)}; name one")
    profile = PROFILES[name]
    if kernels == "all":
        return profile
    if name not in _NARROWED:
        raise ConfigError(
            f"--kernels {kernels} with --profile {name}: kernels are chosen in "
            f"{', '.join(_NARROWED)}; name one of these, or leave --kernels out"
        )
    rules = (_MARLIN, _BF16)
    description = f"{profile.description}; Marlin kernels only"
    return replace(
        profile,
        description=description,
        linear_rules=rules,
        expert_rules=rules,
        kernels=kernels,
    )


def included(asked: str | None, budget: Budget, profile: Profile) -> tuple[str, ...]:
    """What is quantized beside the layers, names in `ENDS` in their order.

    Args:
        asked: names with commas between them, or `none`; None for what the profile loads where
            the budget is of the whole checkpoint, else nothing.
        budget: how large the result may be.
        profile: what the engine can load.

    Raises:
        ConfigError: an unknown name, or the profile does not load it.
    """
    if asked is None:
        return profile.includes if budget.is_of_file else ()
    names = {name.strip() for name in asked.split(",")}
    if names == {"none"}:
        return ()
    if not names <= ENDS.keys():
        raise ConfigError(
            f"--include {asked}; known are {', '.join(ENDS)} and none: name some of them"
        )
    if not names <= set(profile.includes):
        able = [p.option for p in PROFILES.values() if names <= set(p.includes)]
        raise ConfigError(
            f"--include {asked}: {profile.option} loads embeddings and lm_head as they are; leave "
            f"--include out, or use {' or '.join(able)}"
        )
    return tuple(name for name in ENDS if name in names)


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
    if len(unit.matrices) > 1:
        rules = [rule for rule in rules if not rule.is_alone]
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
