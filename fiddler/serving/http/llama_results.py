"""Results of llama.cpp's own `/completion`, and its settings of a request
(https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md). Knows no routes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from math import isinf
from typing import Any

from fiddler.sampling.sampler import Sampling
from fiddler.serving.http.jobs import Job
from fiddler.serving.http.progress import Progress, texts_of
from fiddler.serving.http.service import Service
from fiddler.serving.json_fields import probs_of

__all__ = ["final_result", "partial_result", "probabilities", "sampling_settings", "selected_fields"]

_SAMPLERS = ["penalties", "dry", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"]
_OFF = {  # what this server does not have, in the values that llama.cpp's has where it is off
    "dynatemp_range": 0.0,
    "dynatemp_exponent": 1.0,
    "top_n_sigma": -1.0,
    "mirostat": 0,
    "mirostat_tau": 5.0,
    "mirostat_eta": 0.1,
    "adaptive_target": -1.0,
    "adaptive_decay": 0.9,
    "n_keep": 0,
    "n_discard": 0,
    "min_keep": 0,
}
_RANDOM_SEED = 4294967295  # llama.cpp's number for a seed that is drawn


def sampling_settings(sampling: Sampling, max_tokens: int | None) -> dict[str, Any]:
    """Sampling under llama.cpp's names."""
    values = asdict(sampling)
    values["seed"] = _RANDOM_SEED if sampling.seed is None else sampling.seed
    values["dry_sequence_breakers"] = list(sampling.dry_sequence_breakers)
    values["logit_bias"] = [
        {"id": token, "bias": None if isinf(bias) else bias} for token, bias in sampling.logit_bias.items()
    ]
    limit = -1 if max_tokens is None else max_tokens
    return {**values, **_OFF, "max_tokens": limit, "n_predict": limit, "samplers": _SAMPLERS, "lora": []}


def final_result(service: Service, job: Job, index: int, progress: Progress, content: str) -> dict[str, Any]:
    """The result of text `index`, which has ended. content: "" where it was streamed."""
    completion = progress.completion
    assert completion is not None
    text = texts_of(progress.tokens, service.pieces)
    kind = "limit" if completion.finish_reason == "length" else "word" if completion.stop_string else "eos"
    return {
        "index": index,
        "content": content,
        "tokens": [],
        "id_slot": 0,
        "stop": True,
        "model": service.names[0],
        "tokens_predicted": len(progress.tokens),
        "tokens_evaluated": len(job.prompts[index]),
        "generation_settings": _settings(service, job, index),
        "prompt": texts_of(job.prompts[index], service.pieces),
        "has_new_line": "\n" in text,
        "truncated": completion.finish_reason == "length" and job.cut[index],
        "stop_type": kind,
        "stopping_word": completion.stop_string,
        "tokens_cached": len(job.prompts[index]) + max(len(progress.tokens) - 1, 0),
        "timings": progress.timings(),
    }


def partial_result(index: int, progress: Progress, text: str, tokens: Sequence[int], prompt: int) -> dict[str, Any]:
    """The result of a step. prompt: number of the prompt's tokens."""
    return {
        "index": index,
        "content": text,
        "tokens": list(tokens),
        "stop": False,
        "id_slot": 0,
        "tokens_predicted": len(progress.tokens),
        "tokens_evaluated": prompt,
    }


def selected_fields(result: dict[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """The fields that `response_fields` lists, as "generation_settings/n_predict"; without those that are not there."""
    selected = {}
    for path in paths:
        value: Any = result
        for name in path.split("/"):
            if not isinstance(value, dict) or name not in value:
                break
            value = value[name]
        else:
            selected[path] = value
    return selected


def _settings(service: Service, job: Job, index: int) -> dict[str, Any]:
    settings, sampling = job.settings, job.requests[index].sampling
    values = sampling_settings(sampling, settings.max_tokens)
    if settings.ignore_eos:
        ends = sorted(service.engine.tokenizer.end_ids)
        values["logit_bias"] = values["logit_bias"] + [{"id": token, "bias": None} for token in ends]
    constraint = job.requests[index].constraint
    return values | {
        "stop": list(settings.stop),
        "ignore_eos": settings.ignore_eos,
        "stream": False,
        "grammar": "" if constraint is None else constraint.source,
    }


def probabilities(steps: Sequence[Any], pieces: Sequence[bytes]) -> list[dict[str, Any]]:
    """`completion_probabilities` of some steps."""
    return [probs_of(pieces, step) for step in steps]
