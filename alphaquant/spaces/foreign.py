"""Quantization configurations of other tools: recognized by name, and read where they are exact.

============================  ==========================================  ======================
tool                          recognized by                               read as a plan
============================  ==========================================  ======================
GPTQModel, AutoGPTQ           quant_method gptq, or bits and group_size   bits, group_size, sym,
                                                                          dynamic
AutoRound                     quant_method auto-round                     the same, layer_config
                                                                          and extra_config
compressed-tensors            quant_method, or config_groups              groups of int, fp8 by
                                                                          row, nvfp4; ignore
AWQ, ModelOpt, any other      quant_method, or quant_algo                 no
llm-compressor                a YAML file                                 no
llama.cpp                     GGUF and imatrix files                      no
============================  ==========================================  ======================

A file is its tool's own (`quantize_config.json`) or a model's `config.json` with such an entry in
`quantization_config`. A plan has a format for the matrices that no rule names, and rules of which
the first that matches counts. What of a file has no meaning for bits and bytes (calibration,
packing), or none here (order of columns, rounded inputs), is listed as not exact where it changes
numbers.

Worked example: `{"bits": 4, "group_size": 128, "dynamic": {"+:.*down_proj": {"bits": 8},
"-:.*self_attn.*": {}}}` is int8-g128 for every down_proj, bf16 for attention, int4-g128 else.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphaquant.errors import AlphaQuantError, ConfigError, FormatError
from alphaquant.spaces.formats import BF16, FORMAT_KINDS, Format, make_format, parse_format

_GPTQ, _AUTO_ROUND, _COMPRESSED = "GPTQModel", "AutoRound", "compressed-tensors"
_UNQUANTIZED_BITS = 16
_REGEX_MARKS = set("*+?^$()[]{}|\\")


@dataclass(frozen=True)
class Rule:
    """A format for some matrices.

    Attributes:
        text: as the file has it, for messages.
        matches: whether it names a matrix.
        format: of those; bf16 for what stays.
    """

    text: str
    matches: Callable[[str], bool]
    format: Format


@dataclass(frozen=True)
class Foreign:
    """A configuration of another tool as a plan.

    Attributes:
        tool: whose it is.
        default: format of matrices that no rule names.
        rules: the first that matches counts.
        inexact: what of the file this plan does not hold, one line each.
    """

    tool: str
    default: Format
    rules: tuple[Rule, ...] = ()
    inexact: tuple[str, ...] = ()

    def format_of(self, names: Iterable[str]) -> Format:
        """The format of a matrix by all of its names."""
        known = tuple(names)
        for rule in self.rules:
            if any(map(rule.matches, known)):
                return rule.format
        return self.default

    def warnings(self, names: Sequence[str], source: str) -> tuple[str, ...]:
        """Whose it is, what is not exact, and rules that name nothing, one line each.

        Args:
            names: all names of the model's matrices.
            source: the file.
        """
        idle = [rule.text for rule in self.rules if not any(map(rule.matches, names))]
        found = [f"{source} is a configuration of {self.tool}, read as a plan", *self.inexact]
        if idle:
            found.append(f"{len(idle)} of its rules name no matrix here, e.g. {idle[0]!r}")
        return tuple(found)


def tool_of(data: Any) -> str | None:
    """Whose configuration some JSON is; None where it is not known to be another tool's."""
    entry = _entry(data)
    if entry is None:
        return None
    method = entry.get("quant_method")
    if isinstance(method, str):
        return _TOOLS.get(method, f"another quantizer ({method[:40]})")
    if "config_groups" in entry:
        return _COMPRESSED
    if "quant_algo" in entry or "quant_algo" in _inner(entry, "quantization"):
        return "ModelOpt"
    return _GPTQ if "bits" in entry and "group_size" in entry else None


