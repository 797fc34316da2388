"""A model's chat template: turns messages into prompt ids, as `transformers.apply_chat_template` does.

The template is Jinja from the file's metadata; `template_process` renders it. The template's own text may become
control tokens; text of a message never does. Both are tokenized as one string, because SentencePiece merges and adds
spaces across their borders. So before rendering, a character that occurs nowhere else, the bar, is inserted into every
control token's name in a message, and between a message and text that could complete a name around it. The tokenizer
recognises no special token across a bar, and drops the bar. A message without such a name stays unchanged, so
templates that strip, cut or test it behave as in transformers. A template that itself rewrites a message's letters
(`lower`, `replace`) can still create a name.

Tools and a template's own variables, as `enable_thinking`, are text of the same kind: `template_variables`.

A template that writes no BOS gets none, as in transformers, whatever `add_bos` says; one that writes it gets that one.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from fiddler.errors import FiddlerError, FileFormatError, RequestError, quoted
from fiddler.text.messages import Message, checked_messages, forms, system_in_user
from fiddler.text.template_process import Limits, TemplateProcess
from fiddler.text.template_variables import TemplateVariables
from fiddler.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "barred", "special_tokens"]

T = TypeVar("T")

_SPECIAL = ("bos", "eos", "unknown", "padding")  # as in `tokenizer.ggml.bos_token_id`
_TEMPLATE_NAMES = {"unknown": "unk_token", "padding": "pad_token"}
_TOOL_USE = "tokenizer.chat_template.tool_use"  # transformers' name of the template for tools, where there are several
_NO_VARIABLES = TemplateVariables()
_LARGEST = 16 << 20  # of a template in place of the model's [characters]
_PRIVATE_PLANE, _PRIVATE_COUNT = 0x100000, 0xFFFE


class ChatTemplate:
    """A chat template with its tokenizer. Renders in a process of its own, which `close` ends."""

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        special: Mapping[str, str],
        limits: Limits | None = None,
        *,
        tool_use: str | None = None,
    ) -> None:
        """`special`: the template's variables `bos_token`, `eos_token`, ...; `limits`: of one rendering.

        tool_use: the source that renders conversations with tools; None: `source` does.
        """
        self._source, self._tokenizer, self._special = source, tokenizer, dict(special)
        self._tool_use = source if tool_use is None else tool_use
        self._names = tokenizer.control_names
        self._process = TemplateProcess(limits or Limits())
        self.merges_system = False
        """Whether it refused a system message, which stands before the first user message's text since then."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, metadata: Mapping[str, object], source: str | None = None) -> ChatTemplate | None:
        """The template in a GGUF's metadata, or `source` instead of it; None where there is neither.

        Raises FileFormatError where the metadata's template for tools is no text, RequestError for a huge `source`.
        """
        special = special_tokens(tokenizer, metadata)
        if source is not None:
            if len(source) > _LARGEST:
                raise RequestError(f"the template has {len(source)} characters; at most {_LARGEST} are read")
            return cls(source, tokenizer, special)
        tool_use = metadata.get(_TOOL_USE)
        if not isinstance(tool_use, str | None):
            raise FileFormatError(f"{_TOOL_USE} is {quoted(tool_use)}; it must be one string")
        source = tokenizer.chat_template
        return None if source is None else cls(source, tokenizer, special, tool_use=tool_use)

    def text(
        self,
        messages: Sequence[Message],
        variables: TemplateVariables = _NO_VARIABLES,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text that the template renders for `messages`. Raises as `ids` does."""
        prompt = {"add_generation_prompt": add_generation_prompt}
        return self._merging(messages, lambda merged: self._rendered(merged, variables.to_dict() | prompt))

    def ids(
        self,
        messages: Sequence[Message],
        variables: TemplateVariables = _NO_VARIABLES,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The prompt's ids, BOS included where the template writes it; `add_generation_prompt`: begin an answer.

        A system message that the template refuses goes into the first user message: see `merges_system`.
        Raises RequestError where `messages` are malformed or the template refuses them, and FileFormatError where
        the template is malformed, fails or exceeds the limits, in one line.
        """
        prompt = {"add_generation_prompt": add_generation_prompt}
        return self._merging(messages, lambda merged: self._ids(merged, variables.to_dict() | prompt))

    def _merging(self, messages: Sequence[Message], render: Callable[[Sequence[Message]], T]) -> T:
        """`render` of the messages; of those that `system_in_user` gives, if the template refuses the others."""
        checked = checked_messages(messages)
        merged = system_in_user(checked)
        if merged is None:
            return render(checked)
        if not self.merges_system:
            try:
                return render(checked)
            except RequestError as error:
                refusal = error
        try:
            rendered = render(merged)
        except RequestError as error:
            raise error if self.merges_system else refusal from None
        self.merges_system = True
        return rendered

    def _ids(self, messages: Sequence[Message], variables: dict[str, Any]) -> list[int]:
        bar = _unused_character((self._source, self._tool_use, *self._special.values(), *_texts([messages, variables])))
        marked = _barred([list(messages), variables], self._names, bar)
        rendered = self._rendered(*marked).replace(json.dumps(bar)[1:-1], bar)  # where `tojson` escapes it
        return self._tokenizer.encode(rendered, parse_special=True, bar=bar)

    def close(self) -> None:
        """End the rendering process; the next rendering starts another."""
        self._process.close()

    def _rendered(self, messages: Sequence[Message], variables: dict[str, Any]) -> str:
        """The text of the first of the messages' `forms` that the template neither fails on nor refuses."""
        source = self._source if variables["tools"] is None else self._tool_use
        failure: FiddlerError | None = None
        for form in forms(messages):
            try:
                return self._process.render(source, self._special | variables | {"messages": form})
            except (FileFormatError, RequestError) as error:
                failure = failure or error
        assert failure is not None  # there is a first form
        raise failure


def _texts(value: object) -> Iterator[str]:
    """Every text in lists and objects in each other."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.items():
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def _barred(value: Any, names: Sequence[str], bar: str) -> Any:
    """`value` with every text in it `barred`."""
    if isinstance(value, str):
        return barred(value, names, bar)
    if isinstance(value, Mapping):
        return {barred(key, names, bar): _barred(each, names, bar) for key, each in value.items()}
    return [_barred(each, names, bar) for each in value] if isinstance(value, list | tuple) else value


def special_tokens(tokenizer: Tokenizer, metadata: Mapping[str, object]) -> dict[str, str]:
    """A GGUF's special tokens by their names in templates: variable -> text.

    The variables are those that the metadata defines; `eos_token` always, `bos_token` also where `add_bos` is set.
    Raises FileFormatError for an id outside the vocabulary.
    """
    tokens = {}
    for name in _SPECIAL:
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is None and not (name == "bos" and tokenizer.add_bos) and name != "eos":
            continue
        index = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}.get(name, index)
        if not isinstance(index, int) or not 0 <= index < tokenizer.vocab_size:
            raise FileFormatError(f"tokenizer.ggml.{name}_token_id is {quoted(index)}; it must be the id of a token")
        tokens[_TEMPLATE_NAMES.get(name, f"{name}_token")] = tokenizer.token(index)
    return tokens


def barred(text: str, names: Iterable[str], bar: str) -> str:
    """`text` with `bar` inserted wherever the text, or the text with its surroundings, could hold one of `names`.

    That is: after the first character of every name; at the end of the text, before or after its trailing white space,
    where it ends as a name begins; and likewise at its start. A bar cannot split names of one character.
    """
    names = [name for name in names if len(name) > 1]
    found = {begin for begin in {name[:2] for name in names} if begin in text}  # of hundreds of names, mostly none
    for name in names:
        if name[:2] in found and name in text:
            text = text.replace(name, f"{name[0]}{bar}{name[1:]}")
    begins = {len(edge) for edge in (text, text.rstrip()) if any(_begins(edge, name) for name in names)}
    ends = {len(text) - len(edge) for edge in (text, text.lstrip()) if any(_ends(edge, name) for name in names)}
    for position in sorted(begins | ends, reverse=True):
        text = text[:position] + bar + text[position:]
    return text


def _begins(text: str, name: str) -> bool:
    """Whether `text` ends with a proper prefix of `name`."""
    last, at = text[-1:], -1
    while last and (at := name.find(last, at + 1)) >= 0:
        if at + 1 < len(name) and text.endswith(name[: at + 1]):
            return True
    return False


def _ends(text: str, name: str) -> bool:
    """Whether `text` starts with a proper suffix of `name`."""
    first, at = text[:1], 0
    while first and (at := name.find(first, at + 1)) >= 0:
        if text.startswith(name[at:]):
            return True
    return False


def _unused_character(texts: Iterable[str]) -> str:
    """A random private-use character that none of `texts` holds: nobody can know it in advance."""
    used = set().union(*texts)
    while True:
        character = chr(_PRIVATE_PLANE + secrets.randbelow(_PRIVATE_COUNT))
        if character not in used:
            return character
