"""Measure a trained demo model as transformers runs it, in float32 on its bfloat16 weights, and let it write.

    python evaluate.py out

Reads out/hf, out/heldout.txt and, where there is one, out/training.json; writes out/metrics.json and
out/samples.txt.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from transformers import MixtralForCausalLM

BOS, EOS = 1, 2
PROMPTS = ["Once upon a time"] * 5 + ["One day,", "Tom and Mia", "The old lighthouse"]


@torch.no_grad()
def perplexity(model: MixtralForCausalLM, ids: np.ndarray, window: int) -> float:
    """Over non-overlapping windows, the first token of each replaced by BOS, scoring the second half of each.

    (As llama.cpp's `llama-perplexity` does.) `ids` is the whole text without BOS and EOS.
    """
    rows = torch.from_numpy(ids.astype(np.int64)[: len(ids) // window * window]).view(-1, window).to(model.device)
    nats, count = 0.0, 0
    for row in rows.split(16):
        given = row.clone()
        given[:, 0] = BOS
        logits = model(given).logits[:, window // 2 : -1].float()
        nats += F.cross_entropy(logits.flatten(0, 1), row[:, window // 2 + 1 :].flatten(), reduction="sum").item()
        count += logits.shape[0] * logits.shape[1]
    return math.exp(nats / count)


@torch.no_grad()
def story_loss(model: MixtralForCausalLM, stories: list[np.ndarray]) -> float:
    """Nats a token over whole stories, each on its own after BOS and with its EOS scored."""
    nats, count = 0.0, 0
    for story in stories:
        ids = torch.from_numpy(story.astype(np.int64)).to(model.device)
        logits = model(ids[None, :-1]).logits[0].float()
        nats += F.cross_entropy(logits, ids[1:], reduction="sum").item()
        count += len(ids) - 1
    return nats / count


@torch.no_grad()
def expert_usage(model: MixtralForCausalLM, stories: list[np.ndarray]) -> list[list[float]]:
    """Share of each layer's assignments that each expert takes: [layer][expert], rows sum to 1."""
    config = model.config
    counts = torch.zeros(config.num_hidden_layers, config.num_local_experts)
    for story in stories:
        ids = torch.from_numpy(story.astype(np.int64)).to(model.device)
        logits = model(ids[None], output_router_logits=True).router_logits  # a layer: [S, E]
        for layer, row in enumerate(logits):
            chosen = row.float().topk(config.num_experts_per_tok, -1).indices.flatten().cpu()
            counts[layer] += torch.bincount(chosen, minlength=config.num_local_experts)
    return (counts / counts.sum(1, keepdim=True)).tolist()


@torch.no_grad()
def sample(model: MixtralForCausalLM, pieces: sentencepiece.SentencePieceProcessor, prompt: str, seed: int) -> str:
    """The prompt and up to 120 tokens after it, at temperature 0.7; "[end]" where the story ended by itself."""
    torch.manual_seed(seed)
    ids = torch.tensor([[BOS, *pieces.encode(prompt)]], device=model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.7, top_k=0, top_p=1.0,
        max_new_tokens=120, pad_token_id=EOS,
    )  # fmt: skip
    text: str = pieces.decode(out[0].tolist())
    return text + (" [end]" if out[0, -1] == EOS else "")


def main() -> None:
    """Evaluate one folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder that train.py wrote")
    parser.add_argument(
        "--stories", type=int, default=400, help="held-out stories for the expert usage and the loss a story"
    )
    arguments = parser.parse_args()
    out, folder = arguments.out, arguments.out / "hf"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    text = (out / "heldout.txt").read_text()
    heldout = text.strip().split("\n\n")[: arguments.stories]
    stories = [np.array(row, dtype=np.uint16) for row in pieces.encode(heldout, add_bos=True, add_eos=True)]
    whole = np.array(pieces.encode(text), dtype=np.uint16)
    usage = expert_usage(model, stories)
    metrics = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "heldout_bytes": len(text.encode()),
        "heldout_tokens": len(whole),
        "perplexity_512": perplexity(model, whole, 512),
        "perplexity_stories": math.exp(story_loss(model, stories)),
        "expert_usage_min": min(map(min, usage)),
        "expert_usage_max": max(map(max, usage)),
        "expert_usage": usage,
    }
    if (out / "training.json").exists():
        metrics["training"] = json.loads((out / "training.json").read_text())
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    texts = [sample(model, pieces, prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    (out / "samples.txt").write_text("\n\n---\n\n".join(texts) + "\n")
    print(json.dumps(metrics, indent=1))


if __name__ == "__main__":
    main()
