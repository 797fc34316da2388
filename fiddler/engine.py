"""The one place where file, model, experts, linears and tokenizer are wired together; the Python API's centre."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence as Ordered
from importlib.resources import files
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fiddler import kernels
from fiddler.completion import Completion, Generation
from fiddler.errors import RequestError, ResourceError
from fiddler.experts import CpuExperts, CpuLinear, ExpertWeights, LinearWeight, rms_norm, route
from fiddler.kernels import Product
from fiddler.model_file import ModelFile
from fiddler.models.mixtral import Mixtral
from fiddler.recorder import SILENT, Recorder
from fiddler.runner import Runner
from fiddler.sampling import Sampling
from fiddler.tokenizer import Tokenizer

__all__ = ["DEMO_MODEL", "Engine", "load"]

DEMO_MODEL = Path(str(files("fiddler.models"))) / "demo" / "stories-18m.gguf"

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fast", "exact"]


class Engine:
    """A loaded model. Not for several threads at once: the kernels are called from one thread."""

    def __init__(
        self,
        model_file: ModelFile,
        tokenizer: Tokenizer,
        runner: Runner,
        device: str,
        backend: str,
        load_seconds: float,
    ) -> None:
        self.model_file = model_file
        self.config = model_file.config
        self.tokenizer = tokenizer
        self.runner = runner
        self.device = device
        self.backend = backend  # the kernel tier
        self.load_seconds = load_seconds

    @property
    def context(self) -> int:
        """The most positions a sequence can have: what was asked for, at most what the model was trained with."""
        return self.runner.context

    def logits(self, ids: Ordered[int]) -> Tensor:
        """Logits after every one of `ids`: float32 [T, V] on the CPU.

        Raises RequestError when an id is outside the vocabulary or there are more ids than `context`.
        """
        ids = self._checked(ids)
        sequence = self.runner.sequence()
        chunks = [ids[begin : begin + self.runner.chunk] for begin in range(0, len(ids), self.runner.chunk)]
        if not chunks:
            return torch.empty(0, self.config.vocab_size)
        return torch.cat([self.runner.logits(self.runner.step([(sequence, chunk)])) for chunk in chunks])

    def start(
        self,
        prompt: str | Ordered[int],
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        *,
        stop: Ordered[str] = (),
        ignore_eos: bool = False,
    ) -> Generation:
        """Check a request and prepare it; nothing is computed until the result is iterated.

        prompt: text, which gets a BOS where the model's metadata say so, or token ids, taken as they are.
        max_tokens: None goes on until an end token or the end of the context. `stop`: strings that end the text,
        not included. `ignore_eos`: end tokens are never chosen.
        Raises RequestError when the prompt and `max_tokens` together exceed the context, or make no sense.
        """
        ids = self.tokenizer.encode(prompt, add_bos=self.tokenizer.add_bos) if isinstance(prompt, str) else prompt
        ids = self._checked(ids)
        if not ids:
            raise RequestError("the prompt is empty and this model adds no BOS token; give some text")
        if max_tokens is not None and max_tokens < 0:
            raise RequestError(f"max_tokens is {max_tokens}; give 0 or more, or none for no limit")
        room = self.context - len(ids)
        if max_tokens is not None and max_tokens > room:
            raise RequestError(
                f"{len(ids)} prompt tokens and {max_tokens} new ones exceed the context of {self.context}; "
                f"ask for at most {room} ({self._context_remedy()})"
            )
        if room == 0 and max_tokens is None:
            raise RequestError(
                f"{len(ids)} prompt tokens fill the context of {self.context} ({self._context_remedy()})"
            )
        if any(not text for text in stop):
            raise RequestError("a stop string is empty; give at least one character")
        limit = room if max_tokens is None else max_tokens
        return Generation(
            self.runner, self.tokenizer, ids, sampling or Sampling(), limit, stop, ignore_eos, self.load_seconds
        )

    def stream(
        self,
        prompt: str | Ordered[int],
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        *,
        stop: Ordered[str] = (),
        ignore_eos: bool = False,
    ) -> Iterator[str]:
        """The continuation of `prompt` as pieces of text, as they come. Arguments and errors: see `start`."""
        return iter(self.start(prompt, sampling, max_tokens, stop=stop, ignore_eos=ignore_eos))

    def generate(
        self,
        prompt: str | Ordered[int],
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        *,
        stop: Ordered[str] = (),
        ignore_eos: bool = False,
    ) -> Completion:
        """The whole continuation of `prompt`. Arguments and errors: see `start`."""
        generation = self.start(prompt, sampling, max_tokens, stop=stop, ignore_eos=ignore_eos)
        for _ in generation:
            continue
        return generation.completion

    def _checked(self, ids: Ordered[int]) -> list[int]:
        ids = [int(token) for token in ids]
        bad = next((token for token in ids if not 0 <= token < self.config.vocab_size), None)
        if bad is not None:
            raise RequestError(f"token id {bad} is outside the vocabulary of {self.config.vocab_size}")
        if len(ids) > self.context:
            raise RequestError(
                f"{len(ids)} tokens exceed the context of {self.context}; shorten them ({self._context_remedy()})"
            )
        return ids

    def _context_remedy(self) -> str:
        most = self.config.context_length
        return f"or raise --ctx, up to {most}" if self.context < most else "the model was trained with no more"


def load(
    path: str | Path | ModelFile | None = None,
    device: Device = "auto",
    gpu_memory: str | None = None,
    threads: int | None = None,
    context: int = 4096,
    precision: Precision = "fast",
    *,
    kernel: str | None = None,
    notify: Callable[[str], None] = lambda text: None,
    recorder: Recorder = SILENT,
) -> Engine:
    """Map a Mixtral GGUF and make it ready to run. Weights stay where they are: nothing is copied.

    path: a .gguf file, any part of a split one, one opened before, or None for the demo model that ships.
    device: "cpu", or "auto", which is the CPU as long as the GPU side is not built.
    threads: None for every core the process may use. context: positions a sequence can have; the model's own
    limit where that is smaller. precision: "fast" rounds activations to bf16 before products with bf16 weights and
    keeps their keys and values as float16; "exact", and every model of f16 weights, computes in float32.
    kernel: a tier by name; None for what the environment's FIDDLER_KERNEL says, or the best there is. notify: is
    told, in one line, when kernels must be compiled first, which takes seconds. recorder: is told what a step spends
    its time on.
    Raises FiddlerError for anything that cannot be run, in one line.
    """
    started = time.perf_counter()
    if precision not in ("fast", "exact"):
        raise RequestError(f"precision is {precision!r}; give 'fast' or 'exact'")
    if context < 1:
        raise RequestError(f"context is {context}; give at least 1")
    if device not in ("auto", "cpu", "cuda"):
        raise RequestError(f"device is {device!r}; give 'auto', 'cpu' or 'cuda'")
    if device == "cuda" or gpu_memory is not None:
        raise ResourceError("this version computes on the CPU only; leave out --gpu-memory and use --device cpu")
    model_file = path if isinstance(path, ModelFile) else ModelFile.open(DEMO_MODEL if path is None else path)
    model_file.check_runnable()
    tokenizer = model_file.tokenizer
    tier = kernels.choose_tier(kernel)
    threads = kernels.set_threads(threads)

    def product(kind: str) -> Product:
        weights = "bf16" if kind == "BF16" else "f16"
        return Product(tier, weights, "bf16" if precision == "fast" and weights == "bf16" else "f32")

    config = model_file.config
    experts = []
    for layer in range(config.block_count):
        gate, up, down = (model_file.bits(f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up", "down"))
        experts.append(ExpertWeights(gate[0], up[0], down[0], product(gate[1])))
    linears: dict[str, LinearWeight | Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name in config.tensor_shapes(tied=False):
        if name.endswith("_exps.weight"):
            continue
        values, kind = model_file.bits(name)
        if name.endswith(("norm.weight", "ffn_gate_inp.weight")):
            weights[name] = _tensor(values, kind).float()
        elif name == "token_embd.weight":
            weights[name] = _tensor(values, kind)
        else:
            linears[name] = _tensor(values, kind) if kind == "F32" else LinearWeight(values, product(kind))
    model = Mixtral(config, weights, CpuLinear(linears, recorder), CpuExperts(experts, recorder), route, rms_norm)
    used = {layer.product for layer in experts}
    used |= {weight.product for weight in linears.values() if isinstance(weight, LinearWeight)}
    for each in used:
        kernels.prepare(each, lambda: notify("compiling kernels for this CPU; the next start finds them on disk"))
    rounded = experts[0].product.activations == "bf16"
    runner = Runner(model, min(context, config.context_length), torch.float16 if rounded else torch.float32, threads)
    return Engine(model_file, tokenizer, runner, "cpu", tier.name, time.perf_counter() - started)


def _tensor(values: np.ndarray, kind: str) -> Tensor:
    """A torch tensor over the same memory as a view into the mapping."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch cannot mark a tensor read-only; nothing writes to weights
        tensor = torch.from_numpy(values)
    return tensor.view({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind])
