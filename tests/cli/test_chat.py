"""`fiddler run` as a chat: a real process on a pseudo-terminal, with the demo model. No test waits by sleeping."""

from __future__ import annotations

import json
import os
import re
import signal
import sys

import pexpect
import pytest

from fiddler import Sampling
from fiddler.chat import Chat
from fiddler.cli import chat as cli_chat
from fiddler.cli.terminal import Terminal, Typed, harmless
from fiddler.loading import DEMO_MODEL, load
from oracles.chat_templates import MIXTRAL, MIXTRAL_OLD
from oracles.command import run
from oracles.synthetic import with_template

PATIENCE = 180  # timeout of a process that hangs [s]
PROMPT = "\r\n> "
ENDLESS = ("--temp", "0", "--ignore-eos")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_template(DEMO_MODEL, tmp_path_factory.mktemp("chat") / "demo.gguf", MIXTRAL)


class Session(pexpect.spawn):
    """`fiddler run` on a pseudo-terminal of its own; TERM=dumb: readline does not colour its echo."""

    def __init__(self, *arguments, folder=None):
        environment = os.environ | {"TERM": "dumb"}
        command = ["-m", "fiddler", "run", *map(str, arguments)]
        super().__init__(
            sys.executable,
            command,
            timeout=PATIENCE,
            encoding="utf-8",
            codec_errors="replace",
            env=environment,
            cwd=folder,
            dimensions=(50, 2000),
        )

    def prompt(self):
        """Wait for the next prompt; return the output before it."""
        self.expect_exact(PROMPT)
        return self.before

    def ask(self, line):
        """Type a line and wait for the next prompt; return the output between them, without the echo."""
        self.sendline(line)
        self.expect_exact(line + "\r\n")
        return self.prompt()

    def exit_code(self):
        """Wait until the process ends; return its exit code."""
        self.expect(pexpect.EOF)
        self.close()
        assert self.signalstatus is None
        return self.exitstatus

    def __exit__(self, *error):
        self.close(force=True)


def test_a_chat_streams_stops_at_ctrl_c_saves_resets_and_ends_at_ctrl_d(model, tmp_path):
    with Session(model, "--system", "Be brief.", *ENDLESS, folder=tmp_path) as chat:
        assert f"chat with {model}" in chat.prompt()
        chat.sendline("Once upon a time")
        chat.expect_exact("Once upon a time\r\n")
        chat.expect(r"\w+ \w+ ")  # it streams: the whole answer would be a thousand tokens
        first = chat.before + chat.match[0]
        chat.sendintr()
        rest = chat.prompt()
        answer, _, last_line = (first + rest).replace("^C", "").replace("\r\n", "\n").rpartition("\n")
        assert last_line == "(stopped)"

        assert "broken off" in chat.ask("/stats")
        assert "3 messages" in chat.ask("/save one.json")
        saved = json.loads((tmp_path / "one.json").read_text(encoding="utf-8"))
        assert [message["role"] for message in saved] == ["system", "user", "assistant"]
        assert [message["content"] for message in saved] == ["Be brief.", "Once upon a time", answer]
        assert "exists" in chat.ask("/save one.json")
        assert "needs the name" in chat.ask("/save")
        assert "not a directory" in chat.ask("/save nowhere/x.json")
        assert [path.name for path in tmp_path.iterdir()] == ["one.json"]

        chat.sendline("Tell me more.")  # the next turn works, with the history
        chat.expect_exact("Tell me more.\r\n")  # its echo is no answer yet
        chat.expect(r"\w+ \w+ ")
        chat.sendintr()
        chat.prompt()
        assert "turns: 2, no longer sent: 0" in chat.ask("/stats")
        chat.ask("/reset")
        assert "turns: 0" in chat.ask("/stats")
        assert "/save FILE" in chat.ask("/help")
        assert "there is no /nonsense" in chat.ask("/nonsense 1")
        chat.sendeof()
        assert chat.exit_code() == 0


