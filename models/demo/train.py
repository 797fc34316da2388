"""Train a demo model on a file of stories: first its tokenizer, then the model.

    python train.py stories-18m stories.txt out --minutes 10
    python train.py stories-3m stories.txt out --minutes 40 --processes 2

Writes out/hf (a Hugging Face folder, bfloat16), out/heldout.txt and out/training.json, and keeps out/hf up to
date while it trains, so that an interrupted run still leaves a model. evaluate.py measures the result.

Several processes, on a CPU, take a part of each step's sequences and average their gradients: one meeting a step,
where the threads of one process would meet at every product, and on a busy machine wait for each other.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import vocabulary
from forward import Forward, compare
from recipes import RECIPES, Recipe
from torch import Tensor, distributed
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel


def split(stories: list[str], heldout_bytes: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """A random part of at least `heldout_bytes` to test on, and the rest, shuffled, to train on."""
    order = random.Random(seed).sample(stories, len(stories))
    size = count = 0
    while size < heldout_bytes:
        size += len(order[count].encode()) + 2
        count += 1
    return order[:count], order[count:]


def rate_at(step: int, progress: float, recipe: Recipe) -> float:
    """Learning rate: linear warm-up by steps, cosine over the time (`progress` 0 to 1) to 1 % of the peak."""
    cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return recipe.peak_rate * min(1.0, (step + 1) / recipe.warm_up) * cosine


def save(model: PreTrainedModel, recipe: Recipe, out: Path) -> None:
    """The folder transformers would publish: bfloat16, original tensor names."""
    copy = type(model)(model.config).to(torch.bfloat16)
    copy.load_state_dict({name: tensor.to("cpu", torch.bfloat16) for name, tensor in model.state_dict().items()})
    copy.generation_config = GenerationConfig(
        bos_token_id=recipe.bos, eos_token_id=recipe.eos, do_sample=True, temperature=0.7
    )
    copy.save_pretrained(out)


def optimizer_of(model: PreTrainedModel, recipe: Recipe, fused: bool) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors do not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": recipe.decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.95), fused=fused)


def average(parameters: Iterable[torch.nn.Parameter], progress: float) -> float:
    """Average all gradients over the processes, in place, and return their mean progress."""
    if not distributed.is_initialized():
        return progress
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor([progress])])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, part in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
    return flat[-1].item()


class Reports:
    """Lines on the progress, and the model saved every two minutes; only of the first process."""

    def __init__(self, forward: Forward, recipe: Recipe, test: Tensor, out: Path) -> None:
        self.forward, self.recipe, self.test, self.out = forward, recipe, test, out
        self.started = self.saved = self.reported = time.monotonic()
        self.reported_step = 0
        self.pause = 15 if forward.model.device.type == "cuda" else 60  # seconds: a CPU computes the losses for some

    def heldout(self) -> float:
        """Nats a token on the held-out windows, [N, context + 1]; with gradients, or all would be compiled again."""
        rows = self.test.split(self.forward_sequences)
        return float(np.mean([self.forward.losses(r[:, :-1], r[:, 1:])[0].item() for r in rows]))

    @property
    def forward_sequences(self) -> int:
        """Sequences that one process computes at once: other shapes would be compiled anew."""
        return self.recipe.sequences // (distributed.get_world_size() if distributed.is_initialized() else 1)

    def after(self, step: int, loss: Tensor, balance: Tensor) -> None:
        """Every 20 steps: print after a pause, save after two minutes."""
        if step % 20:
            return
        value = loss.item()  # waits for a GPU, so that the clock is honest
        now = time.monotonic()
        if now - self.reported > self.pause or step == 20:
            speed = (step - self.reported_step) * self.recipe.sequences * self.recipe.context / (now - self.reported)
            print(
                f"{now - self.started:5.0f} s  step {step}  loss {value:.3f}  balance {balance.item():.3f}  "
                f"held-out {self.heldout():.3f}  {speed / 1e6:.4f} M tokens/s",
                flush=True,
            )
            self.reported, self.reported_step = time.monotonic(), step
        if now - self.saved > 120:
            save(self.forward.model, self.recipe, self.out)
            self.saved = time.monotonic()


def train(
    recipe: Recipe, tokens: np.ndarray, heldout: np.ndarray, out: Path, minutes: float, device: str, rank: int = 0
) -> tuple[int, float]:
    """Train for `minutes` on random windows of `tokens`; returns the steps and the seconds they took."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(recipe.config()).to(device)
    data = torch.from_numpy(tokens.astype(np.int32)).to(device)
    length, window = recipe.context, torch.arange(recipe.context + 1, device=device)
    test = torch.from_numpy(heldout.astype(np.int64)).to(device)
    test = test[: (len(test) - 1) // length * length + 1].unfold(0, length + 1, length)
    forward = Forward(model, torch.bfloat16, compiled=True)
    reports = Reports(forward, recipe, test, out)
    local = reports.forward_sequences
    reports.test = test[: max(1, 16 // local) * local]
    if rank == 0:
        print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(tokens)} tokens of text")
        print(f"against transformers' forward pass: {compare(model, test[:2]):.2e}", flush=True)
    optimizer = optimizer_of(model, recipe, fused=device == "cuda")
    torch.manual_seed(rank)
    step, progress = 0, 0.0
    while progress < 1:
        first = torch.randint(len(data) - length - 1, (local, 1), device=device)
        ids = data[first + window].long()  # [N, context + 1]
        loss, balance = forward.losses(ids[:, :-1], ids[:, 1:])
        (loss + recipe.balance * balance).backward()
        progress = average(model.parameters(), (time.monotonic() - reports.started) / (60 * minutes))
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, progress, recipe)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if rank == 0:
            reports.after(step, loss, balance)
    seconds = time.monotonic() - reports.started
    if rank == 0:
        save(model, recipe, out)
        print(f"against transformers' forward pass, trained: {compare(model, test[:2]):.2e}", flush=True)
    return step, seconds


def part(rank: int, count: int, meeting: str, arguments: argparse.Namespace) -> None:
    """One process of several on a CPU, each with one thread; the first one trains a tokenizer and encodes the text."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    work(arguments, "cpu", rank)
    distributed.destroy_process_group()


def prepare(recipe: Recipe, arguments: argparse.Namespace) -> dict[str, int]:
    """Train the tokenizer and write the text as ids; returns sizes of the text."""
    started, out, folder = time.monotonic(), arguments.out, arguments.out / "hf"
    folder.mkdir(parents=True, exist_ok=True)
    stories = [story for story in arguments.stories.read_text().split("\n\n") if story.strip()]
    heldout, training = split(stories, 1000 * arguments.heldout_kb)
    (out / "heldout.txt").write_text("\n\n".join(heldout) + "\n")
    vocabulary.train(training, folder, recipe)
    print(f"{len(training)} stories, {len(heldout)} held out; tokenizer after {time.monotonic() - started:.0f} s")
    tokens = vocabulary.encode_all(folder, recipe, training, arguments.workers)
    np.save(out / "training.npy", tokens)
    np.save(out / "heldout.npy", vocabulary.encode(folder, recipe, heldout))
    print(f"text as tokens after {time.monotonic() - started:.0f} s", flush=True)
    characters = sum(map(len, training))
    return {"training_stories": len(training), "training_characters": characters, "training_tokens": len(tokens)}


def work(arguments: argparse.Namespace, device: str, rank: int = 0) -> None:
    """Prepare the text, train, and write out/training.json."""
    recipe = RECIPES[arguments.recipe]
    recipe = replace(recipe, sequences=arguments.sequences or recipe.sequences)
    sizes = prepare(recipe, arguments) if rank == 0 else {}
    if distributed.is_initialized():
        distributed.barrier()
    tokens, heldout = (np.load(arguments.out / name) for name in ("training.npy", "heldout.npy"))
    steps, seconds = train(recipe, tokens, heldout, arguments.out / "hf", arguments.minutes, device, rank)
    if rank:
        return
    seen = steps * recipe.sequences * recipe.context
    record = {
        "recipe": asdict(recipe), **sizes, "steps": steps, "tokens_seen": seen, "seconds": seconds,
        "tokens_per_second": seen / seconds, "processes": arguments.processes,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
    }  # fmt: skip
    (arguments.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{seen} tokens seen in {seconds:.0f} s")


def main() -> None:
    """Train one model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("recipe", choices=list(RECIPES), help="which demo model")
    parser.add_argument("stories", type=Path, help="text file: stories separated by blank lines")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--minutes", type=float, default=10, help="training time, compiling included")
    parser.add_argument("--heldout-kb", type=int, default=300, help="kilobytes of text to keep for tests")
    parser.add_argument("--sequences", type=int, help="sequences a step; the recipe's if not given")
    parser.add_argument("--processes", type=int, default=1, help="processes that train, on a CPU, of one thread each")
    parser.add_argument("--workers", type=int, default=12, help="processes that tokenize")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    if arguments.processes > 1:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(
                part, (arguments.processes, f"{folder}/meeting", arguments), nprocs=arguments.processes
            )
    else:
        work(arguments, "cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
