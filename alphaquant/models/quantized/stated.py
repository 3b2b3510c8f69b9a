"""Which form a checkpoint says its matrices have: `quantization_config`, read and never assumed.

==================  =====================================================================  ========
quant_method        fields that count                                                      form
==================  =====================================================================  ========
gptq                bits, group_size, desc_act, checkpoint_format, meta, dynamic           GptqForm
auto-round          bits, group_size, data_type, act_bits, packing_format, extra_config    GptqForm
                                                                                           AwqForm
awq                 bits, group_size, zero_point, version                                  AwqForm
fp8                 weight_block_size                                                      ByteForm
blockwise_int8      weight_block_size                                                      ByteForm
compressed-tensors  config_groups, ignore                                                  ct_forms
==================  =====================================================================  ========

They stand in `quantization_config` of config.json; older files of GPTQ and AWQ have them in
`quantize_config.json` and `quant_config.json`, those of ModelOpt in `hf_quant_config.json`. What
would change numbers and is not read (rotated weights, other packings) is refused.

AutoRound 0.16.1 packs as GPTQ version 1 (`auto_round:auto_gptq`, whose zero points of 0 it stores
as those of 1), as version 2 (`auto_round`, `auto_round:gptqmodel`) or as AWQ; `extra_config` has
what of a matrix is other than stated, by its name, a part of it or a pattern.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from alphaquant.errors import ModelError
from alphaquant.models.quantized.byte_forms import ByteForm
from alphaquant.models.quantized.compressed import Form
from alphaquant.models.quantized.ct_forms import Fp4Form, NaiveForm, PackedIntForm
from alphaquant.models.quantized.word_forms import AwqForm, GptqForm
from alphaquant.spaces.json_files import JsonError, read_object

_OLD_FILES = (
    ("quantize_config.json", "gptq"),
    ("quant_config.json", "awq"),
    ("hf_quant_config.json", "modelopt"),
)
_GPTQ_BITS = (2, 3, 4, 8)
_UNQUANTIZED_BITS = 16
_AUTO_ROUND_PACKINGS: Mapping[str, str] = MappingProxyType(
    {
        "auto_round:auto_gptq": "gptq",
        "auto_round": "gptq_v2",
        "auto_round:gptqmodel": "gptq_v2",
        "auto_round:auto_awq": "awq",
    }
)
"""What AutoRound calls the packings of others."""
_PATTERN_MARKS = set("*+?^$()[]{}|\\")


@dataclass(frozen=True)
class FormRule:
    """A form for some modules.

    Attributes:
        matches: whether it names a module.
        form: of those; None where they are not quantized.
    """

    matches: Callable[[str], bool]
    form: Form | None


@dataclass(frozen=True)
class Stated:
    """What a checkpoint says of its matrices.

    Attributes:
        method: `quant_method`.
        entry: all that it says.
        default: form of modules that no rule names; None where they are not quantized.
        rules: the first that matches counts.
    """

    method: str
    entry: Mapping[str, Any]
    default: Form | None
    rules: tuple[FormRule, ...] = ()

    def form_of(self, module: str) -> Form | None:
        """The form of a module by its name in the checkpoint; None where it is not quantized."""
        for rule in self.rules:
            if rule.matches(module):
                return rule.form
        return self.default


def read_stated(directory: Path) -> Stated | None:
    """What a checkpoint says of its matrices; None where it says nothing.

    Raises:
        ModelError: an unknown method, or fields that cannot be read exactly.
    """
    entry = find_entry(directory)
    if entry is None:
        return None
    method = entry.get("quant_method")
    # older releases of AutoRound wrote intel/auto-round
    reader = _READERS.get(method.removeprefix("intel/")) if isinstance(method, str) else None
    if reader is None:
        raise ModelError(
            f"{directory} is quantized by {method!r}, which is not read; "
            f"{', '.join(_READERS)} are: give such a checkpoint"
        )
    try:
        return reader(entry)
    except ModelError as error:
        raise ModelError(f"{directory}: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError, re.error) as error:
        raise ModelError(
            f"{directory}: quantization_config is not as {method} writes it "
            f"({type(error).__name__}: {error}); fetch config.json again"
        ) from error


def find_entry(directory: Path) -> dict[str, Any] | None:
    """The object that speaks of quantization, None where there is none.

    Raises:
        ModelError: a file cannot be read.
    """
    entry = _object(directory / "config.json").get("quantization_config")
    if isinstance(entry, dict):
        return entry
    for name, method in _OLD_FILES:
        if (directory / name).is_file():
            return {"quant_method": method, **_object(directory / name)}
    return None


def _object(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except (OSError, JsonError) as error:
        raise ModelError(f"{file} cannot be read ({error}); give a checkpoint's folder") from error


def _read_gptq(entry: Mapping[str, Any]) -> Stated:
    rules = []
    for key, fields in (entry.get("dynamic") or {}).items():
        sign, _, rest = key.partition(":") if key[:2] in ("+:", "-:") else ("+", "", key)
        form = None if sign == "-" else _gptq_form({**entry, **fields})
        rules.append(FormRule(_starts(rest), form))
    return Stated("gptq", entry, _gptq_form(entry), tuple(rules))


def _gptq_form(fields: Mapping[str, Any]) -> GptqForm:
    """Raises ModelError for bits and packings that are not read."""
    bits, size = fields["bits"], int(fields["group_size"])
    version = fields.get("checkpoint_format") or "gptq"
    if bits not in _GPTQ_BITS:
        raise ModelError(f"gptq with bits {bits!r} is not read; bits are 2, 3, 4 or 8")
    if version not in ("gptq", "gptq_v2") or fields.get("is_marlin_format"):
        raise ModelError(
            f"checkpoint_format {version!r} is not read; gptq and gptq_v2 are: save it as one"
        )
    if fields.get("pack_dtype") not in (None, "int32"):
        raise ModelError(f"pack_dtype {fields['pack_dtype']!r} is not read; int32 is")
    made_by = (fields.get("meta") or {}).get("quantizer") or ()
    texts = [made_by] if isinstance(made_by, str) else [str(text) for text in made_by]
    borrows = any(text.lower().startswith("gptqmodel") for text in texts)
    return GptqForm(bits, size, version == "gptq", borrows, fields.get("desc_act") is True)


def _read_awq(entry: Mapping[str, Any]) -> Stated:
    bits = entry.get("bits", entry.get("w_bit"))
    size = entry.get("group_size", entry.get("q_group_size"))
    version = str(entry.get("version", "gemm")).lower()
    if bits != 4:
        raise ModelError(f"awq with bits {bits!r} is not read; bits are 4")
    if version != "gemm" or not entry.get("zero_point", True):
        raise ModelError(
            f"awq of version {version!r} with zero_point {entry.get('zero_point')} is not read; "
            "version gemm with zero points is"
        )
    return Stated("awq", entry, AwqForm(int(str(size))))


def _read_auto_round(entry: Mapping[str, Any]) -> Stated:
    """Whole names before patterns and parts of names."""
    if entry.get("rotation_config"):
        raise ModelError(
            "rotation_config rotates weights, which is not read; give a checkpoint without"
        )
    named, other = [], []
    for key, fields in (entry.get("extra_config") or {}).items():
        form = _auto_round_form({**entry, **fields})
        named.append(FormRule(key.__eq__, form))
        pattern = key if _PATTERN_MARKS & set(key) else re.escape(key)
        other.append(FormRule(_holds(pattern), form))
    return Stated("auto-round", entry, _auto_round_form(entry), (*named, *other))


def _auto_round_form(fields: Mapping[str, Any]) -> Form | None:
    """None where nothing is quantized; ModelError for numbers and packings that are not read."""
    if fields["bits"] >= _UNQUANTIZED_BITS:
        return None
    kind, of_inputs = fields.get("data_type", "int"), fields.get("act_bits", _UNQUANTIZED_BITS)
    if kind != "int" or of_inputs < _UNQUANTIZED_BITS:
        raise ModelError(
            f"auto-round with data_type {kind!r} and act_bits {of_inputs} is not read; integers "
            "with inputs that are not rounded are: export such a scheme as llm_compressor"
        )
    packing = str(fields.get("packing_format"))
    version = _AUTO_ROUND_PACKINGS.get(packing)
    if version is None:
        raise ModelError(
            f"packing_format {packing!r} of auto-round is not read; "
            f"{', '.join(_AUTO_ROUND_PACKINGS)} are: export it as one of these"
        )
    own = {"bits": fields["bits"], "group_size": fields["group_size"]}
    if version == "awq":
        return _read_awq(own).default
    return _gptq_form({**own, "checkpoint_format": version})


def _read_bytes(element: str) -> Callable[[Mapping[str, Any]], Stated]:
    def read(entry: Mapping[str, Any]) -> Stated:
        method, stated = str(entry["quant_method"]), entry.get("weight_block_size")
        if element == "int" and stated is None:
            raise ModelError(f"{method} states no weight_block_size; it is two numbers")
        return Stated(method, entry, ByteForm(element, _block(stated)))

    return read


def _block(stated: Any) -> tuple[int, int] | None:
    """Outputs and inputs of a block; None where none is stated."""
    if stated is None:
        return None
    rows, cols = stated
    if not (isinstance(rows, int) and isinstance(cols, int) and rows > 0 and cols > 0):
        raise ModelError(f"weight_block_size is {stated!r}; it is two numbers such as [128, 128]")
    return rows, cols


def _read_compressed(entry: Mapping[str, Any]) -> Stated:
    """What is ignored, then whole names, then patterns, then all linears."""
    if entry.get("transform_config"):
        raise ModelError(
            "transform_config rotates weights, which is not read; give a checkpoint without"
        )
    ignored = [FormRule(_target(text), None) for text in entry.get("ignore") or ()]
    named, patterns, default = [], [], None
    for group in entry["config_groups"].values():
        form = _scheme_form(group, str(entry.get("format")))
        for text in group["targets"]:
            if text == "Linear":
                default = form if default is None else default
            elif text.startswith("re:"):
                patterns.append(FormRule(_target(text), form))
            else:
                named.append(FormRule(_target(text), form))
    return Stated("compressed-tensors", entry, default, (*ignored, *named, *patterns))


def _scheme_form(group: Mapping[str, Any], shared: str) -> Form:
    """The form of a group of `config_groups`; `shared` is the format that all have."""
    weights, packing = group["weights"], str(group.get("format") or shared)
    bits, kind = weights["num_bits"], weights["type"]
    size, symmetric = weights.get("group_size"), weights.get("symmetric", True)
    strategy = weights.get("strategy") or ("group" if size else "tensor")
    per_row = -1 if strategy != "group" else int(size)
    is_packed = packing == "pack-quantized" and kind == "int" and bits in range(1, 9)
    if is_packed and strategy in ("group", "channel"):
        ordered = weights.get("actorder") in ("group", True)
        return PackedIntForm(int(bits), per_row, symmetric is not False, ordered)
    fp4 = {"nvfp4-pack-quantized": 16, "mxfp4-pack-quantized": 32}.get(packing)
    if fp4 is not None and (kind, bits, size) == ("float", 4, fp4):
        return Fp4Form(is_mx=fp4 == 32)
    if packing.endswith("-quantized") and "pack" not in packing and bits == 8:
        return NaiveForm(
            "int" if kind == "int" else "e4m3",
            per_row,
            symmetric is not False,
            _block(weights.get("block_structure") if strategy == "block" else None),
            strategy == "tensor",
        )
    raise ModelError(
        f"weights of {kind} of {bits} bits by {strategy} in {packing} are not read; "
        "pack-quantized integers, int8, fp8, nvfp4 and mxfp4 are"
    )


def _starts(pattern: str) -> Callable[[str], bool]:
    match = re.compile(pattern).match
    return lambda name: match(name) is not None


def _holds(pattern: str) -> Callable[[str], bool]:
    search = re.compile(pattern).search
    return lambda name: search(name) is not None


def _target(text: str) -> Callable[[str], bool]:
    return _starts(text.removeprefix("re:")) if text.startswith("re:") else text.__eq__


_READERS: Mapping[str, Callable[[Mapping[str, Any]], Stated]] = {
    "gptq": _read_gptq,
    "awq": _read_awq,
    "fp8": _read_bytes("e4m3"),
    "blockwise_int8": _read_bytes("int"),
    "compressed-tensors": _read_compressed,
    "auto-round": _read_auto_round,
}
METHODS: Sequence[str] = tuple(_READERS)
"""Methods whose checkpoints are read."""
