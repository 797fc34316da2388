"""Beam search here and in transformers, on the model that ships: `python tests/tools/compare_beams.py`.

Not a test that pytest collects: every number of beams on every prompt takes some minutes. Both compute in float32.
Beams are the same when all their tokens are; where the scores of two candidates are closer than a rounding, the two
programs may choose differently: such a tie is shown with both scores, and counted apart.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import MixtralForCausalLM

import fiddler
from fiddler.loading import DEMO_MODEL

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/
from oracles.reference import from_gguf

WIDTHS = [1, 2, 4, 8, 16]
TIE = 1e-4  # scores of two beams that are closer than this differ by float32's rounding of their sums

BEGINNINGS = [
    "Once upon a time",
    "One day, a little girl named Lily",
    "The old farmer looked at the sky and",
    "In the middle of the forest there lived",
    "There was a bird who could not fly.",
    "Far away, behind the mountains,",
    '"Please help me," said the mouse',
    "The robot wanted to be",
    "They were very happy. The end",
    "Sam was sad because his toy",
    "Mom said, \"Don't touch the",
    "1 2 3 4",
    "The bear and the rabbit became friends and",
    "And they lived happily ever",
]
STORIES = [
    "The cat",
    "Tom had a small red boat.",
    "It was a cold winter night when",
    "She opened the box. Inside, there was",
    "Once upon a time",
    "One day, a little girl named Lily",
]


def beginning(engine: fiddler.Engine, text: str) -> list[int]:
    """Token ids of a story's beginning: few of its beams end soon."""
    return engine.tokenizer.encode(text, add_bos=True)


def near_the_end(engine: fiddler.Engine, text: str) -> list[int]:
    """Token ids of the model's own story without its last tokens: most beams end within a few."""
    ids = beginning(engine, text)
    return [*ids, *engine.generate(ids, fiddler.Sampling(temperature=0.0), 300).tokens[:-9]]


def their_beams(
    model: MixtralForCausalLM, ids: Sequence[int], num_beams: int, limit: int, eos: int, **options: object
) -> list[tuple[list[int], float]]:
    """The beams of transformers, best first: tokens and score of each."""
    output = model.generate(
        torch.tensor([list(ids)]),
        num_beams=num_beams,
        do_sample=False,
        num_return_sequences=num_beams,
        max_new_tokens=limit,
        eos_token_id=eos,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    beams = [_to_the_end(row[len(ids) :].tolist(), eos) for row in output.sequences]
    if num_beams > 1:
        return list(zip(beams, output.sequences_scores.tolist(), strict=True))
    steps = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)[0]
    return [(beams[0], float(steps[: len(beams[0])].sum()) / len(beams[0]))]


def _to_the_end(tokens: list[int], eos: int) -> list[int]:
    """Strip the padding of a beam that ended before the longest one."""
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=48, help="tokens to generate (48)")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--threads", type=int, help="of torch, for transformers (default: torch's own)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    engine, model = fiddler.load(precision="exact", device="cpu"), from_gguf(DEMO_MODEL)
    eos = engine.tokenizer.eos_id
    prompts = [beginning(engine, text) for text in BEGINNINGS] + [near_the_end(engine, text) for text in STORIES]
    for num_beams in arguments.widths:
        same, ended, worst, ties = 0, 0, 0.0, 0
        for ids in prompts:
            ours = engine.beam_search(ids, num_beams, arguments.n)
            theirs = their_beams(model, ids, num_beams, arguments.n, eos)
            ended += sum(beam.finish_reason == "stop" for beam in ours)
            worst = max(worst, *(abs(beam.score - score) for beam, (_, score) in zip(ours, theirs, strict=True)))
            if [list(beam.tokens) for beam in ours] == [tokens for tokens, _ in theirs]:
                same += 1
                continue
            for rank, (beam, (tokens, score)) in enumerate(zip(ours, theirs, strict=True)):
                if list(beam.tokens) == tokens:
                    continue
                tie = abs(beam.score - score) < TIE
                ties += tie
                texts = [engine.tokenizer.decode(part, continuing=True) for part in (beam.tokens, tokens)]
                print(
                    f"num_beams {num_beams}, ...{engine.tokenizer.decode(ids)[-40:]!r}, beam {rank}, "
                    f"{'a tie' if tie else 'DIFFERENT'}: {beam.score:.7f} {texts[0]!r}, theirs {score:.7f} {texts[1]!r}"
                )
        print(
            f"num_beams {num_beams:2}: all beams the same on {same} of {len(prompts)} prompts, {ended} of "
            f"{num_beams * len(prompts)} beams end by themselves, {ties} ties; scores differ by at most {worst:.1e}"
        )


if __name__ == "__main__":
    main()
