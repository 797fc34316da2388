"""Messages of a chat, as OpenAI's API and chat templates have them: roles and texts. Pure; knows no template.

A message is an object with a `role` and a `content`: a text, or a list of parts of type "text".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fiddler.errors import RequestError, quoted

__all__ = ["Message", "checked_messages", "system_in_user"]

Message = Mapping[str, str]
"""`role` ("system", "user" or "assistant") and `content`."""


def checked_messages(messages: object) -> list[Message]:
    """Messages with texts for contents: text parts are joined by line breaks, as llama.cpp's server does.

    Raises RequestError, which names the message, for anything but a list of messages.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError(f"messages are {quoted(messages)}; give a list of at least one")
    checked: list[Message] = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise RequestError(f"message {index} is {quoted(message)}; it must have a role and a content")
        texts: dict[str, str] = {}
        for key, value in message.items():
            text = _joined(index, value) if key == "content" else value
            if not isinstance(text, str):
                raise RequestError(f"message {index}: {quoted(key)} is {quoted(text)}; it must be a string")
            texts[key] = text
        checked.append(texts)
    return checked


def system_in_user(messages: Sequence[Message]) -> list[Message] | None:
    """`messages` with the first, a system message, put before the first user message's text; None where not possible.

    As mistral-common does for models that were trained without system messages: a blank line stands between the two.
    """
    if messages[0]["role"] != "system":
        return None
    rest = [dict(message) for message in messages[1:]]
    user = next((message for message in rest if message["role"] == "user"), None)
    if user is None:
        return None
    user["content"] = f"{messages[0]['content']}\n\n{user['content']}"
    return list(rest)


def _joined(index: int, content: object) -> object:
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f"message {index} has the part {quoted(part)}; only parts of type text are read")
        texts.append(part["text"])
    return "\n".join(texts)
