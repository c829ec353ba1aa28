"""Chats to text, through the template that says how a model was shown its conversations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actcache.errors import ConfigError, TextError
from actcache.source.kinds import Chat

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}


def chat_text(tokenizer: Any, chat: Chat, template: str, where: str) -> str:
    """A chat as the text that the model was trained on, BOS and separators included where the template has them.

    Args:
        tokenizer: A transformers tokenizer.
        chat: Messages in order.
        template: A Jinja template; transformers renders it in a sandbox.
        where: What it is, for the message.

    Raises:
        TextError: a message without role or content, or a chat that the template refuses.
    """
    import jinja2

    messages = [_message(message, where) for message in chat]
    try:
        return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise TextError(f"{where}: the chat template refuses it: {error}") from error


def template_of(tokenizer: Any, chat_template: str | None) -> str:
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
        return str(tokenizer.get_chat_template(chat_template))
    except ValueError as error:
        raise ConfigError(f"chat_template: {error}") from error


def _message(message: Any, where: str) -> dict[str, Any]:
    """One message in the usual form; keys that neither form has, such as tool calls, are kept."""
    if isinstance(message, Mapping):
        if "role" in message and ("content" in message or len(message) > 1):
            return dict(message)
        if "from" in message and "value" in message:
            sender = message["from"]
            return {"role": _SHAREGPT_ROLES.get(sender, sender), "content": message["value"]}
    found = sorted(message) if isinstance(message, Mapping) else type(message).__name__
    raise TextError(f"{where}: a message of a chat has role and content (or from and value), found {found}")
