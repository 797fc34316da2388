"""A demo model's tokenizer: trained on stories, and read again. SentencePiece as Mixtral's, or byte-level BPE."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers
from recipes import Recipe

# The expression of Qwen2's and Qwen3's tokenizer.json: a word may take the space or sign before it; digits are single.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def lines_of(stories: list[str], sample_bytes: int) -> Iterator[str]:
    """The lines of the first stories, `sample_bytes` of them or a little more."""
    size = 0
    for story in stories:
        yield from story.split("\n")
        size += len(story)
        if size > sample_bytes:
            return


def train(stories: list[str], folder: Path, recipe: Recipe, sample_bytes: int = 8_000_000) -> None:
    """Write the tokenizer's files, those that a Hugging Face folder has, on the first megabytes of text."""
    if recipe.tokenizer == "sentencepiece":
        settings = train_sentencepiece(lines_of(stories, sample_bytes), folder, recipe)
    else:
        settings = train_byte_level(stories, folder, recipe)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def train_sentencepiece(lines: Iterator[str], folder: Path, recipe: Recipe) -> dict[str, object]:
    """A SentencePiece BPE like Mixtral's: byte fallback, no normalisation at all. Returns tokenizer_config.json."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=recipe.vocabulary,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=1.0,
        unk_id=0,
        bos_id=recipe.bos,
        eos_id=recipe.eos,
        pad_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return {
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


def train_byte_level(stories: list[str], folder: Path, recipe: Recipe) -> dict[str, object]:
    """A byte-level BPE with Qwen's pre-tokenizer, whose template adds BOS. Returns tokenizer_config.json."""
    bos, eos = "<|startoftext|>", "<|endoftext|>"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN2), behavior="isolated")
    letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, letters])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[bos, eos],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    assert (tokenizer.token_to_id(bos), tokenizer.token_to_id(eos)) == (recipe.bos, recipe.eos)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, recipe.bos)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": None,
        "clean_up_tokenization_spaces": False,
    }


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of a folder. `encode` and `decode` know ids of text only; BOS and EOS are the caller's."""

    encode: Callable[[list[str]], list[list[int]]]
    decode: Callable[[list[int]], str]
    bos: int
    eos: int

    def stories(self, texts: list[str]) -> list[np.ndarray]:
        """Each story's ids, uint16, between BOS and EOS."""
        return [np.array([self.bos, *ids, self.eos], dtype=np.uint16) for ids in self.encode(texts)]


def read(folder: Path, bos: int, eos: int) -> Vocabulary:
    """The tokenizer that `train` wrote to a folder."""
    if (folder / "tokenizer.model").exists():
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        return Vocabulary(pieces.encode, pieces.decode, bos, eos)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]

    return Vocabulary(encode, tokenizer.decode, bos, eos)


def encode(folder: Path, recipe: Recipe, stories: list[str]) -> np.ndarray:
    """All stories as one row of ids, each between BOS and EOS."""
    return np.concatenate(read(folder, recipe.bos, recipe.eos).stories(stories))


def encode_all(folder: Path, recipe: Recipe, stories: list[str], workers: int) -> np.ndarray:
    """`encode` in several processes, where there are to be several."""
    if workers < 2:
        return encode(folder, recipe, stories)
    parts = [stories[i::workers] for i in range(workers)]
    with ProcessPoolExecutor(workers) as pool:
        return np.concatenate(list(pool.map(encode, [folder] * workers, [recipe] * workers, parts)))
