"""Make `tests/data/tiny/`, a very small Mixtral as a Hugging Face folder: `python tests/data/make_tiny.py`.

Random bfloat16 weights (seeded, so remaking gives the same bytes with the same library versions), and a real
SentencePiece tokenizer with byte fallback, trained here on a text written for it. What it says makes no
sense; that every implementation must say the same nonsense is what it is for. Needs the `dev` extra.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": None,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "model_type": "mixtral",
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 512,
}

TOKENIZER_CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "legacy": True,
    "model_max_length": 512,
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
}

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- ' [INST] ' + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('a message is from the user or the assistant') }}
    {%- endif %}
{%- endfor %}
"""

TEXT = """\
The old fiddler lived at the end of the village, where the road turned towards the hills.
Every evening he took the fiddle from the wall, tuned its four strings and played for the street.
Nobody could say how many tunes he knew. Some were slow and some were quick; some had no name at all.
When a child asked him where the tunes came from, he said that each had its own keeper.
"There are eight of them," he said, "and for every note I ask the two who know it best."
The child thought about this. "And what do the others do?" - "They wait, and they listen."
In winter the snow lay on the roofs, and the music went out through the window and over the fields.
In spring the river was high. In summer, people danced; in autumn they carried the apples home.
One day a merchant came with a heavy cart, and on the cart stood a machine with wheels of brass.
The machine could play a thousand tunes, but it was so large that it did not fit through any door.
"Take it apart," said the merchant, "and carry it in, piece by piece, whenever you want to hear it."
The fiddler shook his head. "It is easier to carry the listener to the music than the music to him."
So the machine stayed where it was, and the people walked out to it, and it played for them there.
He counted: 1, 2, 3, 4, 5, 6, 7, 8 keepers; 16 strings; 32 songs; 64 nights; 128 steps; 256 lamps.
def play(tune, keepers):
    best = sorted(keepers, key=lambda keeper: keeper.knows(tune))[-2:]
    return sum(keeper.weight * keeper.play(tune) for keeper in best)
The bridge was narrow, the water was deep, and whoever wanted to cross had to wait for the others.
They learned to cross from both sides at the same time, and then nobody had to wait any more.
"""


def make_tokenizer() -> bytes:
    """A SentencePiece BPE model that keeps its input's bytes: no normalisation, unknown characters as bytes."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=written,
        model_type="bpe",
        vocab_size=CONFIG["vocab_size"],
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()


def make_weights() -> dict[str, torch.Tensor]:
    """Random matrices of variance 1 / columns, so that activations keep their size, and norms around 1."""
    random = np.random.default_rng(20261122)
    D, F, V = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    E, H, G = CONFIG["num_local_experts"], CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
    queries, keys = D, D // H * G

    def matrix(rows: int, columns: int) -> torch.Tensor:
        values = random.standard_normal((rows, columns), dtype=np.float32) / columns**0.5
        return torch.from_numpy(values).to(torch.bfloat16)

    def norm() -> torch.Tensor:
        return torch.from_numpy(random.uniform(0.5, 1.5, D).astype(np.float32)).to(torch.bfloat16)

    weights = {"model.embed_tokens.weight": matrix(V, D)}
    for index in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        weights[f"{layer}.input_layernorm.weight"] = norm()
        weights[f"{layer}.self_attn.q_proj.weight"] = matrix(queries, D) * 2  # attention worth its name
        weights[f"{layer}.self_attn.k_proj.weight"] = matrix(keys, D) * 2
        weights[f"{layer}.self_attn.v_proj.weight"] = matrix(keys, D)
        weights[f"{layer}.self_attn.o_proj.weight"] = matrix(D, queries)
        weights[f"{layer}.post_attention_layernorm.weight"] = norm()
        weights[f"{layer}.block_sparse_moe.gate.weight"] = matrix(E, D)
        for expert in range(E):
            prefix = f"{layer}.block_sparse_moe.experts.{expert}"
            weights[f"{prefix}.w1.weight"] = matrix(F, D)
            weights[f"{prefix}.w2.weight"] = matrix(D, F)
            weights[f"{prefix}.w3.weight"] = matrix(F, D)
    weights["model.norm.weight"] = norm()
    weights["lm_head.weight"] = matrix(V, D) * 4  # logits spread as a trained model spreads them
    return weights


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (("config.json", CONFIG), ("tokenizer_config.json", TOKENIZER_CONFIG)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(make_tokenizer())
    save_file(make_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "tiny")
