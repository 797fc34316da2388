"""The lines of a batch's file of prompts: checked, ours or OpenAI's; a bad one fails alone."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest

from fiddler import Sampling
from fiddler.errors import RequestError
from fiddler.generation.request import Request
from fiddler.sampling.constraint import Constraint
from fiddler.serving.batch_input import JobFile
from fiddler.text.template_variables import TemplateVariables
from oracles.job_file import DEFAULTS, job_file


def test_the_fields_of_a_line_replace_the_defaults(tmp_path):
    file = job_file(
        tmp_path,
        b'\xef\xbb\xbf{"id": 1, "prompt": "a", "top_k": null}',
        b"  ",
        {"id": "1", "prompt": "b", "max_tokens": 0, "stop": "x", "ignore_eos": False, "temperature": 0, "seed": 9},
        {"id": 2.5, "prompt": "\ud800", "max_tokens": -1, "stop": ["y", "z"], "top_k": 3, "seed": -1},
    )
    first, second, third = (job for _, job in file.jobs(set()))
    assert [first.id, second.id, third.id] == [1, "1", 2.5]
    assert first.request == replace(DEFAULTS, prompt="a", sampling=first.request.sampling)
    assert (first.request.sampling.temperature, first.request.sampling.top_k) == (0.5, 40)
    assert second.request == Request("b", Sampling(temperature=0, seed=9), 0, ("x",), ignore_eos=False)
    assert (third.request.max_tokens, third.request.stop) == (None, ("y", "z"))
    assert (third.request.sampling.top_k, third.request.sampling.seed) == (3, None)
    assert [identity for identity, _ in file.jobs({1, 2.5})] == ["1"]


def test_a_line_may_have_every_field_of_sampling(tmp_path):
    values = {field.name: getattr(Sampling(seed=3), field.name) for field in fields(Sampling)}
    ((_, job),) = job_file(tmp_path, {"id": 1, "prompt": "a"} | values).jobs(set())
    assert job.request.sampling == Sampling(seed=3)


def test_the_seed_of_a_line_depends_on_its_id_and_the_default_seed_only(tmp_path):
    def seeds(seed, *ids):
        file = job_file(tmp_path, *({"id": n, "prompt": "a"} for n in ids), defaults=Request("", Sampling(seed=seed)))
        return {identity: job.request.sampling.seed for identity, job in file.jobs(set())}

    first, second = seeds(1, 1, 2, "1", "2"), seeds(1, "2", 3, 1)
    assert len(set(first.values())) == 4
    assert (first[1], first["2"]) == (second[1], second["2"])
    assert not set(seeds(2, 1, 2, "1", "2").values()) & set(first.values())
    assert seeds(None, 1, 2) == {1: None, 2: None}


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not UTF-8"),
        (b"[1]", "is a list"),
        (b"NaN", "NaN is no JSON number"),
        (b"[" * 200000, "nested too deeply"),
        (b'{"id": 1, "prompt": ' + b'{"a":' * 200000, "nested too deeply"),
        (b'{"id": ' + b"9" * 5000 + b', "prompt": "a"}', "is not JSON"),
        ({"prompt": "a"}, "has no id"),
        ({"id": None, "prompt": "a"}, "has no id"),
        ({"id": True, "prompt": "a"}, "the id is True"),
        ({"id": [1], "prompt": "a"}, r"the id is \[1\]"),
        (b'{"id": 1e999, "prompt": "a"}', "1e999 is too large a number"),
        ({"id": "\udc80", "prompt": "a"}, "no text that UTF-8 can hold"),
        ({"id": 7, "prompt": "a"}, "the id 7 is that of line 1"),
        ({"id": 7.0, "prompt": "a"}, "the id 7.0 is that of line 1"),
        ({"id": 1}, "either a prompt or messages"),
        ({"id": 1, "prompt": "a", "messages": []}, "either a prompt or messages"),
        ({"id": 1, "prompt": 5}, "the prompt is 5"),
        ({"id": 1, "prompt": "a", "top_q": 5}, "unknown field 'top_q'; known are id, prompt"),
        ({"id": 1, "prompt": "a", "max_tokens": -2}, "max_tokens is -2"),
        ({"id": 1, "prompt": "a", "max_tokens": 1.5}, "max_tokens is 1.5"),
        ({"id": 1, "prompt": "a", "max_tokens": True}, "max_tokens is True"),
        ({"id": 1, "prompt": "a", "stop": ""}, "stop is ''"),
        ({"id": 1, "prompt": "a", "stop": [1]}, r"stop is \[1\]"),
        ({"id": 1, "prompt": "a", "ignore_eos": 1}, "ignore_eos is 1"),
        ({"id": 1, "prompt": "a", "temperature": -1}, "temperature is -1"),
        ({"id": 1, "prompt": "a", "temperature": "hot"}, "temperature is 'hot'"),
        ({"id": 1, "prompt": "a", "temperature": 10**400}, "too large"),
        ({"id": 1, "prompt": "a", "top_k": True}, "top_k is true"),
        ({"id": 1, "prompt": "a", "seed": -2}, "seed is -2"),
        ({"id": 1, "messages": [{"role": "user"}]}, "a role and a content"),
        ({"id": 1, "messages": "hello"}, "messages are 'hello'"),
        ({"id": 1, "messages": [{"role": "user", "content": 1}]}, "it must be a string"),
        ({"id": 1, "prompt": "a", "logit_bias": {"the": 1}}, "logit_bias is for 'the'"),
        ({"id": 1, "prompt": "a", "logit_bias": [5]}, "logit_bias is"),
    ],
)
def test_a_bad_line_fails_alone_with_its_id_or_number(tmp_path, line, message):
    good = {"id": 7, "prompt": "a"}
    file = job_file(tmp_path, good, line, {"id": 8, "prompt": "b"})
    (_, first), (identity, error), (_, last) = file.jobs(set())
    assert [job.request.prompt for job in (first, last)] == ["a", "b"]
    has_id = isinstance(line, dict) and line.get("id") == 1 and line["id"] is not True
    assert identity == (1 if has_id else "line 2")
    assert re.search(message, str(error))
    assert len(str(error)) < 500
    assert list(file.ids) == [7, identity, 8]
    assert [i for i, _ in file.jobs({identity})] == [7, 8]
    if "is that of line 1" not in message:
        with pytest.raises(RequestError, match=rf"in\.jsonl, line 1: .*{message}"):
            job_file(tmp_path, line)


def test_lines_of_openais_batches_are_read(tmp_path):
    chat = {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "stream": False}
    options = {"max_completion_tokens": 5, "temperature": 0, "top_p": 0.5, "stop": "x", "seed": 3, "n": 1}
    tools = [{"type": "function", "function": {"name": "clock"}}]
    wrapped = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array"}}}
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat | options},
        {"custom_id": "b", "url": "/v1/completions", "body": {"prompt": "Once", "logprobs": 4, "max_tokens": 2}},
        {"custom_id": "c", "body": chat | {"logprobs": True, "top_logprobs": 2, "response_format": wrapped}},
        {"custom_id": "d", "body": chat | {"response_format": {"type": "text"}, "user": "me"}},
        {"custom_id": "t", "body": chat | {"tools": tools, "chat_template_kwargs": {"enable_thinking": False}}},
        {"custom_id": "u", "body": chat | {"tools": tools, "tool_choice": "none", "parallel_tool_calls": True}},
        {"custom_id": "e", "body": chat | {"n": 2}},
        {"custom_id": "f", "body": chat | {"tools": "x"}},
        {"custom_id": "f1", "body": chat | {"tools": [], "tool_choice": "required"}},
        {"custom_id": "f2", "body": {"prompt": "a", "tools": []}},
        {"custom_id": "g", "url": "/v1/embeddings", "body": chat},
        {"custom_id": "h", "body": 1},
        {"custom_id": "i", "body": chat | {"response_format": {"type": "xml"}}},
    ]
    a, b, c, d, t, u, *errors = (entry for _, entry in job_file(tmp_path, *lines).jobs(set()))
    assert [job.id for job in (a, b, c, d)] == ["a", "b", "c", "d"]
    sampling = Sampling(temperature=0, top_p=0.5, seed=3)
    assert a.request == Request("", sampling, 5, ("x",), ignore_eos=True)
    assert a.messages == ({"role": "user", "content": "Hi"},)
    assert (b.request.prompt, b.request.sampling.n_probs, b.request.max_tokens) == ("Once", 4, 2)
    assert c.request.sampling.n_probs == 2
    assert c.request.constraint == Constraint.json_schema({"type": "array"})
    assert d.request.constraint is None
    assert t.variables == TemplateVariables(tools, {"enable_thinking": False})
    assert u.variables == d.variables == TemplateVariables()
    for error, words in zip(
        errors,
        ("n is 2", "tools are 'x'", "tool_choice", "tools are for messages", "embeddings", "body is 1", "response_fo"),
        strict=True,
    ):
        assert words in str(error)


def test_the_messages_of_a_line_are_its_prompt(tmp_path):
    messages = [{"role": "user", "content": "hello"}]
    ((_, job),) = job_file(tmp_path, {"id": 1, "messages": messages}).jobs(set())
    assert list(job.messages) == messages


def test_a_file_that_cannot_be_read_or_holds_no_prompt_is_refused(tmp_path):
    for path, message in ((tmp_path / "none", "No such file"), (tmp_path, "it is a folder")):
        with pytest.raises(RequestError, match=message):
            JobFile(path, DEFAULTS)
    with pytest.raises(RequestError, match="holds no prompt"):
        job_file(tmp_path, b"", b" ")


def test_a_file_that_changes_while_its_jobs_run_is_an_error(tmp_path):
    file = job_file(tmp_path, {"id": 1, "prompt": "a"}, {"id": 2, "prompt": "b"})
    file.path.write_text('{"id": 1, "prompt": "a"}\n{"id": 3, "prompt": "c"}\n')
    with pytest.raises(RequestError, match="line 2: was changed"):
        list(file.jobs(set()))
