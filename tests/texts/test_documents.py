"""Layouts of JSON records: which fields are text, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alphaquant import demo
from alphaquant.errors import DataError
from alphaquant.texts.documents import read_json

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"

ASKED, TOLD = "What runs here?", "The Rhine."
CHAT = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": TOLD}]
SHAREGPT = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": TOLD}]
RENDERED = f"<user>{ASKED}\n<assistant>{TOLD}\n"
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    made = AutoTokenizer.from_pretrained(demo.model_path())
    made.chat_template = TEMPLATE
    return made


def read(folder: Path, tokenizer: Any, *records: object) -> str:
    """What a file of these records decodes to."""
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(tokenizer.decode([t for piece in read_json(path, tokenizer) for t in piece]))


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"id": "s-1", "text": TOLD, "messages": CHAT}, TOLD + END),
        ({"id": "s-1", "content": TOLD, "title": "Rivers"}, TOLD + END),
        ({"id": "s-1", "source": "invented", "body": TOLD}, TOLD + END),
        ({"instruction": ASKED, "input": "", "output": TOLD}, f"{ASKED}\n\n{TOLD}{END}"),
        ({"instruction": ASKED, "input": "x", "output": TOLD}, f"{ASKED}\n\nx\n\n{TOLD}{END}"),
        ({"instruction": ASKED, "input": None, "output": TOLD}, f"{ASKED}\n\n{TOLD}{END}"),
        ({"instruction": ASKED, "context": "x", "response": TOLD}, f"{ASKED}\n\nx\n\n{TOLD}{END}"),
        ({"prompt": ASKED, "completion": TOLD}, f"{ASKED}\n\n{TOLD}{END}"),
        ({"prompt": ASKED, "response": TOLD}, f"{ASKED}\n\n{TOLD}{END}"),
        ({"answer": TOLD, "question": ASKED}, f"{ASKED}\n\n{TOLD}{END}"),
        ({"input": ASKED, "output": TOLD}, f"{ASKED}\n\n{TOLD}{END}"),
        ({"prompt": ASKED, "chosen": TOLD, "rejected": "No."}, f"{ASKED}\n\n{TOLD}{END}"),
        ({"chosen": TOLD, "rejected": "No."}, TOLD + END),
        ({"messages": CHAT}, RENDERED),
        ({"id": "s-1", "source": "invented", "conversations": SHAREGPT}, RENDERED),
        ({"conversations": CHAT}, RENDERED),
        ({"system": "Be brief.", "conversations": SHAREGPT}, "<system>Be brief.\n" + RENDERED),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, RENDERED),
        ({"prompt": ASKED, "chosen": CHAT, "rejected": CHAT}, RENDERED),
        ({"chosen": CHAT, "rejected": CHAT[:1]}, RENDERED),
        ({"messages": []}, ""),
        ({"text": ""}, ""),
    ],
)
def test_a_record_is_read_with_all_of_its_sides(
    tmp_path: Path, tokenizer: Any, record: object, text: str
) -> None:
    assert read(tmp_path, tokenizer, record, record) == text * 2


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "s-1", "source": "x"}, "'id', 'source' and none of them is a text"),
        ({"head": "a", "body": "b"}, "'head', 'body' and which of them is the text cannot be"),
        ({"prompt": "a", "completion": "b", "response": "c"}, "rename the text's field to 'text'"),
        ({}, "the fields of nothing"),
    ],
)
def test_no_field_is_taken_for_being_the_first(
    tmp_path: Path, tokenizer: Any, record: object, message: str
) -> None:
    with pytest.raises(DataError, match=f"line 1 has .*{message}"):
        read(tmp_path, tokenizer, record)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"text": "a"}, {"text": None}, "line 2: field 'text' is null; it must be a string"),
        ({"text": "a"}, {"body": "a"}, "line 2: field 'text' is missing"),
        ({"prompt": "a", "response": "b"}, {"prompt": "a"}, "field 'response' is missing"),
        ({"messages": CHAT}, {"messages": None}, "field 'messages' is null; .* list of messages"),
        ({"tokens": [1]}, {"tokens": [1, True]}, r"'tokens' is \[1, true\]; .*list of integers"),
        ({"text": "a"}, {"text": "a\ud800"}, "line 2 has the half character"),
        ({"body": "a"}, {"body": CHAT}, "it must be a string"),
    ],
)
def test_all_records_are_like_the_first(
    tmp_path: Path, tokenizer: Any, first: object, second: object, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, tokenizer, first, second)


def test_strings_that_are_not_read_are_told_once(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    record = {"id": "1", "system_prompt": "s", "question": ASKED, "response": TOLD, "context": "c"}
    read(tmp_path, tokenizer, record, record)
    assert [r.message.partition(": ")[2] for r in caplog.records] == [
        "read question and response, not 'system_prompt'"
    ]


def test_a_conversation_without_a_template_says_what_to_do(tmp_path: Path) -> None:
    plain = AutoTokenizer.from_pretrained(demo.model_path())
    with pytest.raises(
        DataError, match=r"line 1 .*has no chat template; copy chat_template.jinja"
    ):
        read(tmp_path, plain, {"messages": CHAT})


def test_an_array_is_read_as_lines_are(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": ASKED, "output": TOLD}] * 2))
    pieces = list(read_json(tmp_path / "a.json", tokenizer))
    assert tokenizer.decode(pieces[1].tolist()) == f"{ASKED}\n\n{TOLD}{END}"
