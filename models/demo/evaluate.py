"""Measure a trained demo model as transformers runs it, in float32 on its bfloat16 weights, and let it write.

    python evaluate.py out
    python evaluate.py out --text ../../tests/data/heldout.txt

Reads out/hf, out/heldout.txt (or another text of stories: then the losses by story and the experts only) and, where
there is one, out/training.json; writes out/metrics.json and out/samples.txt.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import vocabulary
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

PROMPTS = ["Once upon a time"] * 5 + ["One day,", "Tom and Mia", "The old lighthouse"]


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: np.ndarray, window: int) -> float:
    """Over non-overlapping windows, the first token of each replaced by BOS, scoring the second half of each.

    (As llama.cpp's `llama-perplexity` does.) `ids` is the whole text without BOS and EOS.
    """
    rows = torch.from_numpy(ids.astype(np.int64)[: len(ids) // window * window]).view(-1, window).to(model.device)
    nats, count = 0.0, 0
    for row in rows.split(16):
        given = row.clone()
        given[:, 0] = model.config.bos_token_id
        logits = model(given).logits[:, window // 2 : -1].float()
        nats += F.cross_entropy(logits.flatten(0, 1), row[:, window // 2 + 1 :].flatten(), reduction="sum").item()
        count += logits.shape[0] * logits.shape[1]
    return math.exp(nats / count)


@torch.no_grad()
def read_stories(model: PreTrainedModel, stories: list[np.ndarray]) -> tuple[float, int, list[Tensor]]:
    """Each story on its own after BOS, its EOS scored: nats, tokens scored, and of a story the experts [L, S, K]."""
    nats, count, chosen = 0.0, 0, []
    for story in stories:
        ids = torch.from_numpy(story.astype(np.int64)).to(model.device)
        out = model(ids[None, :-1], output_router_logits=True)
        nats += F.cross_entropy(out.logits[0].float(), ids[1:], reduction="sum").item()
        count += len(ids) - 1
        odds = torch.stack(out.router_logits).float()  # [L, S, E]
        chosen.append(odds.topk(model.config.num_experts_per_tok, -1).indices.cpu())
    return nats, count, chosen


def expert_usage(chosen: list[Tensor], experts: int) -> Tensor:
    """Share of each layer's assignments that each expert takes: [L, E], rows sum to 1."""
    hot = sum(F.one_hot(story, experts).sum((1, 2)) for story in chosen)
    return hot / hot.sum(1, keepdim=True)


def repeats(chosen: list[Tensor]) -> Tensor:
    """Share of a token's experts that the token before it chose as well, by layer: [L]."""
    same, count = torch.zeros(len(chosen[0])), 0
    for story in chosen:
        before, after = story[:, :-1, :, None], story[:, 1:, None, :]
        same += (before == after).sum((1, 2, 3))
        count += before.shape[1] * before.shape[2]
    return same / count


def routing(chosen: list[Tensor], experts: int) -> dict[str, object]:
    """How a model's experts are used. chance: repeats where each token drew its experts by their usage alone."""
    usage, top = expert_usage(chosen, experts), chosen[0].shape[2]
    return {
        "expert_usage_min": usage.amin(1).tolist(),
        "expert_usage_max": usage.amax(1).tolist(),
        "expert_entropy_bits": (-usage * usage.clamp(min=1e-12).log2()).sum(1).tolist(),
        "expert_entropy_even": math.log2(experts),
        "expert_repeats": repeats(chosen).tolist(),
        "expert_repeats_chance": (top * usage.square().sum(1)).tolist(),
        "expert_usage": usage.tolist(),
    }


@torch.no_grad()
def sample(model: PreTrainedModel, words: vocabulary.Vocabulary, prompt: str, seed: int) -> str:
    """The prompt and up to 120 tokens after it, at temperature 0.7; "[end]" where the story ended by itself."""
    torch.manual_seed(seed)
    ids = torch.tensor([[words.bos, *words.encode([prompt])[0]]], device=model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.7, top_k=0, top_p=1.0,
        max_new_tokens=120, pad_token_id=words.eos,
    )  # fmt: skip
    ended = out[0, -1].item() == words.eos
    text = words.decode([token for token in out[0].tolist() if token not in (words.bos, words.eos)])
    return text + (" [end]" if ended else "")


def main() -> None:
    """Evaluate one folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder that train.py wrote")
    parser.add_argument("--text", type=Path, help="stories to measure on; out/heldout.txt if not given")
    parser.add_argument(
        "--stories", type=int, default=400, help="stories of it for the expert usage and the loss a story"
    )
    parser.add_argument("--samples", type=int, default=len(PROMPTS), help="texts to write")
    arguments = parser.parse_args()
    out, folder = arguments.out, arguments.out / "hf"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    config = model.config
    words = vocabulary.read(folder, config.bos_token_id, config.eos_token_id)
    text = (arguments.text or out / "heldout.txt").read_text()
    heldout = text.strip().split("\n\n")[: arguments.stories]
    stories = words.stories(heldout)
    whole = np.array(words.encode([text])[0], dtype=np.uint16)
    nats, tokens, chosen = read_stories(model, stories)
    metrics = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "heldout_bytes": len(text.encode()),
        "heldout_tokens": len(whole),
        **({} if arguments.text else {"perplexity_512": perplexity(model, whole, 512)}),
        "stories": len(stories),
        "nats_stories": nats / tokens,
        "perplexity_stories": math.exp(nats / tokens),
        "bits_per_byte_stories": nats / math.log(2) / sum(len(story.encode()) + 1 for story in heldout),
        **routing(chosen, getattr(config, "num_local_experts", None) or config.num_experts),
    }
    if (out / "training.json").exists():
        metrics["training"] = json.loads((out / "training.json").read_text())
    name = "metrics" if arguments.text is None else f"metrics-{arguments.text.stem}"
    (out / f"{name}.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(json.dumps({key: value for key, value in metrics.items() if key != "expert_usage"}, indent=1), flush=True)
    if arguments.text is None:
        texts = [sample(model, words, prompt, seed) for seed, prompt in enumerate(PROMPTS[: arguments.samples])]
        (out / "samples.txt").write_text("\n\n---\n\n".join(texts) + "\n")


if __name__ == "__main__":
    main()
