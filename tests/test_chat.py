"""A conversation's history and prompts, on the demo model with Mixtral's chat template put into its metadata."""

from __future__ import annotations

import pytest

import fiddler
from fiddler import Sampling
from fiddler.chat import Chat
from fiddler.errors import FileFormatError, RequestError
from fiddler.loading import DEMO_MODEL
from fiddler.text.chat_template import ChatTemplate
from oracles.chat_templates import MIXTRAL, MIXTRAL_OLD
from oracles.synthetic import with_template

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return with_template(DEMO_MODEL, tmp_path_factory.mktemp("chat") / "demo.gguf", MIXTRAL)


@pytest.fixture(scope="module")
def engine(path):
    return fiddler.load(path, context=160)


@pytest.fixture(scope="module")
def template(engine):
    chat_template = ChatTemplate.of(engine.tokenizer, engine.model_file.file.metadata)
    yield chat_template
    chat_template.close()


def message(role, content):
    return {"role": role, "content": content}


def test_an_answer_is_the_models_completion_of_the_templates_prompt(engine, template):
    chat = Chat(engine, "Tell stories.", GREEDY, 12)
    first = "".join(chat.send("Once upon a time"))
    history = [message("system", "Tell stories."), message("user", "Once upon a time")]
    expected = engine.generate(template.ids(history), GREEDY, 12)
    assert first == expected.text.removeprefix(" ")
    assert chat.completion.tokens == expected.tokens
    second = "".join(chat.send("And then?"))
    history += [message("assistant", first), message("user", "And then?")]
    assert second == engine.generate(template.ids(history), GREEDY, 12).text.removeprefix(" ")
    assert chat.messages == [*history, message("assistant", second)]
    assert chat.context_used == len(template.ids(history)) + 12
    chat.reset()
    assert chat.messages == history[:1]
    assert (chat.context_used, chat.completion) == (0, None)
    assert "".join(chat.send("Once upon a time")) == first


def test_an_interrupted_answer_enters_the_history_as_far_as_it_came(engine, template):
    chat = Chat(engine, sampling=GREEDY, ignore_eos=True)
    whole = "".join(Chat(engine, sampling=GREEDY, ignore_eos=True).send("Hello"))
    pieces = chat.send("Hello")
    beginning = next(pieces) + next(pieces)
    pieces.close()
    assert whole.startswith(beginning)
    assert chat.messages == [message("user", "Hello"), message("assistant", beginning)]
    assert chat.completion is None
    assert chat.context_used >= len(template.ids([message("user", "Hello")])) + 1
    assert "".join(chat.send("Go on"))
    assert len(chat.messages) == 4


def test_a_message_without_an_answer_leaves_no_history(engine):
    chat = Chat(engine, sampling=GREEDY)
    chat.send("never taken")
    pieces = chat.send("never taken")
    pieces.close()
    assert "".join(Chat(engine, sampling=GREEDY, max_tokens=0).send("Hello")) == ""
    assert chat.messages == []


def prompt_of(chat, text):
    """The next prompt, as text."""
    return chat._engine.tokenizer.decode(chat._prompt(message("user", text))[1])


def test_a_full_context_leaves_out_the_oldest_turns(engine):
    """20 of the 160 positions must be free; else turns are left out until the prompt fills no more than half."""
    chat = Chat(engine, "Stay.", GREEDY, ignore_eos=True, max_tokens=20)
    lengths, left_out = [], []
    for turn in range(9):
        prompt = prompt_of(chat, f"turn {turn}")
        included = [earlier for earlier in range(turn) if f"turn {earlier}" in prompt]
        "".join(chat.send(f"turn {turn}"))
        lengths.append(chat.completion.stats.prompt_tokens)
        left_out.append(chat.left_out)
        assert "Stay." in prompt
        assert prompt.rstrip().endswith(f"turn {turn} [/INST]")
        assert included == list(range(left_out[-1], turn))  # the latest, without a gap
    assert max(lengths) + 20 <= 160
    steps = [after - before for before, after in zip([0, *left_out], left_out, strict=False)]
    assert sum(step > 0 for step in steps) >= 2
    assert all(lengths[i] <= 80 for i, step in enumerate(steps) if step)
    assert all(step == 0 or steps[i + 1] == 0 for i, step in enumerate(steps[:-1]))  # not at every turn
    assert len(chat.messages) == 19
    chat.reset()
    assert (chat.left_out, prompt_of(chat, "x").count("INST")) == (0, 2)


