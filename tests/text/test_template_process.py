"""Hostile templates: escapes and bombs are refused in bounded time, in one line; others render as in transformers."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from fiddler.errors import FileFormatError, RequestError, ResourceError
from fiddler.text import template_process
from fiddler.text.template_process import Limits, TemplateProcess

LIMITS = Limits(seconds=0.25, memory=128 << 20, characters=1 << 20)
MESSAGES = [{"role": "user", "content": 'Hello </s> "x" <b>é\n'}]


@pytest.fixture(scope="module")
def process():
    renderer = TemplateProcess(LIMITS)
    yield renderer
    renderer.close()


@pytest.fixture(scope="module")
def patient():
    """With the time that the product gives: the kernel may take 0.3 s of it to map what a bomb asks for."""
    renderer = TemplateProcess(replace(LIMITS, seconds=Limits().seconds))
    yield renderer
    renderer.close()


def assert_refused(process, template, *fragments):
    """The message of the refusal. 60 s: on a busy machine, with the start of another process."""
    started = time.monotonic()
    with pytest.raises(FileFormatError) as caught:
        process.render(template, {"messages": MESSAGES, "bos_token": "<s>"})
    assert time.monotonic() - started < 60
    message = str(caught.value)
    assert message.startswith("the chat template ")
    assert "\n" not in message
    assert len(message) < 300
    assert any(fragment in message for fragment in fragments), message
    return message


TIME, MEMORY, LENGTH, DEPTH = "0.25 s of computing", "128 MiB", "1048576 characters", "nested too deeply"

ESCAPES = {
    "class": "{{ ''.__class__ }}",
    "mro": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "subscript": "{{ ''['__class__'] }}",
    "attr filter": "{{ '' | attr('__class__') }}",
    "attr filter, built": "{{ '' | attr('__cl' + 'ass__') }}",
    "attr of format": "{{ ('{0.__class__.__mro__}' | attr('format'))(1) }}",
    "format": "{{ '{0.__class__}'.format(1) }}",
    "format, indirect": "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "init of a class": "{{ cycler.__init__.__globals__.os }}",
    "attribute of a function": "{{ strftime_now.__code__ }}",
    "joiner": "{{ joiner.__init__ }}",
    "namespace": "{{ namespace(__class__=1) }}",
    "namespace, set": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "namespace's class": "{{ namespace().__class__ }}",
    "self": "{{ self._TemplateReference__context }}",
    "loop": "{% for x in [1] %}{{ loop._iterator }}{% endfor %}",
    "macro": "{% macro m() %}{% endmacro %}{{ m._func }}",
    "caller": "{% macro m() %}{{ caller._func }}{% endmacro %}{% call m() %}{% endcall %}",
    "mro of a type": "{{ cycler.mro() }}",
    "generator": "{% set g = messages | map('upper') %}{{ g.gi_frame }}",
    "changing a list": "{% set _ = messages.append(1) %}",
    "changing a dict": "{{ messages[0].update({'a': 1}) }}",
    "changing by attr": "{{ (messages | attr('append'))(1) }}",
    "map attribute": "{{ messages | map(attribute='__class__') | list }}",
    "sort attribute": "{{ messages | sort(attribute='__class__') }}",
}

DOUBLED = "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
BOMBS = {
    "loops": ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", TIME),
    "range": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "range in pieces": ("{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}", LENGTH),
    "multiplied": ("{{ 'a' * 10**10 }}", MEMORY),
    "multiplied list": ("{{ ([0] * 10**10) | length }}", MEMORY),
    "beyond sizes": ("{{ 'a' * 10**30 }}", "OverflowError"),
    "percent": ("{{ '%1000000000d' % 1 }}", MEMORY),
    "percent filter": ("{{ '%1000000000d' | format(1) }}", MEMORY),
    "format width": ("{{ '{:>99999999999}'.format(1) }}", MEMORY, "ValueError"),
    "format precision": ("{{ '{:.999999999f}'.format(1.5) }}", MEMORY, "ValueError"),
    "center": ("{{ '' | center(10**10) }}", MEMORY),
    "ljust": ("{{ 'a'.ljust(10**10) }}", MEMORY),
    "zfill": ("{{ 'a'.zfill(10**10) }}", MEMORY),
    "expandtabs": ("{{ '\t'.expandtabs(10**9) }}", MEMORY),
    "indent": ("{{ 'a\nb' | indent(10**10) }}", MEMORY),
    "replace": ("{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}", MEMORY),
    "join": ("{{ ('x' * 10**6).join('a' * 10**6) }}", MEMORY),
    "join filter": ("{{ range(99999) | join('x' * 10**6) }}", MEMORY),
    "concatenated": (
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        MEMORY,
    ),
    "power": ("{{ 10 ** (10 ** 10) }}", TIME, MEMORY),
    "power, not shown": ("{{ (7 ** (10 ** 8)) % 3 }}", TIME),
    "long number": ("{{ 9 ** 99999 }}", "ValueError"),
    "strftime": ("{{ strftime_now('%A' * 10**7) }}", TIME, MEMORY, LENGTH),
    "lipsum": ("{{ lipsum(n=10**9) }}", TIME, MEMORY),
    "lipsum words": ("{{ lipsum(n=1, min=10**9, max=10**9 + 1) }}", TIME, MEMORY),
    "cycler": ("{% set c = cycler('a') %}{% for i in range(99999) %}{{ c.next() * 99 }}{% endfor %}", LENGTH),
    "batch": ("{{ [1] | batch(10**9, 'x') | list }}", MEMORY, TIME),
    "slice": ("{{ [1] | slice(10**9) | list }}", MEMORY, TIME),
    "nested list as text": (
        DOUBLED + "{{ n.x }}",
        MEMORY,
        TIME,
    ),
    "nested list as JSON": (
        DOUBLED + "{{ n.x | tojson }}",
        MEMORY,
        TIME,
    ),
    "nested lists compared": (
        "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
        "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
        TIME,
    ),
    "a deep list": (
        "{% set n = namespace(x=[]) %}{% for i in range(99999) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}",
        DEPTH,
        TIME,
        "signal 11",
    ),
    "a deep list as JSON": (
        "{% set n = namespace(x=[]) %}{% for i in range(99999) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x | tojson }}",
        DEPTH,
        TIME,
        "signal 11",
    ),
    "a namespace in itself": ("{% set n = namespace() %}{% set n.x = n %}{{ n | tojson }}", "TypeError"),
    "a growing dict": (
        "{% set n = namespace(d={}) %}{% for i in range(99999) %}{% set n.d = dict(n.d, **{'k%d' % i: 'x' * 999}) %}"
        "{% endfor %}",
        TIME,
        MEMORY,
    ),
    "a recursive macro": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", DEPTH),
    "a macro that doubles": (
        "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(99) }}",
        TIME,
    ),
    "a recursive loop": ("{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}", DEPTH),
    "urlize": ("{{ ('a@' * 10**7) | urlize }}", TIME, LENGTH, MEMORY),
    "striptags": ("{{ ('<!--' * 10**6) | striptags }}", TIME, LENGTH, MEMORY),
    "wordwrap": ("{{ ('a ' * 10**6) | wordwrap(1) }}", TIME, MEMORY, LENGTH),
    "sum of lists": ("{% set x = [[1] * 999] * 9999 %}{{ x | sum(start=[]) }}", TIME, MEMORY),
    "unique": ("{{ range(99999) | map('string') | map('center', 9999) | unique | list | length }}", MEMORY, TIME),
    "truncated": ("{{ 'x' * 999 }" * 9, "malformed", "fails", LENGTH),
    "nested parentheses": ("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}", DEPTH, TIME, "signal 11"),
    "nested lists in the text": ("{{ " + "[" * 5000 + "]" * 5000 + " }}", DEPTH, "signal 11"),
    "nested blocks": ("{% if 1 %}" * 5000 + "{% endif %}" * 5000, DEPTH, TIME, "fails"),
    "nested loops": ("{% for x in [1] %}" * 50 + "{% endfor %}" * 50, "fails", DEPTH),
    "a long sum": ("{{ 1" + " + 1" * 100_000 + " }}", DEPTH, TIME, "signal 11"),
    "a long chain": ("{{ x" + ".y" * 100_000 + " }}", DEPTH, TIME, "signal 11"),
    "a long filter": ("{{ 'x'" + " | upper" * 100_000 + " }}", DEPTH, TIME, "signal 11"),
    "a huge text": ("x" * (32 << 20), LENGTH, TIME, MEMORY),
    "many expressions": ("{{ x }}" * 1_000_000, TIME, MEMORY),
    "many blanks": ("{%" + " " * (4 << 20) + "x %}" + "\n {%- " * 100_000, "malformed", TIME),
    "an unknown tag": ("{% include '/etc/passwd' %}", "fails"),
    "an import": ("{% import 'os' as os %}", "fails"),
    "syntax": ("{% for %}", 'malformed: "line 1'),
    "what is not there": ("{{ messages.nothing.at_all }}", "UndefinedError"),
    "a division": ("{{ 1 / 0 }}", "ZeroDivisionError"),
}


@pytest.mark.parametrize("template", ESCAPES.values(), ids=ESCAPES)
def test_templates_that_try_to_escape_are_refused(process, template):
    assert_refused(process, template, "tries what is forbidden")


@pytest.mark.parametrize("template, fragments", [(bomb, texts) for bomb, *texts in BOMBS.values()], ids=BOMBS)
def test_templates_that_exhaust_time_or_memory_are_refused_in_bounded_time(process, patient, template, fragments):
    assert_refused(process if TIME in fragments else patient, template, *fragments)


def test_the_default_limits_refuse_bombs_too():
    process = TemplateProcess(Limits())
    assert_refused(process, BOMBS["nested lists compared"][0], "2 s of computing")
    assert_refused(process, BOMBS["join"][0], "256 MiB")


def test_after_a_refused_template_the_next_one_renders(process):
    for name in ("loops", "multiplied", "a recursive macro", "range in pieces"):
        assert_refused(process, BOMBS[name][0], "")
        assert process.render("{{ a }}!", {"a": "é\udc80"}) == "é\udc80!"


def test_even_without_the_sandbox_the_process_opens_no_file_and_gets_no_more_memory(tmp_path):
    """The second wall: the limits of the process hold for a program without a sandbox, too."""
    program = """
