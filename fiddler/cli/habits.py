"""Options and commands of llama.cpp and Hugging Face that users type from habit: another name, nothing, or our option.

`ALIASES` are other names of our options. `IGNORED` ask for what fiddler does anyway. `REFUSED` mean something that
fiddler does in another way, or not: the line says which option does it here. Pure tables; docs/usage.md has them too.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["ALIASES", "ARGUMENTS", "BARE", "COMMANDS", "IGNORED", "REFUSED", "VALUES", "hub_name"]

ALIASES: Mapping[str, str] = {
    "--temperature": "--temp",
    "--max-tokens": "--n-predict",
    "--max-new-tokens": "--n-predict",
    "--predict": "--n-predict",
    "--ctx-size": "--ctx",
    "-s": "--seed",
    "-f": "--prompt-file",
    "--file": "--prompt-file",
    "-r": "--stop",
    "--reverse-prompt": "--stop",
    "-sys": "--system",
    "--system-prompt": "--system",
    "-j": "--json-schema",
    "-jf": "--json-schema",
    "--repetition-penalty": "--repeat-penalty",
    "--num-beams": "--beams",
    "--outtype": "--dtype",
    "--perf": "--stats",
    "-sp": "--special",
    "-st": "--chat",
    "--single-turn": "--chat",
    "-cnv": "--chat",
    "--conversation": "--chat",
    "--webui": "--ui",
    "--no-webui": "--no-ui",
    "-to": "--timeout",
    "--served-model-name": "--alias",
    "--max-model-len": "--ctx",
    "--max-num-seqs": "--parallel",
    "--quantization": "--type",
}
"""Other names. They hold for commands that have the option on the right and none of the name on the left."""

ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "-m": ("model",),
    "--model": ("model",),
    "--outfile": ("target",),
    "--output": ("target", "out"),
    "-o": ("target", "out"),
    "--output-file": ("out",),
    "-i": ("prompts",),
    "--input": ("prompts",),
    "--input-file": ("prompts",),
}
"""Options elsewhere that are arguments without a name here. They hold for commands without an option of the name."""

BARE: Mapping[str, str] = {"run": "-p", "perplexity": "-f", "batch": "-m", "quantize": "--type"}
"""Of each command, the option whose value people type without it."""

_WIDE = "files are written in 16 bits, and the default is the checkpoint's type"
VALUES: Mapping[tuple[str, str], str] = {
    ("--dtype", "(f|fp|float)32"): _WIDE,
    ("--dtype", "auto"): _WIDE,
    ("--dtype", "(fp|float)16|half"): "give f16",
    ("--dtype", "bfloat16"): "give bf16",
    ("--dtype", "i?q\\d.*|tq\\d.*|int\\d|fp8.*|mxfp4|nf4"): "give --type, as --type Q4_K_M, in its place",
    ("--device", "gpu|nvidia|cuda:.*|\\d+"): "give cuda; CUDA_VISIBLE_DEVICES chooses which",
    ("--precision", "(fp|float|f)32|full"): "give exact",
    ("--cache-type-k", "bf16|(fp|float)16|half"): "give f16",
    ("--cache-type-v", "bf16|(fp|float)16|half"): "give f16",
    ("--cache-type-k", "i?q[45].*|fp8.*|int8"): "give q8_0",
    ("--cache-type-v", "i?q[45].*|fp8.*|int8"): "give q8_0",
    ("--precision", "bf16|f16|(fp|float|bfloat)16|half"): "give fast",
}
"""What to give instead of values of other programs, by option and regular expression."""

IGNORED = frozenset(
    {
        *("--jinja", "--no-display-prompt", "--log-disable", "--color", "--stream"),
        *("-cb", "--cont-batching", "--enable-prefix-caching", "-kvu", "--kv-unified"),
    }
)
"""Flags for what is so anyway: Jinja templates, no echo of the prompt, no log, no colours, text as it comes; requests
that join and leave at every step, share their beginnings, and share the memory of the KV cache."""

_PLACES = "--gpu-memory 24GiB limits what the GPU holds, --gpu-experts N the experts there; --device cpu uses no GPU"
_SAMPLERS = "the samplers and their order are fixed: penalties, DRY, top-k, typical, top-p, min-p, XTC, temperature"
_DOWNLOAD = "fiddler downloads nothing: `hf download ORG/NAME --local-dir DIR`, then `fiddler convert DIR OUT.gguf`"
_MAPPED = "the file is always memory-mapped; the system caches it, and for a GPU it is pinned"
_STEPS = "fiddler chooses how many tokens of a prompt go into a step"
_ONE_GPU = "one GPU is used; the environment's CUDA_VISIBLE_DEVICES chooses it"
_ROPE = "RoPE is as the file says; for another one change the checkpoint's config.json and convert it again"
_CLIENT_KEYS = 'a key comes from --api-key, or from the environment: FIDDLER_API_KEY="$(cat FILE)"'
_PLAIN_HTTP = "the server speaks HTTP without TLS: put a proxy before it, and leave --host at 127.0.0.1"
_TYPES = "each tensor's type is llama-quantize's for --type; leave it out"
_ONLY_PERPLEXITY = "only the perplexity of a text is measured"

REFUSED: Mapping[str, str] = {
    name: reason
    for names, reason in {
        ("-ngl", "--gpu-layers", "--n-gpu-layers"): f"experts are placed, not layers: {_PLACES}",
        ("-ncmoe", "--n-cpu-moe", "-cmoe", "--cpu-moe"): f"experts are placed one by one: {_PLACES}",
        ("-ot", "--override-tensor", "--device-map"): f"tensors have no places of their own: {_PLACES}",
        ("-no-cnv", "--no-conversation"): "with -p a text is continued without a chat; leave it out (--chat answers)",
        ("-i", "--interactive", "-if", "--interactive-first"): "without -p, on a terminal, `run` is a chat",
        ("-hf", "-hfr", "--hf-repo", "-hff", "--hf-file", "-mu", "--model-url", "-dr"): _DOWNLOAD,
        ("--mlock", "--no-mmap", "--mmap"): _MAPPED,
        ("--numa",): "run fiddler under `numactl`",
        ("-tb", "--threads-batch"): "-t is for prompts as well",
        ("-b", "--batch-size", "-ub", "--ubatch-size"): _STEPS,
        ("-fa", "--flash-attn"): "attention never stores all scores; leave it out",
        ("--lora", "--lora-scaled"): "merge the adapter (peft: merge_and_unload), then `fiddler convert` the result",
        ("-md", "--model-draft", "--draft", "--assistant-model"): "there is no speculative decoding",
        ("--rope-scaling", "--rope-scale", "--rope-freq-base", "--rope-freq-scale", "--yarn-orig-ctx"): _ROPE,
        ("-dev",): "--device is auto, cpu or cuda",
        ("-sm", "--split-mode", "-ts", "--tensor-split", "-mg", "--main-gpu"): _ONE_GPU,
        ("--mirostat", "--mirostat-lr", "--mirostat-ent", "--dynatemp-range", "--dynatemp-exp"): _SAMPLERS,
        ("--samplers", "--sampler-seq", "--sampling-seq", "--top-nsigma"): _SAMPLERS,
        ("-e", "--escape"): "the shell writes escapes: -p $'two\\nlines'",
        (
            "-v",
            "--verbose",
            "-lv",
            "--log-verbosity",
        ): "--stats prints times; FIDDLER_TRACEBACK=1 shows an error's source",
        ("--chat-template",): "--chat-template-file FILE reads a template of Jinja",
        ("--in-prefix", "--in-suffix"): "a chat template says what stands around messages: --chat-template-file FILE",
        ("--keep", "--context-shift", "--no-context-shift"): "a chat leaves out its oldest turns when --ctx is full",
        ("--load-in-8bit", "--load-in-4bit", "--torch-dtype"): "weights run in the file's own type: `fiddler convert`",
        ("--api-key-file",): _CLIENT_KEYS,
        ("--ssl-key-file", "--ssl-cert-file", "--ssl-keyfile", "--ssl-certfile"): _PLAIN_HTTP,
        ("--embedding", "--embeddings", "--rerank", "--reranking", "--pooling"): "there are no embeddings",
        ("--slot-save-path", "-sps", "--slot-prompt-similarity"): "prompts share their beginnings by themselves",
        ("--path", "--public-path", "--api-prefix"): "the page is at /; --no-ui leaves it out",
        ("--props",): "/props is read only",
        ("--reasoning-format",): "each request says so, in its reasoning_format",
        ("-tp", "--tensor-parallel-size", "--pipeline-parallel-size"): _ONE_GPU,
        ("--gpu-memory-utilization",): "--gpu-memory 24GiB is a size, not a share",
        ("--trust-remote-code",): "code of a model never runs; leave it out",
        ("--allow-requantize",): "only models in 16 or 32 bits are quantised: start from one",
        ("--pure", "--leave-output-tensor", "--output-tensor-type", "--token-embedding-type", "--tensor-type"): _TYPES,
        ("--hellaswag", "--winogrande", "--multiple-choice", "--kl-divergence"): _ONLY_PERPLEXITY,
    }.items()
    for name in names
}
"""Why an option is not taken, and what to give instead. They hold for commands that have none of the name."""

_RUN = "`fiddler run MODEL.gguf`"
_FILES = "models are files: give the path of a .gguf file"
_CONVERT = "`fiddler convert DIR OUT.gguf` converts a checkpoint"
_NO_TRAINING = "fiddler only runs models"
COMMANDS: Mapping[str, str] = {
    "chat": f"{_RUN} without -p, on a terminal, is a chat",
    "cli": f"{_RUN} generates",
    "main": f"{_RUN} generates",
    "simple": f"{_RUN} generates",
    "completion": "`fiddler run MODEL.gguf -p TEXT` generates",
    "generate": "`fiddler run MODEL.gguf -p TEXT` generates",
    "complete": "`fiddler run MODEL.gguf -p TEXT` generates",
    "server": "`fiddler serve MODEL.gguf` is the server",
    "pull": _DOWNLOAD,
    "download": _DOWNLOAD,
    "list": _FILES,
    "ls": _FILES,
    "rm": _FILES,
    "create": _CONVERT,
    "convert-hf-to-gguf": _CONVERT,
    "batched": "`fiddler batch IN.jsonl OUT.jsonl -m MODEL.gguf` generates for many prompts",
    "run-batch": "`fiddler batch IN.jsonl OUT.jsonl -m MODEL.gguf` generates for many prompts",
    "train": _NO_TRAINING,
    "finetune": _NO_TRAINING,
    "embedding": "there are no embeddings",
    "embed": "there are no embeddings",
    "gguf-split": "a split file runs as it is: give the first part",
    "ps": "nothing runs in the background",
    "show": "`fiddler inspect MODEL.gguf` shows a model",
    "help": "`fiddler --help` lists the commands, `fiddler COMMAND --help` its options",
    "version": "`fiddler --version` prints the version",
}
"""What to type instead of commands that fiddler does not have."""


def hub_name(text: str) -> str | None:
    """What to do with a model's name on the Hugging Face hub, as `mistralai/Mixtral-8x7B-v0.1`; None for others."""
    organisation, slash, name = text.partition("/")
    parts = (organisation, name)
    named = all(part and part.replace("-", "").replace("_", "").replace(".", "").isalnum() for part in parts)
    return _DOWNLOAD.replace("ORG/NAME", text) if slash and named and not text.endswith(".gguf") else None
