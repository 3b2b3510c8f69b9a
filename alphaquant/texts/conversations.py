"""Conversations as text, through the chat template that comes with a tokenizer.

Takes messages as OpenAI writes them (`role`, `content`) and as ShareGPT does (`from`, `value`).
The template is the tokenizer's own and runs in the sandbox of transformers. It writes the special
tokens of a conversation itself, so the text is tokenized without adding any.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from alphaquant.errors import DataError

SPEAKERS = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    "function_call": "assistant",
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
"""Who speaks, as files call them, and the role that templates know."""

TEMPLATE_DATE = datetime(2025, 1, 1)
"""Today, for templates that write the date: the same file gives the same windows every day."""

_DIRECTIVES = ("%Y", "%y", "%m", "%d", "%B", "%b", "%A", "%a", "%H", "%M", "%S")


def check_template(tokenizer: Any, where: str) -> None:
    """Refuse conversations for a tokenizer that cannot write them.

    Raises:
        DataError: it has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where} holds a conversation, and the model's tokenizer has no chat template; copy "
            "chat_template.jinja of the chat model into the model's directory, or give a text, or "
            "records with a field 'text'"
        )


def render(messages: Sequence[Any], tools: Any, tokenizer: Any, where: str) -> str:
    """A conversation as the chat template writes it; empty where there is no message.

    Args:
        messages: objects with `role` and `content`, or `from` and `value`.
        tools: descriptions of the functions that may be called, a list or that as JSON; or None.
        tokenizer: of transformers, with a chat template.
        where: file and line.

    Raises:
        DataError: a message that cannot be read, or that the template refuses.
    """
    if not messages:
        return ""
    found = [_message(m, f"{where}, message {n}") for n, m in enumerate(messages, 1)]
    options = {"tools": _tools(tools, where)}
    try:
        if "strftime_now" in str(tokenizer.chat_template):
            own = tokenizer.get_chat_template(None, options["tools"])
            options["chat_template"] = _date_macro() + own
        text = tokenizer.apply_chat_template(found, tokenize=False, **options)
    except Exception as error:  # the template is a program: anything can go wrong in it
        reason = (str(error).splitlines() or [""])[0][:200]
        raise DataError(
            f"{where}: the tokenizer's chat template refuses this conversation "
            f"({type(error).__name__}: {reason!r}); mend or remove it"
        ) from error
    return str(text)


def _date_macro() -> str:
    """In place of `strftime_now` in a template: functions that are handed over become strings."""
    replaced = "".join(f".replace('{d}', '{TEMPLATE_DATE.strftime(d)}')" for d in _DIRECTIVES)
    return f"{{% macro strftime_now(form) %}}{{{{ form{replaced} }}}}{{% endmacro %}}"


def _message(item: Any, where: str) -> dict[str, Any]:
    """A message with the role and the text that templates expect; other keys stay."""
    if not isinstance(item, Mapping):
        raise DataError(f"{where} is no object; write {{'role': 'user', 'content': '...'}}")
    speaker = item.get("role", item.get("from"))
    role = SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise DataError(
            f"{where} is said by {speaker!r}; known are {', '.join(SPEAKERS)}; rename the speaker"
        )
    message = {k: v for k, v in item.items() if k not in ("from", "value")}
    calls = item.get("tool_calls")
    if calls:
        message["tool_calls"] = _calls(calls, where)
    else:
        message.pop("tool_calls", None)
    text = item.get("content", item.get("value"))
    return message | {"role": role, "content": _text(text, where, is_optional=bool(calls))}


def _text(content: Any, where: str, *, is_optional: bool) -> str:
    """A string, or a list of parts of type text, joined."""
    if isinstance(content, str):
        return content
    if content is None and is_optional:
        return ""
    if not isinstance(content, list):
        raise DataError(
            f"{where} has the content {content!r:.40}; it is a string or a list of texts; "
            "mend or remove the conversation"
        )
    for part in content:
        is_text = isinstance(part, Mapping) and isinstance(part.get("text"), str)
        if not is_text or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise DataError(
                f"{where} has a part of type {kind!r:.40}; only texts can be read; remove the "
                "conversation"
            )
    return "".join(part["text"] for part in content)


def _calls(calls: Any, where: str) -> list[Any]:
    """Calls of functions; arguments that are JSON become objects, as templates expect them."""
    if not isinstance(calls, list):
        raise DataError(f"{where} has tool_calls {calls!r:.40}; they are a list; mend them")
    return [_call(call) for call in calls]


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call  # no JSON: the template gets what the file says
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(tools: Any, where: str) -> list[Any] | None:
    """Descriptions of functions, None where there are none."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: 'tools' is not JSON ({error}); mend or remove it"
            ) from error
    if not tools:
        return None
    if not isinstance(tools, list):
        raise DataError(f"{where}: 'tools' is {tools!r:.40}; it is a list; mend or remove it")
    return tools