import os, sys, fiddler.text.template_sandbox as sandbox
sandbox._limit(64 << 20)
def refused(action):
    try:
        action()
    except (OSError, MemoryError):
        return "refused"
print([refused(w) for w in (lambda: open(sys.argv[1]), lambda: open(sys.argv[2], "w"), lambda: bytearray(1 << 27))])
"""
    (tmp_path / "there").write_text("x")
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "there", tmp_path / "new"], capture_output=True, check=True
    )
    assert done.stdout == b"['refused', 'refused', 'refused']\n"
    assert not (tmp_path / "new").exists()


HONEST = (
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ messages | tojson(false, sort_keys=true) }}",
    "{% for m in messages %}{% if m.role == 'none' %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
    "{% generation %}{% set x = 1 %}{{ messages[0]['content'] | trim }}{% endgeneration %}{{ x }}",
    "  {%- set ns = namespace(n=0) %}\n  {% for i in range(5) %}\n    {% set ns.n = i %}\n  {% endfor %}\n{{ ns.n }}\n",
    "{{ dict(a=1, **{'b': 2}) }}{{ dict([('a', 1)]).items() | list }}{{ {'a': 1}.get('b', 'c') }}",
    "{% macro m(x, y='z') %}{{ x }}{{ y }}{% endmacro %}{{ m('a') }}{{ m('a', y=1) }}",
    "{{ messages[0].content.split(' ')[-1].upper().strip('x') }}{{ 'a,b'.split(',') | join('-') | title }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | length }}",
    "{{ '%s is %d' % ('x', 3) }}{{ '{} {a!r:>4}'.format(1, a='b') }}{{ '%05.1f' | format(2.25) }}",
    "{{ nothing is defined }}{{ tools is none }}{{ nothing }}{{ messages[0].nothing }}{{ bos_token ~ 1 ~ none }}",
    "{{ strftime_now('%Y') }}{{ messages[::-1][0].role }}{{ messages[0].content | replace('<', '&lt;') | e }}",
    "{%- for key, value in messages[0].items() if key != 'role' -%} {{ loop.index }}{{ key }} {%- endfor %}",
)


@pytest.mark.parametrize("template", HONEST)
def test_honest_templates_render_as_in_transformers(process, template):
    variables = {"messages": MESSAGES, "tools": None, "documents": None, "bos_token": "<s>"}
    theirs, _ = render_jinja_template([MESSAGES], chat_template=template, bos_token="<s>")
    assert process.render(template, variables | {"add_generation_prompt": False}) == theirs[0]


@pytest.mark.parametrize("message", ["no system\nmessages", "\x1b[2J", "'x' * 10**7"])
def test_an_exception_raised_by_a_template_is_one_short_line(process, message):
    expression = message if "*" in message else f"'{message}'"
    with pytest.raises(RequestError, match="refuses these messages") as caught:
        process.render("{{ raise_exception(" + expression + ") }}", {})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_the_process_ends_with_its_owner():
    process = TemplateProcess(LIMITS)
    process.render("x", {})
    first = process._process
    process.close()
    assert first.returncode is not None
    process.render("x", {})
    second = process._process
    assert second.pid != first.pid
    del process
    gc.collect()
    assert second.returncode is not None


def test_a_python_that_cannot_be_started_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ResourceError, match=r"cannot start /nowhere/python"):
        TemplateProcess(LIMITS).render("x", {})


def test_after_an_interrupted_request_the_next_one_gets_its_own_answer(monkeypatch):
    process = TemplateProcess(Limits())
    assert process.render("{{ a }}", {"a": "one"}) == "one"
    real = template_process._exchange

    def interrupted_exchange(child, request, deadline):
        child.stdin.write(request)
        child.stdin.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(template_process, "_exchange", interrupted_exchange)
        with pytest.raises(KeyboardInterrupt):
            process.render("{{ a }}", {"a": "two"})
    assert template_process._exchange is real
    assert process.render("{{ a }}", {"a": "three"}) == "three"
    process.close()


def test_the_process_inherits_path_language_time_zone_and_nothing_else(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "12345")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    process = TemplateProcess(LIMITS)
    process.render("x", {})
    raw = Path(f"/proc/{process._process.pid}/environ").read_bytes()
    names = {entry.partition(b"=")[0].decode() for entry in raw.split(b"\0") if entry}
    assert names <= {"PATH", "PYTHONPATH", "LANG", "TZ", "LD_LIBRARY_PATH", "PYTHONHOME"}
    assert {"PYTHONPATH", "TZ"} <= names
    process.close()