def file_kind(path: Path, content: bytes) -> str | None:
    """Whose file one is that is not JSON; None where it is not known.

    Args:
        path: its name tells YAML.
        content: its beginning is enough.
    """
    if content.startswith(b"GGUF"):
        return "a GGUF file of llama.cpp (a model or an importance matrix)"
    if path.suffix.lower() in (".yaml", ".yml") or b"_modifiers:" in content:
        is_recipe = b"odifier" in content
        return "a recipe of llm-compressor" if is_recipe else "a YAML file"
    if path.suffix.lower() in (".dat", ".imatrix"):
        return "an importance matrix of llama.cpp"
    return None


def way_text(path: Path, what: str, *, can_read: bool) -> str:
    """One line: whose file it is, and how to come from there to a configuration of ours."""
    shown = f"aq-inspect {path} --model MODEL shows what it means; " if can_read else ""
    return (
        f'{path} is {what}, not ours; {shown}ours is JSON such as {{"default": {{"wq": "int4", '
        '"group_size": 128}, "overrides": [{"pattern": "*.down_proj", "wq": "int8"}]}} '
        "(docs/commands.md, Files of other tools)"
    )


def read_foreign(data: Any, path: Path) -> Foreign:
    """The plan of a configuration of another tool.

    Args:
        data: JSON of which `tool_of` knows the tool.
        path: of the file, for messages.

    Raises:
        ConfigError: the tool's files are not read, or a field has no exact meaning in our formats.
    """
    tool, entry = tool_of(data), _entry(data)
    reader = _READERS.get(tool or "")
    if reader is None or entry is None:
        raise ConfigError(way_text(path, f"a configuration of {tool}", can_read=False))
    try:
        return reader(entry)
    except (TypeError, KeyError, AttributeError, re.error) as error:
        raise ConfigError(
            f"{path} is a configuration of {tool} that is not as that tool writes it ({error})"
        ) from error
    except AlphaQuantError as error:
        raise ConfigError(f"{path} is a configuration of {tool}: {error}") from error


def _entry(data: Any) -> Mapping[str, Any] | None:
    """The object that speaks of quantization."""
    if not isinstance(data, dict):
        return None
    inner = data.get("quantization_config")
    return inner if isinstance(inner, dict) else data


