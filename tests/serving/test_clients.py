"""The server through the clients that people use: `openai`, `anthropic` and LangChain's, over a real connection."""

from __future__ import annotations

import json

import anthropic
import openai
import pytest

STORY = [{"role": "user", "content": "Tell me about a cat"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_openai_lists_the_model(client):
    assert [model.id for model in client.models.list()] == ["demo"]


def test_openai_chat_streamed_and_in_one_piece_say_the_same(client):
    options = {"model": "demo", "messages": STORY, "max_tokens": 24, "seed": 3, "extra_body": {"cache_prompt": False}}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content is None
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert [delta.role for delta in deltas[1:]] == [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content != ""
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_openai_goes_on_with_an_answer_that_is_begun(client):
    """Word by word as in one piece: only the first space of a whole answer is no part of it."""
    options = {"model": "demo", "temperature": 0}
    whole = client.chat.completions.create(**options, messages=STORY, max_tokens=20).choices[0].message.content
    begun = " ".join(whole.split(" ")[:6])
    messages = [*STORY, {"role": "assistant", "content": begun}]
    rest = client.chat.completions.create(**options, messages=messages, max_tokens=4).choices[0].message.content
    assert rest.startswith(" ")
    assert whole.startswith(begun + rest)


def test_openai_seeds_stops_choices_and_unknown_fields(client):
    def texts(**options):
        fields = {
            "model": "demo",
            "prompt": "Once upon a time",
            "max_tokens": 12,
            "extra_body": {"cache_prompt": False},
        }
        return [choice.text for choice in client.completions.create(**{**fields, **options}).choices]

    assert texts(seed=5) == texts(seed=5)
    assert texts(seed=5) != texts(seed=6)
    several = texts(seed=5, n=3)
    assert several[0] == texts(seed=5)[0]
    assert len(set(several)) == 3
    two = texts(temperature=0, prompt=["Once upon a time", "The cat sat on the"])
    assert two == texts(temperature=0) + texts(temperature=0, prompt="The cat sat on the")
    greedy = texts(temperature=0, max_tokens=30)[0]
    stop = greedy.split()[4]
    assert texts(temperature=0, max_tokens=30, stop=[stop, "never said"])[0] == greedy[: greedy.index(stop)]
    assert texts(seed=5, extra_body={"cache_prompt": False, "no_such_field": {"a": [1]}}) == texts(seed=5)


def test_openai_logprobs_add_up_to_the_text_with_their_bytes(client):
    options = {
        "model": "demo",
        "messages": STORY,
        "max_tokens": 8,
        "logprobs": True,
        "top_logprobs": 3,
        "temperature": 0,
    }
    choice = client.chat.completions.create(**options).choices[0]
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == choice.message.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == choice.message.content
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in tokens)
    assert all(token.logprob == token.top_logprobs[0].logprob for token in tokens)  # greedy
    streamed = [
        token
        for chunk in client.chat.completions.create(**options, stream=True)
        if chunk.choices and chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [token.token for token in streamed] == [token.token for token in tokens]


def test_openai_logit_bias_bans_and_forces(client, http):
    (token,) = http.post("/tokenize", json={"content": "cat"}).json()["tokens"]
    forced = client.chat.completions.create(model="demo", messages=STORY, max_tokens=4, logit_bias={str(token): 100})
    assert forced.choices[0].message.content.split() == ["cat"] * 4
    options = {"model": "demo", "messages": STORY, "max_tokens": 64, "temperature": 0}
    assert (
        "cat" not in client.chat.completions.create(**options, logit_bias={str(token): -100}).choices[0].message.content
    )


def test_openai_json_by_a_schema_is_valid(client):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    reply = client.chat.completions.create(model="demo", messages=STORY, response_format=form, max_tokens=200)
    person = json.loads(reply.choices[0].message.content)
    assert person.keys() == {"name", "age"}
    assert isinstance(person["age"], int)
    assert reply.choices[0].finish_reason == "stop"


def test_openai_calls_a_required_tool_streamed_and_in_one_piece(client):
    options = {"model": "demo", "messages": STORY, "tools": [WEATHER], "tool_choice": "required", "seed": 7}
    options |= {"max_tokens": 300, "extra_body": {"cache_prompt": False}}
    choice = client.chat.completions.create(**options).choices[0]
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, choice.finish_reason) == ("function", "get_weather", "tool_calls")
    assert json.loads(call.function.arguments).keys() == {"city", "days"}
    assert not choice.message.content
    with client.chat.completions.stream(**options) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.message.tool_calls[0].function.name == "get_weather"
    assert final.message.tool_calls[0].function.arguments == call.function.arguments
    deltas = [
        delta
        for chunk in client.chat.completions.create(**options, stream=True)
        if chunk.choices
        for delta in chunk.choices[0].delta.tool_calls or []
    ]
    assert [delta.function.name for delta in deltas if delta.function.name] == ["get_weather"]
    assert {delta.index for delta in deltas} == {0}
    assert len(deltas) > 3  # arguments come in pieces


def test_openai_takes_a_tool_s_result_and_none_for_a_choice(client):
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rom"}'}}
    messages = [*STORY, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages += [{"role": "tool", "tool_call_id": "c1", "content": "sunny"}]
    options = {"model": "demo", "messages": messages, "tools": [WEATHER], "max_tokens": 8}
    assert client.chat.completions.create(**options).choices[0].message.content
    assert client.chat.completions.create(**options, tool_choice="none").choices[0].message.tool_calls is None


def test_openai_responses_streamed_and_in_one_piece_say_the_same(client):
    options = {"model": "demo", "input": "Tell me about a dog", "temperature": 0, "max_output_tokens": 16}
    whole = client.responses.create(**options)
    assert whole.output_text
    assert whole.usage.output_tokens == 16
    events = list(client.responses.create(**options, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    tool = {"type": "function", **WEATHER["function"]}
    called = client.responses.create(
        **{**options, "max_output_tokens": 300}, tools=[tool, {"type": "web_search"}], tool_choice="required"
    )
    (item,) = called.output
    assert (item.type, item.name) == ("function_call", "get_weather")
    assert json.loads(item.arguments).keys() == {"city", "days"}
    assert client.responses.create(model="demo", input=[], max_output_tokens=1).id.startswith("resp_")


def test_openai_errors_are_of_the_right_kind(client):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="demo", messages=STORY, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="tokens, and the context"):
        client.completions.create(model="demo", prompt="once " * 2000)
    with pytest.raises(openai.InternalServerError, match="not supported") as raised:
        client.embeddings.create(model="demo", input="text")
    assert raised.value.status_code == 501
    with pytest.raises(openai.NotFoundError):
        client.get("/no-such-path", cast_to=object)


def test_anthropic_messages_streamed_and_in_one_piece_say_the_same(claude):
    options = {"model": "demo", "max_tokens": 20, "system": "Be brief.", "messages": STORY}
    options["extra_body"] = {"temperature": 0}
    whole = claude.messages.create(**options)
    assert whole.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == 20
    with claude.messages.stream(**options) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        assert stream.get_final_message().usage.output_tokens == 20
    counted = claude.messages.count_tokens(model="demo", system="Be brief.", messages=STORY)
    assert counted.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    stop = whole.content[0].text.split()[3]
    stopped = claude.messages.create(**options, stop_sequences=[stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)


def test_anthropic_uses_a_tool_and_takes_its_result(claude):
    tool = {"name": "get_weather", "description": "", "input_schema": WEATHER["function"]["parameters"]}
    options = {"model": "demo", "max_tokens": 300, "tools": [tool], "tool_choice": {"type": "any"}, "messages": STORY}
    with claude.messages.stream(**options) as stream:
        used = stream.get_final_message()
    assert used.stop_reason == "tool_use"
    (block,) = [block for block in used.content if block.type == "tool_use"]
    assert block.name == "get_weather"
    assert block.input.keys() == {"city", "days"}
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}
    used_block = {"type": "tool_use", "id": block.id, "name": block.name, "input": block.input}
    messages = [*STORY, {"role": "assistant", "content": [used_block]}, {"role": "user", "content": [result]}]
    assert claude.messages.create(model="demo", max_tokens=8, tools=[tool], messages=messages).content[0].text
    image = [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}]
    with pytest.raises(anthropic.BadRequestError, match="image input is not supported"):
        claude.messages.create(model="demo", max_tokens=8, messages=[{"role": "user", "content": image}])


def test_langchain_streams_calls_tools_and_fills_a_schema(server):
    langchain_openai = pytest.importorskip("langchain_openai", reason="a large install; CI has the two clients")
    model = langchain_openai.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="demo", max_tokens=300, temperature=0, max_retries=0
    )
    whole = model.bind(max_tokens=16).invoke("Tell me about a dog")
    assert "".join(chunk.content for chunk in model.bind(max_tokens=16).stream("Tell me about a dog")) == whole.content
    (call,) = model.bind_tools([WEATHER], tool_choice="required").invoke("Hello").tool_calls
    assert call["name"] == "get_weather"
    chunks = list(model.bind_tools([WEATHER], tool_choice="required").stream("Hello"))
    added = chunks[0]
    for chunk in chunks[1:]:
        added += chunk
    assert [(call["name"], call["args"].keys()) for call in added.tool_calls] == [("get_weather", {"city", "days"})]
    filled = model.with_structured_output(
        {"title": "person", "description": "", **SCHEMA}, method="json_schema"
    ).invoke("Hello")
    assert filled.keys() == {"name", "age"}
