"""What a model says with seeds, for comparison bit by bit; as a program, for other processes to ask."""

from __future__ import annotations

import hashlib
import json
import sys

import fiddler
from fiddler import Sampling

__all__ = ["COMPANIONS", "PROMPT", "outcome", "texts"]

PROMPT = [1, *range(5, 245, 4)]
COMPANIONS = [[1, 9, 8, 7], [1, *range(20, 110, 3)], [1, 44]]
SAMPLINGS = Sampling(temperature=0.0), Sampling(temperature=0.9, seed=7)
TOKENS = 16


def texts(engine: fiddler.Engine, *, together: bool = False) -> list[list[int]]:
    """Greedy and seeded tokens after `PROMPT`, which is read anew; together: in a batch with others."""
    tokens = []
    for sampling in SAMPLINGS:
        engine.runner.forget()
        if together:
            prompts = [COMPANIONS[0], PROMPT, *COMPANIONS[1:]]
            outcomes = dict(engine.batch(prompts, sampling, TOKENS, ignore_eos=True, parallel=4))
            tokens.append(outcomes[1].tokens)
        else:
            tokens.append(engine.generate(PROMPT, sampling, TOKENS, ignore_eos=True, reuse=False).tokens)
    return [list(each) for each in tokens]


def outcome(path: object, precision: str, threads: int) -> dict[str, object]:
    """Tokens, and a digest of the logits' bits, of a model that is loaded anew."""
    with fiddler.load(str(path), device="cpu", precision=precision, threads=threads, context=128) as engine:
        digest = hashlib.sha256(engine.logits(PROMPT).numpy().tobytes()).hexdigest()
        return {"tokens": texts(engine), "logits": digest}


def main() -> None:
    """Answer lines of JSON, [path, precision, threads], in the same manner."""
    for line in sys.stdin:
        print(json.dumps(outcome(*json.loads(line))), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
