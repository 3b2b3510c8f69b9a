"""Conversations through chat templates: roles, parts, calls, and what templates refuse."""

from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alphaquant import demo
from alphaquant.errors import DataError
from alphaquant.texts.conversations import render


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo.model_path())


def rendered(tokenizer: Any, template: str, *messages: object, tools: object = None) -> str:
    tokenizer.chat_template = template
    return render(messages, tools, tokenizer, "a.jsonl, line 7")


EACH = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "user", "content": "a"}, "user:a;"),
        ({"role": "developer", "content": "a"}, "system:a;"),
        ({"from": "human", "value": "a"}, "user:a;"),
        ({"from": "GPT", "value": "a"}, "assistant:a;"),
        ({"from": "observation", "value": "a"}, "tool:a;"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}, "user:ab;"),
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, "assistant:;"),
        ({"role": "assistant", "content": "a", "tool_calls": None}, "assistant:a;"),
    ],
)
def test_a_message_has_a_role_and_a_text(tokenizer: Any, message: object, text: str) -> None:
    assert rendered(tokenizer, EACH, message) == text


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("a", "message 1 is no object"),
        ({"role": "narrator", "content": "a"}, "is said by 'narrator'; known are system,"),
        ({"content": "a"}, "is said by None"),
        ({"role": ["user"], "content": "a"}, "is said by"),
        ({"role": "user"}, "has the content None; it is a string"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "part of type 'image_url'; only"),
        ({"role": "user", "content": [{"type": "image", "text": "a"}]}, "part of type 'image'"),
        ({"role": "assistant", "tool_calls": "f()"}, "tool_calls 'f.*they are a list"),
    ],
)
def test_a_message_that_cannot_be_read_is_named(
    tokenizer: Any, message: object, words: str
) -> None:
    with pytest.raises(DataError, match=f"a.jsonl, line 7, message 1 .*{words}|{words}"):
        rendered(tokenizer, EACH, message)


def test_arguments_of_calls_become_objects_and_tools_are_handed_over(tokenizer: Any) -> None:
    template = "{{ tools[0].name }} {{ messages[0].tool_calls[0].function.arguments.city }}"
    call = {"function": {"name": "f", "arguments": '{"city": "Basel"}'}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    for tools in ([{"name": "weather"}], '[{"name": "weather"}]'):
        assert rendered(tokenizer, template, message, tools=tools) == "weather Basel"
    with pytest.raises(DataError, match="line 7: 'tools' is not JSON"):
        rendered(tokenizer, template, message, tools="[")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: 'roles must alternate'"),
        ("{{ messages[9].content }}", "UndefinedError"),
        ("{% for", "TemplateSyntaxError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}{{ open('/etc/passwd') }}", "UndefinedError|SecurityError"),
    ],
)
def test_what_a_template_refuses_is_one_line(tokenizer: Any, template: str, reason: str) -> None:
    message = {"role": "user", "content": "a"}
    with pytest.raises(DataError, match=f"line 7: .*refuses this conversation .*({reason})") as e:
        rendered(tokenizer, template, message)
    assert "\n" not in str(e.value)


def test_today_is_the_same_every_day(tokenizer: Any) -> None:
    template = """{%- if strftime_now is defined %}
{%- set date = strftime_now('%d %b %Y') %}
{%- endif %}
{{- date }} {{ strftime_now("%Y-%m-%d") }}"""
    message = {"role": "user", "content": "a"}
    assert rendered(tokenizer, template, message) == "01 Jan 2025 2025-01-01"
