"""The tokenizer of a packed checkpoint as metadata of a GGUF file.

llama.cpp has two kinds of byte-pair tokenizers: `gpt2`, over bytes, with merges and the name of
the rule by which texts are split into words, and `llama`, over characters with bytes to fall back
to, with a score per token instead of merges.

The rule is known by its pattern: patterns and names are transformers' own table of what it reads
from GGUF files, and GPT-2's. A pattern that is not in it is written as `default`, and the report
says that texts may be split otherwise (`inexact_split`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alphaquant.errors import ConfigError

TOKENIZER = "tokenizer.json"

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6
"""Kinds of tokens, as llama.cpp numbers them."""

_UNKNOWN = "default"
_NO_TOKENIZER = "none"
_FIRST_CHOICES = ("gpt-2", "llama-bpe", "qwen2", "gpt-4o")
"""Names of rules; of several with one pattern the one that is written."""


def add_vocabulary(writer: Any, directory: Path, n_tokens: int) -> str:
    """Write the tokenizer, or that there is none.

    Args:
        writer: a `gguf.GGUFWriter`.
        directory: with `tokenizer.json`, or without.
        n_tokens: rows of the embedding; what the tokenizer lacks is filled up.

    Returns:
        What it is, for the report: `none`, `llama`, `gpt2 split as qwen2`.

    Raises:
        ConfigError: it is of a kind that llama.cpp has not.
    """
    import gguf

    file = directory / TOKENIZER
    if not file.exists():
        writer.add_tokenizer_model(_NO_TOKENIZER)
        return _NO_TOKENIZER
    content = read_tokenizer(file)
    model = content["model"]
    words, kinds = _tokens(content, n_tokens)
    is_bytes = not model.get("byte_fallback")
    writer.add_tokenizer_model("gpt2" if is_bytes else "llama")
    writer.add_token_list(words)
    told = "llama"
    if is_bytes:
        rule = split_rule(content.get("pre_tokenizer") or {})
        writer.add_tokenizer_pre(rule)
        writer.add_token_merges([_merge_text(pair) for pair in model["merges"]])
        told = f"gpt2 split as {rule}"
    else:
        writer.add_token_scores(_scores(model, words))
        writer.add_add_space_prefix(_has_prefix(content))
    writer.add_token_types(kinds)
    gguf.SpecialVocab(directory, n_vocab=n_tokens).add_to_gguf(writer, quiet=True)
    return told


def read_tokenizer(file: Path) -> dict[str, Any]:
    """The content of a tokenizer.json.

    Raises:
        ConfigError: it is of a kind that llama.cpp has not.
    """
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    kind = content["model"].get("type")
    if kind != "BPE":
        raise ConfigError(
            f"--export gguf: {file} is of type {kind}, and BPE is written; leave --export out for "
            "our own checkpoint"
        )
    return content


def inexact_split(told: str) -> list[str]:
    """What to know of a tokenizer that `add_vocabulary` told of, a sentence each."""
    if told == _NO_TOKENIZER:
        return ["the model has no tokenizer.json: servers take numbers of tokens and no texts"]
    if not told.endswith(f" {_UNKNOWN}"):
        return []
    return [
        "the rule by which this tokenizer splits texts into words is not in the table of those "
        "that llama.cpp knows by name: its default is written, so some texts may become other "
        "tokens"
    ]


def split_rule(rule: Mapping[str, Any]) -> str:
    """llama.cpp's name of how texts are split into words; `default` where none is known.

    Args:
        rule: `pre_tokenizer` of tokenizer.json.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    parts = rule.get("pretokenizers", [rule])
    patterns = [p["pattern"].get("Regex") for p in parts if p.get("type") == "Split"]
    if not patterns:
        uses_own = any(p.get("type") == "ByteLevel" and p.get("use_regex", True) for p in parts)
        has_digits = any(p.get("type") == "Digits" for p in parts)
        return "gpt-2" if uses_own and not has_digits else _UNKNOWN
    names = [name for name, known in GGUF_PRE_TOKENIZER_SPLITS.items() if [known] == patterns]
    chosen = [name for name in _FIRST_CHOICES if name in names]
    return [*chosen, *names, _UNKNOWN][0]


def _tokens(content: Mapping[str, Any], n_tokens: int) -> tuple[list[str], list[int]]:
    """Texts and kinds of all tokens, by number."""
    words = {number: word for word, number in content["model"]["vocab"].items()}
    kinds = dict.fromkeys(words, NORMAL)
    if content["model"].get("byte_fallback"):
        kinds |= {n: BYTE for n, w in words.items() if len(w) == 6 and w.startswith("<0x")}
    for token in content.get("added_tokens", ()):
        words[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    n_all = max(n_tokens, max(words) + 1)
    return (
        [words.get(number, f"[PAD{number}]") for number in range(n_all)],
        [kinds.get(number, UNUSED) for number in range(n_all)],
    )


def _merge_text(pair: str | list[str]) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)


def _scores(model: Mapping[str, Any], words: list[str]) -> list[float]:
    """Minus the place of the first merge that makes a token; the last for what no merge makes.

    llama.cpp joins the neighbours whose token has the highest score, which is then the first of
    the merges.
    """
    places: dict[str, int] = {}
    for place, pair in enumerate(model["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        places.setdefault(left + right, place)
    last = len(model["merges"])
    return [-float(places.get(word, last)) for word in words]


def _has_prefix(content: Mapping[str, Any]) -> bool:
    """Whether a text is read as if it began with a space."""
    text = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"always"' in text
