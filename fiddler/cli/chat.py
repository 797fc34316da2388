"""The chat that `run` opens on a terminal: streamed answers, commands, saving. Knows no sampling and no loading."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fiddler.cli.options import say
from fiddler.cli.terminal import StoppedError, Terminal, Typed, harmless
from fiddler.errors import FiddlerError, RequestError

if TYPE_CHECKING:
    from fiddler.chat import Chat
    from fiddler.files.model_file import ModelFile
    from fiddler.generation.completion import Stats
    from fiddler.text.template_variables import TemplateVariables

__all__ = ["MERGED", "open_chat", "templated"]

_HELP = """\
/help        show this
/reset       forget the conversation, except --system
/save FILE   write the conversation to FILE, as JSON messages
/stats       speed, memory and context of the last answer
/exit        leave, as Ctrl-D does
A line that ends with \\ continues on the next. Lines between \"\"\" and \"\"\" are one message, which may begin with /.
Ctrl-C stops an answer; its text so far stays in the conversation. While the model reads a long message, Ctrl-C takes
effect within a few hundred tokens; pressed again after a second it leaves fiddler."""

_NO_TEMPLATE = (
    "this model has no chat template: your messages are plain text, and the model continues the whole conversation, "
    "its own lines included"
)

MERGED = "the chat template takes no system message: it stands before the first user message instead"


def templated(
    model_file: ModelFile, text: str, system: str | None, template: str | None, variables: TemplateVariables
) -> list[int]:
    """A prompt's ids that ask for an answer to `text`; `template`: Jinja, in place of the model's.

    Raises RequestError where there is no template, or it refuses the messages.
    """
    from fiddler.text.chat_template import ChatTemplate

    chat_template = ChatTemplate.of(model_file.tokenizer, model_file.file.metadata, template)
    if chat_template is None:
        raise RequestError("this model has no chat template; give --chat-template-file, or continue a plain text")
    messages = [] if system is None else [{"role": "system", "content": system}]
    try:
        ids = chat_template.ids([*messages, {"role": "user", "content": text}], variables)
    finally:
        chat_template.close()
    if chat_template.merges_system:
        say(MERGED)
    return ids


def open_chat(chat: Chat, name: str, to_text: Callable[[Stats], str], *, show_stats: bool) -> None:
    """Converse until Ctrl-D or /exit. `to_text`: formats an answer's statistics in one line."""
    say(f"chat with {name}; /help lists the commands, Ctrl-D leaves")
    if not chat.has_template:
        say(_NO_TEMPLATE)
    if chat.merges_system:
        say(MERGED)
    with Terminal() as terminal:
        chat.on_chunk = lambda read: terminal.check()
        while (typed := terminal.read()) is not None:
            if typed.one_line and typed.text.startswith("/"):
                if not _obey(chat, typed.text, to_text):
                    return
            else:
                _converse(chat, terminal, typed)
                if show_stats:
                    _stats(chat, to_text)


def _converse(chat: Chat, terminal: Terminal, typed: Typed) -> None:
    before = chat.left_out
    try:
        _show(chat.send(typed.text), terminal)
    except FiddlerError as error:
        say(f"error: {error}")
        return
    if terminal.interrupted:
        say("(stopped)")
    elif chat.completion is not None and chat.completion.finish_reason == "length":
        say("(cut: no room for more; see --ctx and -n)")
    if chat.left_out > before:
        say(f"(the context is full; oldest turns that are no longer sent: {chat.left_out})")


def _show(pieces: Iterator[str], terminal: Terminal) -> None:
    try:
        for piece in pieces:
            sys.stdout.write(harmless(piece))
            sys.stdout.flush()
            if terminal.interrupted:
                break
    except StoppedError:
        pass
    finally:
        pieces.close()  # type: ignore[attr-defined]  # closes the generator: the answer ends with the text shown
        sys.stdout.write("\n")
        sys.stdout.flush()


def _obey(chat: Chat, line: str, to_text: Callable[[Stats], str]) -> bool:
    """Execute a command. Returns whether the chat continues."""
    command, _, argument = line.strip().partition(" ")
    if command in ("/exit", "/bye", "/quit"):
        return False
    if command == "/help":
        say(_HELP)
    elif command == "/reset":
        chat.reset()
        say("(forgotten)")
    elif command == "/stats":
        _stats(chat, to_text)
    elif command == "/save":
        try:
            _save(chat, argument.strip())
        except (FiddlerError, OSError, RuntimeError, ValueError) as error:  # the last two: invalid file names
            say(f"error: {error}")
    else:
        say(f'there is no {harmless(command)}; /help lists the commands (in """ """ a message may begin with /)')
    return True


def _save(chat: Chat, name: str) -> None:
    """Write the messages as JSON to a new file, all or nothing."""
    if not name:
        raise FiddlerError("/save needs the name of a file")
    from fiddler.files.atomic_file import whole_file

    target = Path(name).expanduser()
    if target.is_file():
        raise FiddlerError(f"{target} exists; name another file")
    with whole_file(target, force=False) as file:
        file.write((json.dumps(chat.messages, ensure_ascii=False, indent=2) + "\n").encode())
    say(f"({len(chat.messages)} messages in {target})")


def _stats(chat: Chat, to_text: Callable[[Stats], str]) -> None:
    turns = sum(message["role"] == "user" for message in chat.messages)
    if chat.completion is not None:
        say(to_text(chat.completion.stats))
    elif turns:
        say("the last answer was broken off: no statistics")
    say(f"turns: {turns}, no longer sent: {chat.left_out}; {chat.context_used} of {chat.context} positions used")
