"""The command `run`: reads a prompt and options, prints the text as it comes, or opens a chat. Samples nothing."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fiddler.cli.beams import BEAMS, BeamSearchOptions, print_beams
from fiddler.cli.chat import open_chat, templated
from fiddler.cli.option_groups import with_options
from fiddler.cli.options import LOADING, ModelOrDemo, loaded, open_output, opened, say
from fiddler.cli.sampling_options import (
    SAMPLING,
    Grammar,
    JsonSchema,
    ProbsFile,
    SamplingOptions,
    constraint_of,
)
from fiddler.cli.text_input import check_prompt, read_prompt, read_utf8
from fiddler.errors import RequestError
from fiddler.load_options import LoadOptions

if TYPE_CHECKING:
    from fiddler.chat import Chat
    from fiddler.engine import Engine
    from fiddler.files.atomic_file import OutputFile
    from fiddler.files.model_file import ModelFile
    from fiddler.generation.completion import Stats
    from fiddler.generation.request import Request
    from fiddler.text.harmony_turn import HarmonyTurn
    from fiddler.text.template_variables import TemplateVariables

__all__ = ["run"]

_NOT_FOR_BEAMS = (*SAMPLING.options, "probs_file", "json_schema", "grammar")


@with_options(LOADING, SAMPLING, BEAMS)
def run(
    command: typer.Context,
    model: ModelOrDemo = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(readable=False, help="File with the text to continue.")] = None,
    count: Annotated[
        int, typer.Option("-n", "--n-predict", min=-1, help="Tokens to generate; -1: until the end or --ctx.")
    ] = -1,
    *,
    sampling: SamplingOptions,
    probs_file: ProbsFile = None,
    json_schema: JsonSchema = None,
    grammar: Grammar = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Answer the prompt as a user's message, through the chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message of a chat, or of --chat.")] = None,
    chat_template_file: Annotated[
        Path | None, typer.Option(readable=False, help="Jinja chat template, instead of the model's.")
    ] = None,
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Variables of the chat template, as '{\"enable_thinking\": false}'."),
    ] = None,
    special: Annotated[
        bool, typer.Option("--special", help="Names of control tokens in the prompt, as </s>, are these tokens.")
    ] = False,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Never sample an end token.")] = False,
    beams: BeamSearchOptions,
    prompt_cache: Annotated[
        Path | None,
        typer.Option(readable=False, help="File that caches the prompt's keys and values for the next run."),
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print times and memory to stderr.")] = False,
    loading: LoadOptions,
) -> None:
    """Continue a text, or chat on a terminal. Without MODEL.gguf: the small demo model that ships with fiddler."""
    beams.check(command, _NOT_FOR_BEAMS)
    search = beams.to_search()
    chatting = prompt is None and prompt_file is None and _on_terminal()
    for_template = (system, chat_template_file, chat_template_kwargs)
    answering = not chatting and (chat or any(value is not None for value in for_template))
    if special and (chatting or answering):
        raise typer.BadParameter(
            "--special is for a prompt that is continued; messages of a chat have no control tokens"
        )
    if chatting and (search is not None or prompt_cache is not None or sampling.n_probs):
        raise typer.BadParameter("--beams, --prompt-cache and --n-probs are not for a chat; give a prompt")
    if not chatting:
        check_prompt(prompt, prompt_file)
    template = None if chat_template_file is None else read_utf8(chat_template_file, "a chat template in Jinja")
    variables = _variables(chat_template_kwargs)
    values = sampling.to_sampling()
    if probs_file is not None and not sampling.n_probs:
        raise typer.BadParameter("--probs-file needs --n-probs, how many tokens to write at every step")
    constraint = constraint_of(json_schema, grammar)
    from fiddler.generation.request import Request

    limit = None if count < 0 else count
    try:
        request = Request("", values, limit, tuple(stop or ()), ignore_eos, constraint, special)
    except RequestError as error:
        raise typer.BadParameter(str(error)) from None
    _check_model(model)
    model_file = opened(model)
    text = "" if chatting else prompt
    if text is None:
        text = read_prompt(prompt_file, model_file, loading.capacity(model_file.config.context_length))
    ids = templated(model_file, text, system, template, variables) if answering else None
    named = _named_marks(model_file, template) if answering and search is None else frozenset()
    request = replace(request, prompt=text if ids is None else ids, named_tokens=named)
    with open_output(probs_file) as probs:
        engine = loaded(model_file, loading)
        if chatting:
            conversation = _chat(engine, request, system, template, variables)
            open_chat(conversation, str(model or "the demo model"), _stats_text, show_stats=stats)
            return
        if prompt_cache is not None and callable(signal.getsignal(signal.SIGINT)):
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a half-written file must be removed
        if search is not None:
            measured = print_beams(engine, request, search, beams.n_best, prompt_cache, answer=answering, stats=stats)
        else:
            measured = _print_text(engine, request, prompt_cache, probs, answer=answering)
    if stats:
        say(f"{engine.where} | {_stats_text(measured)}")


def _named_marks(model_file: ModelFile, template: str | None) -> frozenset[int]:
    """Control tokens that an answer shows: harmony's, where the template, the model's or the given one, is that."""
    from fiddler.text.harmony import is_harmony
    from fiddler.text.harmony_turn import named_marks

    tokenizer = model_file.tokenizer
    return named_marks(tokenizer) if is_harmony(template or tokenizer.chat_template) else frozenset()


def _variables(chat_template_kwargs: str | None) -> TemplateVariables:
    """The value of --chat-template-kwargs. Raises BadParameter (usage error) for anything but a JSON object."""
    from fiddler.text.template_variables import TemplateVariables, parse_variables

    try:
        return TemplateVariables() if chat_template_kwargs is None else parse_variables(chat_template_kwargs)
    except RequestError as error:
        raise typer.BadParameter(f"--chat-template-kwargs: {error}") from None


def _chat(
    engine: Engine, request: Request, system: str | None, template: str | None, variables: TemplateVariables
) -> Chat:
    """A conversation whose answers are as the request says; its prompt has no meaning."""
    from fiddler.chat import Chat

    return Chat(
        engine,
        system,
        request.sampling,
        request.max_tokens,
        template=template,
        stop=request.stop,
        ignore_eos=request.ignore_eos,
        constraint=request.constraint,
        tools=variables.tools,
        chat_template_kwargs=variables.kwargs,
    )


def _print_text(
    engine: Engine, request: Request, prompt_cache: Path | None, probs_file: OutputFile | None, *, answer: bool
) -> Stats:
    """Generate and print the text as it comes; then the tokens' log-probabilities, where --n-probs asks for them.

    answer: to a message; its first space belongs to the tokenizer. Named tokens are those of an answer in harmony.
    """
    turn: HarmonyTurn | None = None
    if request.named_tokens:
        from fiddler.text.harmony_turn import HarmonyTurn

        turn = HarmonyTurn()
    generation = engine.start(request, prompt_cache=prompt_cache)
    prefixed = answer and engine.tokenizer.add_space_prefix
    for piece in generation:
        piece = piece.removeprefix(" ") if prefixed else piece
        sys.stdout.write(piece if turn is None else turn.push(piece))
        prefixed = False
        sys.stdout.flush()
    sys.stdout.write(("" if turn is None else turn.finish()) + "\n")
    sys.stdout.flush()
    if request.sampling.n_probs:
        from fiddler.serving.json_fields import probs_of

        pieces = engine.tokenizer.pieces(special=True)
        lines = [json.dumps(probs_of(pieces, step)) for step in generation.completion.log_probs]
        if probs_file is None:
            for line in lines:
                say(line)
        else:
            probs_file.write("".join(line + "\n" for line in lines).encode())
    return generation.completion.stats


def _check_model(model: Path | None) -> None:
    """Raise RequestError for a word that is no file: a prompt without -p."""
    if model is not None and model.parent == Path() and not model.suffix and not model.exists():
        raise RequestError(
            f"{model}: no such file; a prompt stands behind -p: fiddler run -p {shlex.quote(str(model))}"
        )


def _on_terminal() -> bool:
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def _stats_text(stats: Stats) -> str:
    cached = f" ({stats.cached_tokens} of them computed before)" if stats.cached_tokens else ""
    return (
        f"load {stats.load_seconds:.2f} s | "
        f"prompt {stats.prompt_tokens} tokens{cached}, {stats.prompt_speed:.1f} tokens/s | "
        f"generation {stats.generated_tokens} tokens, {stats.generation_speed:.1f} tokens/s | "
        f"peak memory {stats.peak_resident / 2**20:.0f} MiB with the mapped file, "
        f"{stats.anonymous / 2**20:.0f} MiB of its own"
    )
