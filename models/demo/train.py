"""Train the demo model on a file of stories: first its tokenizer, then the model.

    python train.py stories.txt out --minutes 10

Writes out/hf (a Hugging Face folder, bfloat16), out/heldout.txt and out/training.json, and keeps out/hf up to
date while it trains, so that an interrupted run still leaves a model. evaluate.py measures the result.

The weights live in transformers' `MixtralForCausalLM`. Training does not use its forward pass but the one
below, the same mathematics for speed: all experts are computed for all tokens as three large products, and the
router's weights, zero for the six experts that a token does not go to, scale the hidden units in between. For
a model this small that is faster on a GPU than gathering. `compare` holds the two passes against each other.

Letters: N sequences, S positions, D width, H heads, G KV heads, C head size, E experts, K experts a token,
F expert width.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM

BOS, EOS = 1, 2


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the model, apart from the text and the time."""

    vocabulary: int = 4096
    width: int = 256
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    experts: int = 8
    experts_per_token: int = 2
    expert_width: int = 288
    context: int = 1024
    sequences: int = 64  # a step
    peak_rate: float = 2.5e-3
    warm_up: int = 200  # steps
    decay: float = 0.1
    balance: float = 0.01  # weight of the load-balancing loss

    def config(self) -> MixtralConfig:
        return MixtralConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.expert_width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.width // self.heads,
            num_local_experts=self.experts,
            num_experts_per_tok=self.experts_per_token,
            max_position_embeddings=self.context,
            sliding_window=None,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            router_aux_loss_coef=self.balance,
            bos_token_id=BOS,
            eos_token_id=EOS,
            tie_word_embeddings=False,
        )


# Text and tokens


def split(stories: list[str], heldout_bytes: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """A random part of at least `heldout_bytes` to test on, and the rest, shuffled, to train on."""
    order = random.Random(seed).sample(stories, len(stories))
    size = count = 0
    while size < heldout_bytes:
        size += len(order[count].encode()) + 2
        count += 1
    return order[:count], order[count:]


def train_tokenizer(stories: list[str], out: Path, vocabulary: int, sample_bytes: int = 8_000_000) -> None:
    """A SentencePiece BPE like Mixtral's, on the first megabytes: byte fallback, no normalisation at all."""
    lines: list[str] = []
    size = 0
    for story in stories:
        lines += story.split("\n")
        size += len(story)
        if size > sample_bytes:
            break
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(out / "tokenizer"),
        model_type="bpe",
        vocab_size=vocabulary,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=1.0,
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        minloglevel=2,
    )
    (out / "tokenizer.vocab").unlink()
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "sp_model_kwargs": {},
        "use_default_system_prompt": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def encode(tokenizer: Path, stories: list[str]) -> np.ndarray:
    """All stories as one row of ids, each between BOS and EOS."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    ids = pieces.encode(stories, add_bos=True, add_eos=True)
    return np.concatenate([np.array(row, dtype=np.uint16) for row in ids])


def encode_all(tokenizer: Path, stories: list[str], workers: int) -> np.ndarray:
    """`encode` in several processes."""
    parts = [stories[i::workers] for i in range(workers)]
    with ProcessPoolExecutor(workers) as pool:
        return np.concatenate(list(pool.map(encode, [tokenizer] * workers, parts)))


# The training pass


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS normalisation over the last axis, in float32."""
    y = x.float()
    return weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding in Hugging Face's order. x [N, heads, S, C], turn [2, S, C/2]."""
    left, right = x.float().chunk(2, dim=-1)
    cos, sin = turn.unbind(0)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(x.dtype)