def _inner(entry: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = entry.get(key)
    return value if isinstance(value, dict) else {}


def _read_gptq(entry: Mapping[str, Any]) -> Foreign:
    """GPTQModel: rules in file order, matched from the start of the name."""
    rules = []
    for key, fields in _inner(entry, "dynamic").items():
        sign, _, rest = key.partition(":") if key[:2] in ("+:", "-:") else ("+", "", key)
        fmt = BF16 if sign == "-" else _int_format({**entry, **fields})
        rules.append(Rule(key, _starts(rest), fmt))
    return Foreign(_GPTQ, _int_format(entry), tuple(rules), tuple(_gptq_notes(entry)))


def _gptq_notes(entry: Mapping[str, Any]) -> Iterator[str]:
    if entry.get("desc_act"):
        yield "desc_act: the stored order of columns is not counted, 4 bytes per input of a matrix"
    if entry.get("sym") is False:
        yield "zero points are counted as ours are stored"
    else:
        yield "the zero points that its files hold of symmetric groups too are not counted"


def _read_auto_round(entry: Mapping[str, Any]) -> Foreign:
    """AutoRound: whole names before patterns and parts of names."""
    data_type = entry.get("data_type", "int")
    if data_type != "int":
        raise ConfigError(f"data_type {data_type!r} is not read; int is")
    named, other = [], []
    stated = {**_inner(entry, "layer_config"), **_inner(entry, "extra_config")}
    for key, fields in stated.items():
        if fields.get("data_type", "int") != "int":
            raise ConfigError(f"data_type {fields['data_type']!r} of {key} is not read; int is")
        fmt = _int_format({**entry, **fields})
        named.append(Rule(key, key.__eq__, fmt))
        search = re.compile(key if _REGEX_MARKS & set(key) else re.escape(key)).search
        other.append(Rule(key, _found(search), fmt))
    blocks = entry.get("block_name_to_quantize") or entry.get("to_quant_block_names")
    notes = [] if not blocks else ["block_name_to_quantize: taken to name all decoder layers"]
    if entry.get("act_bits", 16) < _UNQUANTIZED_BITS:
        notes.append(f"act_bits {entry['act_bits']}: rounded inputs are left out")
    return Foreign(
        _AUTO_ROUND,
        _int_format(entry),
        (*named, *other),
        (*notes, *_gptq_notes({**entry, "desc_act": False})),
    )


def _read_compressed(entry: Mapping[str, Any]) -> Foreign:
    """compressed-tensors: what is ignored, then whole names, then patterns, then classes."""
    ignored = [Rule(text, _target(text), BF16) for text in entry.get("ignore") or ()]
    named, patterns, notes = [], [], []
    default = BF16
    for name, group in entry["config_groups"].items():
        fmt = _args_format(group.get("weights"), name)
        if group.get("input_activations"):
            notes.append(f"{name}: rounded inputs are left out")
        for text in group["targets"]:
            if text == "Linear":
                default = fmt if default == BF16 else default
            elif text.startswith("re:"):
                patterns.append(Rule(text, _target(text), fmt))
            else:
                named.append(Rule(text, _target(text), fmt))
    notes.append("scales are counted as ours are stored")
    return Foreign(_COMPRESSED, default, (*ignored, *named, *patterns), tuple(notes))


def _args_format(args: Mapping[str, Any] | None, group: str) -> Format:
    """The format of the `weights` of a group."""
    if args is None:
        return BF16
    bits, kind = args.get("num_bits", 8), args.get("type", "int")
    size = args.get("group_size")
    strategy = args.get("strategy") or ("group" if size else "tensor")
    if kind == "int" and strategy in ("group", "channel"):
        symmetric = args.get("symmetric", True)
        size = -1 if strategy == "channel" else size
        return _int_format({"bits": bits, "group_size": size, "sym": symmetric})
    if (kind, bits, strategy) == ("float", 8, "channel"):
        return parse_format("fp8-e4m3-row")
    if (kind, bits, strategy, size) == ("float", 4, "tensor_group", 16):
        return parse_format("nvfp4")
    raise FormatError(
        f"weights of {group} are {kind} of {bits} bits by {strategy}, which is none of our formats"
    )


def _int_format(fields: Mapping[str, Any]) -> Format:
    """The format of `bits`, `group_size` and `sym`; bf16 from 16 bits on."""
    bits, size = fields["bits"], fields.get("group_size", 128)
    if type(bits) is not int or type(size) is not int or f"int{bits}" not in FORMAT_KINDS:
        if bits in (_UNQUANTIZED_BITS, 32):
            return BF16
        raise FormatError(f"bits {bits!r} with group_size {size!r} is none of our formats")
    return make_format(f"int{bits}", size, symmetric=fields.get("sym", True) is not False)


def _starts(pattern: str) -> Callable[[str], bool]:
    return _found(re.compile(pattern).match)


def _target(text: str) -> Callable[[str], bool]:
    return _starts(text.removeprefix("re:")) if text.startswith("re:") else text.__eq__


def _found(search: Callable[[str], object]) -> Callable[[str], bool]:
    return lambda name: search(name) is not None


_TOOLS: Mapping[str, str] = {
    "gptq": _GPTQ,
    "auto-round": _AUTO_ROUND,
    "intel/auto-round": _AUTO_ROUND,
    "compressed-tensors": _COMPRESSED,
    "awq": "AWQ",
    "modelopt": "ModelOpt",
}
_READERS: Mapping[str, Callable[[Mapping[str, Any]], Foreign]] = {
    _GPTQ: _read_gptq,
    _AUTO_ROUND: _read_auto_round,
    _COMPRESSED: _read_compressed,
}
READABLE = tuple(_READERS)
"""Tools whose configurations are read as plans."""