def test_input_may_be_continued_quoted_empty_cancelled_or_invalid_utf_8(model, tmp_path):
    with Session(model, "--temp", 0, "-n", 3, "--stats", folder=tmp_path) as chat:
        chat.prompt()
        chat.sendintr()
        assert "Ctrl-D or /exit leaves" in chat.prompt()
        chat.send("half a line")
        chat.expect_exact("half a line")
        chat.sendintr()
        assert "leaves" not in chat.prompt()
        chat.sendline("")  # an empty line is ignored
        chat.prompt()
        chat.sendline("one\\")
        chat.expect_exact("\r\n. ")
        assert "generation 3 tokens" in chat.ask("two")
        chat.sendline('"""')
        chat.expect_exact("\r\n. ")
        chat.sendline("/three")
        chat.expect_exact("\r\n. ")
        chat.sendline("")
        chat.expect_exact("\r\n. ")
        assert "(cut: " in chat.ask('  four"""')
        chat.ask('"""/five </s> é"""')
        os.write(chat.child_fd, b"caf\xe9 \xff\n")
        chat.prompt()
        assert "error: " in chat.ask("/save " + "x" * 300)
        assert "error: " in chat.ask("/save ~nobody-of-this-name/x")
        chat.ask("/save all.json")
        saved = json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))
        *texts, invalid = [message["content"] for message in saved if message["role"] == "user"]
        assert texts == ["one\ntwo", "/three\n\n  four", "/five </s> é"]
        assert "\ufffd" in invalid  # invalid UTF-8; its position is readline's choice
        chat.sendline("/exit")
        assert chat.exit_code() == 0


def test_a_full_context_cuts_answers_drops_old_turns_and_refuses_long_messages(model):
    with Session(model, *ENDLESS, "--ctx", 128) as chat:
        chat.prompt()
        outputs = [chat.ask(f"message {turn}") for turn in range(3)]
        assert all("(cut: no room for more" in output for output in outputs)
        assert "no longer sent: 1" in outputs[1]
        refusal = chat.ask("word " * 110)
        assert re.search(r"error: the message makes a prompt of \d+ tokens, .*; shorten it, or raise --ctx", refusal)
        assert "turns: 3, no longer sent: 2; 128 of 128" in chat.ask("/stats")
        chat.sendeof()
        assert chat.exit_code() == 0


def test_a_model_without_a_chat_template_continues_the_text():
    with Session(*ENDLESS, "-n", 8) as chat:
        assert "has no chat template" in chat.prompt()
        assert re.search(r"\w+ \w+", chat.ask("Once upon a time"))
        chat.ask("Then the bear")
        assert "turns: 2" in chat.ask("/stats")
        chat.sendeof()
        assert chat.exit_code() == 0


def test_ctrl_c_twice_within_a_second_counts_once_and_later_reaches_the_old_handler():
    """The first SIGINT sets a flag; one within a second of it changes nothing; a later one has its old handler."""
    times, handled = iter([10.0, 10.5, 11.5, 99.0]), []
    previous_handler = signal.signal(signal.SIGINT, lambda number, frame: handled.append(number))
    try:
        with Terminal(lambda: next(times)) as terminal:
            assert not terminal.interrupted
            for count in (0, 0, 1):
                signal.raise_signal(signal.SIGINT)
                assert terminal.interrupted
                assert len(handled) == count
        signal.raise_signal(signal.SIGINT)
        assert len(handled) == 2
    finally:
        signal.signal(signal.SIGINT, previous_handler)


def test_ctrl_c_during_prefill_drops_the_message_and_the_chat_goes_on(model, monkeypatch, capsys):
    """SIGINT between two prefill chunks: the conversation is as before the message, and goes on."""
    engine = load(model)
    monkeypatch.setattr(engine.runner, "chunk", 16)
    chat, typed, checks = Chat(engine, sampling=Sampling(temperature=0.0), max_tokens=5), ["a word " * 60, "Hello"], []
    handler = signal.getsignal(signal.SIGINT)

    class ScriptedTerminal(Terminal):
        def read(self):
            self._interrupted = None
            return Typed(typed.pop(0), one_line=True) if typed else None

        def check(self):
            checks.append(len(typed))
            if checks == [1, 1, 1]:
                signal.raise_signal(signal.SIGINT)
            super().check()

    monkeypatch.setattr(cli_chat, "Terminal", ScriptedTerminal)
    cli_chat.open_chat(chat, "demo", str, show_stats=False)
    assert checks == [1, 1, 1]
    assert "(stopped)" in capsys.readouterr().err
    assert [message["content"] for message in chat.messages[::2]] == ["Hello"]
    assert chat.completion is not None
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_one_prompt_from_a_script_is_answered_through_the_template(model, tmp_path, system):
    """By -p, by a file and by a pipe; a system message alone asks for an answer, too."""
    (tmp_path / "t.txt").write_text("Hello\n")
    options = (*(["--system", system] if system else ["--chat"]), "-n", "8", "--temp", "0")
    with load(model, device="cpu") as engine:
        expected = "".join(Chat(engine, system, Sampling(temperature=0.0), 8).send("Hello")) + "\n"
    for prompt, data in ((("-p", "Hello"), b""), (("--prompt-file", tmp_path / "t.txt"), b""), ((), b"Hello\n")):
        done = run("run", model, *prompt, *options, input=data)
        assert (done.returncode, done.stdout.decode()) == (0, expected)