def block(
    x: Tensor,
    turn: Tensor,
    eps: float,
    heads: int,
    kv_heads: int,
    top: int,
    dtype: torch.dtype,
    weights: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """One layer on x [N, S, D] -> x, and the load-balancing loss of its router.

    That loss is E times the sum over experts of (share of the tokens sent there) times (mean probability): K
    where all is even, with K assignments a token. The share has no gradient. (Fedus et al. 2021, equation 4,
    for each layer by itself.)
    """
    n, s, d = x.shape
    w = {name: weight.to(dtype) for name, weight in weights.items() if weight.dim() > 1}
    y = rms_norm(x, weights["input_layernorm.weight"], eps).to(dtype)
    q = F.linear(y, w["self_attn.q_proj.weight"]).view(n, s, heads, -1).transpose(1, 2)
    k = F.linear(y, w["self_attn.k_proj.weight"]).view(n, s, kv_heads, -1).transpose(1, 2)
    v = F.linear(y, w["self_attn.v_proj.weight"]).view(n, s, kv_heads, -1).transpose(1, 2)
    groups = heads // kv_heads
    k, v = rotate(k, turn).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    y = F.scaled_dot_product_attention(rotate(q, turn), k, v, is_causal=True)
    x = x + F.linear(y.transpose(1, 2).reshape(n, s, d), w["self_attn.o_proj.weight"])

    normed = rms_norm(x, weights["post_attention_layernorm.weight"], eps).view(-1, d)  # [T, D]
    odds = F.linear(normed, weights["mlp.gate.weight"]).softmax(-1)  # [T, E], float32
    best, chosen = odds.topk(top, -1)
    share = torch.zeros_like(odds).scatter(1, chosen, best / best.sum(-1, keepdim=True))
    sent = (share.detach() > 0).float().mean(0)
    balance = odds.shape[1] * (sent * odds.mean(0)).sum()

    up_down = w["mlp.experts.gate_up_proj"]  # [E, 2 F, D], gate rows first
    experts, width = up_down.shape[0], up_down.shape[1] // 2
    gate, up = F.linear(normed.to(dtype), up_down.flatten(0, 1)).view(-1, experts, 2, width).unbind(2)
    hidden = F.silu(gate) * up * share.to(dtype).unsqueeze(-1)  # [T, E, F]
    down = w["mlp.experts.down_proj"].transpose(0, 1).reshape(d, experts * width)  # [E, D, F] -> [D, E F]
    return x + F.linear(hidden.flatten(1), down).view(n, s, d), balance


def head_loss(x: Tensor, norm: Tensor, weight: Tensor, targets: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Mean cross-entropy in nats of the next tokens, x [N, S, D], targets [N, S]."""
    logits = F.linear(rms_norm(x, norm, eps).to(dtype), weight.to(dtype))
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Trainer:
    """The training pass over a `MixtralForCausalLM`'s own parameters."""

    def __init__(self, model: MixtralForCausalLM, dtype: torch.dtype, compiled: bool) -> None:
        self.model, self.config, self.dtype = model, model.config, dtype
        self.block = torch.compile(block, dynamic=False) if compiled else block
        self.head_loss = torch.compile(head_loss, dynamic=False) if compiled else head_loss
        self.layers = [dict(layer.named_parameters()) for layer in model.model.layers]
        config = self.config
        steps = torch.arange(0, config.head_dim, 2, device=model.device).float() / config.head_dim
        rates = config.rope_parameters["rope_theta"] ** -steps
        angles = torch.arange(config.max_position_embeddings, device=model.device).float()[:, None] * rates
        self.turn = torch.stack((angles.cos(), angles.sin()))  # [2, context, C/2]

    def losses(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy (nats a token) and load-balancing loss (mean over layers); ids and targets [N, S]."""
        config, eps = self.config, self.config.rms_norm_eps
        x = F.embedding(ids, self.model.model.embed_tokens.weight)
        turn = self.turn[:, : ids.shape[1]]
        balances = []
        for weights in self.layers:
            x, balance = self.block(
                x,
                turn,
                eps,
                config.num_attention_heads,
                config.num_key_value_heads,
                config.num_experts_per_tok,
                self.dtype,
                weights,
            )
            balances.append(balance)
        loss = self.head_loss(x, self.model.model.norm.weight, self.model.lm_head.weight, targets, eps, self.dtype)
        return loss, torch.stack(balances).mean()


@torch.no_grad()
def compare(model: MixtralForCausalLM, ids: Tensor) -> float:
    """Relative difference of our loss and transformers', both in float32. Should be rounding."""
    ours, _ = Trainer(model, torch.float32, compiled=False).losses(ids[:, :-1], ids[:, 1:])
    theirs = F.cross_entropy(model(ids[:, :-1]).logits.float().flatten(0, 1), ids[:, 1:].flatten())
    return (abs(ours - theirs) / theirs).item()


def rate_at(step: int, progress: float, recipe: Recipe) -> float:
    """Learning rate: linear warm-up by steps, cosine over the time (`progress` 0 to 1) to 1 % of the peak."""
    cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return recipe.peak_rate * min(1.0, (step + 1) / recipe.warm_up) * cosine


def save(model: MixtralForCausalLM, out: Path) -> None:
    """The folder transformers would publish: bfloat16, original tensor names."""
    copy = MixtralForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict({name: tensor.to("cpu", torch.bfloat16) for name, tensor in model.state_dict().items()})
    copy.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, do_sample=True, temperature=0.7)
    copy.save_pretrained(out)


def train(
    recipe: Recipe, tokens: np.ndarray, heldout: np.ndarray, out: Path, minutes: float, device: str
) -> tuple[int, float]:
    """Train for `minutes` on random windows of `tokens`; returns the tokens seen and the seconds it took."""
    fast = device == "cuda"
    torch.manual_seed(0)
    model = MixtralForCausalLM(recipe.config()).to(device)
    data = torch.from_numpy(tokens.astype(np.int32)).to(device)
    test = torch.from_numpy(heldout.astype(np.int64)).to(device)
    length, window = recipe.context, torch.arange(recipe.context + 1, device=device)
    test = test[: (len(test) - 1) // length * length + 1].unfold(0, length + 1, length)[: recipe.sequences]
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(tokens)} tokens of text")
    print(f"against transformers' forward pass: {compare(model, test[:2]):.2e}", flush=True)

    trainer = Trainer(model, torch.bfloat16 if fast else torch.float32, compiled=fast)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": recipe.decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.95), fused=fast)

    started = saved = reported = time.monotonic()
    step = reported_step = 0
    while True:
        now = time.monotonic()
        progress = (now - started) / (60 * minutes)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, progress, recipe)
        first = torch.randint(len(data) - length - 1, (recipe.sequences, 1), device=device)
        ids = data[first + window].long()  # [N, context + 1]
        loss, balance = trainer.losses(ids[:, :-1], ids[:, 1:])
        (loss + recipe.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 20 == 0:
            value = loss.item()  # waits for the GPU, so that the clock is honest
            now = time.monotonic()
            if now - reported > 15 or step == 20:
                with torch.no_grad():
                    nats = (
                        trainer.losses(test[:, :-1], test[:, 1:])[0].item()
                        if len(test) == recipe.sequences
                        else math.nan
                    )
                speed = (step - reported_step) * recipe.sequences * length / (time.monotonic() - reported)
                print(
                    f"{now - started:5.0f} s  step {step}  loss {value:.3f}  balance {balance.item():.3f}  "
                    f"held-out {nats:.3f}  {speed / 1e6:.3f} M tokens/s",
                    flush=True,
                )
                reported, reported_step = time.monotonic(), step
            if now - saved > 120:
                save(model, out)
                saved = time.monotonic()
    save(model, out)
    print(f"against transformers' forward pass, trained: {compare(model, test[:2]):.2e}", flush=True)
    return step * recipe.sequences * length, time.monotonic() - started


def main() -> None:
    """Train one model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("stories", type=Path, help="text file: stories separated by blank lines")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--minutes", type=float, default=10, help="training time, compiling included")
    parser.add_argument("--heldout-kb", type=int, default=300, help="kilobytes of text to keep for tests")
    parser.add_argument("--sequences", type=int, default=Recipe.sequences, help="sequences a step")
    parser.add_argument("--context", type=int, default=Recipe.context, help="tokens a sequence")
    parser.add_argument("--workers", type=int, default=12, help="processes that tokenize")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = Recipe(sequences=arguments.sequences, context=arguments.context)
    folder = arguments.out / "hf"
    folder.mkdir(parents=True, exist_ok=True)

    started = time.monotonic()
    stories = [story for story in arguments.stories.read_text().split("\n\n") if story]
    heldout, training = split(stories, 1000 * arguments.heldout_kb)
    (arguments.out / "heldout.txt").write_text("\n\n".join(heldout) + "\n")
    train_tokenizer(training, folder, recipe.vocabulary)
    print(
        f"{len(training)} stories, {len(heldout)} held out; tokenizer after {time.monotonic() - started:.0f} s",
        flush=True,
    )
    tokens = encode_all(folder / "tokenizer.model", training, arguments.workers)
    test = encode(folder / "tokenizer.model", heldout)
    print(f"text as tokens after {time.monotonic() - started:.0f} s", flush=True)
    seen, seconds = train(recipe, tokens, test, folder, arguments.minutes, device)
    record = {
        "recipe": asdict(recipe), "training_stories": len(training),
        "training_characters": sum(map(len, training)), "training_tokens": len(tokens), "tokens_seen": seen,
        "seconds": seconds, "tokens_per_second": seen / seconds,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
    }  # fmt: skip
    (arguments.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{seen} tokens seen in {seconds:.0f} s")


if __name__ == "__main__":
    main()
