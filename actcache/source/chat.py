"""Chats to text, through the template that says how a model was shown its conversations."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from actcache.errors import ConfigError, TextError
from actcache.source.kinds import Chat

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of the parts of a message's content that are text, by the names that common interfaces use."""


def chat_text(tokenizer: Any, chat: Chat, template: str) -> str:
    """A chat as the text that the model was trained on, BOS and separators included where the template has them.

    Content of several text parts is given to the template as it is, or joined to one text if the template refuses it.
    Keys without a value (`"content": None` beside tool calls, columns of a table) count as missing.

    Args:
        tokenizer: A transformers tokenizer.
        chat: Messages in order.
        template: A Jinja template; transformers renders it in a sandbox.

    Raises:
        TextError: a message without role, or whose content is not text; a chat that the template refuses, or in
            which it prints a list or mapping in Python's notation.
    """
    messages = [_message(message) for message in chat]
    joined = [_join_parts(message) for message in messages]
    if messages != joined:
        try:
            text = _render(tokenizer, messages, template)
        except TextError:
            pass
        else:
            if all(part in text for message in messages for part in _parts(message)):
                return text
    return _render(tokenizer, joined, template)


def message_strings(chat: Chat) -> Iterator[str]:
    """Every string in the messages of a chat."""
    waiting: list[Any] = list(chat)
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)


def _render(tokenizer: Any, messages: list[dict[str, Any]], template: str) -> str:
    try:
        text = str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
    except MemoryError:
        raise
    except Exception as error:  # templates are small programs that may raise anything
        raise TextError(f"the chat template refuses it: {str(error) or type(error).__name__}") from error
    for shown in _reprs(messages):
        if shown in text:
            raise TextError(f"the chat template cannot write {shown:.80}, and shows it as Python does")
    return text


def _reprs(value: Any) -> Iterator[str]:
    """Python's notation for lists and mappings within messages, where JSON would look different."""
    for inner in value.values() if isinstance(value, Mapping) else value:
        if isinstance(inner, Mapping | list | tuple):
            if inner and _json(inner) != repr(inner):
                yield repr(inner)
            yield from _reprs(inner)


def _json(value: Any) -> str | None:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return None


def template_of(tokenizer: Any, chat_template: str | os.PathLike[str] | None) -> str:
    """The template to use: the one given, the tokenizer's of the name given, or the tokenizer's own.

    Raises:
        ConfigError: the tokenizer has none, and none was given.
    """
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"the documents are chats, but {type(tokenizer).__name__} has no chat template; give one with "
            "chat_template (--chat-template), or take the tokenizer of the model's chat version"
        )
    try:
        if isinstance(chat_template, os.PathLike):
            chat_template = Path(chat_template).expanduser().read_text(encoding="utf-8")
        template = str(tokenizer.get_chat_template(chat_template))
    except Exception as error:
        raise ConfigError(f"chat_template: {error}") from error
    if "{{" not in template and "{%" not in template:
        raise ConfigError(
            "chat_template is the text of a Jinja template, the name of one of the tokenizer's, or the Path of a file; "
            f"{template[:60]!r} is none of these: it has nothing to put messages in"
        )
    return template


def _message(message: Any) -> dict[str, Any]:
    """One message in the standard form; other keys, such as tool calls, are kept."""
    if not isinstance(message, Mapping):
        raise TextError(f"a message of a chat has role and content (or from and value), found {type(message).__name__}")
    if "role" in message and ("content" in message or len(message) > 1):
        usual = dict(message)
    elif "from" in message and "value" in message:
        sender = message["from"]
        usual = {"role": _SHAREGPT_ROLES.get(sender, sender) if isinstance(sender, str) else sender}
        usual["content"] = message["value"]
    else:
        raise TextError(
            f"a message of a chat has role and content (or from and value), found {sorted(map(str, message))}"
        )
    if not isinstance(usual["role"], str):
        raise TextError(f"the role of a message must be a text, found {type(usual['role']).__name__}")
    if usual.get("content") is None and len([key for key, value in usual.items() if value is not None]) < 2:
        raise TextError(f"a message of {usual['role']!r} has no content, and nothing else either")
    usual = {key: _plain(value) for key, value in usual.items() if value is not None}
    _check_content(usual.get("content", ""), usual["role"])
    return usual


def _plain(value: Any) -> Any:
    """Arrays, which pandas tables have in place of lists, as lists."""
    if hasattr(value, "tolist") and not isinstance(value, str | bytes):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _check_content(content: Any, role: str) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise TextError(f"the content of a message of {role!r} must be a text, found {type(content).__name__}")
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind not in _TEXT_PARTS:
            raise TextError(f"the content of a message of {role!r} has a part of the type {kind!r}; only text is read")
        if not isinstance(_text_of(part), str):
            raise TextError(f"a part of the content of a message of {role!r} has no text")


def _text_of(part: Any) -> Any:
    return part.get("text") if isinstance(part, Mapping) else part


def _parts(message: Mapping[str, Any]) -> list[str]:
    """The texts of a content of several parts."""
    content = message.get("content")
    return [_text_of(part) for part in content] if isinstance(content, list) else []


def _join_parts(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is one text."""
    return {**message, "content": "".join(_parts(message))} if isinstance(message.get("content"), list) else message
