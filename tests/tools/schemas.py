"""Random JSON schemas with short values, and generations constrained by them.

As a command, `python tests/tools/schemas.py -n 200`, it repeats a test for any number of schemas, counts the answers
that were cut, and measures the masks over Mixtral's vocabulary.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

import fiddler
from fiddler.sampling.constraint import Vocabulary
from fiddler.text.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/
from oracles.texts import REAL_MODEL
from oracles.vocabularies import vocabulary

WORDS = ("red", "green", "blue", "yes", "no", "Lily", 'a "b"', "tab\t", "café", "日本", "▁", "back\\slash", "😀")
PROMPTS = ("Once upon a time", "Tom has a red boat. As JSON:", "The answer is", "List of animals:")


def random_schema(draw: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema whose values have at most some hundred characters."""
    kinds = ["string", "enum", "integer", "boolean", "null", "const", "pattern"]  # a number may have endless digits
    if depth:
        kinds += ["array", "object", "object", "anyOf"]
    kind = draw.choice(kinds)
    if kind == "string":
        least = draw.choice([0, 0, 1, 3])
        return {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 12)}
    if kind == "enum":
        return {"enum": draw.sample([*WORDS, 1, -7, True, None], draw.randint(1, 4))}
    if kind == "integer":
        low = draw.randint(-1000, 1000)
        return {"type": "integer", "minimum": low, "maximum": low + draw.choice([0, 5, 10**4])}
    if kind == "const":
        return {"const": draw.choice([*WORDS, {"a": [1, None]}])}
    if kind == "pattern":
        return {"type": "string", "pattern": draw.choice(["^[A-Z]{2}[0-9]{1,3}$", "^(ab|c){1,4}$", "^\\d{4}-\\d{2}$"])}
    if kind == "array":
        least = draw.randint(0, 2)
        items = random_schema(draw, depth - 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + draw.randint(0, 2)}
    if kind == "anyOf":
        return {"anyOf": [random_schema(draw, depth - 1) for _ in range(draw.randint(1, 3))]}
    if kind == "object":
        names = draw.sample([word for word in WORDS if word != "▁"], draw.randint(1, 4))
        return {
            "type": "object",
            "properties": {name: random_schema(draw, depth - 1) for name in names},
            "required": [name for name in names if draw.random() < 0.7],
            "additionalProperties": False,
        }
    return {"type": kind}


def hold(engine: fiddler.Engine, seed: int, max_tokens: int = 200) -> fiddler.Completion:
    """Generate by the schema of `seed`; a complete answer must parse and be valid."""
    draw = random.Random(seed)
    schema = random_schema(draw)
    sampling = fiddler.Sampling(temperature=draw.choice([0.0, 0.8, 1.5]), seed=seed)
    constraint = fiddler.Constraint.json_schema(schema)
    completion = engine.generate(draw.choice(PROMPTS), sampling, max_tokens, constraint=constraint)
    if completion.finish_reason == "stop":
        jsonschema.validate(json.loads(completion.text), schema)
    else:
        assert len(completion.tokens) == max_tokens, f"{completion.text!r} is not complete"
    return completion


def mask_times(count: int) -> np.ndarray:
    """Seconds of each mask along random texts of `count` schemas, for a vocabulary of 32000."""
    with tempfile.TemporaryDirectory() as folder:
        mixtral = vocabulary(Path(folder), tokenizer_model=REAL_MODEL.read_bytes())
    tokens, times = Vocabulary(Tokenizer.from_metadata(mixtral.metadata())), []
    for seed in range(count):
        draw = random.Random(seed)
        guide = tokens.guide(fiddler.Constraint.json_schema(random_schema(draw)))
        for _ in range(100):
            if guide.finished:
                break
            guide.advance(draw.choice(np.flatnonzero(guide.allowed()).tolist()))
            started = time.perf_counter()
            guide.allowed()
            times.append(time.perf_counter() - started)
    return np.array(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=200, help="schemas (200)")
    arguments = parser.parse_args()
    engine = fiddler.load(threads=1)  # a model this small is no faster with more
    engine.generate("x", max_tokens=2, constraint=fiddler.Constraint.json_schema({}))
    started, tokens, cut = time.perf_counter(), 0, []
    for seed in range(arguments.n):
        completion = hold(engine, seed)
        tokens += len(completion.tokens)
        if completion.finish_reason == "length":
            cut.append(seed)
    seconds = time.perf_counter() - started
    print(
        f"{arguments.n - len(cut)} of {arguments.n} answers are whole, parse and are valid; {len(cut)} were cut at the "
        f"token limit (seeds {cut}); {tokens} tokens, {seconds:.1f} s, {tokens / seconds:.0f} tokens/s"
    )
    times = mask_times(arguments.n) * 1e6
    median, high = np.percentile(times, [50, 99])
    print(f"{len(times)} masks over 32000 tokens: median {median:.0f} us, 99 % within {high:.0f} us")


if __name__ == "__main__":
    main()