def test_an_answer_by_beam_search_loses_the_same_space(tmp_path):
    """One beam is a greedy search; the template is the message alone, which the demo model continues with a space."""
    (tmp_path / "a.jinja").write_text("{{ bos_token + messages[0]['content'] }}")
    options = ("-p", "One day, a little", "--chat-template-file", tmp_path / "a.jinja", "-n", "4")
    answers = [run("run", *options, *more).stdout.decode() for more in (("--beams", "1"), ("--temp", "0"))]
    continued = run("run", *options[:2], "-n", "4", "--beams", "1").stdout.decode()
    assert answers == [continued.removeprefix(" ")] * 2
    assert continued.startswith(" ")


def test_a_system_message_that_the_template_refuses_is_told_of(tmp_path):
    (tmp_path / "a.jinja").write_text(MIXTRAL_OLD)
    done = run("run", "-p", "Hi", "--system", "Be nice.", "--chat-template-file", tmp_path / "a.jinja", "-n", "2")
    assert done.returncode == 0
    assert "it stands before the first user message instead" in done.stderr.decode()


def test_variables_of_the_command_line_reach_the_template(tmp_path):
    (tmp_path / "a.jinja").write_text("{{ raise_exception(enable_thinking ~ tools[0].name) }}")
    done = run(
        *("run", "-p", "Hi", "--chat-template-file", tmp_path / "a.jinja"),
        *("--chat-template-kwargs", '{"enable_thinking": false, "tools": [{"name": "clock"}]}'),
    )
    assert done.returncode == 1
    assert "refuses these messages: 'Falseclock'" in done.stderr.decode()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("-p", "x", "--chat"), 1, "no chat template"),
        (("-p", "x", "--chat-template-kwargs", "{}"), 1, "no chat template"),
        (("-p", "x", "--chat-template-kwargs", "thinking"), 2, "'thinking' is no JSON object; give one, as"),
        (("-p", "x", "--chat", "--special"), 2, "--special is for a prompt that is continued"),
        (("--system", "y"), 1, "no chat template"),  # standard input is empty here
    ],
)
def test_an_answer_that_cannot_be_given_is_refused_before_torch_is_imported(arguments, code, message):
    done = run("run", *arguments, env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == code
    assert message in done.stderr.decode()


@pytest.mark.parametrize(
    "template, system, message",
    [
        ("{{ 'a' * 10**10 }}", None, "the chat template asks for more than 256 MiB of memory"),
        (None, "y", "no chat template"),
    ],
)
def test_a_template_that_cannot_start_a_chat_is_refused_in_one_line(tmp_path, template, system, message):
    (tmp_path / "a.jinja").write_text(template or "")
    options = ["--chat-template-file", tmp_path / "a.jinja"] if template else []
    with Session(*options, *(["--system", system] if system else [])) as chat:
        chat.expect(r"error: [^\r\n]*" + re.escape(message) + r"[^\r\n]*\r\n")
        assert chat.exit_code() == 1


def test_control_characters_of_a_model_do_not_reach_the_terminal():
    latin_1 = "".join(map(chr, range(0x100)))
    shown = harmless(latin_1 + "é\u2028😀")
    assert all(char in "\n\t" or not (ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0) for char in shown)
    assert harmless("\x1b[2J\rx\x9b1m\x07") == r"\x1b[2J\x0dx\x9b1m\x07"
    assert harmless("a\n\tb é 😀") == "a\n\tb é 😀"
