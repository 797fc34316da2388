"""A user's program with the whole public API, for type checkers: mypy --strict and pyright. Nothing runs it.

Right calls have the types that `assert_type` says; each wrong call is an error of the checker, or its `ignore` would be
an unused one, which is an error too.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import torch

import fiddler
from fiddler import Beam, Chat, Completion, Constraint, Engine, FiddlerError, Request, Sampling
from fiddler.errors import CheckpointError, FileFormatError, RequestError, ResourceError
from fiddler.generation.beam_hypotheses import BeamOptions
from fiddler.generation.beam_search import BeamSearch
from fiddler.generation.sampled_text import Generation


def right(path: Path) -> None:
    assert_type(fiddler.load(), Engine)
    with fiddler.load(path, device="cpu", context=512, gpu_memory="24GiB", precision="exact") as engine:
        assert_type(engine, Engine)
        assert_type(repr(engine), str)
        assert_type(engine.context, int)
        ids = engine.tokenizer.encode("Once", add_bos=True)
        assert_type(ids, list[int])
        assert_type(engine.logits(ids), torch.Tensor)
        greedy = Sampling(temperature=0.0, seed=1, logit_bias={3: -1.0})
        assert_type(greedy.temperature, float)
        completion = engine.generate("Once", greedy, max_tokens=4, stop="END", special=True)
        assert_type(completion, Completion)
        assert_type(completion.text, str)
        assert_type(completion.tokens, tuple[int, ...])
        assert_type(completion.stats.generation_speed, float)
        assert_type(engine.generate((1, 2), stop=["a", "b"]).text, str)
        assert_type(engine.stream(ids, constraint=Constraint.json_schema({"type": "object"})), Iterator[str])
        beams = engine.beam_search("Once", width=2, max_tokens=4, length_penalty=0.5)
        assert_type(beams, list[Beam])
        assert_type(beams[0].score, float)
        request = Request("Once", greedy, max_tokens=4, stop=("END",))
        generation = engine.start(request, prompt_cache=path, on_chunk=print)
        assert_type(generation, Generation)
        search = engine.start_beams(request, BeamOptions(2))
        assert_type(search, BeamSearch)
        for index, outcome in engine.batch(["a", ids, request, generation, search], greedy, 4, parallel=2):
            assert_type(index, int)
            if isinstance(outcome, Completion):
                assert_type(outcome.text, str)
            elif isinstance(outcome, FiddlerError):
                raise outcome
            else:
                assert_type(outcome.beams, tuple[Beam, ...])
        assert_type(next(engine.batch(request for _ in range(3)))[0], int)
        assert_type(engine.scheduler(parallel=2).add(generation), int)
        chat = Chat(engine, "Be brief.", greedy, 64)
        assert_type(chat.send("Hello"), Iterator[str])
        chat = Chat(engine, tools=[{"type": "function"}], chat_template_kwargs={"enable_thinking": False})
        assert_type(chat.send({"role": "tool", "content": "12:00"}), Iterator[str])
        assert_type(fiddler.convert(path, path, "bf16", force=True).nbytes, int)
    errors: list[type[FiddlerError]] = [CheckpointError, FileFormatError, RequestError, ResourceError]
    assert_type(errors[0](), FiddlerError)
    assert_type(fiddler.__version__, str)


def wrong(engine: Engine) -> None:
    engine.generate("Once", stop=3)  # type: ignore[arg-type]
    engine.generate("Once", {"temperature": 0.0})  # type: ignore[arg-type]
    engine.generate("Once", max_tokens="4")  # type: ignore[arg-type]
    engine.generate("Once", temperature=0.0)  # type: ignore[call-arg]
    engine.generate(["a", "b"])  # type: ignore[list-item]
    engine.generate([1.5])  # type: ignore[list-item]
    engine.generate({"prompt": "Once"})  # type: ignore[arg-type]
    engine.logits("12")  # type: ignore[arg-type]
    engine.beam_search("Once", width="4")  # type: ignore[arg-type]
    engine.start("Once")  # type: ignore[arg-type]
    engine.batch([None])  # type: ignore[list-item]
    engine.batch(["Once"], parallel="2")  # type: ignore[arg-type]
    print(engine.stream("Once").text)  # type: ignore[attr-defined]
    fiddler.load(device="gpu")  # type: ignore[arg-type]
    fiddler.load(precision="bf16")  # type: ignore[arg-type]
    fiddler.load(n_ctx=512)  # type: ignore[call-arg]
    fiddler.convert("a", "b", "q8_0")  # type: ignore[arg-type]
    Sampling(temperature="hot")  # type: ignore[arg-type]
    Request()  # type: ignore[call-arg]
    fiddler.generate("Once")  # type: ignore[attr-defined]