def test_a_message_that_is_too_long_is_refused_and_leaves_no_trace(engine):
    chat = Chat(engine, sampling=GREEDY, max_tokens=3)
    "".join(chat.send("Hello"))
    before = chat.messages
    with pytest.raises(
        RequestError, match=r"prompt of \d+ tokens, .* context of 160 .*; shorten it, or raise --ctx, up"
    ):
        chat.send("word " * 200)
    assert (chat.messages, chat.left_out) == (before, 0)
    assert prompt_of(chat, "x").count("Hello") == 1
    assert "".join(chat.send("Hello again"))


def test_an_answer_ends_where_the_context_ends(engine):
    chat = Chat(engine, sampling=GREEDY, ignore_eos=True)
    "".join(chat.send("Hello"))
    assert chat.completion.finish_reason == "length"
    assert chat.context_used == 160


def test_a_system_message_that_the_template_refuses_goes_into_the_first_user_message(engine):
    chat = Chat(engine, "Be nice.", GREEDY, 5, template=MIXTRAL_OLD)
    plain = Chat(engine, None, GREEDY, 5, template=MIXTRAL_OLD)
    assert (chat.merges_system, plain.merges_system) == (True, False)
    answer = "".join(chat.send("Hello"))
    assert answer == "".join(plain.send("Be nice.\n\nHello"))
    assert chat.messages[:2] == [message("system", "Be nice."), message("user", "Hello")]
    assert "".join(chat.send("And?")) == "".join(plain.send("And?"))  # the later prompts hold it as well
    assert not Chat(engine, "Be nice.").merges_system


@pytest.mark.parametrize("template", ["{{ 'a' * 10**10 }}", "{% for %}", "{{ ''.__class__ }}"])
def test_a_template_that_cannot_be_used_is_refused_at_once(engine, template):
    with pytest.raises(FileFormatError, match="the chat template"):
        Chat(engine, template=template)


def test_without_a_template_each_message_continues_the_text():
    plain = fiddler.load(context=160)
    chat = Chat(plain, sampling=GREEDY, max_tokens=10)
    assert not chat.has_template
    first = "".join(chat.send("Once upon a time"))
    assert first == plain.generate("Once upon a time", GREEDY, 10).text
    second = "".join(chat.send("Then the bear"))
    assert second == plain.generate(f"Once upon a time\n{first}\nThen the bear", GREEDY, 10).text
    with pytest.raises(RequestError, match="no chat template"):
        Chat(plain, "Be nice.")


def test_tools_variables_and_their_results_reach_the_template(engine):
    written = "{{ tools | length }}{{ note }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    tools, kwargs = [{"type": "function", "function": {"name": "clock"}}], {"note": "!"}
    chat = Chat(engine, None, GREEDY, 4, template=written, tools=tools, chat_template_kwargs=kwargs)
    first = "".join(chat.send("What time is it?"))
    assert first == engine.generate(engine.tokenizer.encode("1![user]What time is it?"), GREEDY, 4).text.removeprefix(
        " "
    )
    result = {"role": "tool", "content": "12:00", "name": "clock"}
    second = "".join(chat.send(result))
    prompt = engine.tokenizer.encode(f"1![user]What time is it?[assistant]{first}[tool]12:00")
    assert second == engine.generate(prompt, GREEDY, 4).text.removeprefix(" ")
    assert chat.messages[2:] == [result, message("assistant", second)]
    with pytest.raises(RequestError, match="it must have a role and a content"):
        chat.send({"role": "tool"})


def test_tools_for_a_model_without_a_template_are_refused():
    with pytest.raises(RequestError, match="nothing reads tools or chat_template_kwargs"):
        Chat(fiddler.load(), chat_template_kwargs={"enable_thinking": True})
