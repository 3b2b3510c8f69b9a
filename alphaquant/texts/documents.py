r"""What the objects of a JSON file mean: texts, token ids, conversations, or pairs.

The first object decides, and all others are read like it:

    text                            the text; else `content`
    tokens, input_ids               token ids, concatenated as they are
    messages, conversations         a conversation, as the tokenizer's chat template writes it
    prompt + completion, ...        both sides, and further input; a blank line between them
    prompt + chosen + rejected      a pair with the chosen answer; the rejected one is not read
    one single string               that, whatever its name; names, dates and labels do not count

Anything else is refused: no field is taken for being the first. Texts and pairs are followed by
the tokenizer's eos. Conversations are not: the template ends turns itself. Pairs do not go through
the template, so that base models read them too.

    {"instruction": "Name a river.", "input": "", "output": "The Rhine."}
    -> "Name a river.\n\nThe Rhine." <eos>
"""

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from alphaquant.errors import DataError
from alphaquant.texts.conversations import check_template, render
from alphaquant.texts.records import Record, read_records, shown
from alphaquant.texts.tokens import (
    Tokenizer,
    Tokens,
    check_ids,
    encode,
    tokenize_documents,
)

logger = logging.getLogger(__name__)

TEXTS = ("text", "content")
IDS = ("tokens", "input_ids")
CHATS = ("messages", "conversations")
ASKED = ("prompt", "instruction", "question", "query")
FURTHER = ("input", "context")
ANSWERED = ("completion", "response", "output", "answer", "chosen")

LABELS = frozenset(
    ("id", "_id", "uid", "uuid", "guid", "index", "key", "name", "title", "source", "src")
    + ("dataset", "subset", "split", "file", "filename", "path", "url", "link", "license")
    + ("author", "model", "model_name", "generator", "lang", "language", "locale", "category")
    + ("topic", "tag", "label", "type", "kind", "task", "domain", "subject", "difficulty")
    + ("date", "time", "timestamp", "created", "created_at", "updated_at", "hash", "digest")
    + ("sha", "md5", "version", "meta", "metadata", "rejected")
)
"""Strings that say something about a text and are none."""

_KNOWN = (
    "possible are 'text' or 'content'; 'tokens' or 'input_ids'; 'messages' or 'conversations'; a "
    "pair such as 'prompt' and 'completion'; or one single string"
)


def read_json(path: Path, tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Token pieces of a file of JSON objects, one per line or in one array.

    Raises:
        DataError: while reading, naming file and line.
    """
    records = read_records(path)
    first = next(records, None)
    if first is None:
        return
    names = choose_fields(first)
    _tell_unread(first, names)
    records = itertools.chain([first], records)
    if names[0] in IDS:
        for record in records:
            ids = _ids(record, names[0])
            if ids:
                yield check_ids(np.asarray(ids), tokenizer, f"{record.where}, field {names[0]!r}")
        return
    for record in records:
        found = _conversation(record, names, tokenizer)
        if found is None:
            text = "\n\n".join(part for part in _parts(record, names) if part)
            yield from tokenize_documents(iter([_whole(text, record)]), tokenizer)
        elif found:
            yield encode(_whole(found, record), tokenizer)


def choose_fields(record: Record) -> tuple[str, ...]:
    """The fields that are read: one, or the two sides of a pair.

    Raises:
        DataError: it cannot be told which they are.
    """
    fields = record.fields
    for name in (TEXTS[0], *IDS, *CHATS, TEXTS[1]):
        if name in fields:
            return (name,)
    asked = [n for n in ASKED if n in fields] or [n for n in FURTHER[:1] if n in fields]
    answered = [n for n in ANSWERED if n in fields]
    if len(asked) == len(answered) == 1:
        return (asked[0], answered[0])
    if answered == ["chosen"] and not asked:
        return ("chosen",)
    strings = [n for n, value in fields.items() if isinstance(value, str) and n not in LABELS]
    if len(strings) == 1:
        return (strings[0],)
    which = "which of them is the text cannot be told" if strings else "none of them is a text"
    raise DataError(
        f"{record.where} has the fields {', '.join(map(repr, fields)) or 'of nothing'} and "
        f"{which}; {_KNOWN}; rename the text's field to 'text'"
    )


def _tell_unread(record: Record, names: tuple[str, ...]) -> None:
    """Warn once of strings that are not read, because they may be part of the text."""
    if names[0] in (*TEXTS, *IDS):
        return
    read = {*names, *FURTHER, *LABELS, *(("system", "tools") if names[0] in CHATS else ())}
    left = [n for n, value in record.fields.items() if isinstance(value, str) and n not in read]
    if left:
        logger.warning("%s: read %s, not %s", record.where, " and ".join(names), str(left)[1:-1])


def _ids(record: Record, name: str) -> list[int]:
    value = record.fields.get(name)
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise _wrong(record, name, "a list of integers")
    return value


def _parts(record: Record, names: tuple[str, ...]) -> Iterator[str]:
    """The strings of a text or of a pair, further input behind the question."""
    for i, name in enumerate(names):
        value = record.fields.get(name)
        if not isinstance(value, str):
            raise _wrong(record, name, "a string")
        yield value
        if i == 0 and len(names) == 2:
            further = (record.fields.get(n) for n in FURTHER if n not in names)
            yield from (value for value in further if isinstance(value, str))


def _conversation(record: Record, names: tuple[str, ...], tokenizer: Tokenizer) -> str | None:
    """The record as a conversation, None where it is none."""
    sides = [record.fields.get(name) for name in names]
    if names[0] in CHATS:
        if not isinstance(sides[0], list):
            raise _wrong(record, names[0], "a list of messages")
        messages = sides[0]
    elif names[-1] in ANSWERED and any(isinstance(side, list) for side in sides):
        messages = _joined(record, names)
    else:
        return None
    check_template(tokenizer, record.where)
    system, tools = record.fields.get("system"), record.fields.get("tools")
    if messages and isinstance(system, str) and system:
        messages = [{"role": "system", "content": system}, *messages]
    return render(messages, tools, tokenizer, record.where)


def _joined(record: Record, names: tuple[str, ...]) -> list[Any]:
    """The messages of a pair; an answer that begins with the question is the whole."""
    sides = []
    for name, role in zip(names, ("user", "assistant")[-len(names) :], strict=True):
        value = record.fields.get(name)
        if not isinstance(value, str | list):
            raise _wrong(record, name, "a string or a list of messages")
        is_text = isinstance(value, str)
        sides.append([{"role": role, "content": value}] if is_text else list(value))
    last = sides[-1]
    begins = last[0] if last and isinstance(last[0], dict) else {}
    if begins.get("role", begins.get("from")) not in ("assistant", "gpt"):
        return last
    return [message for side in sides for message in side]


def _wrong(record: Record, name: str, wanted: str) -> DataError:
    given = f"is {shown(record.fields[name])}" if name in record.fields else "is missing"
    return DataError(
        f"{record.where}: field {name!r} {given}; it must be {wanted}, as the first record has "
        "that field; mend or remove the record"
    )


def _whole(text: str, record: Record) -> str:
    """The text, if all of its characters exist: JSON can name halves of characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{record.where} has the half character {error.object[error.start]!r}; write whole "
            "ones, or remove the record"
        ) from error
    return text
