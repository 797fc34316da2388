"""Checked requests for the worker, made from a body's settings and the ids of its prompts. Knows no protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fiddler.errors import RequestError, quoted
from fiddler.generation.request import Request, checked_ids, longest_text
from fiddler.sampling.constraint import Constraint
from fiddler.serving.http.errors import ContextError, HttpError
from fiddler.serving.http.service import Service
from fiddler.serving.request_fields import Settings, constraint_of, settings_of

__all__ = ["Job", "encoded", "job_of"]

_MOST_PROMPTS = 128


@dataclass(frozen=True)
class Job:
    """Texts to generate: `requests[i]` continues `prompts[i]`. `cut`: the context leaves fewer tokens than asked for.

    `settings`: of all; `sampling` of each request has its own seed.
    """

    settings: Settings
    requests: Sequence[Request]
    prompts: Sequence[Sequence[int]]
    cut: Sequence[bool]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, each counted once, whatever the number of its choices."""
        return sum(len(prompt) for prompt in self.prompts[:: self.settings.choices])


async def job_of(
    service: Service,
    body: Mapping[str, Any],
    prompts: Sequence[list[int]],
    *,
    grammar: str | None = None,
    named_tokens: frozenset[int] = frozenset(),
) -> Job:
    """The job of a body whose prompts are encoded already.

    grammar: Lark, instead of the body's own constraint. Raises RequestError for what makes no sense.
    """
    settings = settings_of(body, service.options.defaults, service.options.token_limit)
    if grammar is not None:
        settings = replace(settings, grammar=grammar, schema=None)
    constrained = settings.grammar is not None or settings.schema is not None
    constraint = await service.on_grammar(constraint_of, settings) if constrained else None
    return await service.on_text(_job, service, settings, prompts, constraint, named_tokens)


def _job(
    service: Service,
    settings: Settings,
    prompts: Sequence[list[int]],
    constraint: Constraint | None,
    named_tokens: frozenset[int],
) -> Job:
    config, context = service.engine.config, service.engine.context
    biases = _bias_ids(service, settings)
    sampling = replace(settings.sampling, logit_bias={**settings.sampling.logit_bias, **biases})
    requests, repeated, cut = [], [], []
    for ids in prompts:
        if len(ids) >= context:
            raise ContextError(len(ids), context)
        if not ids:
            raise RequestError("the prompt is empty and this model adds no BOS token; give some text")
        checked_ids(ids, config, context)
        available = context - len(ids)
        limit = available if settings.max_tokens is None else min(available, settings.max_tokens)
        for choice in range(settings.choices):
            seed = None if sampling.seed is None else (sampling.seed + choice) % 2**64
            requests.append(
                Request(
                    ids,
                    replace(sampling, seed=seed),
                    limit,
                    settings.stop,
                    settings.ignore_eos,
                    constraint,
                    reuse=settings.reuse,
                    priority=settings.priority,
                    named_tokens=named_tokens,
                )
            )
            repeated.append(ids)
            cut.append(settings.max_tokens is None or limit < settings.max_tokens)
    return Job(replace(settings, sampling=sampling), requests, repeated, cut)


def _bias_ids(service: Service, settings: Settings) -> dict[int, float]:
    """Biases by token; one for a text is for each of its tokens."""
    biases: dict[int, float] = {}
    for token, bias in settings.biases:
        ids = service.engine.tokenizer.encode(token, continuing=True) if isinstance(token, str) else [token]
        for each in ids:
            if each >= service.engine.config.vocab_size or each < 0:
                raise RequestError(f"logit_bias is for token {quoted(each)}, outside the vocabulary")
            biases[each] = bias
    return biases


def encoded(service: Service, prompt: object, special: bool) -> list[list[int]]:
    """The ids of a prompt as OpenAI and llama.cpp have it: a text, ids, both mixed, or a list of such prompts.

    special: names of control tokens in texts are these tokens. Raises RequestError for anything else.
    """
    several = isinstance(prompt, list) and prompt and not any(_is_id(part) for part in prompt)
    prompts = prompt if several and isinstance(prompt, list) else [prompt]
    if len(prompts) > _MOST_PROMPTS:
        raise RequestError(f"there are {len(prompts)} prompts; give at most {_MOST_PROMPTS}")
    return [_encoded(service, each, special) for each in prompts]


def _encoded(service: Service, prompt: object, special: bool) -> list[int]:
    if isinstance(prompt, dict):  # llama.cpp's form for prompts with media
        if prompt.get("multimodal_data"):
            raise HttpError(400, "image input is not supported, and no other media; give text")
        prompt = prompt.get("prompt_string")
    tokenizer = service.engine.tokenizer
    if isinstance(prompt, str):
        return _encode_text(service, prompt, special, add_bos=tokenizer.add_bos)
    if not isinstance(prompt, list) or not all(_is_id(part) or isinstance(part, str) for part in prompt):
        raise RequestError(f"the prompt is {quoted(prompt)}; give a text, token ids, or a list of them")
    ids: list[int] = []
    for at, part in enumerate(prompt):
        if isinstance(part, str):
            ids += _encode_text(service, part, special, add_bos=tokenizer.add_bos and at == 0, continuing=at > 0)
        else:
            ids.append(part)
    return ids


def _encode_text(
    service: Service, text: str, special: bool, *, add_bos: bool = False, continuing: bool = False
) -> list[int]:
    engine = service.engine
    if len(text) > engine.context:  # to encode takes some hundred times the memory of a text
        limit, _ = longest_text(engine.tokenizer, engine.config, engine.context)
        if len(text) > limit:
            raise ContextError(len(text) // engine.tokenizer.longest_token, engine.context)
    return engine.tokenizer.encode(text, add_bos=add_bos, parse_special=special, continuing=continuing)


def _is_id(part: object) -> bool:
    return isinstance(part, int) and not isinstance(part, bool)
