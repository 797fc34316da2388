"""A model's chat template: messages in, the ids of a prompt out, as `transformers.apply_chat_template` gives them.

The template is Jinja from the file's metadata, rendered by `template_process`. Its own text may become control
tokens; what stands in a message never does. Both meet in one string, which is cut into tokens as a whole, since
SentencePiece joins and spaces across their borders. So before rendering a character that occurs nowhere else, the
bar, goes into every name of a control token that a message holds, and between a message and what could complete one
around it; the tokenizer finds no special token across a bar and drops it. A message without such a name is left as it
is, so templates that strip, cut or test it do with it as they do in transformers. A template that itself rewrites
a message's letters (`lower`, `replace`) can still make a name of what was none.

A template that writes no BOS gets none, as in transformers, whatever `add_bos` says; one that does gets that one.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence

from fiddler.errors import FileFormatError, RequestError, quoted
from fiddler.text.template_process import Limits, TemplateProcess
from fiddler.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Message", "barred", "special_tokens"]

Message = Mapping[str, str]
"""`role` ("system", "user" or "assistant") and `content`."""

_SPECIAL = ("bos", "eos", "unknown", "padding")  # as in `tokenizer.ggml.bos_token_id`
_TEMPLATE_NAMES = {"unknown": "unk_token", "padding": "pad_token"}
_PRIVATE_PLANE, _PRIVATE_COUNT = 0x100000, 0xFFFE


class ChatTemplate:
    """One template with the tokenizer it is for. Renders in a process of its own, which `close` ends."""

    def __init__(
        self, source: str, tokenizer: Tokenizer, special: Mapping[str, str], limits: Limits | None = None
    ) -> None:
        """`special`: what the template finds as `bos_token`, `eos_token`, ...; `limits`: of rendering once."""
        self._source, self._tokenizer, self._special = source, tokenizer, dict(special)
        self._names = tokenizer.control_names
        self._process = TemplateProcess(limits or Limits())

    @classmethod
    def of(cls, tokenizer: Tokenizer, metadata: Mapping[str, object], source: str | None = None) -> ChatTemplate | None:
        """The template in a GGUF's metadata, or `source` instead of it; None where there is neither."""
        source = tokenizer.chat_template if source is None else source
        return None if source is None else cls(source, tokenizer, special_tokens(tokenizer, metadata))

    def text(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """What the template makes of `messages`, as text. Raises as `ids` does."""
        return self._rendered(_checked(messages), add_generation_prompt)

    def ids(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """The prompt's ids, BOS included where the template writes it; `add_generation_prompt`: up to an answer.

        Raises RequestError where `messages` are malformed or the template refuses them, and FileFormatError where
        the template is malformed, fails or goes beyond the limits, in one line.
        """
        texts = [text for message in _checked(messages) for pair in message.items() for text in pair]
        bar = _unused_character((self._source, *self._special.values(), *texts))
        marked = [
            {barred(key, self._names, bar): barred(value, self._names, bar) for key, value in message.items()}
            for message in messages
        ]
        return self._tokenizer.encode(self._rendered(marked, add_generation_prompt), parse_special=True, bar=bar)

    def close(self) -> None:
        """End the process that renders; it is started again when needed."""
        self._process.close()

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        variables = {"messages": messages, "tools": None, "documents": None} | self._special
        return self._process.render(self._source, variables | {"add_generation_prompt": add_generation_prompt})


def _checked(messages: Sequence[Message]) -> Sequence[Message]:
    if not messages:
        raise RequestError("there are no messages; give at least one")
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise RequestError(f"message {place} is {quoted(message)}; it must have a role and a content")
        for key, value in message.items():
            if not isinstance(value, str):
                raise RequestError(f"message {place}: {quoted(key)} is {quoted(value)}; it must be a string")
    return messages


def special_tokens(tokenizer: Tokenizer, metadata: Mapping[str, object]) -> dict[str, str]:
    """The names of a GGUF's special tokens as templates know them: those that its metadata name."""
    found = {}
    for name in _SPECIAL:
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is None and not (name == "bos" and tokenizer.add_bos) and name != "eos":
            continue
        index = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}.get(name, index)
        if not isinstance(index, int) or not 0 <= index < tokenizer.vocab_size:
            raise FileFormatError(f"tokenizer.ggml.{name}_token_id is {quoted(index)}; it must be the id of a token")
        found[_TEMPLATE_NAMES.get(name, f"{name}_token")] = tokenizer.token(index)
    return found


def barred(text: str, names: Iterable[str], bar: str) -> str:
    """`text` with `bar` wherever it, or it and what stands around it, could hold one of `names`.

    That is after the first character of every name; behind the text, before or after the white space at its end,
    where it ends as a name begins; and likewise in front of it. Names of one character cannot be kept apart.
    """
    names = [name for name in names if len(name) > 1]
    for name in names:
        if name in text:
            text = text.replace(name, f"{name[0]}{bar}{name[1:]}")
    begins = {len(edge) for edge in (text, text.rstrip()) if any(_begins(edge, name) for name in names)}
    ends = {len(text) - len(edge) for edge in (text, text.lstrip()) if any(_ends(edge, name) for name in names)}
    for place in sorted(begins | ends, reverse=True):
        text = text[:place] + bar + text[place:]
    return text


def _begins(text: str, name: str) -> bool:
    """Whether `text` ends with a beginning of `name`, not all of it."""
    last, at = text[-1:], -1
    while last and (at := name.find(last, at + 1)) >= 0:
        if at + 1 < len(name) and text.endswith(name[: at + 1]):
            return True
    return False


def _ends(text: str, name: str) -> bool:
    """Whether `text` starts with an end of `name`, not all of it."""
    first, at = text[:1], 0
    while first and (at := name.find(first, at + 1)) >= 0:
        if text.startswith(name[at:]):
            return True
    return False


def _unused_character(texts: Iterable[str]) -> str:
    """A private-use character that none of `texts` holds, and that nobody can know before."""
    taken = set().union(*texts)
    while True:
        character = chr(_PRIVATE_PLANE + secrets.randbelow(_PRIVATE_COUNT))
        if character not in taken:
            return character
