"""Chat templates in the manner of the families', written for tests: the same features of Jinja, other words.

Reversed lists, slices and namespaces (Qwen3); macros, `items` and mappings (GLM-4.5); dates, documents, indented JSON
and `generation` (Granite); nulls and texts for arguments (DeepSeek); `raise_exception`, `dict` and loop controls.
"""

from __future__ import annotations

__all__ = ["FAMILY_TEMPLATES", "OWN_FORM"]

_AS_QWEN3 = r"""{%- if tools %}
    {{- '<s>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- 'Functions:' }}
    {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\nend</s>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<s>system\n' + messages[0].content + '</s>\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == 'user'
        and not (message.content.startswith('<r>') and message.content.endswith('</r>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<s>' + message.role + '\n' + message.content + '</s>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
            {%- set thought = message.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<s>assistant\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if (loop.first and content) or not loop.first %}{{- '\n' }}{%- endif %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '<c>{"name": "' ~ call.name ~ '", "arguments": ' }}
            {%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | tojson }}{%- endif %}
            {{- '}</c>' }}
        {%- endfor %}
        {{- '</s>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<s>user' }}{%- endif %}
        {{- '\n<r>\n' + message.content + '\n</r>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '</s>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<s>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""

_AS_GLM = r"""[G]<s>
{%- macro visible(content) -%}
    {%- if content is string -%}{{- content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for item in content -%}
            {%- if item is mapping and item.type == 'text' -%}{{- item.text }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{- content }}{%- endif -%}
{%- endmacro -%}
{%- if tools -%}
<|system|>
# Tools
{% for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
{%- endif -%}
{%- set ns = namespace(last_user=-1) -%}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last_user = loop.index0 -%}{%- endif %}{%- endfor %}
{% for m in messages %}
{%- if m.role == 'user' -%}<|user|>
{{ visible(m.content) }}
{%- set quick = enable_thinking is defined and not enable_thinking -%}
{{- '/nothink' if (quick and not visible(m.content).endswith('/nothink')) else '' -}}
{%- elif m.role == 'assistant' -%}<|assistant|>
{%- set reasoning = '' %}
{%- if m.reasoning_content is string %}{%- set reasoning = m.reasoning_content %}{%- endif %}
{%- if loop.index0 > ns.last_user and reasoning -%}
{{ '\n<think>' + reasoning.strip() + '</think>' }}
{%- else -%}
{{ '\n<think></think>' }}
{%- endif -%}
{%- if visible(m.content or '').strip() -%}{{ '\n' + visible(m.content).strip() }}{%- endif -%}
{% if m.tool_calls %}
{% for tc in m.tool_calls %}
{%- if tc.function %}{%- set tc = tc.function %}{%- endif %}
{{ '\n<c>' + tc.name }}
{% set args = tc.arguments %}
{% if args is not mapping %}{{ raise_exception('Invalid arguments: ' + args | string) }}{% endif %}
{% for k, v in args.items() %}
<k>{{ k }}</k>
<v>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</v>
{% endfor %}
</c>{% endfor %}
{% endif %}
{%- elif m.role == 'tool' -%}
{%- if loop.first or (messages[loop.index0 - 1].role != 'tool') %}{{- '<|observation|>' }}{%- endif %}
{{- '\n<r>\n' }}{{- m.content }}{{- '\n</r>' }}
{%- elif m.role == 'system' -%}<|system|>
{{ visible(m.content) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>{{- '\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' -}}
{%- endif -%}
"""

_AS_GRANITE = r"""{%- if messages[0]['role'] == 'system' -%}
    {%- set system_message = messages[0]['content'] -%}{%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set system_message = 'Cut-off: April.\nToday: ' + strftime_now('%B %d, %Y') + '.' -%}
    {%- if tools and documents -%}{%- set system_message = system_message + ' Both.' -%}
    {%- elif thinking -%}{%- set system_message = system_message + ' Think: <think></think>.' -%}{%- endif -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{{- '<s>system<m>' + system_message + '</s>\n' -}}
{%- if tools -%}{{- '<s>tools<m>' + (tools | tojson(indent=4)) + '</s>\n' -}}{%- endif -%}
{%- if documents -%}{{- '<s>documents<m>' -}}{%- for document in documents -%}
    {{- 'Document ' + (loop.index | string) + '\n' + document['text'] -}}
    {%- if not loop.last -%}{{- '\n\n' -}}{%- endif -%}
{%- endfor -%}{{- '</s>\n' -}}{%- endif -%}
{%- set names = dict(user='U', assistant='A') -%}
{%- for message in loop_messages -%}
    {%- if message['role'] == 'tool' and loop.first -%}{{- raise_exception('a tool cannot begin') -}}{%- endif -%}
    {%- if message.get('content') is none -%}{%- continue -%}{%- endif -%}
    {%- if message['role'] == 'assistant' -%}
{% generation %}
{{ '<s>' ~ names.get(message['role'], 'X') ~ '<m>' ~ (message['content'] | default('', true) | trim) ~ '</s>\n' }}
{% endgeneration %}
    {%- else -%}
        {{- '<s>' + names.get(message['role'], message['role'] | upper) + '<m>' -}}
        {{- message['content'] + '</s>\n' -}}
    {%- endif -%}
    {%- if loop.last and add_generation_prompt -%}
        {{- '<s>assistant' -}}{%- if controls -%}{{- ' ' + controls | tojson -}}{%- endif -%}{{- '<m>' -}}
    {%- endif -%}
{%- endfor -%}
"""

_AS_DEEPSEEK = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(first=false, tool=false, output_first=true, system='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system = message['content'] %}"
    "{%- endif %}{%- endfor %}{{bos_token}}{{ns.system}}{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{%- set ns.tool = false -%}{{'[U]' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is none %}{%- for tool in message['tool_calls']%}"
    "{%- if not ns.first %}{{'[A]<c>' + tool['type'] + '[s]' + tool['function']['name'] + '\n```json\n' + "
    "tool['function']['arguments'] + '\n```'}}{%- set ns.first = true -%}{%- else %}{{'\n<c>' + "
    "tool['function']['name'] + tool['function']['arguments'] + eos_token}}{%- endif %}{%- endfor %}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}{%- if ns.tool %}"
    "{{'[o]' + message['content'] + eos_token}}{%- set ns.tool = false -%}{%- else %}"
    "{{'[A]' + message['content'].split('</think>')[-1] + eos_token}}{%- endif %}{%- endif %}"
    "{%- if message['role'] == 'tool' %}{%- set ns.tool = true -%}{{'[o]' + message['content']}}{%- endif %}"
    "{%- endfor -%}{% if add_generation_prompt and not ns.tool %}{{'[A]'}}{% endif %}"
)

_AS_OLMOE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + "
    "message['content'] + '\n' }}{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\n' + message['content'] + "
    "eos_token + '\n' }}{% else %}{{ '<|assistant|>\n' + message['content'] + eos_token }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)

FAMILY_TEMPLATES = {
    "qwen3": _AS_QWEN3,
    "glm": _AS_GLM,
    "granite": _AS_GRANITE,
    "deepseek": _AS_DEEPSEEK,
    "olmoe": _AS_OLMOE,
}

OWN_FORM = {"glm", "deepseek", "olmoe"}
"""Those that fail in transformers on some conversations, and render another form of their messages in ours."""
