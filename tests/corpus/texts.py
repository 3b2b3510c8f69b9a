"""Texts: what is no text, too short, of another layout or of another model."""

import io
import json
from typing import Any

import numpy as np

from tests.corpus.engine import EVALUATE, SEARCH, Case, Place


def _read(name: str, file: str, content: str | bytes, says: str, code: int = 1) -> Case:
    """A text that aq-eval is given."""
    return Case(name, f"{EVALUATE} --data {file}", says, code, files={file: content})


def _lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _saved(*values: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(*values, **options))
    return buffer.getvalue()


def _folder(place: Place) -> None:
    (place.here / "folder.txt").mkdir()


LONG = "The gardener measures a wooden bridge near the harbour before the rain. " * 40

NAMES = (
    Case("text that is not there", f"{EVALUATE} --data nothing.txt", "nothing.txt"),
    Case("text with a slip", f"{EVALUATE} --data wikitext", "known names are"),
    Case("text of nothing", f"{EVALUATE} --data ''", "source ''"),
    Case("text that is a folder", f"{EVALUATE} --data folder.txt", "a folder", make=_folder),
    Case("text of 5000 letters", f"{EVALUATE} --data {'x' * 300}.txt", "known names are"),
    Case(
        "share too small for one window", f"{EVALUATE} --data demo=9,demo:code=1", "at least one"
    ),
    Case("share of NaN", f"{EVALUATE} --data demo=nan,demo:code=0.5", "nan"),
    Case("share of nothing", f"{EVALUATE} --data demo=,demo:code=0.5", "share"),
    Case("negative share", f"{EVALUATE} --data demo=-1,demo:code=2", "-1"),
    Case("only commas of texts", f"{EVALUATE} --data ,", "source"),
    Case("one text for two roles", f"{SEARCH} --heldout {{evaluation}}", "disjoint"),
    Case("calibration that is not there", f"{SEARCH} --calibration nothing.txt", "nothing.txt"),
    Case(
        "quantize on a text that is not there",
        "aq-quantize --model {tiny} --config {int4} --out out --calibration nothing.txt",
        "nothing.txt",
    ),
)

CONTENT = (
    _read("text without a letter", "t.txt", "", "too short"),
    _read("text that is too short", "t.txt", "Three words only.", "too short"),
    _read("text of zeros", "t.txt", b"\0" * 4000, "zero bytes"),
    _read("text of random bytes", "t.txt", bytes(range(256)) * 20, "UTF-8"),
    _read("text in utf-16", "t.txt", LONG.encode("utf-16"), "UTF-8"),
    _read("text that is packed", "t.txt.gz", b"\x1f\x8b" + b"\0" * 99, "unpack it first"),
    _read("text in a table", "t.parquet", b"PAR1", "write it as JSON lines"),
    _read("text without a suffix", "text", LONG, "suffixless"),
    _read("lines of no JSON", "t.jsonl", "{]\n" * 9, "t.jsonl"),
    _read("lines of nothing", "t.jsonl", "", "t.jsonl"),
    _read("line cut short", "t.jsonl", _lines({"text": LONG}) + '{"text": "The', "t.jsonl"),
    _read("lines of numbers", "t.jsonl", _lines(*range(99)), "t.jsonl"),
    _read("lines of null", "t.jsonl", _lines({"text": LONG}, {"text": None}), "null"),
    _read("lines without a text", "t.jsonl", _lines({"id": 5}, {"id": 6}), "t.jsonl"),
    _read("array of nothing", "t.json", "[]", "t.json"),
    _read("array of arrays", "t.json", "[[1], [2]]", "t.json"),
    _read("array nested deep", "t.json", "[" * 99999, "t.json"),
    _read("token ids that are fractions", "t.npy", _saved([0.5] * 99), "integers"),
    _read("token ids of another model", "t.npy", _saved([4096] * 99), "tokenizer has 0 to 4095"),
    _read("negative token ids", "t.npy", _saved([-1] * 99), "tokenizer has 0 to 4095"),
    _read("no token ids", "t.npy", _saved([], dtype=int), "t.npy"),
    _read("token ids that are a pickle", "t.npy", _saved([{}], dtype=object), "t.npy"),
    _read("token ids cut short", "t.npy", _saved([1] * 99)[:-8], "t.npy"),
    _read("token ids of zeros", "t.safetensors", b"\0" * 99, "t.safetensors"),
)

RIGHT = (
    _read("byte order mark before a text", "t.txt", "\ufeff" + LONG, "perplexity", 0),
    _read("lines of texts", "t.jsonl", _lines({"text": LONG}, {"text": LONG}), "perplexity", 0),
    _read(
        "lines of prompts and answers",
        "t.jsonl",
        _lines({"prompt": LONG, "completion": LONG}),
        "perplexity",
        0,
    ),
    _read(
        "lines of ids and texts", "t.jsonl", _lines({"id": "a-1", "body": LONG}), "perplexity", 0
    ),
    _read("token ids", "t.npy", _saved([7, 8, 9] * 99), "perplexity", 0),
)

CASES = (*NAMES, *CONTENT, *RIGHT)
