"""The command `run`: reads a prompt and options, prints the text as it comes, or opens a chat. Samples nothing."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fiddler.cli.beams import (
    Beams,
    EarlyStop,
    EarlyStopOption,
    LengthPenalty,
    NBest,
    beam_options_of,
    check_beam_options,
    print_beams,
)
from fiddler.cli.options import (
    Ctx,
    Device,
    DeviceOption,
    ExpertCounts,
    GpuExperts,
    GpuMemory,
    Missing,
    MissingOption,
    ModelOrDemo,
    Precision,
    PrecisionOption,
    Threads,
    loaded,
    say,
)
from fiddler.cli.sampling_options import (
    SAMPLING,
    DryAllowedLength,
    DryBase,
    DryMultiplier,
    DryPenaltyLastN,
    DrySequenceBreaker,
    FrequencyPenalty,
    Grammar,
    JsonSchema,
    LogitBias,
    MinP,
    NProbs,
    PresencePenalty,
    ProbsFile,
    RepeatLastN,
    RepeatPenalty,
    Seed,
    Temp,
    TopK,
    TopP,
    Typical,
    XtcProbability,
    XtcThreshold,
    constraint_of,
    sampling_from,
)
from fiddler.errors import FiddlerError

if TYPE_CHECKING:
    from fiddler.generation.completion import Stats

__all__ = ["run"]

_SAMPLING_PARAMETERS = (*SAMPLING, "probs_file", "json_schema", "grammar")  # without effect on beams


def run(
    context: typer.Context,
    model: ModelOrDemo = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the text to continue.")] = None,
    count: Annotated[
        int, typer.Option("-n", "--n-predict", min=-1, help="Tokens to generate; -1: until the end or --ctx.")
    ] = -1,
    temp: Temp = 0.8,
    top_k: TopK = 40,
    top_p: TopP = 0.95,
    min_p: MinP = 0.05,
    typical: Typical = 1.0,
    repeat_penalty: RepeatPenalty = 1.0,
    repeat_last_n: RepeatLastN = 64,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    dry_multiplier: DryMultiplier = 0.0,
    dry_base: DryBase = 1.75,
    dry_allowed_length: DryAllowedLength = 2,
    dry_penalty_last_n: DryPenaltyLastN = 64,
    dry_sequence_breaker: DrySequenceBreaker = None,
    xtc_probability: XtcProbability = 0.0,
    xtc_threshold: XtcThreshold = 0.1,
    logit_bias: LogitBias = None,
    seed: Seed = -1,
    n_probs: NProbs = 0,
    probs_file: ProbsFile = None,
    json_schema: JsonSchema = None,
    grammar: Grammar = None,
    system: Annotated[str | None, typer.Option(help="System message of a chat.")] = None,
    chat_template_file: Annotated[
        Path | None, typer.Option(help="Jinja chat template for a chat, instead of the model's.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Never sample an end token.")] = False,
    beams: Beams = None,
    n_best: NBest = 1,
    length_penalty: LengthPenalty = 1.0,
    early_stopping: EarlyStopOption = EarlyStop.false,
    prompt_cache: Annotated[
        Path | None, typer.Option(help="File that caches the prompt's keys and values for the next run.")
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print times and memory to stderr.")] = False,
    device: DeviceOption = Device.auto,
    gpu_memory: GpuMemory = None,
    gpu_experts: GpuExperts = None,
    missing: MissingOption = Missing.auto,
    expert_counts: ExpertCounts = None,
    threads: Threads = None,
    ctx: Ctx = None,
    precision: PrecisionOption = Precision.fast,
) -> None:
    """Continue a text, or chat on a terminal. Without MODEL.gguf: the small demo model that ships with fiddler."""
    check_beam_options(context, beams, n_best, _SAMPLING_PARAMETERS)
    options = None if beams is None else beam_options_of(beams, length_penalty, early_stopping)
    chatting = prompt is None and prompt_file is None and _on_terminal()
    if not chatting and (system is not None or chat_template_file is not None):
        raise typer.BadParameter("--system and --chat-template-file are for a chat, on a terminal and without a prompt")
    if chatting and (beams is not None or prompt_cache is not None or n_probs):
        raise typer.BadParameter("--beams, --prompt-cache and --n-probs are not for a chat; give a prompt")
    text = "" if chatting else _prompt_text(prompt, prompt_file)
    template = None
    if chat_template_file is not None:
        from fiddler.cli.chat import read_template

        template = read_template(chat_template_file)
    sampling = sampling_from(context)
    if probs_file is not None and not n_probs:
        raise typer.BadParameter("--probs-file needs --n-probs, how many tokens to write at every step")
    if probs_file is not None:
        with probs_file.open("ab"):
            pass  # fails before any work if it is not writable
    constraint = constraint_of(json_schema, grammar)
    engine = loaded(
        model,
        ctx,
        device=device.value,
        gpu_memory=gpu_memory,
        gpu_experts=gpu_experts,
        missing=missing.value,
        expert_counts=expert_counts,
        threads=threads,
        precision=precision.value,
    )
    max_tokens = None if count < 0 else count
    if chatting:
        from fiddler.chat import Chat
        from fiddler.cli.chat import open_chat

        chat = Chat(
            engine,
            system,
            sampling,
            max_tokens,
            template=template,
            stop=stop or (),
            ignore_eos=ignore_eos,
            constraint=constraint,
        )
        open_chat(chat, str(model or "the demo model"), _stats_text, show_stats=stats)
        return
    if prompt_cache is not None and callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a half-written file must be removed
    if options is not None:
        search_stats = print_beams(
            engine,
            text,
            options,
            max_tokens,
            n_best,
            stop=stop or (),
            ignore_eos=ignore_eos,
            prompt_cache=prompt_cache,
            stats=stats,
        )
        if stats:
            say(f"{engine.where} | {_stats_text(search_stats)}")
        return
    generation = engine.start(
        text,
        sampling,
        max_tokens,
        stop=stop or (),
        ignore_eos=ignore_eos,
        constraint=constraint,
        prompt_cache=prompt_cache,
    )
    for piece in generation:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if n_probs:
        from fiddler.serving.json_fields import probs_of

        pieces = engine.tokenizer.pieces(special=True)
        lines = [json.dumps(probs_of(pieces, step)) for step in generation.completion.log_probs]
        if probs_file is None:
            for line in lines:
                say(line)
        else:
            probs_file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    if stats:
        say(f"{engine.where} | {_stats_text(generation.completion.stats)}")


def _on_terminal() -> bool:
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt from -p, a file or standard input. Raises BadParameter (usage error) for none or more than one.

    As in llama.cpp, one newline at the end of a file is dropped: `echo` and editors add it. Bytes that are not UTF-8
    reach the tokenizer unchanged.
    """
    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter("give -p or --prompt-file, not both")
    if prompt is not None:
        return prompt
    if prompt_file is not None:
        try:
            data = prompt_file.read_bytes()
        except OSError as error:
            raise FiddlerError(f"{prompt_file}: cannot be read: {error.strerror}") from None
    elif sys.stdin is None or sys.stdin.isatty():
        raise typer.BadParameter("no prompt: give -p TEXT, --prompt-file FILE, or text on standard input")
    else:
        data = sys.stdin.buffer.read()
    return data.removesuffix(b"\n").decode("utf-8", "surrogateescape")


def _stats_text(stats: Stats) -> str:
    cached = f" ({stats.cached_tokens} of them computed before)" if stats.cached_tokens else ""
    return (
        f"load {stats.load_seconds:.2f} s | "
        f"prompt {stats.prompt_tokens} tokens{cached}, {stats.prompt_speed:.1f} tokens/s | "
        f"generation {stats.generated_tokens} tokens, {stats.generation_speed:.1f} tokens/s | "
        f"peak memory {stats.peak_resident / 2**20:.0f} MiB with the mapped file, "
        f"{stats.anonymous / 2**20:.0f} MiB of its own"
    )
